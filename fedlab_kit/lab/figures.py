"""Accuracy against size, accuracy per round, drift: numbers in, a `Plot` out, for pictures and live charts.

No torch, no pyplot, no widget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from math import isfinite, isnan, nan, sqrt
from numbers import Real
from typing import TYPE_CHECKING, Any

from fedlab_kit.deployment.selection import front
from fedlab_kit.lab.client_figures import client_accuracy, label_counts
from fedlab_kit.lab.plot import Axis, Kind, Line, Mark, Plot, room, to_figure, to_html, to_image, to_png
from fedlab_kit.lab.style import (
    BLUE,
    BYTES,
    GREY,
    MILLISECONDS,
    STYLES,
    VERMILLION,
    as_written,
    canvas,
    html_table,
    other_than,
    percent,
    styles,
    three,
    with_interval,
)
from fedlab_kit.lab.weight_figures import filters, histogram

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

    from fedlab_kit.deployment.drift import Look
    from fedlab_kit.deployment.monitor import Alarm
    from fedlab_kit.federation.server import RoundRecord

__all__ = [  # made elsewhere
    "client_accuracy",
    "filters",
    "histogram",
    "label_counts",
    "to_figure",
    "to_html",
    "to_image",
    "to_png",
]

Point = Mapping[str, Any]
Curve = tuple[str, "Sequence[RoundRecord]"]
"""A label and the records it stands for."""


AXES = {
    "bytes": Axis("Model file", BYTES),
    "zstd_bytes": Axis("Model file, compressed with zstd", BYTES),
    "uplink_bytes": Axis("Uplink of the whole run", BYTES),
    "latency_ms": Axis("Latency of one prediction", MILLISECONDS),
    "seconds": Axis("Time of the whole run", ((1, "s"),)),
}
HEIGHTS = {  # what is drawn upwards: label, columns of the interval, +1 where more is better, points in its unit
    "accuracy": ("Accuracy on validation (%)", "low", "high", 1, 100),
    "lost": ("Points lost against its own fp32 file", "lost_low", "lost_high", -1, 1),
}
HUMAN: dict[str, Callable[[Any], str]] = {  # how a field is written that is no plain number
    **{field: axis.write for field, axis in AXES.items()},
    **dict.fromkeys(("accuracy", "sparsity"), percent),
    "lost": "{:.1f} points".format,
    "downlink_bytes": AXES["bytes"].write,
    "parameters": "{:,}".format,
}
# What is said in other words, or to machines.
UNTOLD = {"name", "low", "high", "lost_low", "lost_high", "earlier", "path", "run"}


def accuracy_against(
    points: Sequence[Point], axis: str = "bytes", kind: str = "dtype", current: int | None = None, y: str = "accuracy"
) -> Plot:
    """Show accuracy, or the points `lost`, against a size, a time or the traffic, with the Pareto front as steps.

    A point is a mapping with `accuracy`, `low`, `high` in 0..1 and the quantity that `axis` (a key of `AXES`) names;
    points that lack one are left out. Those of one `kind` (any column) share colour and marker, one with a `name` is
    labelled, `current` (an index) is ringed, and those that are `earlier` are hollow, without interval unless they are
    named. A mark's key is the point's `point`, else its index. Raises ValueError for an unknown axis.
    """
    for name, value, allowed in (("axis", axis, AXES), ("y", y, HEIGHTS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    x, (label, low, high, sign, scale) = AXES[axis], HEIGHTS[y]
    places = [i for i, p in enumerate(points) if _number(p, axis) > 0 and not isnan(_number(p, y))]
    keys = {i: str(points[i].get("point", i)) for i in places}
    marks = tuple(_mark(keys[i], points[i], kind, (axis, y, low, high), scale) for i in places)
    best = tuple((size, sign * height) for size, height in front((mark.x, sign * mark.y) for mark in marks))
    kinds = [Kind(name, *style) for name, style in styles(mark.kind for mark in marks).items()]
    steps, before = (other_than(name, [kind.name for kind in kinds]) for name in ("Pareto front", "measured earlier"))
    kinds += [Kind(steps)] if best else []
    kinds += [Kind(before, marker="o", hollow=True)] if any(mark.hollow for mark in marks) else []
    count = f"{len(marks)} point{'s' if len(marks) > 1 else ''}, {len(best)} on the Pareto front"
    alt = f"{label.split(' on ')[0]} against {x.label[0].lower()}{x.label[1:]}: {count if best else 'no point yet'}"
    if current is not None and current in keys:
        chosen = points[current]
        alt += f"; the current one has {_reached(chosen)} at {x.write(chosen[axis])}"
    return Plot(
        replace(x, ends=_reach([mark.x for mark in marks]), log=True),
        Axis(label, ends=room(marks)),
        tuple(kinds),
        marks,
        (Line("front", steps, best, steps=True),) if best else (),
        current=keys.get(-1 if current is None else current, ""),
        note="" if marks else "No point yet",
        alt=f"{alt}.",
    )


def _number(point: Point, field: str) -> float:
    """Return a field that is a finite number, NaN for every other."""
    value = point.get(field)
    return float(value) if isinstance(value, Real) and isfinite(value) else nan


def _mark(key: str, point: Point, kind: str, fields: tuple[str, str, str, str], scale: int) -> Mark:
    """Return the mark of a point, its height times `scale`; an interval includes what it is of."""
    x, y, low, high = (_number(point, field) for field in fields)
    name, hollow = str(point.get("name") or ""), bool(point.get("earlier"))
    barred = (name or not hollow) and not isnan(low + high)
    below, above = (scale * min(low, y), scale * max(high, y)) if barred else (None, None)
    return Mark(key, str(point.get(kind, "point")), x, scale * y, below, above, name, hollow, known(point))


def _reached(point: Point) -> str:
    return with_interval(point["accuracy"], point["low"], point["high"])


def known(point: Point) -> tuple[tuple[str, str], ...]:
    """Return what is known of a point or a round in pairs of words, without what is empty or no single value."""
    told = [(k, v) for k, v in point.items() if k not in UNTOLD and isinstance(v, str | Real) and v != ""]
    said = {field: HUMAN[field](value) if field in HUMAN else str(value) for field, value in told if value == value}
    if said.keys() & {"accuracy"} and "low" in point:
        said["accuracy"] = _reached(point)
    return tuple((AXES[k].label if k in AXES else k.replace("_", " ").capitalize(), text) for k, text in said.items())


def _reach(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a logarithmic axis: at least a factor of four apart."""
    low, high = (min(values), max(values)) if values else (1e3, 1e6)
    margin = max(1.25, sqrt(4 * low / high))
    return low / margin, high * margin


