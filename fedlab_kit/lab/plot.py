"""What a figure shows, as plain values, and its picture by matplotlib; `lab.chart` makes the same values live."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal

from fedlab_kit.lab.style import BLUE, GREY, PIXELS_PER_INCH, Units, as_written, canvas, human, plain, whole_numbers

if TYPE_CHECKING:  # matplotlib takes a second to import, which a notebook without plots should not pay
    from IPython.display import Image
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = round(5.6 * PIXELS_PER_INCH)
LEGEND, NAMES = 14, 18  # entries and names that a picture has room for
SMALL: dict[str, Any] = {"color": GREY, "fontsize": 9}


@dataclass(frozen=True)
class Axis:
    """A quantity: its label, the units it is written in, and from where to where it is shown.

    `whole` puts ticks at whole numbers alone, `names` are written at 0, 1, 2 in their place.
    """

    label: str
    units: Units = ((1, ""),)
    ends: tuple[float, float] = (0, 1)
    log: bool = False
    whole: bool = False
    names: tuple[str, ...] = ()

    def write(self, value: float) -> str:
        """Return one value as people write it."""
        return human(value, self.units)


@dataclass(frozen=True)
class Kind:
    """An entry of the legend, and the look of the marks and lines that name it; `dash` is a line's style."""

    name: str
    color: str = GREY
    marker: str = ""
    dash: Literal["-", "--", ":"] = "-"
    hollow: bool = False


@dataclass(frozen=True)
class Mark:
    """A dot, with its interval unless it has none; `tip` is all that is known of it, in pairs of words."""

    key: str
    kind: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    name: str = ""
    hollow: bool = False
    tip: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Line:
    """A line through `points`, over a band of (low, high) if it has one; `end` is written where it ends.

    One with `steps` is level from each point to the next one, and to the right end of the figure.
    """

    key: str
    kind: str
    points: tuple[tuple[float, float], ...]
    band: tuple[tuple[float, float], ...] = ()
    end: str = ""
    bold: bool = False
    steps: bool = False


@dataclass(frozen=True)
class Plot:
    """A figure: `current` is the key of the mark that is ringed, `alt` says it all to those who cannot see it.

    `note` stands where there is nothing to show.
    """

    x: Axis
    y: Axis
    kinds: tuple[Kind, ...] = ()
    marks: tuple[Mark, ...] = ()
    lines: tuple[Line, ...] = ()
    current: str = ""
    note: str = ""
    alt: str = ""


def room(marks: Sequence[Mark]) -> tuple[float, float]:
    """Return the ends of an axis that holds the intervals, with a margin."""
    ends = [end for m in marks for end in (m.y, m.y if m.low is None else m.low, m.y if m.high is None else m.high)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 100.0)
    margin = max(1.0, (high - low) / 20)
    return low - margin, high + margin


def to_png(drawn: Plot | Figure) -> bytes:
    """Return the picture as a transparent PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, buffer = to_figure(drawn) if isinstance(drawn, Plot) else drawn, BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def to_html(drawn: Plot | Figure, alt: str = "") -> str:
    """Return an `<img>`, as wide as there is room, that a screen reader reads out as `alt`, a plot's own by default."""
    words, picture = escape(alt or getattr(drawn, "alt", "")), base64.b64encode(to_png(drawn)).decode()
    look = f'width="{WIDTH}" style="max-width: 100%; height: auto"'
    return f'<img alt="{words}" {look} src="data:image/png;base64,{picture}">'


def to_image(drawn: Plot | Figure, alt: str = "") -> Image:
    """Return the picture as the last value of a notebook cell; its text form is the same for every picture."""
    from IPython.display import Image

    return Image(to_png(drawn), alt=alt or getattr(drawn, "alt", ""), width=WIDTH)


def to_figure(plot: Plot) -> Figure:
    """Draw a plot as a transparent figure; every text in it is taken as it stands."""
    ends, kinds = [line for line in plot.lines if line.end], {kind.name: kind for kind in plot.kinds}
    figure, axes = canvas(right=0.3 if ends else 0.26)
    _scale(axes, plot)
    for line in plot.lines:
        _draw_line(axes, line, kinds[line.kind], plot.x.ends[1])
    for (name, hollow), marks in _groups(plot.marks).items():
        _draw_marks(axes, kinds[name], marks, hollow, 6 if len(plot.marks) < 60 else 4)
    for mark in plot.marks:
        if mark.key == plot.current:
            axes.plot(mark.x, mark.y, "o", color=GREY, markersize=14, markeredgewidth=2, fillstyle="none")
    axes.text(0.5, 0.5, plot.note, transform=axes.transAxes, color=GREY, ha="center")
    _name_marks(axes, [mark for mark in plot.marks if mark.name][-NAMES:])
    if ends:
        _label_ends(axes, sorted(ends, key=lambda line: (line.points[-1][1], line.end)))
    elif plot.kinds:
        _add_legend(axes, plot)
    return as_written(figure)


def _groups(marks: Sequence[Mark]) -> dict[tuple[str, bool], list[Mark]]:
    groups: dict[tuple[str, bool], list[Mark]] = {}
    for mark in marks:
        groups.setdefault((mark.kind, mark.hollow), []).append(mark)
    return groups


