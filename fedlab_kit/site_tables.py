"""Tables of patients that never leave their hospital: checked, encoded, split and normalized hospital by hospital."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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

MISSING = frozenset({"", "?", "nan", "NaN", "NA", "N/A", "null", "None", "<NA>"})
"""What stands in a cell of text whose value is missing."""


@dataclass(frozen=True)
class Column:
    """One column of a hospital's table: numbers from `low` to `high`, or one of `kinds` (categories).

    A column of kinds (whole numbers, or words) becomes an indicator for each kind but the first.
    """

    name: str
    low: float
    high: float
    kinds: tuple[int, ...] | tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, cells: Series) -> Column:
        """Return the column that these cells make: numbers where all that are there are, else at most 20 words."""
        import pandas

        known, largest = cells[~cells.isin(MISSING)], float(np.finfo(np.float32).max)
        words = known[pandas.to_numeric(known, errors="coerce").isna()]
        kinds = sorted(set(known)) if len(words) else []
        if len(kinds) > min(20, len(cells) // 2):
            example = f"{len(kinds)} different ones such as {words.iloc[0]!r}"
            raise DataError(f"column {name!r} must hold numbers or few words, it holds {example}: mend or drop it")
        return cls(name, -largest, largest, tuple(kinds))


@dataclass(frozen=True)
class Schema:
    """The columns that every hospital must have, and the one that holds the label.

    A label above 0 is a positive case; the place of a label with kinds among them is the number of its class.
    """

    columns: tuple[Column, ...]
    label: Column

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the encoded features, numbers first, then the indicators."""
        kinds = [f"{c.name}={kind}" for c in self.columns for kind in c.kinds[1:]]
        return (*(c.name for c in self.columns if not c.kinds), *kinds)


@dataclass(frozen=True, eq=False)
class Hospital:
    """One hospital's patients: raw `x` float64 [n, d], labels `y` int64 [n], the numbers of their classes.

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
        """Count and add up the rows of `x` [n, d], each sum correctly rounded: no machine and no order changes it.

        Of pictures [n, d, h, w] every pixel is a row, its channels are what is added up.
        """
        rows = np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])
        if rows.dtype == np.uint8:  # in whole numbers, which are as exact and much faster
            squares = np.square(rows, dtype=np.uint16)
            return cls(len(rows), rows.sum(0, dtype=np.int64), squares.sum(0, dtype=np.int64))
        wide = np.asarray(rows, np.float64)
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

    A row with a missing value (see `MISSING`), a value that is no number, or one outside its column's range is left
    out and counted. Raises DataError for a missing or renamed column, and when fewer than 8 rows are left.
    """
    import pandas

    wanted = (*schema.columns, schema.label)
    check_columns(f"site {name!r}", list(map(str, table.columns)), [column.name for column in wanted])
    text = pandas.DataFrame({c.name: table[c.name].astype(str).str.strip() for c in wanted})
    missing = text.isin(MISSING)
    numbers = text.apply(pandas.to_numeric, errors="coerce")
    for column in wanted:
        if isinstance(next(iter(column.kinds), None), str):
            numbers[column.name] = text[column.name]  # words stay words
    outside = pandas.DataFrame({c.name: _outside(numbers[c.name], c) for c in wanted})
    reasons = {"missing value": missing, "not a number": numbers.isna(), "out of range": outside}
    good, left_out = pandas.Series(True, table.index), {}
    for reason, cells in reasons.items():
        rows = good & cells.any(axis=1)
        good, left_out[reason] = good & ~rows, int(rows.sum())
    if good.sum() < FEWEST:
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise DataError(f"site {name!r} must have at least {FEWEST} usable rows, got {good.sum()} ({counts})")
    kept = numbers[good]
    labels, kinds = kept[schema.label.name], schema.label.kinds
    y = labels.map({kind: number for number, kind in enumerate(kinds)}) if kinds else labels > 0
    return Hospital(name, _encode(kept, schema), y.to_numpy(np.int64), left_out)


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
        raise DataError(f"none of the {len(tables)} sites could be admitted")
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
    x, y, site = rows_of(hospitals)
    sites = tuple(hospital.name for hospital in hospitals)
    return joined(name, classes, x, y, np.concatenate(parts), features, sites, site)


