"""Which artifact for which device: the points that no other beats, and the best of a table under a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf, isfinite
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas

FLOORS = ("accuracy", "low", "throughput", "sensitivity", "specificity", "auc", "lowest_accuracy")
"""Columns of which more is better; a budget on them is a floor, on every other column a ceiling."""


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (cost, gain) pairs that no other beats, by rising cost and each once: the Pareto front.

    A pair is beaten when another costs no more and gains no less, and is better in one of the two; one with a NaN
    is left out.
    """
    found: list[tuple[float, float]] = []
    for cost, gain in sorted(filter(_finite, points), key=lambda point: (point[0], -point[1])):
        if gain > (found[-1][1] if found else -inf):
            found.append((cost, gain))
    return found


def pareto(cost: Iterable[float], gain: Iterable[float]) -> list[bool]:
    """Say for each point whether it is on the front; equal points are both on it."""
    points = list(zip(cost, gain, strict=True))
    best = set(front(points))
    return [point in best for point in points]


def front_share(
    cost: Iterable[float], right: Sequence[np.ndarray | None], draws: int = 400, seed: int = 0
) -> list[float]:
    """Return how often each point is on the front, 0..1, when the samples are drawn again (bootstrap, Efron 1979).

    `right` says of each point which of its samples it answers rightly, bool [n], None of one that was not measured.
    Points with as many samples are asked about the same ones. The best of many on one split is partly lucky: a point
    that stands on the front by luck is seldom on it again.
    """
    rng, cost = np.random.default_rng(seed), list(cost)
    gains = np.full((len(right), draws), np.nan)
    for count in sorted({len(one) for one in right if one is not None}):
        these = {row: one for row, one in enumerate(right) if one is not None and len(one) == count}
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=draws)
        gains[[*these]] = np.stack([*these.values()]) @ drawn.T / count
    return np.mean([pareto(cost, gain) for gain in gains.T], axis=0).tolist() if len(right) else []


def choose(table: pandas.DataFrame, **budget: float) -> pandas.Series:
    """Return the row of highest accuracy among those within the budget, the smaller file on a tie.

    `choose(table, bytes=50_000, latency_ms=1.0)`; names are columns of a table made by `sweep`, or of what
    `evaluate.with_rates` adds to it. `lost=1` means that the interval of what got lost ends below one point. Raises
    ValueError for a column that the table lacks, and, when nothing fits, says which limit leaves nothing and what comes
    nearest.
    """
    if unknown := sorted(budget.keys() - set(table.columns)):
        raise ValueError(f"budget must name columns of the table ({', '.join(table.columns)}), got {unknown[0]!r}")
    fitting = table
    for asked, limit in budget.items():
        name = "lost_high" if asked == "lost" and "lost_high" in table.columns else asked
        left = fitting[fitting[name] >= limit] if name in FLOORS else fitting[fitting[name] <= limit]
        if left.empty:
            nearest = fitting[name].max() if name in FLOORS else fitting[name].min()
            side = "at least" if name in FLOORS else "at most"
            raise ValueError(f"no point has {name} {side} {limit:g}; the nearest has {nearest:g}")
        fitting = left
    return fitting.sort_values(["accuracy", "bytes"], ascending=[False, True]).iloc[0]


def plan(table: pandas.DataFrame, budgets: Mapping[str, Mapping[str, float]]) -> pandas.DataFrame:
    """Choose for each class of devices: `plan(table, {"tablet": {"bytes": 9_000, "sensitivity": 0.9}})`.

    Returns a row a class, indexed by its name. Raises ValueError as `choose` does, naming the class.
    """
    import pandas

    chosen = {}
    for device, budget in budgets.items():
        try:
            chosen[device] = choose(table, **budget)
        except ValueError as error:
            raise ValueError(f"device class {device!r}: {error}") from None
    return pandas.DataFrame.from_dict(chosen, orient="index")


def _finite(point: tuple[float, float]) -> bool:
    return isfinite(point[0]) and isfinite(point[1])
