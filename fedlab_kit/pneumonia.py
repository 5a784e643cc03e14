"""Chest X-rays of children: the published pictures of one hospital, dealt out to four that are simulated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fedlab_kit.catalog import dataset
from fedlab_kit.data import Dataset, Split
from fedlab_kit.download import DataError, Source, fetch
from fedlab_kit.own_data import from_npz

PNEUMONIA = Source(
    "pneumonia",
    ("https://zenodo.org/records/10519652/files/", "https://zenodo.org/records/6496656/files/"),
    {"pneumoniamnist.npz": "28209eda62fecd6e6a2d98b1501bb15f"},
)
SIMULATED = {"simulated A": (4, 1), "simulated B": (3, 2), "simulated C": (2, 3), "simulated D": (1, 4)}
"""Tenths of the healthy and of the sick children that each made-up hospital gets."""


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
