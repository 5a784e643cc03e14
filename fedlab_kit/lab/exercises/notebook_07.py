"""Exercises of notebooks/07_hospitals.ipynb."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import numpy as np

from fedlab_kit.lab.exercises import Hint, call, exercise, number
from fedlab_kit.site_tables import Moments
from fedlab_kit.wire.frame import HEADER

TABLES = ([50.0, 60.0, 70.0, 60.0], [80.0, 90.0])  # one feature at two hospitals of 07-1
HITS = {"university": (54, 57, 60), "city": (38, 39, 40), "county": (26, 26, 28), "rural": (14, 11, 15)}
"""Before, after and patients of 07-2, as the notebook tells them."""


@exercise("07-1")
def merged_moments(answer: Any) -> str:
    """A function of a list of (count, sum, sum of squares) that gives mean and standard deviation of all patients."""
    parts = [Moments.of(np.array(table)[:, None]) for table in TABLES]
    told = [(part.count, float(part.sums[0]), float(part.squares[0])) for part in parts]
    mean, std = _pair(call(answer, told), "the mean and the standard deviation")
    pooled = np.concatenate(TABLES)
    if abs(mean - pooled.mean()) > 1e-6:
        averaged = abs(mean - np.mean([np.mean(table) for table in TABLES])) < 1e-6
        raise Hint(
            "That is the mean of the hospitals' means: the small hospital counts as much as the large one."
            if averaged
            else "The mean is the sum of all sums over the sum of all counts."
        )
    if abs(std - pooled.std()) > 1e-6:
        hints = {
            pooled.var(): "That is the variance; the standard deviation is its root.",
            float(np.mean([np.std(table) for table in TABLES])): "Standard deviations cannot be averaged: the "
            "hospitals' means differ too.",
            float(np.sqrt(np.mean(pooled**2))): "Take the square of the mean away before the root.",
        }
        near = [hint for value, hint in hints.items() if abs(std - value) < 1e-6]
        raise Hint(near[0] if near else "The variance is the mean of the squares less the square of the mean.")
    return f"Mean {mean:.2f} and standard deviation {std:.2f}, and no patient has left a hospital."


@exercise("07-2")
def mean_and_worst(answer: Any) -> str:
    """By how many points the accuracy of all patients and that of the rural hospital change, as a pair."""
    change, rural = _pair(answer, "two numbers, all patients and rural")
    before, after, patients = (sum(row[k] for row in HITS.values()) for k in range(3))
    truth = 100 * (after - before) / patients
    worst = 100 * (HITS["rural"][1] - HITS["rural"][0]) / HITS["rural"][2]
    if abs(rural - worst) > 0.06:
        sign = abs(rural + worst) < 0.06
        raise Hint("Rural loses, so its change is negative." if sign else "Rural: 14 of 15 before, 11 of 15 after.")
    if abs(change - truth) > 0.06:
        mean = np.mean([100 * (a - b) / n for b, a, n in HITS.values()])
        raise Hint(
            "That is the mean of the four hospitals' changes. Here every patient counts alike."
            if abs(change - mean) < 0.06
            else "All patients: add the hits of the four hospitals before and after, over 143 patients, in points."
        )
    return f"All together gain {truth:.1f} points while rural loses {-worst:.0f}: the large hospitals drown it out."


@exercise("07-3")
def slice_bytes(answer: Any) -> str:
    """The payload in fp32 of half of the mlp on 30 features and two classes."""
    given = number(answer, "one whole number of bytes")
    half, whole = _weights(0.5), _weights(1.0)
    truth = HEADER.size + 4 * half
    if given == truth:
        return f"{half:,} of {whole:,} weights, 4 bytes each, and a header of {HEADER.size}."
    hints = {
        4 * half: "Those are the weights alone; the frame also has a header.",
        HEADER.size + 4 * whole: "That is the whole model.",
        HEADER.size
        + 2 * whole: "Half of the units is not half of the weights: a layer between two halves is a quarter.",
        half: "That is the number of weights; each takes 4 bytes, and there is a header.",
    }
    raise Hint(hints.get(int(given), "The halves are 30 to 64, 64 to 32 and 32 to 2, each with its biases."))


def _weights(share: float) -> int:
    first, second = int(128 * share), int(64 * share)
    return 30 * first + first + first * second + second + second * 2 + 2


def _pair(answer: Any, what: str) -> tuple[float, float]:
    if isinstance(answer, str) or not isinstance(answer, Sized) or not hasattr(answer, "__getitem__"):
        raise Hint(f"This takes {what}, as a pair: `a, b`.")
    if len(answer) != 2:
        raise Hint(f"This takes {what}, two numbers and not {len(answer)}.")
    try:
        return number(answer[0], "a number"), number(answer[1], "a number")
    except (KeyError, TypeError):
        raise Hint(f"This takes {what}, as a pair: `a, b`.") from None
