"""Numbers in, `matplotlib.figure.Figure` out: no torch, no pyplot, no widget.

Figures are transparent with mid-grey axes, so that they read on light and dark pages; colours (Okabe and Ito, 2008)
are paired with marker shapes or words, so that nothing hangs on colour alone.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import BytesIO
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # matplotlib takes a second to import, which a notebook without plots should not pay
    from IPython.display import Image
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
STYLES = ((BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"))
GREY = "#808080"
PIXELS_PER_INCH = 100  # on the page; the picture itself holds half as many again, for sharp screens


class Measured(Protocol):
    """What a curve needs of a `RoundRecord`."""

    @property
    def round(self) -> int: ...  # noqa: D102
    @property
    def accuracy(self) -> float: ...  # noqa: D102
    @property
    def low(self) -> float: ...  # noqa: D102
    @property
    def high(self) -> float: ...  # noqa: D102


Curve = tuple[str, Sequence[Measured]]
"""A label and the records it stands for."""


def human_bytes(count: float) -> str:
    """Return a count of bytes to three digits with its decimal unit, e.g. "87.4 kB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{_three(count / size)} {unit}"
    return f"{count:.0f} B"


def percent(share: float) -> str:
    """Return a share in 0..1 as, for instance, "87.4 %"."""
    return f"{100 * share:.1f} %"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 999.5 else f"{value:.3g}"


class Axis(NamedTuple):
    """A quantity that accuracy is drawn against: its label, and how one value is written."""

    label: str
    write: Callable[[float], str]


AXES = {
    "bytes": Axis("Model file", human_bytes),
    "zstd_bytes": Axis("Model file, compressed with zstd", human_bytes),
    "uplink_bytes": Axis("Uplink of the whole run", human_bytes),
    "latency_ms": Axis("Latency of one prediction", lambda value: f"{_three(value)} ms"),
    "seconds": Axis("Time of the whole run", lambda value: f"{_three(value)} s"),
}


def accuracy_curve(
    records: Sequence[Measured], earlier: Sequence[Curve] = (), rounds: int = 0, label: str = "this run"
) -> Figure:
    """Draw accuracy per round: the current run bold with its 95 % band, earlier runs in grey behind it.

    `rounds` is how far the axis reaches at least; `earlier` is drawn in its order, each labelled where it ends.
    """
    figure, axes = _backdrop(earlier, max(rounds, records[-1].round if records else 0))
    if records:
        _add_run(axes, records)
    elif not earlier:
        axes.text(0.5, 0.5, "No round yet", transform=axes.transAxes, color=GREY, ha="center")
    _label_ends(axes, [*earlier, (label, records)], bold=label)
    return figure


