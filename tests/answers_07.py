"""Right and wrong answers to the exercises on the hospitals; test_exercises.py tries them."""

import numpy as np


def merged(told, *, root=True, away=True):
    count, total, squares = (sum(row[k] for row in told) for k in range(3))
    variance = squares / count - (total / count) ** 2 * away
    return total / count, variance**0.5 if root else variance


def averaged(told):
    means = [total / count for count, total, _ in told]
    return sum(means) / len(means), 1.0


def of_deviations(told):
    stds = [(squares / count - (total / count) ** 2) ** 0.5 for count, total, squares in told]
    return merged(told)[0], sum(stds) / len(stds)


RIGHT = {
    "07-1": [merged, lambda told: list(merged(told)), lambda told: np.array(merged(told))],
    "07-2": [(0.7, -20), (100 / 143, -20.0), np.array([0.699, -20.0])],
    "07-3": [16_534, 16_534.0],
}
WRONG = {
    "07-1": [
        (averaged, "mean of the hospitals' means"),
        (of_deviations, "cannot be averaged"),
        (lambda told: merged(told, root=False), "That is the variance"),
        (lambda told: merged(told, away=False), "Take the square of the mean away"),
        (lambda told: (1.0, 1.0), "sum of all sums over the sum of all counts"),
        (lambda told: (merged(told)[0], 7.0), "mean of the squares less the square of the mean"),
        (lambda told: merged(told)[0], "as a pair"),
        (lambda told: (1, 2, 3), "two numbers and not 3"),
        (lambda: 1, "raised TypeError"),
        (3, "Give the function itself"),
    ],
    "07-2": [
        ((0.7, 20), "so its change is negative"),
        ((0.7, -3), "11 of 15 after"),
        ((-3.1, -20), "mean of the four hospitals' changes"),
        ((5, -20), "over 143 patients"),
        ((0.7, "much"), "a number, not a str"),
        ({"all": 0.7, "rural": -20}, "as a pair"),
        (0.7, "as a pair"),
        ("0.7, -20", "as a pair"),
    ],
    "07-3": [
        (16_520, "also has a header"),
        (49_430, "the whole model"),
        (24_722, "a layer between two halves is a quarter"),
        (4_130, "each takes 4 bytes"),
        (1, "30 to 64"),
        ("many", "one whole number of bytes, not a str"),
    ],
}
