"""Right and wrong answers to the exercises on pruning and quantization; test_exercises.py tries them."""

import numpy as np
import torch

import fedlab_kit as fk

KEPT = 90 + 21_750 - 19_575  # of cnn at mask ratio 0.9: all biases, a tenth of the weights
INT4 = 128 * (392 + 4)  # bytes of the first layer of mlp: rows, codes and scale


def largest(weights, ratio):
    mask = torch.zeros(weights.numel(), dtype=torch.bool)
    mask[weights.abs().flatten().argsort(descending=True)[: round((1 - ratio) * weights.numel())]] = True
    return mask.view_as(weights)


def to_int8(weight):
    scale = weight.abs().max().clamp(min=1e-30) / 127
    return (weight / scale).round().to(torch.int8), scale


def merge(clients):
    names = {name for client in clients for name in client}
    held = {name: [client[name] for client in clients if name in client] for name in names}
    return {name: (min(low for low, _ in r), max(high for _, high in r)) for name, r in held.items()}


def mean_of_ranges(clients):
    ranges = {name: np.mean([c[name] for c in clients if name in c], axis=0) for name in ("a", "b")}
    return {name: tuple(r) for name, r in ranges.items()}


RIGHT = {
    "02-1": [
        largest,
        lambda weights, ratio: largest(weights, ratio).float(),
        lambda weights, ratio: largest(weights, ratio).numpy(),
        lambda weights, ratio: weights.abs() >= weights.abs().quantile(ratio),
    ],
    "02-2": [14 + 4 * KEPT, float(14 + 4 * KEPT)],
    "02-3": [fk.Recipe(prune="channel", prune_ratio=0.6), fk.Recipe(prune="channel", prune_ratio=0.58)],
    "03-1": [to_int8, lambda weight: (to_int8(weight)[0], float(to_int8(weight)[1]))],
    "03-2": [merge, lambda clients: {name: list(r) for name, r in merge(clients).items()}],
    "03-3": [8 * INT4 / 100_352, 4.04],
}
WRONG = {
    "02-1": [
        (lambda weights, ratio: ~largest(weights, ratio), "True means kept"),
        (lambda weights, ratio: weights >= weights.quantile(ratio), "compare magnitudes"),
        (lambda weights, ratio: weights * largest(weights, ratio), "not the weights themselves"),
        (lambda weights, ratio: weights.abs() > weights.abs().quantile(ratio), "600 must stay, yours keeps 599"),
        (lambda weights, ratio: weights.abs() > 1, "must stay, yours keeps"),
        (lambda weights, ratio: largest(weights.roll(1), ratio), "a smaller magnitude than a removed one"),
        (lambda weights, ratio: largest(weights, ratio)[0], "shape of the weights, [2, 2], not [2]"),
        (lambda weights, ratio: "mask", "must be a tensor, not a str"),
        (lambda weights, ratio: None, "returns nothing yet"),
        (lambda weights: weights, "raised TypeError"),
        (0.5, "Give the function itself"),
    ],
    "02-2": [
        (14 + 4 * 21_840, "dense payload"),
        (4 * KEPT, "begins with a header"),
        (4 * 2184, "90 biases"),
        (14 + 4 * 2175, "90 biases"),
        (14 + 8 * KEPT, "No positions"),
        (14 + 4 * 19_575, "counts what was removed"),
        (1, "Count the numbers that are left"),
        ("2265", "one whole number of bytes"),
        (float("nan"), "one whole number of bytes"),
    ],
    "02-3": [
        (fk.Recipe(), "The file has 87,982 bytes and must fit in 20,000"),
        (fk.Recipe(prune_ratio=0.9), "still has 87,982 bytes: a zero takes as much room"),
        (fk.Recipe(prune="channel", prune_ratio=0.5), "must fit"),
        (fk.Recipe(prune="channel", prune_ratio=0.65), "with less removed it would still fit"),
        (fk.Recipe(prune="channel", prune_ratio=0.99), "would remove all 10 channels"),
        (fk.Recipe(prune="channel", prune_ratio=0.6, dtype="int8"), "Leave dtype at fp32"),
        (0.6, "Give a recipe"),
    ],
    "03-1": [
        (lambda w: ((w / w.abs().max() * 255).to(torch.int32).to(torch.int8), w.abs().max() / 255), "wrap around"),
        (lambda w: (((w - w.min()) * 255).to(torch.uint8), 1 / 255), "uint8 has no negative codes"),
        (lambda w: (to_int8(w)[0] + torch.tensor(1, dtype=torch.int8), 1.0), "Zero must have code 0"),
        (lambda w: ((w / to_int8(w)[1]).to(torch.int8), to_int8(w)[1]), "a cast cuts off"),
        (lambda w: ((w * 10).round().to(torch.int8), 0.1), "half a step is possible"),
        (lambda w: ((w / (w.abs().max() / 127)).round().nan_to_num(9).to(torch.int8), w.abs().max()), "step"),
        (lambda w: (to_int8(w)[0] if w.any() else w.char() + 1, to_int8(w)[1]), "do not divide by zero"),
        (lambda w: (to_int8(w)[0], torch.tensor(0.0) / w.abs().max() + to_int8(w)[1]), "do not divide by zero"),
        (lambda w: to_int8(w)[0], "Return two things"),
        (lambda w: (w.round(), 1.0), "must be torch.int8"),
        (lambda w: (to_int8(w)[0].flatten(), to_int8(w)[1]), "shape of the weight"),
        (lambda w: None, "returns nothing yet"),
        (torch.zeros(3), "Give the function itself"),
    ],
    "03-2": [
        (mean_of_ranges, "some clients lie outside"),
        (lambda clients: {name: (max(0.0, -1.0) - 1, 1.0) for name in ("a", "b")}, "every client"),
        (lambda clients: {"a": (-3.0, 1.0), "b": (0.0, 5.0)}, "yours is (-3.0, 1.0)"),
        (lambda clients: clients[2], "The activations are a, b; yours are a"),
        (lambda clients: [(-3.0, 2.0)], "Return a dictionary"),
        (lambda clients: {"a": 3, "b": 4}, "Return a dictionary"),
        (lambda clients: clients["a"], "raised TypeError"),
        ({"a": (-3.0, 2.0)}, "Give the function itself"),
    ],
    "03-3": [
        (4, "the codes alone"),
        (36, "once for all weights"),
        (8 * INT4, "divide by its number of weights"),
        (INT4, "how many bits"),
        (32, "one scale of 32 bits"),
        ("4.04", "a number of bits"),
    ],
}
