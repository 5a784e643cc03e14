"""What travels between clients and server: payload codecs, the byte ledger and privacy."""

from . import dense, sparse  # registers the built-in codecs
from .bits import Bits, Exact
from .codec import CODECS, Codec, codec, make
from .frame import compensate, pack, unpack, unpack_all, unpack_first
from .steps import NotFinite, PayloadError, finite

__all__ = [
    "CODECS",
    "Bits",
    "Codec",
    "Exact",
    "NotFinite",
    "PayloadError",
    "codec",
    "compensate",
    "dense",
    "finite",
    "make",
    "pack",
    "sparse",
    "unpack",
    "unpack_all",
    "unpack_first",
]
