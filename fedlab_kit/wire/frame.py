"""Frames: the header, checksum and optional zstd around a packed body, and error feedback.

A payload is one or more frames, one after the other. A frame is a header of 14 bytes, little endian (codec id
u8, flags u8, samples u32, body length u32, CRC-32 u32 over the other fields and the body), then the body. The
schema is not sent: both sides know from the Experiment which codec and how many numbers to expect. The
checksum finds accidents; it cannot find a forged payload, which takes authentication.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from zlib import crc32

import torch
from numpy.random import Generator
from torch import Tensor

from fedlab_kit.catalog import is_built_in

from .bit_packing import NotFinite, PayloadError, finite
from .codecs import Codec

HEADER = struct.Struct("<BBIII")
FIELDS = struct.Struct("<BBII")  # the header without the checksum over it
ZSTD = 1  # flag: the body went through zstd


def pack(codec: Codec, vector: Tensor, *, samples: int, rng: Generator, zstd: bool = False) -> bytes:
    """One frame with a float32 vector [P] and the number of samples behind it; NotFinite if it is not finite.

    `zstd` compresses the body where that makes it shorter. A codec that is not built in reads its own body back:
    ValueError names it and the method when that does not work, which is no fault of the payload or of the training.
    """
    body = _encoded(codec, vector, rng)
    if not is_built_in(type(codec)):
        _read_back(codec, body, vector.numel())
    return _frame(codec, body, samples, zstd)


def compensate(
    update: Tensor, residual: Tensor, codec: Codec, rng: Generator, *, samples: int, zstd: bool = False
) -> tuple[bytes, Tensor]:
    """Error feedback: send update + residual, keep what the codec lost (Karimireddy et al. 2019).

    Returns (payload, new residual [P]). The residual belongs to one sender and is kept by client id. Errors: `pack`'s.
    """
    wanted = update + residual
    body = _encoded(codec, wanted, rng)
    return _frame(codec, body, samples, zstd), wanted - _read_back(codec, body, wanted.numel())


def unpack(payload: bytes, codec: Codec, *, size: int) -> tuple[int, list[Tensor]]:
    """Read one frame of `size` numbers: (samples, [vector]). PayloadError says why not."""
    return unpack_all(payload, [(codec, size)])


def unpack_all(payload: bytes, schema: Sequence[tuple[Codec, int]]) -> tuple[int, list[Tensor]]:
    """Read one frame for each (codec, size) of the schema, and nothing after them: (samples, vectors).

    Allocates nothing beyond what each codec can need for its size, whatever the payload claims. PayloadError says
    why a payload is refused.
    """
    vectors: list[Tensor] = []
    samples = start = 0
    for codec, size in schema:
        before = samples
        vector, samples, start = _read(payload, start, codec, size)
        if vectors and samples != before:
            raise PayloadError(f"its frames state {before} and {samples} samples")
        vectors.append(vector)
    if start != len(payload):
        raise PayloadError(f"{len(payload) - start} bytes follow the last frame")
    return samples, vectors


def unpack_first(payload: bytes, codec: Codec, *, size: int) -> tuple[Tensor, bytes]:
    """Read the frame at the head of a payload: (vector, what follows). PayloadError says why not."""
    vector, _, end = _read(payload, 0, codec, size)
    return vector, payload[end:]


def _encoded(codec: Codec, vector: Tensor, rng: Generator) -> bytes:
    """What a codec makes of a finite vector. ValueError, naming codec and method, unless it is a body to be sent."""
    if not finite(vector):
        raise NotFinite("the update holds NaN or infinity: lower the learning rate")
    if is_built_in(type(codec)):
        return codec.encode(vector, rng)
    size, limit = vector.numel(), codec.limit(vector.numel())
    try:
        body = codec.encode(vector.clone(), rng)  # it may write into its argument
    except Exception as error:
        raise ValueError(f"codec {codec.name!r}: encode raised {type(error).__name__}: {error}") from error
    if not isinstance(body, bytes):
        raise ValueError(f"codec {codec.name!r}: encode must give bytes, got {type(body).__name__}")
    if len(body) > limit:
        raise ValueError(f"codec {codec.name!r}: encode gave {len(body)} bytes for {size} numbers, limit says {limit}")
    return body


def _read_back(codec: Codec, body: bytes, size: int) -> Tensor:
    """What a codec makes of its own body. ValueError, naming codec and method, unless it is a vector [size]."""
    try:
        vector = codec.decode(body, size)
    except Exception as error:
        said = f"decode raised {type(error).__name__} on what encode gave: {error}"
        raise ValueError(f"codec {codec.name!r}: {said}") from error
    _check_kind(codec, vector, size)
    if vector.shape != (size,):
        raise ValueError(f"codec {codec.name!r}: decode must give a float32 tensor [{size}], got {list(vector.shape)}")
    if not finite(vector):
        raise ValueError(f"codec {codec.name!r}: decode gave NaN or infinity for an update that holds neither")
    return vector


def _check_kind(codec: Codec, vector: object, size: int) -> None:
    """Raise ValueError for what no damage to a payload explains: not a plain float32 tensor on the CPU."""
    if is_built_in(type(codec)):
        return
    if not isinstance(vector, Tensor):
        found = type(vector).__name__
    elif vector.dtype != torch.float32 or vector.device.type != "cpu":
        found = f"{vector.dtype} on {vector.device}"
    elif vector.layout != torch.strided or vector.requires_grad:
        found = "one that is sparse or requires a gradient"
    else:
        return
    raise ValueError(f"codec {codec.name!r}: decode must give a float32 tensor [{size}] on the CPU, got {found}")


def _frame(codec: Codec, body: bytes, samples: int, zstd: bool) -> bytes:
    flags = 0
    if zstd:
        import zstandard

        packed = zstandard.ZstdCompressor().compress(body)
        flags, body = (ZSTD, packed) if len(packed) < len(body) else (0, body)
    fields = FIELDS.pack(codec.id, flags, samples, len(body))
    return fields + crc32(body, crc32(fields)).to_bytes(4, "little") + body


def _read(payload: bytes, start: int, codec: Codec, size: int) -> tuple[Tensor, int, int]:
    """The vector of the frame at `start`, its samples, and where the next frame begins."""
    body, samples, end = _body(payload, start, codec, size)
    try:
        vector = codec.decode(body, size)
    except Exception as error:
        if is_built_in(type(codec)) or isinstance(error, PayloadError):
            raise
        raise PayloadError(f"codec {codec.name!r} cannot read it: {error}") from error
    _check_kind(codec, vector, size)
    if vector.shape != (size,) or not finite(vector):
        raise PayloadError("the payload holds NaN or infinity, or too few numbers")
    return vector, samples, end


def _body(payload: bytes, start: int, codec: Codec, size: int) -> tuple[bytes, int, int]:
    """The checked, plain body of the frame at `start`, its samples, and where the next frame begins."""
    first, limit = start + HEADER.size, codec.limit(size)
    if len(payload) < first:
        raise PayloadError(f"truncated: {len(payload) - start} bytes are left, a header takes {HEADER.size}")
    number, flags, samples, length, checksum = HEADER.unpack_from(payload, start)
    if number != codec.id or flags not in (0, ZSTD):
        raise PayloadError(f"codec {number} with flags {flags} came, {codec.name} ({codec.id}) was agreed")
    if length > limit:
        raise PayloadError(f"oversized: a body of {length} bytes, {limit} is the most")
    body = payload[first : first + length]
    if len(body) < length:
        raise PayloadError(f"truncated: {length} bytes announced, {len(body)} came")
    if crc32(body, crc32(payload[start : start + FIELDS.size])) != checksum:
        raise PayloadError("the checksum does not match")
    return (_inflate(body, limit) if flags else body), samples, first + length


def _inflate(body: bytes, limit: int) -> bytes:
    """Undo zstd without ever allocating more than `limit` bytes, whatever size the data declares."""
    import zstandard

    try:
        declared = zstandard.frame_content_size(body)
        if not 0 <= declared <= limit:
            raise PayloadError(f"a zstd body that declares {declared} bytes, {limit} is the most")
        return zstandard.ZstdDecompressor().decompress(body, max_output_size=limit, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PayloadError(f"broken zstd body: {error}") from None
