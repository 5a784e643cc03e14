"""What pruning and rounding do to weights: how many lie where, and which filters of a convolution go."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlab_kit.lab.plot import Axis, Kind, Line, Plot
from fedlab_kit.lab.style import GREY, STYLES, VERMILLION, as_written, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 60
INSIDE = 0.998  # share of the weights between the ends of the axis: a few lie far outside and would flatten the rest


def histogram(weights: Mapping[str, Any]) -> Plot:
    """Show how many weights have which value, an outline for each name, whose values may have any shape.

    Weights that are exactly zero are not drawn, since they would dwarf all others; the legend counts them.
    """
    flat = {name: np.asarray(values, float).ravel() for name, values in weights.items()}
    reach = max(np.quantile(np.abs(values), INSIDE) for values in flat.values())
    edges = np.linspace(-reach, reach, BINS + 1)
    counts = {name: np.histogram(values[values != 0], edges)[0] for name, values in flat.items()}
    names = {name: f"{name}, {int((values == 0).sum()):,} are 0" for name, values in flat.items()}
    looks = zip(flat, STYLES, cycle(("-", "--", ":")), strict=False)
    outlines = {name: (*zip(edges.tolist(), [*count.tolist(), 0], strict=True),) for name, count in counts.items()}
    return Plot(
        Axis("Weight", ends=(-reach, reach)),
        Axis("Weights", ends=(0, 1.05 * max(count.max() for count in counts.values()))),
        tuple(Kind(names[name], color, dash=dash) for name, (color, _), dash in looks),  # type: ignore[arg-type]
        lines=tuple(Line(name, names[name], points, steps=True) for name, points in outlines.items()),
        alt=f"How many weights have which value: {'; '.join(names.values())}.",
    )


def filters(weights: Any, gone: Collection[int]) -> Figure:
    """Draw filters [n, h, w], light where a weight is positive, dark where it is negative, crossed out if `gone`."""
    shown, across = np.asarray(weights, float), 5
    count, height, width = shown.shape
    figure, axes = canvas(right=0.03, left=0.03)
    limit = np.abs(shown).max()
    for number, one in enumerate(shown):
        down, right = divmod(number, across)
        left, top = right * (width + 1), down * (height + 2)
        place = (left, left + width, top + height, top)
        axes.imshow(one, cmap="gray", vmin=-limit, vmax=limit, extent=place)
        axes.text(left, top - 0.3, str(number), color=GREY, fontsize=9)
        if number in gone:
            axes.plot([left, left + width], [top, top + height], color=VERMILLION, linewidth=3)
            axes.plot([left, left + width], [top + height, top], color=VERMILLION, linewidth=3)
    axes.set(xlim=(-0.5, across * (width + 1)), ylim=(-(-count // across) * (height + 2) - 1, -1.5))
    axes.axis("off")
    return as_written(figure)
