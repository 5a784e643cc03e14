"""Pictures of drift: the distance at every look beside its limit, and how much of a shift is caught."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from fedlab_kit.lab.canvas import BLUE, GREY, STYLES, VERMILLION, canvas, html_table, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedlab_kit.deployment.drift import Look
    from fedlab_kit.deployment.monitor import Alarm


def distances(looks: Sequence[Look], begin: int | None = None) -> Figure:
    """Draw the distance of each look, its limit, the looks that gave alarm, and where the change began."""
    figure, axes = canvas(right=0.22)
    axes.set(xlabel="Patients", ylabel="Distance (standard deviations)", ylim=(0, None))
    patients = [look.patients for look in looks]
    axes.plot(patients, [look.limit for look in looks], "--", color=GREY, linewidth=1.2, label="limit")
    axes.plot(patients, [look.distance for look in looks], "-", color=BLUE, linewidth=1.6, label="distance")
    if rung := [look for look in looks if look.alarm]:
        at = [look.patients for look in rung], [look.distance for look in rung]
        axes.plot(*at, "s", color=VERMILLION, markersize=7, label="alarm")
    if begin is not None:
        axes.axvline(begin, color=GREY, linewidth=1, linestyle=":", label="change")
    axes.set_ylim(0, 1.1 * max([1.0, *(look.limit for look in looks), *(look.distance for look in looks)]))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=GREY, fontsize=9)
    return figure


def describe_distances(looks: Sequence[Look], begin: int | None = None) -> str:
    """Return what `distances` shows, in words."""
    rung = [look.patients for look in looks if look.alarm]
    change = "" if begin is None else f" The change begins after {begin} patients."
    if not rung:
        return f"Distance from the reference at {len(looks)} looks: always below the limit.{change}"
    count = f"{len(rung)} alarm{'s' if len(rung) > 1 else ''}"
    return f"Distance from the reference at {len(looks)} looks: {count}, the first after {rung[0]} patients.{change}"


def power(sizes: Sequence[float], caught: Mapping[str, Sequence[float]], label: str) -> Figure:
    """Draw the share of streams that were caught against the size of the shift, a line for each site."""
    figure, axes = canvas(right=0.22)
    axes.set(xlabel=label, ylabel="Streams caught (%)", ylim=(-4, 104))
    for (color, marker), (name, shares) in zip(cycle(STYLES), caught.items(), strict=False):
        axes.plot(sizes, [100 * s for s in shares], marker=marker, color=color, markersize=6, label=name)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=GREY, fontsize=9)
    return figure


def describe_power(sizes: Sequence[float], caught: Mapping[str, Sequence[float]], label: str) -> str:
    """Return what `power` shows, in words."""
    ends = "; ".join(f"{name} from {percent(shares[0])} to {percent(shares[-1])}" for name, shares in caught.items())
    return f"Share of streams that were caught, for a shift ({label}) from {sizes[0]:g} to {sizes[-1]:g}: {ends}."


def alarm_table(alarms: Sequence[Alarm]) -> str:
    """Return the alarms as an HTML table, oldest first."""
    heads = ("patient", "kind", "value", "limit", "what")
    rows = [(str(a.patient), a.kind, f"{a.value:.2f}", f"{a.limit:.2f}", a.what) for a in alarms]
    return html_table(f"{len(alarms)} alarm{'' if len(alarms) == 1 else 's'}", heads, rows)
