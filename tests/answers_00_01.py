"""Right and wrong answers to the exercises on the workbench and on federated rounds; test_exercises.py tries them."""

import numpy as np
import torch

import fedlab_kit as fk

STUDENT_FRAME = 14 + 4 * (784 * 64 + 64 + 64 * 32 + 32 + 32 * 10 + 10)
UP, DOWN = 2 * STUDENT_FRAME, 1 + 2 * STUDENT_FRAME  # SCAFFOLD, one client

RIGHT = {
    "00-1": [fk.Recipe(dtype="int8"), fk.Recipe(dtype="int8", prune_ratio=0.3), fk.Recipe(dtype="int4")],
    "01-1": [0.1, np.float64(0.1), torch.tensor(0.1)],
    "01-2": [
        lambda updates, samples: (torch.tensor(samples) / sum(samples)) @ updates,
        lambda updates, samples: np.average(updates.numpy(), axis=0, weights=samples),
        lambda updates, samples: sum(n * u for n, u in zip(samples, updates, strict=True)) / sum(samples),
    ],
    "01-3": [3 * UP + 5 * DOWN, float(3 * UP + 5 * DOWN)],
}
WRONG = {
    "00-1": [
        (fk.Recipe(), "more than a third"),
        (fk.Recipe(dtype="fp16"), "more than a third"),
        (fk.Recipe(prune_ratio=0.9), "takes as much room as any other number"),
        (fk.Recipe(dtype="int8", prune_ratio=0.99), "loses more than three points"),
        (fk.Recipe(prune="channel", prune_ratio=0.999), "cannot be used"),
        (fk.Experiment(), "Give a recipe"),
        ("int8", "Give a recipe"),
    ],
    "01-1": [
        (100.0, "the median is 10. Try a smaller"),
        (0.001, "the median is 1. Try a larger"),
        (-1, "above 0"),
        (float("nan"), "one number"),
        ("0.1", "one number"),
        ([0.1, 0.2], "one number, an alpha, not a list"),
    ],
    "01-2": [
        (lambda updates, samples: updates.mean(0), "plain mean"),
        (lambda updates, samples: torch.tensor(samples).float() @ updates, "add up to 1"),
        (lambda updates, samples: torch.tensor(samples).float() @ updates / len(samples), "number of clients"),
        (lambda updates, samples: updates.sum(0), "share of all samples"),
        (lambda updates, samples: updates, "shape of one update, [7850]"),
        (lambda updates, samples: "a mean", "must be a tensor"),
        (lambda updates, samples: None, "returns nothing yet"),
        (lambda updates, samples: ..., "returns nothing yet"),
        (lambda updates, samples: samples / 2, "raised TypeError"),
        (lambda updates: updates, "raised TypeError"),
        (torch.zeros(7850), "Give the function itself"),
    ],
    "01-3": [
        (3 * UP, "uplink alone"),
        (5 * DOWN, "downlink alone"),
        (3 * UP + 3 * DOWN, "were sent the model before"),
        (5 * UP + 5 * DOWN, "never answer"),
        (8 * STUDENT_FRAME + 5, "two vectors each way"),
        (2 * 8 * (STUDENT_FRAME - 14), "header"),
        (3 * UP + 5 * (DOWN - 1), "Nearly. Each broadcast begins"),
        (1, "Count the frames"),
        ("many", "one whole number of bytes, not a str"),
        (float("inf"), "one whole number of bytes"),
    ],
}
