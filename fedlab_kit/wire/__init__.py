"""What travels between clients and server: payload codecs, frames, links, and privacy."""

from .bit_packing import NotFinite, PayloadError, finite
from .codecs import CODECS, Bits, Codec, Exact, codec, make
from .frame import compensate, pack, unpack, unpack_all, unpack_first

__all__ = [
    "CODECS", "Bits", "Codec", "Exact", "NotFinite", "PayloadError", "codec", "compensate", "finite", "make", "pack",
    "unpack", "unpack_all", "unpack_first",
]  # fmt: skip
