"""The look of every figure, its way onto a page, and numbers as people write them: no torch, no pyplot."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # matplotlib takes a second to import, which a notebook without plots should not pay
    from IPython.display import Image
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
STYLES = ((BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"))
GREY = "#808080"
PIXELS_PER_INCH = 100  # on the page; the picture itself holds half as many again, for sharp screens


def human_bytes(count: float) -> str:
    """Return a count of bytes to three digits with its decimal unit, e.g. "87.4 kB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{three(count / size)} {unit}"
    return f"{count:.0f} B"


def human_ms(value: float) -> str:
    """Return milliseconds to three digits with a fitting unit, e.g. "11.8 µs"."""
    return f"{three(value)} ms" if value >= 0.9995 else f"{three(1000 * value)} µs"


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


def whole_numbers(axes: Axes) -> None:
    """Put the ticks of x at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True))


def to_png(figure: Figure) -> bytes:
    """Return the figure as a transparent PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def to_html(figure: Figure, alt: str) -> str:
    """Return the figure as an `<img>` that a screen reader reads out as `alt`."""
    return img(to_png(figure), alt, figure.get_figwidth())


def to_image(figure: Figure, alt: str) -> Image:
    """Return the figure as the last value of a notebook cell; its text form is the same for every picture."""
    from IPython.display import Image

    return Image(to_png(figure), alt=alt, width=round(figure.get_figwidth() * PIXELS_PER_INCH))


def img(png: bytes, alt: str, inches: float) -> str:
    """Return the tag for a PNG that is shown `inches` wide, or as wide as there is room."""
    look = f'width="{inches * PIXELS_PER_INCH:.0f}" style="max-width: 100%; height: auto"'
    return f'<img alt="{escape(alt)}" {look} src="data:image/png;base64,{base64.b64encode(png).decode()}">'


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
