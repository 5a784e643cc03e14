"""Exercises of notebooks/05_communication.ipynb."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlab_kit.lab.exercises import Hint, call, exercise, number
from fedlab_kit.wire import Codec, make
from fedlab_kit.wire.frame import HEADER

SIZE = 1_000_000  # numbers in the payload of 05-1
SIDE = 4  # bytes that 05-2 allows beside one for each number


@exercise("05-1")
def int4_payload(answer: Any) -> str:
    """The bytes of an int4 payload of a million numbers in buckets of 512."""
    given = number(answer, "one whole number of bytes")
    codes, body = SIZE // 2, make("int4").limit(SIZE)
    truth, scales = HEADER.size + body, body - codes
    if given == truth:
        return f"{codes:,} bytes of codes, {scales:,} of scales, {HEADER.size} of header."
    hints = {
        codes: "Those are the codes alone. Scales and the header travel too.",
        body: f"Nearly. The frame begins with a header of {HEADER.size} bytes.",
        codes + HEADER.size: "Each bucket of 512 numbers also has a scale of two bytes.",
        truth - 2: "The last bucket is not full, but it has a scale too.",
        body - 2: "The last bucket is not full, but it has a scale too; and there is a header.",
        codes + scales // 2 + HEADER.size: "A scale takes two bytes.",
        truth + codes: "Two codes of int4 share a byte.",
        8 * truth: "That is in bits.",
    }
    raise Hint(hints.get(int(given), "Add half a byte for each number, two bytes for each bucket, and one header."))


@exercise("05-2")
def one_byte_codec(answer: Any) -> str:
    """A codec class: one byte a number and four more at most, error at most 1 % of the largest magnitude."""
    codec = _made(answer)
    normal = torch.randn(1000, generator=torch.Generator().manual_seed(5))
    longest = 0
    for vector in (normal, normal[:7] * 1e-3, 100 * normal[:1] + 1, torch.zeros(12)):
        body = call(codec.encode, vector.clone(), np.random.default_rng(5))
        if not isinstance(body, bytes):
            raise Hint(f"encode must return bytes, not a {type(body).__name__}: `.tobytes()` makes them.")
        if len(body) > len(vector) + SIDE:
            raise Hint(f"{len(vector)} numbers became {len(body)} bytes; {len(vector) + SIDE} are allowed.")
        _judge(vector, _decoded(codec, body, len(vector)))
        longest = max(longest, len(body))
    return f"{len(normal)} numbers became {longest} bytes, and all came back within 1 % of the largest."


def _made(answer: Any) -> Codec:
    """Return a codec of the learner's class, or the one that was handed in."""
    if isinstance(answer, Codec):
        return answer
    if not (isinstance(answer, type) and issubclass(answer, Codec)):
        raise Hint("Hand in the class itself; it begins with `class OneByte(fk.Codec):`.")
    made = call(answer)
    assert isinstance(made, Codec)
    return made


def _decoded(codec: Codec, body: bytes, size: int) -> Tensor:
    found = call(codec.decode, body, size)
    if not isinstance(found, Tensor) or found.dtype != torch.float32:
        kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise Hint(f"decode must return a float32 tensor, not {kind}.")
    if found.shape != (size,):
        raise Hint(f"{size} numbers went in, {list(found.shape)} came out: where does the scale end?")
    return found


def _judge(vector: Tensor, found: Tensor) -> None:
    largest, error = float(vector.abs().max()), float((found - vector).abs().max())
    if not bool(torch.isfinite(found).all()):
        raise Hint("A vector of zeros came back as NaN or infinity: what is its scale, and do you divide by it?")
    if error <= 0.01 * largest:
        return
    if not largest:
        raise Hint("A vector of zeros must come back as zeros.")
    if bool((found * vector < 0).any()):
        raise Hint("Some numbers change their sign: codes beyond 127 wrap around when they are cast to int8.")
    raise Hint(f"The largest error is {error / largest:.1%} of the largest magnitude; 1 % is allowed.")