class LiveCurve:
    """`accuracy_curve` for a run under way: axes and earlier runs are drawn once, a round then costs a few ms.

    Drawing holds the interpreter, and with it the thread that trains; hence also the coarser picture.
    """

    def __init__(self, earlier: Sequence[Curve], rounds: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure, self._axes = _backdrop(earlier, rounds)
        _label_ends(self._axes, earlier)
        figure.set_dpi(PIXELS_PER_INCH)
        self._inches = figure.get_figwidth()
        self._canvas = FigureCanvasAgg(figure)
        self._canvas.draw()
        self._background = self._canvas.copy_from_bbox(figure.bbox)

    def to_html(self, records: Sequence[Measured], alt: str) -> str:
        """Return the picture after these rounds, as `to_html` does for a figure."""
        self._canvas.restore_region(self._background)
        if records:
            artists = _add_run(self._axes, records)
            end = (records[-1].round, 100 * records[-1].accuracy)
            text = percent(records[-1].accuracy)
            look: dict[str, Any] = {"color": BLUE, "fontsize": 9, "fontweight": "bold", "annotation_clip": False}
            artists.append(self._axes.annotate(text, end, (7, -3), textcoords="offset points", **look))
            for artist in artists:
                self._axes.draw_artist(artist)
                artist.remove()
        return _img(self._png(), alt, self._inches)

    def _png(self) -> bytes:
        from matplotlib.image import imsave

        buffer = BytesIO()
        imsave(buffer, self._canvas.buffer_rgba(), format="png", pil_kwargs={"compress_level": 1})
        return buffer.getvalue()


def describe_curve(records: Sequence[Measured], earlier: Sequence[Curve] = (), rounds: int = 0) -> str:
    """Return what `accuracy_curve` shows, in words, for those who cannot see it."""
    if not records:
        return f"Accuracy per round: no round yet{_behind(earlier)}."
    last = records[-1]
    return (
        f"Accuracy per round: {percent(last.accuracy)} on validation after round {last.round} of "
        f"{max(rounds, last.round)} (95 % interval {percent(last.low)} to {percent(last.high)}), "
        f"{percent(records[0].accuracy)} after round {records[0].round}{_behind(earlier)}."
    )


def accuracy_against(
    points: Sequence[Mapping[str, Any]],
    axis: str = "bytes",
    *,
    kind: str = "dtype",
    current: int | None = None,
) -> Figure:
    """Draw accuracy against a size, a time or the traffic (log scale), with the Pareto front as steps.

    A point is a mapping with `accuracy`, `low`, `high` in 0..1 and the quantity that `axis` (a key of `AXES`) names;
    points that lack it are left out. Those of one `kind` share colour and marker, one with a `name` is labelled,
    `current` (an index) is ringed. Raises ValueError for an unknown axis.
    """
    quantity = _axis(axis)
    figure, axes = _canvas(right=0.2)
    axes.set(xlabel=quantity.label, ylabel="Accuracy on validation (%)")
    shown = [point for point in points if _positive(point.get(axis))]
    for (color, marker), (name, group) in zip(_styles(), _groups(shown, kind).items(), strict=False):
        y = [100 * point["accuracy"] for point in group]
        bars = [[100 * (p["accuracy"] - p["low"]) for p in group], [100 * (p["high"] - p["accuracy"]) for p in group]]
        axes.errorbar(
            [p[axis] for p in group], y, bars, fmt=marker, color=color, markersize=6, elinewidth=0.8, label=name
        )
    best = pareto([(point[axis], point["accuracy"]) for point in shown])
    corners = [(shown[i][axis], 100 * shown[i]["accuracy"]) for i in best]
    if corners:
        axes.step(*zip(*corners, strict=True), where="post", color=GREY, linewidth=1.2, zorder=1, label="Pareto front")
    if current is not None and _positive(points[current].get(axis)):
        chosen = points[current]
        axes.plot(
            chosen[axis], 100 * chosen["accuracy"], "o", markersize=14, fillstyle="none", color=GREY, markeredgewidth=2
        )
    for point in shown:
        if point.get("name"):
            at = (point[axis], 100 * point["accuracy"])
            axes.annotate(point["name"], at, (6, 6), textcoords="offset points", color=GREY, fontsize=9)
    _log_scale(axes, [point[axis] for point in shown], quantity)
    if shown:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=GREY, fontsize=9)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the (cost, accuracy) points that no other beats, by rising cost.

    A point is beaten when another costs no more and is at least as accurate, and better in one of the two; of equal
    points the first stays.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def label_counts(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Draw who holds which labels as bubbles, area by samples: counts is [clients, classes]."""
    cells = [(k, c, n) for k, row in enumerate(counts) for c, n in enumerate(row) if n]
    figure, axes = _canvas(right=0.03, left=0.18 if max(map(len, classes)) > 3 else 0.09)
    axes.set(xlabel="Client", ylabel="Label", xlim=(-0.7, len(counts) - 0.3), ylim=(-0.7, len(classes) - 0.3))
    axes.set_yticks(range(len(classes)), classes)
    _whole_numbers(axes)
    width, height = axes.get_position().size * figure.get_size_inches() * 72
    cell = min(width / len(counts), height / len(classes))
    largest = max(n for *_, n in cells)
    x, y, n = zip(*cells, strict=True)
    axes.scatter(x, y, s=[(0.95 * cell) ** 2 * value / largest for value in n], color=BLUE, alpha=0.85, linewidth=0)
    axes.set_title(f"Largest bubble: {largest} samples", color=GREY, fontsize=9, loc="right")
    return figure


def client_accuracy(
    accuracy: Sequence[float], low: Sequence[float], high: Sequence[float], names: Sequence[str] = ()
) -> Figure:
    """Draw each client's accuracy (0..1) with its interval, worst first, beside the mean over clients."""
    names = names or [str(client) for client in range(len(accuracy))]
    order = sorted(range(len(accuracy)), key=lambda client: accuracy[client])
    figure, axes = _canvas(right=0.15)
    axes.set(ylabel="Accuracy on validation (%)", xlabel="Client, worst first", xlim=(-0.7, len(order) - 0.3))
    for place, client in enumerate(order):
        color, marker = (VERMILLION, "s") if place == 0 else (BLUE, "o")
        axes.vlines(place, 100 * low[client], 100 * high[client], color=color, linewidth=1)
        axes.plot(place, 100 * accuracy[client], marker, color=color, markersize=6)
    axes.set_xticks(range(len(order)), [names[client] for client in order] if len(order) <= 30 else [""] * len(order))
    mean = 100 * sum(accuracy) / len(accuracy)
    axes.axhline(mean, color=GREY, linewidth=1, linestyle="--")
    axes.annotate(
        f"mean {percent(mean / 100)}",
        (1.01, mean),
        xycoords=("axes fraction", "data"),
        color=GREY,
        va="center",
        fontsize=9,
    )
    worst = order[0]
    text = f"worst: {names[worst]}, {percent(accuracy[worst])}"
    axes.annotate(text, (0, 100 * accuracy[worst]), (8, -11), textcoords="offset points", color=VERMILLION, fontsize=9)
    return figure


def to_png(figure: Figure) -> bytes:
    """Return the figure as a transparent PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def to_html(figure: Figure, alt: str) -> str:
    """Return the figure as an `<img>` that a screen reader reads out as `alt`."""
    return _img(to_png(figure), alt, figure.get_figwidth())


def to_image(figure: Figure, alt: str) -> Image:
    """Return the figure as the last value of a notebook cell; its text form is the same for every picture."""
    from IPython.display import Image

    return Image(to_png(figure), alt=alt, width=round(figure.get_figwidth() * PIXELS_PER_INCH))


def _img(png: bytes, alt: str, inches: float) -> str:
    look = f'width="{inches * PIXELS_PER_INCH:.0f}" style="max-width: 100%; height: auto"'
    return f'<img alt="{escape(alt)}" {look} src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _backdrop(earlier: Sequence[Curve], rounds: int) -> tuple[Figure, Axes]:
    """Return axes for `rounds` rounds, or as many as an earlier run has, with the earlier runs in grey."""
    figure, axes = _canvas(right=0.27)
    longest = max([2, rounds, *(curve[-1].round for _, curve in earlier if curve)])
    axes.set(xlabel="Round", ylabel="Accuracy on validation (%)", xlim=(0, longest * 1.02), ylim=(0, 100))
    _whole_numbers(axes)
    for _, curve in earlier:
        axes.plot(*_percent(curve), color=GREY, linewidth=1, alpha=0.7)
    return figure, axes


def _add_run(axes: Axes, records: Sequence[Measured]) -> list[Artist]:
    """Draw the current run bold over its 95 % band."""
    x, y = _percent(records)
    low, high = [100 * record.low for record in records], [100 * record.high for record in records]
    band = axes.fill_between(x, low, high, color=BLUE, alpha=0.2, linewidth=0)
    return [band, *axes.plot(x, y, color=BLUE, linewidth=2.2, marker="o", markersize=4)]


def _canvas(right: float, left: float = 0.09) -> tuple[Figure, Axes]:
    """Return a transparent figure with one pair of grey axes; the margins are shares of its width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 3.6), dpi=1.5 * PIXELS_PER_INCH, facecolor="none")
    axes = figure.add_axes((left, 0.14, 1 - left - right, 0.8), facecolor="none")
    axes.grid(color=GREY, alpha=0.25, linewidth=0.7)
    axes.tick_params(colors=GREY)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
    for side, spine in axes.spines.items():
        spine.set_color(GREY)
        spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def _percent(records: Sequence[Measured]) -> tuple[list[int], list[float]]:
    return [record.round for record in records], [100 * record.accuracy for record in records]


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True))