def _draw_line(axes: Axes, line: Line, kind: Kind, right: float) -> None:
    x, y = zip(*line.points, strict=True)
    if line.band:
        low, high = zip(*line.band, strict=True)
        axes.fill_between(x, low, high, color=kind.color, alpha=0.2, linewidth=0)
    if line.steps:
        x, y = (*x, right), (*y, y[-1])
    look: dict[str, Any] = {"linewidth": 2.2 if line.bold else 1.2, "drawstyle": "steps-post" if line.steps else None}
    axes.plot(x, y, color=kind.color, linestyle=kind.dash, alpha=0.7 if line.end and not line.bold else 1, **look)


def _draw_marks(axes: Axes, kind: Kind, marks: Sequence[Mark], hollow: bool, size: float) -> None:
    """Draw the marks of one kind with their intervals, hollow ones faint."""
    x, y, faint = [m.x for m in marks], [m.y for m in marks], 0.6 if hollow else 1
    style = "none" if hollow else "full"
    axes.plot(x, y, kind.marker, color=kind.color, markersize=size, alpha=faint, fillstyle=style)
    barred: list[Any] = [(m.x, m.low, m.high) for m in marks if m.low is not None]
    if barred:
        axes.vlines(*zip(*barred, strict=True), color=kind.color, linewidth=0.8, alpha=faint)


def _add_legend(axes: Axes, plot: Plot) -> None:
    """Write what the kinds are, right of the axes; those that there is no room for are counted."""
    from matplotlib.lines import Line2D

    lined, shown, more = {line.kind for line in plot.lines}, plot.kinds[:LEGEND], len(plot.kinds) - LEGEND
    if more > 0:
        shown = (*shown, Kind(f"and {more} more", marker=" "))
    handles = [
        Line2D([], [], color=kind.color, marker=kind.marker, fillstyle="none" if kind.hollow else "full",
               linestyle=kind.dash if kind.name in lined else "none", label="entry")
        for kind in shown
    ]  # fmt: skip
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "frameon": False, "fontsize": 9}
    place |= {"handlelength": 1.5, "handletextpad": 0.6, "borderpad": 0}
    legend = axes.legend(handles=handles, labelcolor=GREY, **place)
    for text, kind in zip(legend.get_texts(), shown, strict=True):
        text.set_text("\n".join(wrap(plain(kind.name), 14)))  # only now: matplotlib leaves out what begins with "_"


def _name_marks(axes: Axes, marks: Sequence[Mark]) -> None:
    """Write names beside their marks, moved apart in height, with a line to the mark, where they would touch."""
    inch, middle = axes.figure.dpi / 72, axes.bbox.x0 + axes.bbox.width / 2
    placed = sorted(((*axes.transData.transform((m.x, m.y)), m) for m in marks), key=lambda one: one[1])
    heights = _apart([y for _, y, _ in placed], 13 * inch, axes.bbox.y1)
    for (x, y, mark), height in zip(placed, heights, strict=True):
        moved = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5} if abs(height - y) > 13 * inch else None
        side = 1 if x < middle else -1
        look = SMALL | {"textcoords": "offset points", "arrowprops": moved, "ha": "left" if side > 0 else "right"}
        axes.annotate(plain(mark.name, 24), (mark.x, mark.y), (7 * side, (height - y) / inch + 4), **look)


def _label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write what each line is right of the axes at the height where it ends, moved apart where they would touch."""
    labels = [wrap(plain(line.end, 200), 20 if line.bold else 24, max_lines=2, placeholder="...") for line in lines]
    gap = 6.0 * max(map(len, labels))
    for height, line, words in zip(_apart([line.points[-1][1] for line in lines], gap), lines, labels, strict=True):
        look = SMALL | ({"color": BLUE, "fontweight": "bold"} if line.bold else {})
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "annotation_clip": False, "va": "center"}
        axes.annotate("\n".join(words), (1.01, height), **place, **look)


def _apart(heights: list[float], gap: float, top: float = 100.0) -> list[float]:
    """Return sorted heights, moved so that neighbours are `gap` apart and none lies above `top`."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    for index in range(len(placed) - 1, -1, -1):
        placed[index] = min(placed[index], top - gap * (len(placed) - 1 - index))
    return placed


def _scale(axes: Axes, plot: Plot) -> None:
    """Set both axes; a logarithmic x has two ticks or more, in its unit."""
    axes.set_xscale("log" if plot.x.log else "linear")
    axes.set(xlim=plot.x.ends, ylim=plot.y.ends, xlabel=plain(plot.x.label, 80), ylabel=plot.y.label)
    if plot.x.whole:
        whole_numbers(axes)
    elif plot.x.names:
        names = [plain(name, 12) for name in plot.x.names]
        axes.set_xticks(range(len(names)), names, fontsize=9 if len(names) < 12 else 7)
    if plot.x.log:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        reach = plot.x.ends[1] / plot.x.ends[0]
        subs = (1.0, 2.0, 5.0) if reach < 50 else (1.0, 3.0) if reach < 1000 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plot.x.write(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
