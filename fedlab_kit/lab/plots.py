"""Numbers in, `matplotlib.figure.Figure` out: no torch, no pyplot, no widget.

Figures are transparent with mid-grey axes, so that they read on light and dark pages; colours (Okabe and Ito, 2008)
are paired with marker shapes or words, so that nothing hangs on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

from fedlab_kit.deployment.measure import front
from fedlab_kit.lab.canvas import (
    GREY,
    STYLES,
    canvas,
    human_bytes,
    human_ms,
    three,
    to_html,
    to_image,
    to_png,
    with_interval,
)
from fedlab_kit.lab.clients import client_accuracy, label_counts
from fedlab_kit.lab.curve import accuracy_curve, describe_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "AXES",
    "accuracy_against",
    "accuracy_curve",
    "client_accuracy",
    "describe_curve",
    "describe_points",
    "label_counts",
    "to_html",
    "to_image",
    "to_png",
]


class Axis(NamedTuple):
    """A quantity that accuracy is drawn against: its label, and how one value is written."""

    label: str
    write: Callable[[float], str]


AXES = {
    "bytes": Axis("Model file", human_bytes),
    "zstd_bytes": Axis("Model file, compressed with zstd", human_bytes),
    "uplink_bytes": Axis("Uplink of the whole run", human_bytes),
    "latency_ms": Axis("Latency of one prediction", human_ms),
    "seconds": Axis("Time of the whole run", lambda value: f"{three(value)} s"),
}


def accuracy_against(
    points: Sequence[Mapping[str, Any]], axis: str = "bytes", *, kind: str = "dtype", current: int | None = None
) -> Figure:
    """Draw accuracy against a size, a time or the traffic (log scale), with the Pareto front as steps.

    A point is a mapping with `accuracy`, `low`, `high` in 0..1 and the quantity that `axis` (a key of `AXES`) names;
    points that lack it are left out. Those of one `kind` share colour and marker, one with a `name` is labelled,
    `current` (an index) is ringed, and those that are `earlier` are hollow, without interval unless they are named.
    Raises ValueError for an unknown axis.
    """
    quantity = _axis(axis)
    figure, axes = canvas(right=0.23)
    axes.set(xlabel=quantity.label, ylabel="Accuracy on validation (%)")
    shown = [point for point in points if _positive(point.get(axis))]
    for style, (label, group) in zip(cycle(STYLES), _groups(shown, kind).items(), strict=False):
        _add_kind(axes, axis, label, group, *style)
    if best := front(_place(point, axis) for point in shown):
        axes.step(*zip(*best, strict=True), where="post", color=GREY, linewidth=1.2, zorder=1, label="Pareto front")
    if any(point.get("earlier") for point in shown):
        axes.plot([], [], "o", color=GREY, fillstyle="none", alpha=0.6, markersize=5, label="measured\nearlier")
    if current is not None and _positive(points[current].get(axis)):
        ring: dict[str, Any] = {"markersize": 14, "markeredgewidth": 2, "fillstyle": "none"}
        axes.plot(*_place(points[current], axis), "o", color=GREY, **ring)
    for point in shown:
        if name := point.get("name"):
            axes.annotate(name, _place(point, axis), (6, 6), textcoords="offset points", color=GREY, fontsize=9)
    _log_scale(axes, [point[axis] for point in shown], quantity)
    if shown:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=GREY, fontsize=9)
    return figure


def _add_kind(axes: Axes, axis: str, name: str, group: list[Mapping[str, Any]], color: str, marker: str) -> None:
    """Draw the points of one kind: those of now with their intervals, earlier ones hollow and faint."""
    now, earlier = ([p for p in group if bool(p.get("earlier")) is when] for when in (False, True))
    if now:
        _add_bars(axes, axis, now, fmt=marker, color=color, markersize=6, label=name)
    if earlier:
        faint: dict[str, Any] = {"color": color, "alpha": 0.6}
        _add_bars(axes, axis, [p for p in earlier if p.get("name")], fmt="none", **faint)
        x, y = zip(*(_place(p, axis) for p in earlier), strict=True)
        axes.plot(x, y, marker, fillstyle="none", markersize=5, label="" if now else name, **faint)


def _add_bars(axes: Axes, axis: str, points: list[Mapping[str, Any]], **look: Any) -> None:
    x, y = [p[axis] for p in points], [100 * p["accuracy"] for p in points]
    bars = [[100 * max(0.0, p[a] - p[b]) for p in points] for a, b in (("accuracy", "low"), ("high", "accuracy"))]
    axes.errorbar(x, y, bars, elinewidth=0.8, **look)


def describe_points(points: Sequence[Mapping[str, Any]], axis: str = "bytes", current: int | None = None) -> str:
    """Return what `accuracy_against` shows, in words, for those who cannot see it."""
    quantity = _axis(axis)
    shown = [point for point in points if _positive(point.get(axis))]
    what = f"Accuracy against {quantity.label[0].lower()}{quantity.label[1:]}"
    if not shown:
        return f"{what}: no point yet."
    best = front(_place(point, axis) for point in shown)
    count = f"{len(shown)} point{'s' if len(shown) > 1 else ''}, {len(best)} on the Pareto front"
    if current is None or not _positive(points[current].get(axis)):
        return f"{what}: {count}."
    chosen = points[current]
    return (
        f"{what}: {count}; the current one has "
        f"{with_interval(chosen['accuracy'], chosen['low'], chosen['high'])} at {quantity.write(chosen[axis])}."
    )


def _axis(name: str) -> Axis:
    if name not in AXES:
        raise ValueError(f"axis must be one of {', '.join(AXES)}, got {name!r}")
    return AXES[name]


def _place(point: Mapping[str, Any], axis: str) -> tuple[float, float]:
    """Where a point stands: the quantity, and its accuracy in percent."""
    return point[axis], 100 * point["accuracy"]


def _positive(value: Any) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _groups(points: Sequence[Mapping[str, Any]], kind: str) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault(str(point.get(kind, "point")), []).append(point)
    return groups


def _log_scale(axes: Axes, values: list[float], quantity: Axis) -> None:
    """Scale x by its logarithm, at least a factor of four wide, with two ticks or more in `quantity`'s unit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = (min(values), max(values)) if values else (1e3, 1e6)
    margin = max(1.25, math.sqrt(4 * low / high))
    axes.set_xscale("log")
    axes.set_xlim(low / margin, high * margin)
    reach = margin**2 * high / low
    subs = (1.0, 2.0, 5.0) if reach < 50 else (1.0, 3.0) if reach < 1000 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity.write(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
