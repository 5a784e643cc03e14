"""Right and wrong answers to the exercises of notebook 08, and the hint that each wrong one must get."""

import numpy as np


def right(reference, recent):
    shift = recent.mean(0) - reference.mean(0)
    return np.sqrt(shift @ np.linalg.solve(np.cov(reference.T), shift))


def by_whitening(reference, recent):
    spread, axes = np.linalg.eigh(np.cov(reference.T))
    return np.linalg.norm(((recent.mean(0) - reference.mean(0)) @ axes) / np.sqrt(spread))


def moved(reference, recent):
    return recent.mean(0) - reference.mean(0)


RIGHT = {
    "08-1": [1, 1.0],
    "08-2": [120, 4 * 1000 * 30 * 0.001],
    "08-3": [right, by_whitening],
}
WRONG = {
    "08-1": [
        (2, "There is a third"),
        (3, "takes it off the pile"),
        (4, "Two rollbacks came after"),
        (0, "Keep a pile"),
        ("1", "the number of a version, not '1'"),
        ([1], "the number of a version, not a list"),
    ],
    "08-2": [
        (30, "There are four"),
        (4, "one for each feature"),
        (1200, "every 10 patients"),
        (120_000, "how many tests there are"),
        (7, "Count the tests"),
        (float("nan"), "a number of alarms"),
    ],
    "08-3": [
        (lambda reference, recent: right(reference, recent) ** 2, "the square of the distance"),
        (lambda reference, recent: np.linalg.norm(moved(reference, recent)), "plain length of the shift"),
        (lambda reference, recent: np.linalg.norm(moved(reference, recent) / reference.std(0)), "belong together"),
        (
            lambda reference, recent: np.sqrt(
                moved(reference, recent) @ np.cov(reference.T) @ moved(reference, recent)
            ),
            "inverse of the covariance",
        ),
        (lambda reference, recent: 99.0, "It gives 99 where"),
        (lambda reference, recent: None, "returns nothing yet"),
        (lambda reference: 1.0, "raised TypeError"),
        (lambda reference, recent: moved(reference, recent), "one number, the distance"),
        (3, "Give the function itself"),
    ],
}
