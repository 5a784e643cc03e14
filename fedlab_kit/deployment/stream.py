"""Made-up streams of patients for trying a monitor: held-out ones drawn again, measured by a device that changes."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlab_kit.data import Preprocess, Split
from fedlab_kit.settings import FieldError, Settings, knob


class Stream(Settings):
    """A stream of one hospital's patients and what happens to it.

    Example: `Stream(patients=400, begin=200, gain=1.1, offset=0.5, features=10)`.
    """

    patients: int = knob(400, "Patients", "stream", ge=1, le=100_000, step=10, span=(100, 1000))
    """How many patients come."""
    begin: int = knob(200, "Begin", "stream", ge=0, le=100_000, step=10, span=(0, 500))
    """How many are measured as before."""
    features: int = knob(10, "Features", "stream", ge=0, span=(0, 30))
    """How many features change, drawn by the seed."""
    gain: float = knob(1.1, "Gain", "stream", ge=0, le=100, step=0.01, span=(0.8, 1.2))
    """A changed feature is multiplied by this."""
    offset: float = knob(0.5, "Offset", "stream", ge=-100, le=100, step=0.05, span=(-1, 1))
    """And this many of its standard deviations are added."""
    seed: int = knob(7, "Seed", "stream", ge=0, le=2**32 - 1)
    """Which patients come, and which features change."""


def draw(part: Split, site: int, preprocess: Preprocess, stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    """Return raw rows float32 [patients, d] and labels int64 [patients] of one site's patients, as `stream` says.

    Raises ValueError when the site has nobody there, or fewer columns than are to change.
    """
    pool = np.flatnonzero(part.site.numpy() == site) if part.site is not None else np.arange(len(part))
    if not len(pool):
        raise ValueError(f"site must have patients in this split, site {site} has none")
    width = part.x.shape[1]
    if stream.features > width:
        raise FieldError("features", f"must be at most {width}, the columns of the table, got {stream.features}")
    rng = np.random.default_rng(stream.seed)
    chosen, rows = rng.permutation(width)[: stream.features], pool[rng.integers(len(pool), size=stream.patients)]
    x, y = part.x.numpy()[rows].copy(), part.y.numpy()[rows]
    x[stream.begin :] = changed(x[stream.begin :], chosen, preprocess, stream.gain, stream.offset)
    return x, y


def changed(
    rows: np.ndarray, features: np.ndarray, preprocess: Preprocess, gain: float, offset: float, about: Any = 0.0
) -> np.ndarray:
    """Return raw rows float32 [n, d] with some `features` stretched by `gain` about `about` ([d], or one number).

    `offset` of their standard deviations are added.
    """
    std, pivot = (
        np.broadcast_to(np.asarray(value, np.float32), rows.shape[1])[features] for value in (preprocess.std, about)
    )
    moved = rows.copy()
    moved[:, features] = pivot + np.float32(gain) * (rows[:, features] - pivot) + np.float32(offset) * std
    return moved