def rows_of(hospitals: Sequence[Hospital]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return float32 x [n, d], y [n] and the site [n] of all patients, hospital after hospital."""
    x, y = np.concatenate([h.x for h in hospitals]), np.concatenate([h.y for h in hospitals])
    return x.astype(np.float32), y, np.repeat(np.arange(len(hospitals)), [len(h.y) for h in hospitals])


def joined(
    name: str,
    classes: tuple[str, ...],
    x: np.ndarray,
    y: np.ndarray,
    part: np.ndarray,
    features: tuple[str, ...] = (),
    sites: tuple[str, ...] = (),
    site: np.ndarray | None = None,
) -> Dataset:
    """Make a data set of samples whose split is the place `part` [n] in `SPLITS`; -1 is left out.

    Raises DataError when there is nothing to learn from, and warns of a class that nobody can learn.
    """
    if len(classes) < 2 or not (part == 0).any():
        raise DataError(f"there must be two classes and samples to learn from, got {len(y)} of {', '.join(classes)}")
    if unseen := [label for number, label in enumerate(classes) if number not in y[part == 0]]:
        warnings.warn(f"dataset {name!r}: train has no sample of {', '.join(unseen)}", stacklevel=2)
    train, validation, public, test = (
        Split(*(torch.from_numpy(values[part == number]) for values in (x, y, site) if values is not None))
        for number in range(len(SPLITS))
    )
    plain = Dataset(name, classes, train, validation, public, test, Preprocess(0.0, 1.0), sites, features)
    groups = [part == 0] if site is None else [(part == 0) & (site == number) for number in range(len(sites))]
    moments = [Moments.of(x[group]) for group in groups]
    return replace(plain, preprocess=sum(moments[1:], moments[0]).preprocess())


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


def deal(
    x: np.ndarray,
    y: np.ndarray,
    part: np.ndarray,
    shares: tuple[float, float, float],
    seed: int,
    site: np.ndarray | None = None,
) -> np.ndarray:
    """Return the split of each sample, its place in `SPLITS` [n], or -1: no two splits hold samples that are equal.

    `part` [n] is the split that is given. A split that none is given gets its share of those given to train, by site
    and class; `shares` are those of train, validation and public, the rest is that of test. Samples that are equal go
    together. One that is given to two splits stays in the last, left out (-1) of the other. A warning counts both.
    """
    if len(shares) != 3 or min(shares) < 0 or not 0 < shares[0] <= sum(shares) <= 1 + 1e-9:
        raise ValueError(f"shares must be three, of train (above 0), validation and public, 1 at most, got {shares}")
    seen: dict[bytes, int] = {}
    first = np.array([seen.setdefault(hashlib.sha256(row.tobytes()).digest(), n) for n, row in enumerate(x)])
    last = part.copy()
    np.maximum.at(last, first, part)
    given, copy = last[first], first != np.arange(len(x))
    free = [number for number in range(len(SPLITS)) if number == 0 or number not in part]
    ends = np.cumsum(np.array([*shares, 1 - sum(shares)])[free])
    dealt, rng = given.copy(), np.random.default_rng(seed)
    for group in [part == 0] if site is None else [site == one for one in np.unique(site)]:
        if len(rows := np.flatnonzero(group & (given == 0) & ~copy)):
            sizes = np.diff(np.floor(ends / ends[-1] * len(rows) + 1e-9).astype(int), prepend=0)
            dealt[rows] = np.array(free)[stratified(y[rows], sizes, rng)]
    together, out = (copy & (given == 0) & (len(free) > 1)).sum(), (part < given).sum()
    if together or out:
        counts = f"{together} equal another and go with it, {out} are left out of one split as they are in another"
        warnings.warn(f"no sample may be in two splits: {counts}", stacklevel=2)
    return np.where(part < given, -1, dealt[first])


def check_columns(where: str, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise DataError when a table lacks one of the wanted columns, with the name that it may have instead."""
    for column in wanted:
        if column not in found:
            others = {other.lower(): other for other in found if other not in wanted}
            near = get_close_matches(column.lower(), others, n=1)
            hint = f"is {others[near[0]]!r} it, renamed?" if near else f"it has {', '.join(found)}"
            raise DataError(f"{where} lacks the column {column!r}; {hint}")


def _outside(values: Series, column: Column) -> Series:
    if column.kinds:
        return ~values.isin(column.kinds)
    return ~values.between(column.low, column.high)


def _encode(numbers: DataFrame, schema: Schema) -> np.ndarray:
    plain = [numbers[c.name] for c in schema.columns if not c.kinds]
    kinds = [numbers[c.name] == kind for c in schema.columns for kind in c.kinds[1:]]
    return np.column_stack([column.to_numpy(np.float64) for column in (*plain, *kinds)])
