"""Tables of patients that never leave their hospital: checked, encoded, split and normalized hospital by hospital."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedlab_kit.data import SPLITS, Dataset, Preprocess, Split
from fedlab_kit.download import DataError

if TYPE_CHECKING:
    from pandas import DataFrame, Series

FEWEST = 8
"""Patients that a hospital must have to be split in four."""


@dataclass(frozen=True)
class Column:
    """One column of a hospital's table: numbers from `low` to `high`, or one of `kinds` (categories).

    A column of kinds becomes an indicator for each kind but the first.
    """

    name: str
    low: float
    high: float
    kinds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Schema:
    """The columns that every hospital must have, and the one that holds the label: above 0 is a positive case."""

    columns: tuple[Column, ...]
    label: Column

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the encoded features, numbers first, then the indicators."""
        kinds = [f"{c.name}={kind}" for c in self.columns for kind in c.kinds[1:]]
        return (*(c.name for c in self.columns if not c.kinds), *kinds)


@dataclass(frozen=True, eq=False)
class Hospital:
    """One hospital's patients: raw `x` float64 [n, d], labels `y` int64 [n] of 0 and 1.

    `left_out` counts the rows that could not be used, by reason.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Moments:
    """What a hospital tells about its features so that all can normalize alike: a count, sums and sums of squares [d].

    Two releases that differ by one patient give exactly that patient, so they are no privacy by themselves. They add
    up: the moments of all hospitals together are those of the pooled table, which nobody ever holds.
    """

    count: int
    sums: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray) -> Moments:
        """Count and add up the rows of `x` [n, d], each sum correctly rounded: no machine and no order changes it."""
        wide = np.asarray(x, np.float64)
        sums, squares = (np.array([math.fsum(column) for column in values.T]) for values in (wide, wide**2))
        return cls(len(wide), sums, squares)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.sums + other.sums, self.squares + other.squares)

    def preprocess(self) -> Preprocess:
        """Return the recipe that gives mean 0 and standard deviation 1; a feature that never varies keeps its unit."""
        mean = self.sums / self.count
        variance = self.squares / self.count - mean**2
        flat = variance <= 1e-12 * self.squares / self.count  # nothing but rounding is left
        std = np.sqrt(np.where(flat, 1.0, variance))
        return Preprocess(tuple(mean.tolist()), tuple(std.tolist()))


def admit(name: str, table: DataFrame, schema: Schema) -> Hospital:
    """Check and encode one hospital's table of text or numbers.

    A row with a missing value ("?" or nothing), a value that is no number, or one outside its column's range is left
    out and counted. Raises DataError for a missing or renamed column, and when fewer than 8 rows are left.
    """
    import pandas

    _check_columns(name, list(map(str, table.columns)), schema)
    wanted = (*schema.columns, schema.label)
    text = pandas.DataFrame({c.name: table[c.name].astype(str).str.strip() for c in wanted})
    missing = text.isin(["?", "", "nan", "NaN", "None", "<NA>"])
    numbers = text.apply(pandas.to_numeric, errors="coerce")
    outside = pandas.DataFrame({c.name: _outside(numbers[c.name], c) for c in wanted})
    reasons = {"missing value": missing, "not a number": numbers.isna(), "out of range": outside}
    good, left_out = pandas.Series(True, table.index), {}
    for reason, cells in reasons.items():
        rows = good & cells.any(axis=1)
        good, left_out[reason] = good & ~rows, int(rows.sum())
    if good.sum() < FEWEST:
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise DataError(f"hospital {name!r} must have at least {FEWEST} usable rows, got {good.sum()} ({counts})")
    kept = numbers[good]
    return Hospital(name, _encode(kept, schema), (kept[schema.label.name] > 0).to_numpy(np.int64), left_out)


def admit_all(tables: Mapping[str, DataFrame], schema: Schema) -> list[Hospital]:
    """Admit each hospital that can be: one whose table is wrong is left out with a warning, and the others go on.

    Raises DataError when none is left.
    """
    hospitals = []
    for name, table in tables.items():
        try:
            hospitals.append(admit(name, table, schema))
        except DataError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
    if not hospitals:
        raise DataError(f"none of the {len(tables)} hospitals could be admitted")
    return hospitals


def assemble(
    name: str,
    classes: tuple[str, str],
    features: tuple[str, ...],
    hospitals: Sequence[Hospital],
    shares: tuple[float, float, float],
    seed: int,
) -> Dataset:
    """Split every hospital's patients by themselves and make a data set whose sites are the hospitals.

    `shares` go to train, validation and public, the rest to test. The preprocessing comes from the merged `Moments`
    of the hospitals' training parts. A hospital without a positive case takes part like any other.
    """
    rng, parts = np.random.default_rng(seed), []
    for hospital in hospitals:
        ends = np.floor(np.cumsum(shares) * len(hospital.y) + 1e-9).astype(int)
        parts.append(stratified(hospital.y, np.diff(ends, prepend=0, append=len(hospital.y)), rng))
    moments = [Moments.of(h.x[part == 0].astype(np.float32)) for h, part in zip(hospitals, parts, strict=True)]
    merged = sum(moments[1:], moments[0])
    train, validation, public, test = (
        gather(hospitals, [part == number for part in parts]) for number in range(len(SPLITS))
    )
    sites = tuple(hospital.name for hospital in hospitals)
    return Dataset(name, classes, train, validation, public, test, merged.preprocess(), sites, features)


def gather(hospitals: Sequence[Hospital], rows: Sequence[np.ndarray]) -> Split:
    """Return one split made of some `rows` (bool [n]) of each hospital."""
    x = np.concatenate([h.x[row] for h, row in zip(hospitals, rows, strict=True)]).astype(np.float32)
    y = np.concatenate([h.y[row] for h, row in zip(hospitals, rows, strict=True)])
    site = np.repeat(np.arange(len(hospitals)), [row.sum() for row in rows])
    return Split(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(site))


def stratified(y: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Deal samples into parts of the given sizes, each label spread over them in proportion: the part of each [n].

    A label of a single sample falls anywhere, with the chance that the parts' sizes give.
    """
    order = rng.permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]
    turns = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    sequence = np.repeat(np.arange(len(sizes)), sizes)[np.argsort(turns, kind="stable")]
    part = np.empty(len(y), np.int64)
    part[order] = np.roll(sequence, rng.integers(len(y)))
    return part


def _check_columns(name: str, found: list[str], schema: Schema) -> None:
    wanted = [column.name for column in (*schema.columns, schema.label)]
    for column in wanted:
        if column not in found:
            others = {other.lower(): other for other in found if other not in wanted}
            near = get_close_matches(column.lower(), others, n=1)
            hint = f"is {others[near[0]]!r} it, renamed?" if near else f"it has {', '.join(found)}"
            raise DataError(f"hospital {name!r} lacks the column {column!r}; {hint}")


def _outside(values: Series, column: Column) -> Series:
    if column.kinds:
        return ~values.isin(column.kinds)
    return ~values.between(column.low, column.high)


def _encode(numbers: DataFrame, schema: Schema) -> np.ndarray:
    plain = [numbers[c.name] for c in schema.columns if not c.kinds]
    kinds = [numbers[c.name] == kind for c in schema.columns for kind in c.kinds[1:]]
    return np.column_stack([column.to_numpy(np.float64) for column in (*plain, *kinds)])
