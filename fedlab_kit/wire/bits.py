"""How a mask travels: one bit for each entry."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .codec import Codec
from .steps import unpack_bits


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