def _label_ends(axes: Axes, curves: Sequence[Curve], bold: str | None = None) -> None:
    """Write each label right of the axes at the height where its curve ends, moved apart where they would touch."""
    ends = sorted([(100 * curve[-1].accuracy, text) for text, curve in curves if curve])
    for height, (value, text) in zip(_apart([end[0] for end in ends], gap=6.0), ends, strict=True):
        axes.annotate(
            shorten(f"{percent(value / 100)} {text}", 28, placeholder="..."),
            (1.01, height),
            xycoords=("axes fraction", "data"),
            annotation_clip=False,
            color=BLUE if text == bold else GREY,
            va="center",
            fontsize=9,
            fontweight="bold" if text == bold else "normal",
        )


def _apart(heights: list[float], gap: float, top: float = 100.0) -> list[float]:
    """Return sorted heights, moved so that neighbours are `gap` apart and none lies above `top`."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    for index in range(len(placed) - 1, -1, -1):
        placed[index] = min(placed[index], top - gap * (len(placed) - 1 - index))
    return placed


def _behind(earlier: Sequence[Curve]) -> str:
    count = len(earlier)
    return f"; {count} earlier run{'s' if count > 1 else ''} behind it" if count else ""


def _axis(name: str) -> Axis:
    if name not in AXES:
        raise ValueError(f"axis must be one of {', '.join(AXES)}, got {name!r}")
    return AXES[name]


def _positive(value: Any) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _groups(points: Sequence[Mapping[str, Any]], kind: str) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault(str(point.get(kind, "point")), []).append(point)
    return groups


def _styles() -> Any:
    from itertools import cycle

    return cycle(STYLES)


def _log_scale(axes: Axes, values: list[float], quantity: Axis) -> None:
    """Scale x by its logarithm, at least a factor of four wide, with ticks at 1, 2, 5 written in `quantity`'s unit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = (min(values), max(values)) if values else (1e3, 1e6)
    margin = max(1.25, math.sqrt(4 * low / high))
    axes.set_xscale("log")
    axes.set_xlim(low / margin, high * margin)
    subs = (1.0, 2.0, 5.0) if high * margin < 50 * low / margin else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity.write(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
