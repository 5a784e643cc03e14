"""Codecs that send the largest entries only: positions, then values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .codec import CODECS, Codec, codec, make
from .steps import pack_count, pack_positions, unpack_count, unpack_positions


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

    def encode(self, vector: Tensor, rng: np.random.Generator) -> bytes:
        """How many, where (Rice-coded gaps or a bitmap, whichever is shorter), and the values."""
        x = vector.numpy()
        chosen = self._choose(x)
        if not len(chosen):
            return pack_count(0)
        positions = pack_positions(chosen, len(x))
        return pack_count(len(chosen)) + positions + self.inner.encode(torch.from_numpy(x[chosen]), rng)

    def decode(self, body: bytes, size: int) -> Tensor:
        """The values in their places, zeros elsewhere."""
        count, start = unpack_count(body, self._most(size))
        vector = torch.zeros(size)
        if not count and start == len(body):
            return vector
        positions, used = unpack_positions(body[start:], count, size)
        vector[torch.from_numpy(positions)] = self.inner.decode(body[start + used :], count)
        return vector

    def bound(self, vector: Tensor) -> Tensor:
        """An entry that is sent: the bound of its codec; one that is not: all of it."""
        x = vector.numpy()
        chosen = torch.from_numpy(self._choose(x))
        bound = vector.abs()
        bound[chosen] = self.inner.bound(vector[chosen])
        return bound

    def limit(self, size: int) -> int:
        """The count, a bitmap (no other way to give positions is chosen when it is longer), and the values."""
        return 6 + -(-size // 8) + self.inner.limit(self._most(size))

    def _most(self, size: int) -> int:
        return max(1, round(self.keep * size))

    def _choose(self, x: NDArray[np.float32]) -> NDArray[np.int64]:
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
