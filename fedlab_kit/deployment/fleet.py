"""Which artifact for which device: the best point of a table under a budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

FLOORS = ("accuracy", "low", "throughput", "sensitivity", "specificity", "auc", "lowest_accuracy")
"""Columns of which more is better; a budget on them is a floor, on every other column a ceiling."""


def choose(table: pandas.DataFrame, **budget: float) -> pandas.Series:
    """Return the row of highest accuracy among those within the budget, the smaller file on a tie.

    `choose(table, bytes=50_000, latency_ms=1.0)`; names are columns of a table made by `sweep`. Raises ValueError
    for a column that the table lacks, and, when nothing fits, says which limit leaves nothing and what comes nearest.
    """
    if unknown := sorted(budget.keys() - set(table.columns)):
        raise ValueError(f"budget must name columns of the table ({', '.join(table.columns)}), got {unknown[0]!r}")
    fitting = table
    for name, limit in budget.items():
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
