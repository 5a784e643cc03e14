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

from fedlab_kit.catalog import dataset
from fedlab_kit.data import SPLITS, Dataset, Preprocess, Split
from fedlab_kit.download import DataError, Source, bundled, fetch

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


MEASURES = (
    "radius", "texture", "perimeter", "area", "smoothness",
    "compactness", "concavity", "concave points", "symmetry", "fractal dimension",
)  # fmt: skip
CELLS = tuple(f"{kind} {measure}" for kind in ("mean", "error of", "worst") for measure in MEASURES)
READ = (*range(10), *range(20, 30))
"""The features that a microscope reads off: the `mean` and the `worst` ones."""

SPREADS = (
    3.524, 4.301, 24.3, 351.9, 0.01406, 0.05281, 0.07972, 0.0388, 0.02741, 0.00706,
    4.833, 6.146, 33.6, 569.4, 0.02283, 0.1573, 0.2086, 0.06573, 0.06187, 0.01806,
)  # fmt: skip
"""Standard deviations of those twenty over all 569 patients, in their own units."""

WARDS = {
    "university": (132, 108, 1.0, 0.0),
    "city": (48, 112, 1.1, 0.0),
    "county": (22, 87, 0.9, -0.25),
    "rural": (10, 50, 1.1, 0.5),
}
"""Malignant and benign cases of each hospital, and how its microscope reads: gain, offset in standard deviations."""

HEART = Source(
    "heart_disease",
    ("https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease/",),
    {
        "processed.cleveland.data": "2d91a8ff69cfd9616aa47b59d6f843db",
        "processed.hungarian.data": "22e96bee155b5973568101c93b3705f6",
        "processed.switzerland.data": "9a87f7577310b3917730d06ba9349e20",
        "processed.va.data": "4249d03ca7711e84f4444768c9426170",
    },
)
CLINICS = ("Cleveland", "Hungary", "Switzerland", "VA Long Beach")
PATIENT = Schema(
    columns=(
        Column("age", 0, 120),
        Column("sex", 0, 1),
        Column("cp", 1, 4, kinds=(1, 2, 3, 4)),  # chest pain: typical, atypical, none of the heart, without symptoms
        Column("trestbps", 0, 300),  # mm Hg at rest; 0 stands for not measured
        Column("chol", 0, 800),  # mg/dl; 0 stands for not measured, which is the rule in Switzerland
        Column("fbs", 0, 1),
        Column("restecg", 0, 2, kinds=(0, 1, 2)),
        Column("thalach", 0, 250),
        Column("exang", 0, 1),
        Column("oldpeak", -5, 10),
    ),
    label=Column("num", 0, 4),
)
HEADER = (*(column.name for column in PATIENT.columns), "slope", "ca", "thal", PATIENT.label.name)
"""The columns of the published files, which name none."""


@dataset
def hospitals() -> Dataset:
    """569 women whose breast tumour was examined under a microscope, dealt out to four hospitals that are not alike.

    The patients are real, the hospitals are made up: see `WARDS` for how they differ. 30 features; offline, and
    the same bytes on every machine.
    """
    return wards(seed=0)


def wards(seed: int) -> Dataset:
    """Return `hospitals` with another split: the same patients in the same hospitals, other ones held out."""
    return assemble("hospitals", ("benign", "malignant"), CELLS, _wards(), (0.55, 0.15, 0.05), seed)


@dataset
def heart() -> Dataset:
    """UCI Heart Disease (Janosi, Steinbrunn, Pfisterer and Detrano, 1988): 740 patients of four real hospitals.

    Prepared as FLamby does (Ogier du Terrail et al. 2022): without the columns slope, ca and thal, which most hospitals
    miss, without rows that lack a value, and 66 % of each hospital's patients to learn from (a few of them validate).
    """
    return clinics(seed=0, shares=(0.48, 0.15, 0.03))


def clinics(seed: int, shares: tuple[float, float, float]) -> Dataset:
    """Return `heart` with another split: `shares` of each hospital train, validate and are public, the rest tests.

    Raises DataError when a file cannot be had or is damaged.
    """
    return assemble("heart", ("healthy", "disease"), PATIENT.features, heart_hospitals(), shares, seed)


def heart_hospitals() -> list[Hospital]:
    """Return the patients of `heart`, hospital by hospital, in the order of the files."""
    import pandas

    paths = [fetch(HEART, file) for file in HEART.md5]
    tables = {
        name: pandas.read_csv(path, header=None, names=HEADER, dtype=str, index_col=False)
        for name, path in zip(CLINICS, paths, strict=True)
    }
    return admit_all(tables, PATIENT)


def _wards() -> list[Hospital]:
    """Deal the malignant and the benign cases out, and read them through each hospital's microscope."""
    x, malignant = _bundled()
    rng, given = np.random.default_rng(569), []
    cases, controls = (rng.permutation(np.flatnonzero(malignant == kind)) for kind in (1, 0))
    for name, (sick, healthy, gain, offset) in WARDS.items():
        rows = np.concatenate([cases[:sick], controls[:healthy]])
        cases, controls = cases[sick:], controls[healthy:]
        read = x[rows]
        read[:, READ] = gain * read[:, READ] + offset * np.array(SPREADS)
        given.append(Hospital(name, read, malignant[rows]))
    return given


def _bundled() -> tuple[np.ndarray, np.ndarray]:
    """Read features float64 [569, 30] and labels int64 [569], 1 for malignant."""
    table = np.loadtxt(bundled("sklearn", "datasets/data/breast_cancer.csv"), delimiter=",", skiprows=1)
    return table[:, :30], 1 - table[:, 30].astype(np.int64)
