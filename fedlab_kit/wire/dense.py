"""Codecs that send a value for every entry: floats, integer grids and signs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .codec import Codec, codec
from .steps import digits_bytes, exactly, pack_digits, pack_scales, unpack_bits, unpack_digits, unpack_scales

Floats = NDArray[np.float32]


@codec("fp32", id=1)
class FP32(Codec):
    """The numbers themselves, little endian: the baseline that every other codec is compared with."""

    dtype: torch.dtype = torch.float32

    @property
    def unbiased(self) -> bool:
        """Exact, or so nearly that no feedback is needed."""
        return True

    def encode(self, vector: Tensor, rng: np.random.Generator) -> bytes:
        """`dtype` for each entry; numbers outside its range become its largest."""
        if self.dtype != vector.dtype:
            most = torch.finfo(self.dtype).max
            vector = vector.clamp(-most, most).to(self.dtype)
        return vector.numpy().tobytes()

    def decode(self, body: bytes, size: int) -> Tensor:
        """The numbers as they came, NaN and infinity included: `unpack` refuses those."""
        return torch.frombuffer(bytearray(exactly(body, self.limit(size))), dtype=self.dtype).float()

    def bound(self, vector: Tensor) -> Tensor:
        """Nothing is lost."""
        return torch.zeros_like(vector)

    def limit(self, size: int) -> int:
        """Exactly this many bytes."""
        return self.dtype.itemsize * size


@codec("fp16", id=2)
class FP16(FP32):
    """Half-precision floats: half the bytes, three significant digits, at most 65,504."""

    dtype = torch.float16

    def bound(self, vector: Tensor) -> Tensor:
        """Half a unit in the last of 11 bits, half the smallest number near zero, and what is cut off."""
        size = vector.abs()
        return torch.maximum(size * 2**-11, torch.full_like(size, 2**-25)).maximum(size - 65504)


class Rounded(Codec):
    """Codes on a scale for each bucket, to which entries are rounded: to the nearest, or stochastically."""

    @property
    def unbiased(self) -> bool:
        """Stochastic rounding is right on average."""
        return self.rounding == "stochastic"


class Grid(Rounded):
    """Whole numbers -levels..levels times a step; each bucket has its own step, and zero stays zero.

    The step is the bucket's largest magnitude / levels. QSGD (Alistarh et al. 2017) with stochastic rounding.
    """

    levels: int

    def encode(self, vector: Tensor, rng: np.random.Generator) -> bytes:
        """A bfloat16 scale for each bucket, then the digits, as many to a byte as fit."""
        x = vector.numpy()
        packed, scale = self._scales(x)
        with np.errstate(invalid="ignore"):  # 0 / 0 in a bucket of zeros
            ratio = np.nan_to_num(x / scale) * self.levels
        lift = rng.random(len(x), np.float32) if self.rounding == "stochastic" else np.float32(0.5)
        digits = np.floor(ratio + lift).clip(-self.levels, self.levels) + self.levels
        return packed + pack_digits(digits.astype(np.uint8), 2 * self.levels + 1)

    def decode(self, body: bytes, size: int) -> Tensor:
        """Code times step."""
        step = _spread(body, self.bucket, size) / np.float32(self.levels)
        digits = unpack_digits(body[2 * -(-size // self.bucket) :], 2 * self.levels + 1, size)
        return torch.from_numpy((digits.astype(np.float32) - np.float32(self.levels)) * step)

    def bound(self, vector: Tensor) -> Tensor:
        """One step, or half of one when rounding to the nearest (and float32's own rounding)."""
        _, scale = self._scales(vector.numpy())
        share = (1 if self.rounding == "stochastic" else 0.5) / self.levels
        return torch.from_numpy(scale * (share + 2**-20) + self.levels * 2**-149)

    def limit(self, size: int) -> int:
        """Exactly this many bytes."""
        return 2 * -(-size // self.bucket) + digits_bytes(size, 2 * self.levels + 1)

    def _scales(self, x: Floats) -> tuple[bytes, Floats]:
        """The largest magnitude of each bucket, rounded upwards so that no code exceeds `levels`: packed, and [P]."""
        packed = pack_scales(np.maximum.reduceat(np.abs(x), _starts(x, self.bucket)), up=True)
        return packed, _spread(packed, self.bucket, len(x))


@codec("int8", id=3)
class Int8(Grid):
    """A byte for each entry: 255 values."""

    levels = 127


@codec("int4", id=4)
class Int4(Grid):
    """Half a byte for each entry: 15 values."""

    levels = 7


@codec("ternary", id=5)
class Ternary(Grid):
    """Minus, zero or plus: 1.6 bits for each entry. TernGrad (Wen et al. 2017) with stochastic rounding."""

    levels = 1


@codec("sign", id=6)
class Sign(Rounded):
    """One bit for each entry and a scale for each bucket; only a bucket of zeros stays zero.

    Nearest: the sign times the bucket's mean magnitude (Karimireddy et al. 2019; needs error feedback).
    Stochastic: plus or minus the bucket's largest magnitude, with the chances that make it right on average.
    """

    def encode(self, vector: Tensor, rng: np.random.Generator) -> bytes:
        """A bfloat16 scale for each bucket, then the bits, 1 for plus."""
        x = vector.numpy()
        packed, scale = self._scales(x)
        threshold = scale * (2 * rng.random(len(x), np.float32) - 1) if self.rounding == "stochastic" else 0
        return packed + np.packbits(x > threshold).tobytes()

    def decode(self, body: bytes, size: int) -> Tensor:
        """Sign times scale."""
        scale = _spread(body, self.bucket, size)
        plus = unpack_bits(body[2 * -(-size // self.bucket) :], size)
        return torch.from_numpy(np.where(plus, scale, -scale))

    def bound(self, vector: Tensor) -> Tensor:
        """The distance to the farther (stochastic) or the nearer (nearest) of plus and minus the scale."""
        scale = torch.from_numpy(self._scales(vector.numpy())[1])
        size = vector.abs()
        return size + scale if self.rounding == "stochastic" else (size - scale).abs()

    def limit(self, size: int) -> int:
        """Exactly this many bytes."""
        return 2 * -(-size // self.bucket) + -(-size // 8)

    def _scales(self, x: Floats) -> tuple[bytes, Floats]:
        """The largest (stochastic) or mean (nearest) magnitude of each bucket: packed, and [P]."""
        starts, size = _starts(x, self.bucket), np.abs(x)
        if self.rounding == "stochastic":
            packed = pack_scales(np.maximum.reduceat(size, starts), up=True)
        else:
            means = np.add.reduceat(size, starts, dtype=np.float64) / np.diff(starts, append=len(x))
            packed = pack_scales(means.astype(np.float32), up=False)
        return packed, _spread(packed, self.bucket, len(x))


def _starts(x: Floats, bucket: int) -> NDArray[np.int64]:
    """Where each bucket begins."""
    return np.arange(0, len(x), bucket)


def _spread(packed: bytes, bucket: int, size: int) -> Floats:
    """The scale of each entry's bucket [size], from the packed scales at the start of a body."""
    scales = unpack_scales(packed, -(-size // bucket))
    return np.repeat(scales, min(bucket, size))[:size]
