"""One grid per dtype, shared by training and export, and fake quantization on it.

The codes that training sees are those in the deployed file, bit for bit. A tensor of two dimensions or more has one
scale for each index of its first axis: in `int8` the largest magnitude gets code 127 or -127, in `int4` and `int2` the
largest value gets the lowest code, -8 or -2, which takes a scale of either sign, uses all codes and keeps zero at code
0. Scales and biases are rounded to bfloat16: half of their bytes in the file are then zeros. Activations are not
simulated; the static export quantizes them to 8 bits with ranges that the clients measure afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = ("fp32", "fp16", "int8", "int4", "int2")
LOWEST = {"int8": -127, "int4": -8, "int2": -2}  # code of each grid; the highest are 127, 7 and 1
_TINY = torch.finfo(torch.float32).tiny


class Codes(NamedTuple):
    """Integer codes int8 [..] and float32 scales that broadcast to them; a value is `scale * code`."""

    codes: Tensor
    scale: Tensor


def grid_codes(weight: Tensor, dtype: str, channels: tuple[int, ...] = (0,)) -> Codes:
    """Quantize a weight to codes of "int8", "int4" or "int2", with a scale for each index of the axes `channels`.

    Values that are on the grid already keep their codes and their scale: the largest stays the largest, and a float32
    holds every product of a bfloat16 and a code (Jacob et al. 2018 for int8; for int4 as in onnxruntime).
    """
    rest = tuple(axis for axis in range(weight.ndim) if axis not in channels)
    low, high = weight.amin(rest, keepdim=True), weight.amax(rest, keepdim=True)
    largest = torch.maximum(high, -low) if dtype == "int8" else torch.where(high > -low, -high, -low)
    scale = bfloat16(largest / -LOWEST[dtype])
    scale = torch.where(scale.abs() < _TINY, torch.ones_like(scale), scale)
    highest = 127 if dtype == "int8" else -LOWEST[dtype] - 1
    return Codes(torch.round(weight / scale).clamp(LOWEST[dtype], highest).to(torch.int8), scale)


def bfloat16(values: Tensor) -> Tensor:
    """Round to the nearest values that bfloat16 holds; the type stays."""
    return values.to(torch.bfloat16).to(values.dtype)


def quantized(tensor: Tensor, dtype: str, channels: tuple[int, ...] = (0,)) -> Tensor:
    """Return a tensor's values in `dtype`: a weight's on its grid, "bf16" for a bias. ValueError on an unknown one."""
    if dtype in LOWEST:
        codes, scale = grid_codes(tensor, dtype, channels)
        return codes.to(tensor.dtype) * scale
    if dtype not in (*DTYPES, "bf16"):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return tensor.to(kinds[dtype]).to(tensor.dtype)


def fake_quantize(weight: Tensor, dtype: str) -> Tensor:
    """Round to the grid and let the gradient pass: straight-through (Bengio et al. 2013, Jacob et al. 2018)."""
    return quantized(weight.detach(), dtype) + (weight - weight.detach())


def weight_dtypes(names: Iterable[str], dtype: str, keep: str) -> dict[str, str]:
    """Say which dtype each weight gets, named in the order of the network: with `keep` "ends", int8 at both ends."""
    given = dict.fromkeys(names, dtype)
    if keep == "ends" and dtype in ("int4", "int2") and given:
        given[next(iter(given))] = given[next(reversed(given))] = "int8"
    return given


def parameter_dtypes(shapes: Mapping[str, tuple[int, ...]], dtype: str, keep: str) -> dict[str, str]:
    """Say which dtype each parameter gets, by the parameters' names and shapes; none where it stays as it is.

    Weights are called so and have two dimensions or more, their biases have one; normalization must not be among them.
    A recurrent layer's two directions lie in one tensor of the file.
    """
    weights = [name for name, shape in shapes.items() if len(shape) > 1 and "weight" in name.rpartition(".")[2]]
    biases = [name for name, shape in shapes.items() if len(shape) == 1 and "bias" in name.rpartition(".")[2]]
    given = weight_dtypes((name.removesuffix("_reverse") for name in weights), dtype, keep)
    return {name: given[name.removesuffix("_reverse")] for name in weights} | dict.fromkeys(biases, "bf16")
