"""The small steps that codecs are made of, each with its way back: digits, bits, positions, scales, counts.

Everything here is numpy on whole arrays. A way back raises PayloadError when the bytes are not what the way
out writes.
"""

from __future__ import annotations

from functools import cache
from math import isfinite, log2

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class PayloadError(ValueError):
    """A payload is refused; the message is the reason, in a few words."""


class NotFinite(ValueError):
    """An update holds NaN or infinity: training has diverged, and there is nothing to send."""


def finite(vector: Tensor) -> bool:
    """Whether every number of a float32 vector on the CPU is finite.

    A finite sum says so in one pass; one that is not may have overflowed, so only then is every number looked at.
    """
    return isfinite(vector.sum()) or bool(np.isfinite(vector.numpy()).all())


def exactly(body: bytes, length: int) -> bytes:
    """The body itself, if it is as long as it must be."""
    if len(body) != length:
        raise PayloadError(f"{length} bytes of values must come, got {len(body)}")
    return body


def pack_digits(digits: NDArray[np.generic], base: int) -> bytes:
    """Digits 0..base-1 as bytes, as many to a byte as fit: one of base 255, two of 15, five of 3, eight of 2."""
    width = digits_per_byte(base)
    padded = np.zeros(-(-len(digits) // width) * width, np.uint8)
    padded[: len(digits)] = digits
    columns = padded.reshape(-1, width).T
    packed = columns[0]
    for column in columns[1:]:
        packed = packed * np.uint8(base) + column
    return packed.tobytes()


def unpack_digits(body: bytes, base: int, size: int) -> NDArray[np.uint8]:
    """Exactly `size` digits of `pack_digits`."""
    table = _digits_of_bytes(base)
    packed = np.frombuffer(exactly(body, -(-size // table.shape[1])), np.uint8)
    if packed.size and int(packed.max()) >= len(table):
        raise PayloadError(f"a byte holds {packed.max()}, the most is {len(table) - 1}")
    digits = table[packed].reshape(-1)
    if digits[size:].any():
        raise PayloadError("the padding after the values is not zero")
    return digits[:size]


def digits_per_byte(base: int) -> int:
    """How many digits of a base fit into one byte."""
    return int(8 // log2(base))


@cache
def _digits_of_bytes(base: int) -> NDArray[np.uint8]:
    """Row b holds the digits that byte b stands for."""
    width = digits_per_byte(base)
    return (np.arange(base**width)[:, None] // base ** np.arange(width - 1, -1, -1) % base).astype(np.uint8)


def pack_positions(positions: NDArray[np.int64], size: int) -> bytes:
    """One or more increasing positions below `size`, as Rice-coded gaps (Golomb codes with a power of two).

    A gap is split: its `low` last bits are written plainly, the rest in unary, zeros ended by a one. With
    low = 0 the result is a bitmap. The first byte is `low`, chosen by the real length of every way there is.
    """
    gaps = np.diff(positions, prepend=-1) - 1
    low = min(range(max(size, 1).bit_length()), key=lambda low: len(gaps) * low + int((gaps >> low).sum()))
    ends = np.cumsum((gaps >> low) + 1)
    unary = np.zeros(ends[-1], np.uint8)
    unary[ends - 1] = 1
    plain = np.unpackbits(gaps.astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)[:, 32 - low :]
    return bytes([low]) + np.packbits(np.concatenate([plain.reshape(-1), unary])).tobytes()


def unpack_positions(body: bytes, count: int, size: int) -> tuple[NDArray[np.int64], int]:
    """Exactly `count` positions below `size`, and how many bytes of `body` they took."""
    if not count or not body or body[0] >= max(size, 1).bit_length():
        raise PayloadError("the positions are coded in no known way")
    low, bits = body[0], np.unpackbits(np.frombuffer(body, np.uint8, offset=1))
    ends = np.flatnonzero(bits[count * low :])[:count] + 1
    if len(ends) < count:
        raise PayloadError(f"{count} positions are announced, {len(ends)} came")
    plain = np.zeros((count, 32), np.uint8)
    plain[:, 32 - low :] = bits[: count * low].reshape(count, low)
    high = np.diff(ends, prepend=0) - 1
    gaps = (high << low) + np.packbits(plain, axis=1).view(">u4").reshape(-1)
    positions = np.cumsum(gaps + 1) - 1
    if positions[-1] >= size:
        raise PayloadError(f"position {positions[-1]} lies outside {size} numbers")
    used = count * low + int(ends[-1])
    if bits[used : -(-used // 8) * 8].any():
        raise PayloadError("the padding after the positions is not zero")
    return positions, 1 + -(-used // 8)


def pack_scales(scales: NDArray[np.float32], *, up: bool) -> bytes:
    """Non-negative numbers as bfloat16, the range of float32 in two bytes, rounded up or to the nearest."""
    bits = scales.astype(np.float32).view(np.uint32).astype(np.int64)
    rounded = (bits + (0xFFFF if up else 0x8000)) >> 16  # a half goes up, unlike in ml_dtypes and torch
    return np.minimum(rounded, 0x7F7F).astype("<u2").tobytes()


def unpack_scales(body: bytes, count: int) -> NDArray[np.float32]:
    """Exactly `count` finite scales from the start of `body`."""
    if len(body) < 2 * count:
        raise PayloadError(f"{count} scales must come, got {len(body) // 2}")
    bits = np.frombuffer(body, "<u2", count)
    if bits.size and int(bits.max()) > 0x7F7F:
        raise PayloadError("a scale is negative, infinite or not a number")
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pack_count(count: int) -> bytes:
    """A whole number in as few bytes as it takes, seven bits a byte, the lowest first (LEB128)."""
    sevens = [count >> shift & 127 for shift in range(0, max(1, count.bit_length()), 7)]
    return bytes([*(seven | 128 for seven in sevens[:-1]), sevens[-1]])


def unpack_count(body: bytes, most: int) -> tuple[int, int]:
    """A number of `pack_count` that is at most `most`, and how many bytes it took."""
    end = next((place for place, byte in enumerate(body[:5], 1) if byte < 128), 0)
    count = sum((byte & 127) << 7 * place for place, byte in enumerate(body[:end]))
    if not end or count > most or pack_count(count) != body[:end]:
        raise PayloadError(f"the number of values must be at most {most}")
    return count, end
