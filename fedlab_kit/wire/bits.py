"""What travels besides updates: a mask, one bit for each entry, and a model's state, exactly."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .codec import Codec
from .steps import exactly, unpack_bits


class Bits(Codec):
    """Zeros and ones, eight to a byte. Not in the catalog of codecs: it is made for masks, not for updates."""

    name, id = "bits", 20

    def encode(self, vector: Tensor, rng: np.random.Generator) -> bytes:
        """Eight entries to a byte, the last byte padded with zeros."""
        return np.packbits(vector.numpy() != 0).tobytes()

    def decode(self, body: bytes, size: int) -> Tensor:
        """Zeros and ones as float32."""
        return torch.from_numpy(unpack_bits(body, size).astype(np.float32))

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

    def encode(self, vector: Tensor, rng: np.random.Generator) -> bytes:
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
