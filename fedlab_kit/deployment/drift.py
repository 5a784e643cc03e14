"""Has the mean of what comes in moved? One test for all features, at every look, with a shift that may be ignored.

One test a feature, corrected for 30 features and hundreds of looks, sees a large shift as soon, but takes the harmless
difference between any two groups of patients for drift sooner or later (`python -m benchmarks drift` counts both).
Here the distance of two means is measured in the directions of all features together (Mahalanobis), where a shift that
breaks how features belong together is large, and it must exceed a tolerance before it counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

LOOK = 10  # patients between two looks
FIRST = 20  # patients before the first
WINDOW = 100  # patients that are looked at
TOLERANCE = 1.0  # standard deviations in the direction that tells most: nobody's concern
LEVEL = 1e-6  # chance of a false alarm at one look, while the shift is within the tolerance
CLIP = 4.0  # standard deviations at which one patient's value stops to count
SHRINKAGE = 0.05  # share of the covariance that is replaced by a sphere, so that rare directions do not decide


@dataclass(frozen=True, eq=False)
class Reference:
    """What a site knows of its reference patients: `count`, `mean` [d], `scatter` [d, d] around it, clipped `centre`.

    `mean` is in the units of the values and stays at the site; only `count` and `scatter` are shared.
    """

    count: int
    mean: np.ndarray
    centre: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, scale: np.ndarray) -> Reference:
        """Sum up values [m, d]; `scale` [d] is each feature's standard deviation over all sites."""
        mean = values.mean(axis=0)
        unit = ((values - mean) / scale).clip(-CLIP, CLIP)
        centre = unit.mean(axis=0)
        return cls(len(values), mean, centre, (unit - centre).T @ (unit - centre))


def directions(references: Iterable[Reference]) -> np.ndarray:
    """Return the matrix [d, d] that makes all sites' features uncorrelated, of unit variance: scatters add up."""
    from sklearn.covariance import shrunk_covariance

    known = list(references)
    scatter = np.sum([reference.scatter for reference in known], axis=0)
    covariance = scatter / max(1, sum(reference.count - 1 for reference in known))
    spread, axes = np.linalg.eigh(shrunk_covariance(covariance, SHRINKAGE))
    return axes / np.sqrt(np.maximum(spread, 1e-12))


@dataclass(frozen=True, eq=False)
class Look:
    """One look: after how many `patients`, the `distance` of the means, its `limit`, and the `shift` of each feature.

    `distance` and `limit` are in standard deviations along the most telling direction, `shift` [d] in those of
    each feature.
    """

    patients: int
    distance: float
    limit: float
    shift: np.ndarray

    @property
    def alarm(self) -> bool:
        """Whether the distance is beyond its limit."""
        return self.distance > self.limit


class Drift:
    """The stream of one site against its reference; `looks` holds all of them, oldest first."""

    def __init__(self, reference: Reference, scale: np.ndarray, whiten: np.ndarray, tolerance: float = TOLERANCE):
        self.looks: list[Look] = []
        self.patients = 0
        self._reference, self._scale, self._whiten, self._tolerance = reference, scale, whiten, tolerance
        self._recent: deque[np.ndarray] = deque(maxlen=WINDOW)

    def add(self, values: np.ndarray) -> list[Look]:
        """Take in patients [n, d] and return the looks that give alarm; the window starts anew after each."""
        unit = ((values - self._reference.mean) / self._scale).clip(-CLIP, CLIP) - self._reference.centre
        alarms = []
        for row in unit:
            self.patients += 1
            self._recent.append(row)
            if self.patients % LOOK == 0 and len(self._recent) >= FIRST:
                self.looks.append(self._look())
                if self.looks[-1].alarm:
                    alarms.append(self.looks[-1])
                    self._recent.clear()
        return alarms

    def _look(self) -> Look:
        shift = np.mean(self._recent, axis=0)
        bound = limit(len(self._recent), self._reference.count, len(self._scale), self._tolerance)
        return Look(self.patients, float(np.linalg.norm(shift @ self._whiten)), bound, shift)


@lru_cache(maxsize=4096)
def limit(window: int, reference: int, features: int, tolerance: float) -> float:
    """Return the distance that means of so many patients exceed with chance `LEVEL` if the true one is `tolerance`.

    The squared distance of two means of d uncorrelated features, over 1/window + 1/reference, is noncentral
    chi-square with d degrees of freedom.
    """
    from scipy.stats import ncx2

    spread = 1 / window + 1 / reference
    return float(np.sqrt(ncx2.isf(LEVEL, features, tolerance**2 / spread) * spread))
