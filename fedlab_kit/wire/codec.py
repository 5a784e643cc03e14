"""What a codec is, where codecs are registered, and how one is made.

A codec turns one float32 vector [P] (all tensors of the model, end to end) into a packed body and back.
Frames, checksums and the entropy coder stand around it in `frame.py`; a codec knows nothing about them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import numpy as np
from torch import Tensor

Rounding = Literal["stochastic", "nearest"]
AnyCodec = TypeVar("AnyCodec", bound="type[Codec]")

CODECS: dict[str, type[Codec]] = {}
"""Name -> class, the built-in ones first."""

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
        self,
        keep: float = 0.01,
        bucket: int = 512,
        rounding: Rounding = "stochastic",
        values: str = "fp16",
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

    def encode(self, vector: Tensor, rng: np.random.Generator) -> bytes:
        """Pack a finite float32 vector [P] into `bytes`; every random choice is drawn from `rng`."""
        raise NotImplementedError

    def decode(self, body: bytes, size: int) -> Tensor:
        """Unpack a finite float32 tensor [size]; PayloadError when `body` is not what `encode` writes for it."""
        raise NotImplementedError

    def bound(self, vector: Tensor) -> Tensor:
        """The largest error |decode(encode(x)) - x| that each entry of `vector` can suffer, [P]."""
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
