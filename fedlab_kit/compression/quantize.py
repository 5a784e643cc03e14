"""One grid per dtype, shared by training and export, and fake quantization on it.

The grids are those of onnxruntime's quantizers, bit for bit, so the codes that training sees are the codes in the
deployed file. They cover weights: a tensor needs two dimensions or more to be quantized (biases and norms stay
float), a convolution of fewer than four channels stays float in `int8`, because that is faster, and `int4` exists for
Linear weights alone, as in the runtime. Activations are not simulated in training; the static export quantizes them to
8 bits with ranges that the clients measure afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

DTYPES = ("fp32", "fp16", "int8", "int4")
NARROW = 4  # with fewer input channels the runtime's int8 convolution takes 1.3 to 2.8 times as long as its float one
BLOCK = 32  # input features that share one int4 scale
_TINY = torch.finfo(torch.float32).tiny


class Codes(NamedTuple):
    """Integer codes int8 [..] and the float32 scale of each group; a value is `scale * code`."""

    codes: Tensor
    scale: Tensor


def applies(weight: Tensor, dtype: str, stacked: bool = False) -> bool:
    """Say whether the grid of `dtype` is used for a weight of this shape. Raises ValueError on an unknown dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    shape = weight.shape[stacked:]
    linear, convolution = len(shape) == 2, len(shape) > 2 and shape[1] >= NARROW
    return {"fp32": False, "fp16": True, "int8": linear or convolution, "int4": linear}[dtype]


def int8_codes(weight: Tensor, stacked: bool = False) -> Codes:
    """Quantize a weight [out, in, ...] symmetrically, one scale for each output channel, codes -127..127.

    With `stacked`, a leading dimension holds one weight per client and each is quantized by itself.
    The scale has the weight's rank, so `codes * scale` broadcasts. Zero is code 0 (Jacob et al. 2018).
    """
    largest = weight.abs().amax(dim=tuple(range(1 + stacked, weight.ndim)), keepdim=True)
    scale = (largest.double() / 127).to(weight.dtype)
    scale = torch.where(scale < _TINY, torch.ones_like(scale), scale)
    return Codes(torch.round(weight / scale).clamp(-127, 127).to(torch.int8), scale)


def int4_codes(weight: Tensor) -> Codes:
    """Quantize a weight [..., out, in] in blocks of 32 inputs, codes -8..7; zero is code 0.

    Codes are [..., out, blocks, 32] (the last block padded with zeros), scales [..., out, blocks, 1]. The value of
    largest magnitude in a block gets code -8, so the scale carries the opposite sign of that value.
    """
    blocks = pad(weight, (0, -weight.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    scale = torch.where(high.abs() > low.abs(), high, low) / -8
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    # floor(v + 0.5) on 0..15 is the runtime's rounding, halves away from zero
    codes = torch.floor(blocks * inverse + 8.5).clamp(0, 15) - 8
    return Codes(codes.to(torch.int8), scale)


def quantized(weight: Tensor, dtype: str, stacked: bool = False) -> Tensor:
    """Return the values that a weight takes on the grid of `dtype`, same shape; unchanged where none applies."""
    if not applies(weight, dtype, stacked):
        return weight
    if dtype == "fp16":
        return weight.to(torch.float16).to(weight.dtype)
    codes, scale = int4_codes(weight) if dtype == "int4" else int8_codes(weight, stacked)
    values = codes.to(weight.dtype) * scale
    return values.flatten(-2)[..., : weight.shape[-1]] if dtype == "int4" else values


def fake_quantize(weight: Tensor, dtype: str) -> Tensor:
    """Round a weight to the grid of `dtype` and let the gradient pass as if nothing had happened.

    The straight-through estimator of Bengio et al. 2013, as in quantization-aware training (Jacob et al. 2018).
    The value is exactly the grid's, not weight + error.
    """
    if not applies(weight, dtype):
        return weight
    return quantized(weight.detach(), dtype) + (weight - weight.detach())
