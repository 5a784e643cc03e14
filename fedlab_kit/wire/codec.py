"""How an update becomes bytes: one small class per codec, registered under the name that an Experiment uses.

A codec turns one float32 vector [P] (all tensors of the model, end to end) into a packed body and back. Frames,
checksums and the entropy coder stand around it in `frame.py`, so that a codec knows nothing about them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .steps import PayloadError

CODECS: dict[str, type[Codec]] = {}
"""Name -> class; `make` calls the class with the settings that it takes."""

OWN_IDS = 128  # numbers from here on belong to codecs that a user registers


class Codec:
    """What travels: subclass it, write `encode` and `decode`, and register it with `@codec("name")`.

    `name` and `id` are set by the decorator. `unbiased` says that decode(encode(x)) is x on average.
    """

    name: str
    id: int
    unbiased: bool = False

    def encode(self, vector: Tensor, rng: np.random.Generator) -> bytes:
        """Pack a finite float32 vector [P]; every random choice is drawn from `rng`."""
        raise NotImplementedError

    def decode(self, body: bytes, size: int) -> Tensor:
        """Unpack a float32 vector [size]; PayloadError when `body` is not what `encode` writes for it."""
        raise NotImplementedError

    def bound(self, vector: Tensor) -> Tensor:
        """The largest error |decode(encode(x)) - x| that each entry of `vector` can suffer, [P]."""
        raise NotImplementedError

    def limit(self, size: int) -> int:
        """The longest body in bytes that `encode` writes for `size` entries; more is refused unread."""
        return 64 + 8 * size


def codec(name: str, *, id: int | None = None) -> Callable[[type[Codec]], type[Codec]]:
    """Register the class below under a name: `@codec("mine")`. Registering a name again replaces it.

    `id` is the byte that marks its payloads; it is derived from the name unless given.
    """

    def register(cls: type[Codec]) -> type[Codec]:
        cls.name = name
        cls.id = OWN_IDS + zlib.crc32(name.encode()) % (256 - OWN_IDS) if id is None else id
        CODECS[name] = cls
        return cls

    return register


def make(name: str, **settings: Any) -> Codec:
    """The codec of a name with its settings; ValueError names the field, the value and what is allowed."""
    if name not in CODECS:
        raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {name!r}")
    return CODECS[name](**settings)


@codec("fp32", id=1)
class FP32(Codec):
    """The raw float32 numbers, little endian: the baseline that every other codec is compared with."""

    unbiased = True

    def encode(self, vector: Tensor, rng: np.random.Generator) -> bytes:
        """Four bytes per number."""
        return vector.numpy().astype("<f4", copy=False).tobytes()

    def decode(self, body: bytes, size: int) -> Tensor:
        """The numbers themselves."""
        if len(body) != 4 * size:
            raise PayloadError(f"the body must be {4 * size} bytes long, got {len(body)}")
        return torch.from_numpy(np.frombuffer(body, "<f4").astype(np.float32))

    def bound(self, vector: Tensor) -> Tensor:
        """Nothing is lost."""
        return torch.zeros_like(vector)

    def limit(self, size: int) -> int:
        """Four bytes per number."""
        return 4 * size
