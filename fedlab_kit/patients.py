"""The built-in data sets of patients: two of hospitals' own tables, and chest X-rays of children."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fedlab_kit.catalog import dataset
from fedlab_kit.data import Dataset, Split
from fedlab_kit.download import DataError, Source, bundled, fetch
from fedlab_kit.own_data import from_npz
from fedlab_kit.site_tables import Column, Hospital, Schema, admit_all, assemble

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

PNEUMONIA = Source(
    "pneumonia",
    ("https://zenodo.org/records/10519652/files/", "https://zenodo.org/records/6496656/files/"),
    {"pneumoniamnist.npz": "28209eda62fecd6e6a2d98b1501bb15f"},
)
SIMULATED = {"simulated A": (4, 1), "simulated B": (3, 2), "simulated C": (2, 3), "simulated D": (1, 4)}
"""Tenths of the healthy and of the sick children that each made-up hospital gets."""


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


@dataset
def pneumonia() -> Dataset:
    """PneumoniaMNIST (Yang et al. 2023): 5,856 chest X-rays of children, 28x28, dealt out to four simulated hospitals.

    The pictures are of one real hospital (Kermany et al. 2018), the sites `simulated A` to `D` are made up, see
    `SIMULATED`. Split as published, 4,708 / 524 / 0 / 624, less what is in two splits.
    """
    return radiology(fetch(PNEUMONIA, "pneumoniamnist.npz"))


def radiology(file: Path) -> Dataset:
    """Return `pneumonia` from its published file. Raises DataError when that holds something else than two classes."""
    whole, rng = from_npz(file), np.random.default_rng(28)
    if whole.classes != ("0", "1") or whole.shape != (1, 28, 28):
        raise DataError(f"{file} must hold pictures [n, 28, 28] labelled 0 and 1, got {whole.shape} of {whole.classes}")
    train, validation, public, test = (
        replace(split, site=_simulated(split, rng))
        for split in (whole.train, whole.validation, whole.public, whole.test)
    )
    labels = ("normal", "pneumonia")
    return Dataset("pneumonia", labels, train, validation, public, test, whole.preprocess, tuple(SIMULATED))


def _simulated(split: Split, rng: np.random.Generator) -> torch.Tensor:
    """Deal each class of a split out by `SIMULATED`: the site of each sample, int64 [n]."""
    site = np.empty(len(split), np.int64)
    for number, tenths in enumerate(zip(*SIMULATED.values(), strict=True)):
        members = rng.permutation(np.flatnonzero(split.y.numpy() == number))
        ends = np.cumsum(tenths) * len(members)  # in tenths of a sample
        site[members] = np.searchsorted(ends, 10 * np.arange(len(members)) + 5, side="right")
    return torch.from_numpy(site)
