"""Published files, checked by digest: read from the folder that FEDLAB_DATA names, or downloaded once."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fedlab_kit.files import ROOT, at


class DataError(ValueError):
    """A data file that is missing, damaged or not the one that was published; the message is one line."""


@dataclass(frozen=True)
class Source:
    """A published set of files: the folder's name, mirrors (base URLs, tried in order) and the MD5 of each file."""

    name: str
    mirrors: tuple[str, ...]
    md5: dict[str, str]


IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
"""Training images and labels, then test images and labels."""

MNIST = Source(
    "mnist",
    ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    {
        IDX_FILES[0]: "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        IDX_FILES[1]: "d53e105ee54ea40749a09fcbcd1e9432",
        IDX_FILES[2]: "9fb629c4189551a2d022fa330f9573f3",
        IDX_FILES[3]: "ec29112dd5afa0611ce80d1b7f02629c",
    },
)

FASHION_MNIST = Source(
    "fashion_mnist",
    ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
    {
        IDX_FILES[0]: "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        IDX_FILES[1]: "25c81989df183df01b3e8a0aad5dffbe",
        IDX_FILES[2]: "bef4ecab320f06d8554ea6380940ec79",
        IDX_FILES[3]: "bb300cfdad3c16e7a12a480ee83cd310",
    },
)


def fetch(source: Source, file: str) -> Path:
    """Return the path of one of the source's files, its digest checked.

    That is `$FEDLAB_DATA/<name>/<file>` if it is there, else the project's `data/cache/<name>/<file>`, which pooch
    downloads once (beside its place, renamed when the digest is right). Raises DataError when the digest differs or
    no mirror answers.
    """
    folder = os.environ.get("FEDLAB_DATA")
    if folder and (local := ROOT / at(folder) / source.name / file).exists():
        return checked(local, source.md5[file])
    return _download(source, file)


def bundled(package: str, file: str) -> Path:
    """Return the path of a data file inside an installed package, as `bundled("sklearn", "datasets/data/iris.csv")`.

    The package itself is not imported: that takes a second. Raises DataError when it is not installed.
    """
    found = find_spec(package)
    if found is None or found.origin is None:
        raise DataError(f"{file} is part of {package}, which is not installed: run the set-up again")
    return Path(found.origin).parent / file


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read a gzip-compressed idx file of unsigned bytes as an array with that number of dimensions.

    Strict about the magic number, the sizes in the header and the length; DataError says what was found.
    (The format: LeCun, Cortes and Burges, the MNIST database.)
    """
    try:
        with gzip.open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as gzip: {error}") from None
    magic, header = 0x0800 + dimensions, 4 + 4 * dimensions
    if len(content) < header:
        raise DataError(f"{path} must begin with an idx header of {header} bytes, found {len(content)} bytes")
    found, *shape = struct.unpack(f">{1 + dimensions}I", content[:header])
    if found != magic:
        raise DataError(f"{path} must begin with the idx magic number {magic}, found {found}")
    if len(content) - header != math.prod(shape):
        raise DataError(f"{path} must hold {math.prod(shape)} values for {shape}, found {len(content) - header}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def checked(path: Path, md5: str) -> Path:
    """Return the path of a file whose digest is the published one. Raises DataError when it is another, or none."""
    try:
        with path.open("rb") as content:
            found = hashlib.file_digest(content, "md5").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if found != md5:
        raise DataError(f"{path} must have the MD5 {md5}, found {found}: replace it with the published file")
    return path


def _download(source: Source, file: str) -> Path:
    import pooch

    folder = ROOT / "data" / "cache" / source.name
    patient, errors = pooch.HTTPDownloader(timeout=10), []
    for mirror in source.mirrors:
        try:
            return Path(pooch.retrieve(mirror + file, f"md5:{source.md5[file]}", file, folder, downloader=patient))
        except (OSError, ValueError) as error:
            errors.append(f"{mirror}: {str(error).splitlines()[0]}")
    raise DataError(
        f"{source.name}: {file} could not be downloaded ({'; '.join(errors)}); put {', '.join(source.md5)} into "
        f"{folder}, or into the folder {source.name} of the folder that FEDLAB_DATA names"
    )
