"""Exercises of notebooks/03_quantization.ipynb."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedlab_kit.compression.quantize import grid_codes
from fedlab_kit.deployment.calibration import merge_ranges
from fedlab_kit.lab.exercises import Hint, call, exercise, number

LAYER = (128, 784)  # the first Linear of `mlp`, what 03-3 asks about


@exercise("03-1")
def to_int8(answer: Any) -> str:
    """A function weight -> (codes, scale): symmetric int8 with one scale, zero at code 0, nearest code."""
    normal = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    for weight in (normal.clamp(min=0.0), normal, -normal.abs() / 1000):
        _judge(weight, *_codes(answer, weight))
    codes, scale = _codes(answer, torch.zeros(2, 3))
    if codes.any() or not bool(torch.isfinite(scale).all()):
        raise Hint("A layer of zeros must give codes 0 and a finite scale: do not divide by zero.")
    return "Every value comes back within half a step, and zero comes back as zero."


def _codes(answer: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Call the learner's function and look at what kind of thing it gives."""
    found = call(answer, weight.clone())
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], Tensor):
        raise Hint("Return two things: a tensor of codes, and the scale.")
    codes, scale = found[0], torch.as_tensor(found[1], dtype=torch.float32)
    if codes.dtype == torch.uint8:
        raise Hint("uint8 has no negative codes, and zero would need a code of its own: use torch.int8.")
    if codes.dtype != torch.int8:
        raise Hint(f"The codes must be torch.int8, one byte each, not {codes.dtype}.")
    if codes.shape != weight.shape or scale.numel() != 1:
        raise Hint("The codes must have the shape of the weight, and the scale must be one number.")
    return codes, scale


def _judge(weight: Tensor, codes: Tensor, scale: Tensor) -> None:
    back = codes * scale
    step = float(weight.abs().max()) / 127
    if bool((codes[weight == 0] != 0).any()):
        raise Hint("Zero must have code 0, or pruned weights come back: no offset, only a scale.")
    if bool((back * weight < 0).any()):
        raise Hint("Some values change their sign: codes beyond 127 wrap around when they are cast to int8.")
    error = float((back - weight).abs().max())
    if error <= 0.51 * step:
        return
    if error <= 1.01 * step and int(codes.abs().max()) >= 126:
        raise Hint("The error reaches a whole step: round to the nearest code, a cast cuts off.")
    raise Hint(f"The largest error is {error / step:.1f} steps of largest magnitude / 127; half a step is possible.")


@exercise("03-2")
def merge(answer: Any) -> str:
    """A function of the clients' answers, a list of {name: (low, high)}, that gives the server's ranges."""
    clients = [{"a": (-1.0, 2.0), "b": (0.0, 5.0)}, {"a": (-3.0, 1.0), "b": (0.5, 4.0)}, {"a": (-2.0, 1.5)}]
    truth = merge_ranges([{n: (torch.tensor(v[0]), torch.tensor(v[1])) for n, v in c.items()} for c in clients])  # type: ignore[misc]
    wanted = {name: (float(low), float(high)) for name, (low, high) in truth.items()}
    found = _ranges(call(answer, clients))
    if found == wanted:
        return "The same ranges as if the server had seen all samples together."
    if set(found) != set(wanted):
        raise Hint(f"The activations are {', '.join(wanted)}; yours are {', '.join(found) or 'none'}.")
    if found["a"] == (-2.0, 1.5):
        raise Hint("With the mean of the ranges, values of some clients lie outside and are cut off.")
    if found["a"] == (-1.0, 1.0):
        raise Hint("That is where all clients overlap. The range must hold the values of every client.")
    raise Hint(f"For the first activation yours is {found['a']}. Which low and which high hold all values?")


def _ranges(found: Any) -> dict[str, tuple[float, float]]:
    try:
        return {str(name): (float(low), float(high)) for name, (low, high) in found.items()}
    except (AttributeError, TypeError, ValueError):
        raise Hint("Return a dictionary: the activation's name -> (low, high).") from None


@exercise("03-3")
def bits_per_weight(answer: Any) -> str:
    """The bits that one weight of the first Linear layer of `mlp` takes in the int4 file, scales included."""
    given = number(answer, "a number of bits")
    codes, scale = grid_codes(torch.zeros(LAYER), "int4")
    size = codes.numel() // 2 + 4 * scale.numel()
    truth = 8 * size / codes.numel()
    if abs(given - truth) < 0.01:
        return f"{size:,} bytes for {codes.numel():,} weights, {truth:.2f} bits each."
    hints = {
        4.0: "Those are the codes alone. Each row has a scale too, a float of 32 bits.",
        36.0: "The scale is there once for all weights of its row, not once for each.",
        8 * size: "That is the size of the layer in bits: divide by its number of weights.",
        size: "That is the size of the layer in bytes: how many bits is that for one weight?",
    }
    raise Hint(hints.get(round(given, 2), "A row has 784 codes of 4 bits, and one scale of 32 bits."))