def accuracy_curve(
    records: Sequence[RoundRecord], earlier: Sequence[Curve] = (), rounds: int = 0, label: str = "this run"
) -> Plot:
    """Show accuracy per round: the current run bold with its 95 % band, earlier runs in grey behind it.

    `rounds` is how far the axis reaches at least. A round's key is `round/N`, that of an earlier run `earlier/INDEX`.
    """
    label = other_than(label, dict(earlier))
    curves = [*((f"earlier/{i}", *curve) for i, curve in enumerate(earlier)), ("this", label, records)]
    lines = [
        Line(key, text, tuple((r.round, 100 * r.accuracy) for r in curve), end=f"{percent(curve[-1].accuracy)} {text}")
        for key, text, curve in curves
        if curve
    ]
    alt = "Accuracy per round: no round yet"
    if records:
        first, last = records[0], records[-1]
        rounds = max(rounds, last.round)
        lines[-1] = replace(lines[-1], band=tuple((100 * r.low, 100 * r.high) for r in records), bold=True)
        alt = (
            f"Accuracy per round: {percent(last.accuracy)} on validation after round {last.round} of {rounds} "
            f"(95 % interval {percent(last.low)} to {percent(last.high)}), "
            f"{percent(first.accuracy)} after round {first.round}"
        )
    if earlier:
        alt += f"; {len(earlier)} earlier run{'s' if len(earlier) > 1 else ''} behind it"
    marks = (Mark(f"round/{r.round}", label, r.round, 100 * r.accuracy, tip=known(vars(r))) for r in records)
    return Plot(
        Axis("Round", ends=(0, 1.02 * max([2, rounds, *(line.points[-1][0] for line in lines)])), whole=True),
        Axis("Accuracy on validation (%)", ends=(0, 100)),
        tuple({line.kind: Kind(line.kind, *((BLUE, "o") if line.bold else (GREY,))) for line in lines}.values()),
        tuple(marks),
        tuple(lines),
        note="" if lines else "No round yet",
        alt=f"{alt}.",
    )


