"""The look of every figure and table, and numbers as people write them: no torch, no pyplot.

Figures are transparent with mid-grey axes, so that they read on light and dark pages; colours (Okabe and Ito, 2008)
are paired with marker shapes or words, so that nothing hangs on colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, partial
from html import escape
from math import isfinite
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:  # matplotlib takes a second to import, which a notebook without plots should not pay
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
STYLES = ((BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (SKY, "P"), (BLUE, "X"))
MARKERS = "os^DvPX*ph"
KNOWN = (  # each name has the style at its place, wherever it is drawn
    ("fp32", "int8", "int4", "int2", "fp16"),
    ("weight", "channel"),
    ("cnn", "student", "mlp", "logistic", "2nn", "resnet", "half_mlp"),
    ("point",),
)
_PLACE = {name: place for names in KNOWN for place, name in enumerate(names)}
_OTHERS = [(color, marker) for marker in MARKERS for color, _ in STYLES[:6] if (color, marker) not in STYLES]
GREY = "#808080"
PIXELS_PER_INCH = 100  # on the page; the picture itself holds half as many again, for sharp screens

Units = tuple[tuple[float, str], ...]
"""Sizes with their names, the largest first."""
BYTES: Units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
MILLISECONDS: Units = ((1, "ms"), (1e-3, "µs"))


def styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return colour and marker of each name, in the order of legends: both follow from the name alone.

    Only where a name would look like another one here, it takes the next style that is free.
    """
    found: dict[str, tuple[str, str]] = {}
    for name in sorted(set(names), key=_order):
        start = crc32(name.encode(errors="replace")) % len(_OTHERS)
        wishes = [STYLES[_PLACE[name]]] if name in _PLACE else []
        wishes += _OTHERS[start:] + _OTHERS[:start]
        found[name] = next((style for style in wishes if style not in found.values()), wishes[0])
    return found


def _order(name: str) -> tuple[int, float, str]:
    """Known names first, then numbers by size, then the alphabet."""
    if name in _PLACE:
        return 0, _PLACE[name], name
    try:
        return (1, float(name), name) if isfinite(float(name)) else (2, 0, name)
    except ValueError:
        return 2, 0, name


def human(value: float, units: Units) -> str:
    """Return a value to three digits with the unit that fits, the smallest one if none does."""
    size, unit = next((pair for pair in units if abs(value) >= 0.9995 * pair[0]), units[-1])
    return f"{three(value / size)} {unit}".rstrip()


human_bytes = partial(human, units=BYTES)
human_ms = partial(human, units=MILLISECONDS)


def percent(share: float) -> str:
    """Return a share in 0..1 as, for instance, "87.4 %"."""
    return f"{100 * share:.1f} %"


def with_interval(share: float, low: float, high: float) -> str:
    """Return a share in 0..1 with its interval, e.g. "87.4 % (95 % interval 82.1 % to 91.3 %)"."""
    return f"{percent(share)} (95 % interval {percent(low)} to {percent(high)})"


def three(value: float) -> str:
    """Return a number to three digits, without an exponent."""
    return f"{value:.0f}" if value >= 999.5 else f"{value:.3g}"


def canvas(right: float, left: float = 0.11) -> tuple[Figure, Axes]:
    """Return a transparent figure with one pair of grey axes; the margins are shares of its width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), dpi=1.5 * PIXELS_PER_INCH, facecolor="none")
    axes = figure.add_axes((left, 0.15, 1 - left - right, 0.8), facecolor="none")
    axes.grid(color=GREY, alpha=0.25, linewidth=0.7)
    axes.tick_params(which="both", colors=GREY)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
    for side, spine in axes.spines.items():
        spine.set_color(GREY)
        spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def other_than(name: str, taken: Iterable[str]) -> str:
    """Return a name that is not taken, though it reads the same."""
    return other_than(f"{name} ", taken) if name in taken else name


def plain(text: str, most: int = 40) -> str:
    """Return text as a picture can show it: one line of `most` characters, a box for each that the font lacks."""
    line = " ".join(text.split())
    line = line if len(line) <= most else line[: most - 1] + "…"
    return "".join(character if ord(character) in _glyphs() else "□" for character in line)


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def as_written(figure: Figure) -> Figure:
    """Return the figure with every text in it taken as it is: `$` begins no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure


def whole_numbers(axes: Axes) -> None:
    """Put the ticks of x at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True))


def html_table(
    caption: str, heads: Iterable[str], rows: Iterable[Sequence[str]], look: str = "", current: int | None = None
) -> str:
    """Return a table whose first column names its rows; the row at the index `current` is marked as that."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    lines = ""
    for index, (name, *cells) in enumerate(rows):
        mark = ' class="fedlab-current" aria-current="true"' if index == current else ""
        data = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines += f'<tr{mark}><th scope="row">{escape(name)}</th>{data}</tr>'
    return (
        f'<div class="fedlab-wide"><table class="fedlab-points {look}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )
