"""Codecs: one float32 vector [P], all tensors of the model end to end, as a packed body and back.

Frames, checksums and the entropy coder stand around a body in `frame.py`; a codec knows nothing about them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

import fedlab_kit.wire.bit_packing as packing

from ..catalog import add_table
from .bit_packing import exactly

Rounding = Literal["stochastic", "nearest"]
Floats = NDArray[np.float32]
AnyCodec = TypeVar("AnyCodec", bound="type[Codec]")

CODECS: dict[str, type[Codec]] = {}
"""Name -> class, the built-in ones first."""

add_table("codec", CODECS)

OWN_IDS = 128  # numbers from here on belong to codecs that a user registers


class Codec:
    """What travels: subclass it, write `encode` and `decode`, and register it with `@codec("name")`.

    Every codec has the same four settings and reads those that it needs: `keep`, the share of entries sent,
    above 0 and at most 1; `bucket`, how many neighbouring entries share a scale; `rounding`, stochastic
    (right on average) or nearest (the smaller error, for error feedback); `values`, the codec of the entries
    that `topk` keeps. `name` and `id` come from the decorator.
    """

    name: str
    id: int

    def __init__(
        self, keep: float = 0.01, bucket: int = 512, rounding: Rounding = "stochastic", values: str = "fp16"
    ) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {keep}")
        if bucket < 1:
            raise ValueError(f"bucket must be a whole number, at least 1, got {bucket}")
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(f"rounding must be one of stochastic, nearest, got {rounding!r}")
        self.keep, self.bucket, self.rounding, self.values = keep, bucket, rounding, values

    @property
    def unbiased(self) -> bool:
        """Whether decode(encode(x)) is x on average; a biased codec needs error feedback."""
        return False

    def encode(self, vector: Tensor, rng: Generator) -> bytes:
        """Pack a finite float32 vector [P] into `bytes`; every random choice is drawn from `rng`."""
        raise NotImplementedError

    def decode(self, body: bytes, size: int) -> Tensor:
        """Unpack a finite float32 tensor [size]; PayloadError when `body` is not what `encode` writes for it."""
        raise NotImplementedError

    def limit(self, size: int) -> int:
        """The longest body in bytes that `encode` writes for `size` entries; more is refused unread."""
        return 64 + 8 * size


def codec(name: str, *, id: int | None = None) -> Callable[[AnyCodec], AnyCodec]:
    """Register the class below under a name: `@codec("mine")`. Registering the name again replaces it.

    `id` is the byte that marks its payloads; it is derived from the name unless given. The name of a built-in
    codec and what is no subclass of `Codec` raise ValueError.
    """

    def register(cls: AnyCodec) -> AnyCodec:
        """Give the class its name and id, and enter it among the codecs."""
        if not (isinstance(cls, type) and issubclass(cls, Codec)):
            raise ValueError(f"codec {name!r} must be a subclass of fk.Codec, got {cls!r}")
        if id is None and name in CODECS and CODECS[name].id < OWN_IDS:
            raise ValueError(f"codec {name!r} is built in and cannot be replaced: choose another name")
        cls.name = name
        cls.id = OWN_IDS + zlib.crc32(name.encode()) % (256 - OWN_IDS) if id is None else id
        CODECS[name] = cls
        return cls

    return register


def make(name: str, **settings: Any) -> Codec:
    """The codec of a name with the settings of `Codec`; ValueError names the field, the value and what is allowed."""
    if name not in CODECS:
        raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {name!r}")
    try:
        return CODECS[name](**settings)
    except TypeError as error:
        raise ValueError(f"codec {name!r} must take the settings of fk.Codec: {error}") from error


@codec("fp32", id=1)
class FP32(Codec):
    """The numbers themselves, little endian: the baseline that every other codec is compared with."""

    dtype: torch.dtype = torch.float32
    unbiased = True  # exact, or so nearly that no feedback is needed

    def encode(self, vector: Tensor, rng: Generator) -> bytes:
        """`dtype` for each entry; numbers outside its range become its largest."""
        if self.dtype != vector.dtype:
            most = torch.finfo(self.dtype).max
            vector = vector.clamp(-most, most).to(self.dtype)
        return vector.numpy().tobytes()

    def decode(self, body: bytes, size: int) -> Tensor:
        """The numbers as they came, NaN and infinity included: `unpack` refuses those."""
        return torch.frombuffer(bytearray(exactly(body, self.limit(size))), dtype=self.dtype).float()

    def limit(self, size: int) -> int:
        """Exactly this many bytes."""
        return self.dtype.itemsize * size


@codec("fp16", id=2)
class FP16(FP32):
    """Half-precision floats: half the bytes, three significant digits, at most 65,504."""

    dtype = torch.float16


class Grid(Codec):
    """A bfloat16 scale for each bucket of neighbours, then a digit below `base` for each entry, several to a byte.

    The digits are the whole numbers -levels..levels, times a step of scale / levels; the scale is the bucket's largest
    magnitude, and zero stays zero. QSGD (Alistarh et al. 2017) with stochastic rounding.
    """

    base: int

    @property
    def unbiased(self) -> bool:
        """Stochastic rounding is right on average."""
        return self.rounding == "stochastic"

    def encode(self, vector: Tensor, rng: Generator) -> bytes:
        """The scales, then the digits."""
        x = vector.numpy()
        scales = self._scales(x)
        return scales + packing.pack_digits(self._digits(x, self._spread(scales, len(x)), rng), self.base)

    def decode(self, body: bytes, size: int) -> Tensor:
        """What each digit stands for on the scale of its bucket."""
        scale = self._spread(body, size)
        digits = packing.unpack_digits(body[2 * -(-size // self.bucket) :], self.base, size)
        return torch.from_numpy(self._values(digits, scale))

    def limit(self, size: int) -> int:
        """Exactly this many bytes."""
        return 2 * -(-size // self.bucket) + -(-size // packing.digits_per_byte(self.base))

    def _scales(self, x: Floats) -> bytes:
        """The largest magnitude of each bucket, packed; rounded upwards, so that no digit exceeds it."""
        return packing.pack_scales(np.maximum.reduceat(np.abs(x), np.arange(0, len(x), self.bucket)), up=True)

    def _spread(self, body: bytes, size: int) -> Floats:
        """The scale of each entry [size], from the scales at the head of a body."""
        scales = packing.unpack_scales(body, -(-size // self.bucket))
        return np.repeat(scales, min(self.bucket, size))[:size]

    def _digits(self, x: Floats, scale: Floats, rng: Generator) -> NDArray[Any]:
        with np.errstate(invalid="ignore"):  # 0 / 0 in a bucket of zeros
            ratio = np.nan_to_num(x / scale) * (levels := self.base // 2)
        lift = rng.random(len(x), np.float32) if self.rounding == "stochastic" else np.float32(0.5)
        return np.floor(ratio + lift).clip(-levels, levels) + levels

    def _values(self, digits: NDArray[np.uint8], scale: Floats) -> Floats:
        levels = np.float32(self.base // 2)
        return (digits.astype(np.float32) - levels) * (scale / levels)


@codec("int8", id=3)
class Int8(Grid):
    """A byte for each entry: 255 values."""

    base = 255


@codec("int4", id=4)
class Int4(Grid):
    """Half a byte for each entry: 15 values."""

    base = 15


@codec("ternary", id=5)
class Ternary(Grid):
    """Minus, zero or plus: 1.6 bits for each entry. TernGrad (Wen et al. 2017) with stochastic rounding."""

    base = 3


@codec("sign", id=6)
class Sign(Grid):
    """One bit for each entry, 1 for plus, and a scale for each bucket; only a bucket of zeros stays zero.

    Nearest: the sign times the bucket's mean magnitude (Karimireddy et al. 2019; needs error feedback).
    Stochastic: plus or minus the bucket's largest magnitude, with the chances that make it right on average.
    """

    base = 2

    def _digits(self, x: Floats, scale: Floats, rng: Generator) -> NDArray[Any]:
        threshold = scale * (2 * rng.random(len(x), np.float32) - 1) if self.rounding == "stochastic" else 0
        return x > threshold

    def _values(self, digits: NDArray[np.uint8], scale: Floats) -> Floats:
        return np.where(digits, scale, -scale)

    def _scales(self, x: Floats) -> bytes:
        if self.rounding == "stochastic":
            return super()._scales(x)
        starts = np.arange(0, len(x), self.bucket)
        means = np.add.reduceat(np.abs(x), starts, dtype=np.float64) / np.diff(starts, append=len(x))
        return packing.pack_scales(means.astype(np.float32), up=False)


@codec("topk", id=7)
class TopK(Codec):
    """The share `keep` of the entries with the largest magnitudes (Aji and Heafield 2017).

    The codec `values` packs them. What is left out is lost unless error feedback brings it back.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        allowed = [name for name, cls in CODECS.items() if not issubclass(cls, TopK)]
        if self.values not in allowed:
            raise ValueError(f"values must be one of {', '.join(allowed)}, got {self.values!r}")
        self.inner = make(self.values, bucket=self.bucket, rounding=self.rounding)

    def encode(self, vector: Tensor, rng: Generator) -> bytes:
        """How many, where (Rice-coded gaps or a bitmap, whichever is shorter), and the values."""
        x = vector.numpy()
        chosen = self._choose(x)
        if not len(chosen):
            return packing.pack_count(0)
        values = self.inner.encode(torch.from_numpy(x[chosen]), rng)
        return packing.pack_count(len(chosen)) + packing.pack_positions(chosen, len(x)) + values

    def decode(self, body: bytes, size: int) -> Tensor:
        """The values in their places, zeros elsewhere."""
        count, start = packing.unpack_count(body, self._most(size))
        vector = torch.zeros(size)
        if not count and start == len(body):
            return vector
        positions, used = packing.unpack_positions(body[start:], count, size)
        vector[torch.from_numpy(positions)] = self.inner.decode(body[start + used :], count)
        return vector

    def limit(self, size: int) -> int:
        """The count, a bitmap (no other way to give positions is chosen when it is longer), and the values."""
        return 6 + -(-size // 8) + self.inner.limit(self._most(size))

    def _most(self, size: int) -> int:
        return max(1, round(self.keep * size))

    def _choose(self, x: Floats) -> NDArray[np.int64]:
        """The positions, in order, of the entries to send; zeros are never sent."""
        size = np.abs(x)
        largest = np.argpartition(size, -self._most(len(x)))[-self._most(len(x)) :]
        return np.sort(largest[size[largest] > 0])


@codec("stc", id=8)
class STC(TopK):
    """Sparse ternary compression (Sattler et al. 2020): the largest entries, as plus or minus their mean.

    A bit of sign and a Rice-coded position for each entry sent, one scale for all: the mean magnitude of the
    entries sent, not of all. Needs error feedback.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "bucket": 2**31, "rounding": "nearest", "values": "sign"})


class Bits(Codec):
    """Zeros and ones, eight to a byte. Not in the catalog of codecs: it is made for masks, not for updates."""

    name, id = "bits", 20

    def encode(self, vector: Tensor, rng: Generator) -> bytes:
        """One bit for each entry; the last byte is padded with zeros."""
        return packing.pack_digits(vector.numpy() != 0, 2)

    def decode(self, body: bytes, size: int) -> Tensor:
        """Zeros and ones as float32."""
        return torch.from_numpy(packing.unpack_digits(body, 2, size).astype(np.float32))

    def limit(self, size: int) -> int:
        """Exactly this many bytes."""
        return -(-size // 8)


class Exact(Codec):
    """Running statistics as float32 and counters as whole numbers of 64 bits, nothing lost: made for state alone.

    `whole`, bool [S], marks the counters; vectors are float64, which holds both.
    """

    name, id = "state", 21

    def __init__(self, whole: Tensor) -> None:
        super().__init__()
        self._whole = whole.numpy()

    def encode(self, vector: Tensor, rng: Generator) -> bytes:
        """The statistics, then the counters, little endian."""
        x = vector.numpy()
        return x[~self._whole].astype("<f4").tobytes() + x[self._whole].astype("<i8").tobytes()

    def decode(self, body: bytes, size: int) -> Tensor:
        """Float64 [size]."""
        x, split = np.zeros(size), 4 * int((~self._whole).sum())
        x[~self._whole] = np.frombuffer(exactly(body, self.limit(size))[:split], "<f4")
        x[self._whole] = np.frombuffer(body[split:], "<i8")
        return torch.from_numpy(x)

    def limit(self, size: int) -> int:
        """Exactly this many bytes."""
        return 4 * size + 4 * int(self._whole.sum())