def lines(curves: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> Plot:
    """Show a quantity `y` against another, a line of points (x, y) for each name, told apart by colour and dash."""
    across, up = zip(*(point for points in curves.values() for point in points), strict=True)
    margin = 0.04 * (max(up) - min(up)) or 1.0
    looks = zip(curves, cycle(STYLES[:6]), cycle(("-", "--", ":")), strict=False)
    told = "; ".join(f"{name} from {three(points[0][1])} to {three(points[-1][1])}" for name, points in curves.items())
    return Plot(
        Axis(x, ends=(min(across), max(across)), whole=all(float(value).is_integer() for value in across)),
        Axis(y, ends=(min(up) - margin, max(up) + margin)),
        tuple(Kind(name, color, dash=dash) for name, (color, _), dash in looks),  # type: ignore[arg-type]
        lines=tuple(Line(name, name, tuple(points)) for name, points in curves.items()),
        alt=f"{y} against {x[0].lower()}{x[1:]}: {told}.",
    )


def distances(looks: Sequence[Look], begin: int | None = None) -> Plot:
    """Show the distance of each look of a monitor, its limit, the looks that gave alarm, and where the change began."""
    rung = [look for look in looks if look.alarm]
    top = 1.1 * max([1.0, *(look.limit for look in looks), *(look.distance for look in looks)])
    told = "always below the limit"
    if rung:
        told = f"{len(rung)} alarm{'s' if len(rung) > 1 else ''}, the first after {rung[0].patients} patients"
    change = "" if begin is None else f" The change begins after {begin} patients."
    kinds = [Kind("limit", dash="--"), Kind("distance", BLUE), Kind("alarm", VERMILLION, "s"), Kind("change", dash=":")]
    places = {kind: tuple((look.patients, getattr(look, kind)) for look in looks) for kind in ("limit", "distance")}
    if begin is not None:
        places["change"] = (begin, 0.0), (begin, top)
    marks = [Mark(f"alarm/{one.patients}", "alarm", one.patients, one.distance, tip=known(vars(one))) for one in rung]
    drawn = {*(mark.kind for mark in marks), *(kind for kind, some in places.items() if some)}
    return Plot(
        Axis("Patients", ends=(0, 1.03 * max([1, *(look.patients for look in looks)])), whole=True),
        Axis("Distance (standard deviations)", ends=(0, top)),
        tuple(kind for kind in kinds if kind.name in drawn),
        tuple(marks),
        tuple(Line(kind, kind, some) for kind, some in places.items() if some),
        alt=f"Distance from the reference at {len(looks)} looks: {told}.{change}",
    )


def power(sizes: Sequence[float], caught: Mapping[str, Sequence[float]], label: str) -> Plot:
    """Show the share of streams that were caught against the size of the shift, a line for each site."""
    shares = {name: tuple(zip(sizes, (100 * s for s in values), strict=True)) for name, values in caught.items()}
    told = "; ".join(f"{name} from {percent(values[0])} to {percent(values[-1])}" for name, values in caught.items())
    margin = 0.05 * (max(sizes) - min(sizes)) or 1.0
    return Plot(
        Axis(label, ends=(min(sizes) - margin, max(sizes) + margin)),
        Axis("Streams caught (%)", ends=(-4, 104)),
        tuple(Kind(name, *style) for name, style in styles(caught).items()),
        tuple(
            Mark(f"{name}/{x:g}", name, x, y, tip=(("Site", name), (label, f"{x:g}"), ("Streams caught", f"{y:.1f} %")))
            for name, places in shares.items()
            for x, y in places
        ),
        tuple(Line(name, name, places) for name, places in shares.items()),
        alt=f"Share of streams that were caught, for a shift ({label}) from {sizes[0]:g} to {sizes[-1]:g}: {told}.",
    )


def by_setting(
    values: Sequence[Any], lines: Mapping[str, Sequence[tuple[float, float | None, float | None]]], x: str, y: str
) -> Plot:
    """Show a quantity `y` at each of the `values` of a setting `x`, which stand at equal distances.

    The line of each name has (quantity, low, high) for each value; low and high are None where there is no interval.
    """
    marks = [
        Mark(f"{name}/{value}", name, place, middle, low, high, tip=((x, str(value)), (y, three(middle))))
        for name, points in lines.items()
        for place, (value, (middle, low, high)) in enumerate(zip(values, points, strict=True))
    ]
    told = "; ".join(f"{name}: {', '.join(three(middle) for middle, *_ in points)}" for name, points in lines.items())
    return Plot(
        Axis(x, ends=(-0.3, len(values) - 0.7), names=tuple(map(str, values))),
        Axis(y, ends=room(marks)),
        tuple(Kind(name, *style) for name, style in styles(lines).items()),
        tuple(marks),
        tuple(Line(name, name, tuple((m.x, m.y) for m in marks if m.kind == name)) for name in lines),
        alt=f"{y} at {x[0].lower()}{x[1:]} {', '.join(map(str, values))}. {told}.",
    )


def soft_answers(picture: ArrayLike, label: str, answers: Mapping[str, Sequence[float]]) -> Figure:
    """Draw a picture [h, w] with its label, and beside it answers (shares in 0..1, one a class) as bars, by name."""
    figure, axes = canvas(right=0.02, left=0.38)
    shown = figure.add_axes((0.02, 0.25, 0.24, 0.5))
    shown.imshow(picture, cmap="gray")
    shown.set_title(f"Label: {label}", color=GREY, fontsize=10)
    shown.set_axis_off()
    width = 0.8 / len(answers)
    for place, (name, shares) in enumerate(answers.items()):
        middles = [c + width * (place - (len(answers) - 1) / 2) for c in range(len(shares))]
        axes.bar(middles, [100 * share for share in shares], width, color=STYLES[place][0], label=name)
    axes.set(xlabel="Class", ylabel="Answer (%)", xticks=range(len(shares)), ylim=(0, 100))
    axes.legend(frameon=False, labelcolor=GREY)
    return as_written(figure)


def alarm_table(alarms: Sequence[Alarm]) -> str:
    """Return the alarms as an HTML table, oldest first."""
    heads = ("patient", "kind", "value", "limit", "what")
    rows = [(str(a.patient), a.kind, f"{a.value:.2f}", f"{a.limit:.2f}", a.what) for a in alarms]
    return html_table(f"{len(alarms)} alarm{'' if len(alarms) == 1 else 's'}", heads, rows)
