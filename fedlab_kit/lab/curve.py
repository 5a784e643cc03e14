"""Accuracy per round: as a figure, in words, and live while a run is under way."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from fedlab_kit.lab.canvas import BLUE, GREY, PIXELS_PER_INCH, canvas, img, percent, whole_numbers

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fedlab_kit.federation.server import RoundRecord


Curve = tuple[str, "Sequence[RoundRecord]"]
"""A label and the records it stands for."""


def accuracy_curve(
    records: Sequence[RoundRecord], earlier: Sequence[Curve] = (), rounds: int = 0, label: str = "this run"
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


def describe_curve(records: Sequence[RoundRecord], earlier: Sequence[Curve] = (), rounds: int = 0) -> str:
    """Return what `accuracy_curve` shows, in words, for those who cannot see it."""
    if not records:
        return f"Accuracy per round: no round yet{_behind(earlier)}."
    last = records[-1]
    return (
        f"Accuracy per round: {percent(last.accuracy)} on validation after round {last.round} of "
        f"{max(rounds, last.round)} (95 % interval {percent(last.low)} to {percent(last.high)}), "
        f"{percent(records[0].accuracy)} after round {records[0].round}{_behind(earlier)}."
    )


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

    def to_html(self, records: Sequence[RoundRecord], alt: str) -> str:
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
        return img(self._png(), alt, self._inches)

    def _png(self) -> bytes:
        from matplotlib.image import imsave

        buffer = BytesIO()
        imsave(buffer, self._canvas.buffer_rgba(), format="png", pil_kwargs={"compress_level": 1})
        return buffer.getvalue()


def _backdrop(earlier: Sequence[Curve], rounds: int) -> tuple[Figure, Axes]:
    """Return axes for `rounds` rounds, or as many as an earlier run has, with the earlier runs in grey."""
    figure, axes = canvas(right=0.3)
    longest = max([2, rounds, *(curve[-1].round for _, curve in earlier if curve)])
    axes.set(xlabel="Round", ylabel="Accuracy on validation (%)", xlim=(0, longest * 1.02), ylim=(0, 100))
    whole_numbers(axes)
    for _, curve in earlier:
        axes.plot(*_percent(curve), color=GREY, linewidth=1, alpha=0.7)
    return figure, axes


def _add_run(axes: Axes, records: Sequence[RoundRecord]) -> list[Artist]:
    """Draw the current run bold over its 95 % band."""
    x, y = _percent(records)
    low, high = [100 * record.low for record in records], [100 * record.high for record in records]
    band = axes.fill_between(x, low, high, color=BLUE, alpha=0.2, linewidth=0)
    return [band, *axes.plot(x, y, color=BLUE, linewidth=2.2, marker="o", markersize=4)]


def _percent(records: Sequence[RoundRecord]) -> tuple[list[int], list[float]]:
    return [record.round for record in records], [100 * record.accuracy for record in records]


def _label_ends(axes: Axes, curves: Sequence[Curve], bold: str | None = None) -> None:
    """Write each label right of the axes at the height where its curve ends, moved apart where they would touch."""
    ends = sorted([(100 * curve[-1].accuracy, text) for text, curve in curves if curve])
    labels = [
        wrap(f"{percent(value / 100)} {text}", 20 if text == bold else 24, max_lines=2, placeholder="...")
        for value, text in ends
    ]
    gap = 6.0 * max(map(len, labels), default=1)
    for height, (_, text), lines in zip(_apart([end[0] for end in ends], gap), ends, labels, strict=True):
        axes.annotate(
            "\n".join(lines),
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
