"""Exercises of notebooks/08_deployment_and_monitoring.ipynb."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlab_kit.lab.exercises import Hint, call, exercise, number

HOSPITALS, PATIENTS, LOOK, FEATURES, LEVEL = 4, 10_000, 10, 30, 0.001


@exercise("08-1")
def version_in_service(answer: Any) -> str:
    """What serves after promote 1, 2, 3, rollback, promote 4, rollback, rollback."""
    given = number(answer, "the number of a version")
    hints = {
        2: "That is where the second rollback goes. There is a third.",
        3: "Version 3 was rolled back before 4 came: a rollback takes it off the pile for good.",
        4: "Two rollbacks came after 4 was promoted.",
    }
    if given == 1:
        return "1, 2, 3, back to 2, then 4, back to 2, back to 1. Nothing was deleted on the way."
    raise Hint(hints.get(int(given), "Keep a pile: promote puts a version on top, rollback takes the top one off."))


@exercise("08-2")
def false_alarms(answer: Any) -> str:
    """How many false alarms 30 tests at each look give at p <= 0.001 in four hospitals of 10,000 patients."""
    given = number(answer, "a number of alarms")
    looks = PATIENTS // LOOK
    truth = HOSPITALS * looks * FEATURES * LEVEL
    if abs(given - truth) < 0.5:
        return (
            f"{HOSPITALS} hospitals x {looks:,} looks x {FEATURES} features x {LEVEL}: nobody reads the {truth:.0f}th."
        )
    hints = {
        round(truth / HOSPITALS): "That is one hospital. There are four.",
        round(truth / FEATURES): "Every look makes 30 tests, one for each feature.",
        round(truth * LOOK): "A look comes every 10 patients, not at each of them.",
        round(truth / LEVEL): "That is how many tests there are. Each gives a false alarm with chance 0.001.",
    }
    raise Hint(hints.get(round(given), "Count the tests: hospitals x looks x features. Then times 0.001."))


@exercise("08-3")
def mahalanobis(answer: Any) -> str:
    """A function of reference [m, d] and recent [n, d] rows: the Mahalanobis distance of their means."""
    rng = np.random.default_rng(8)
    covariance = np.array([[4.0, 1.9, 0.0], [1.9, 1.0, 0.0], [0.0, 0.0, 9.0]])
    reference = rng.multivariate_normal([10.0, 5.0, 0.0], covariance, 300)
    recent = rng.multivariate_normal([11.0, 4.5, 1.0], covariance, 80)
    given = number(call(answer, reference.copy(), recent.copy()), "one number, the distance")
    shift, inside = recent.mean(0) - reference.mean(0), np.cov(reference.T)
    truth = float(np.sqrt(shift @ np.linalg.solve(inside, shift)))
    if np.isclose(given, truth, rtol=0.02):
        return "Half a unit against a correlation weighs more than one along it."
    mistakes = {
        truth**2: "That is the square of the distance.",
        float(np.linalg.norm(shift)): "That is the plain length of the shift: no covariance went in.",
        float(np.linalg.norm(shift / reference.std(0))): (
            "You divided each feature by its own spread. Features belong together: use the whole covariance."
        ),
        float(np.sqrt(shift @ inside @ shift)): "Multiply by the inverse of the covariance, not by the covariance.",
    }
    for wrong, hint in mistakes.items():
        if np.isclose(given, wrong, rtol=0.02):
            raise Hint(hint)
    raise Hint(f"It gives {given:.3g} where {truth:.3g} is right: shift, solve with the covariance, shift again, root.")
