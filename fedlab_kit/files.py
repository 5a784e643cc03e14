"""Plain files that are whole or absent: bytes and tensors written beside their place and then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident

from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
"""The project's root, against which relative folders are resolved (kernels run in their notebook's folder)."""


class StoreError(OSError):
    """A stored file that cannot be read or written; the message names it and says what to do."""


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Word what fails inside the block, on a full or read-only disk say, as a StoreError that names the place."""
    try:
        yield
    except (StoreError, TimeoutError):
        raise
    except OSError as error:
        raise StoreError(f"cannot write {place}: {error.strerror or error}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a kill, sees the old content or the new one and nothing between.

    Raises StoreError (an OSError) when the disk is full or read-only; the half-written file is removed.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.{get_ident()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(content)
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def spare_folder(owner: object) -> Path:
    """Return a new temporary folder, for what another place does not take; it goes when its owner does."""
    folder = tempfile.mkdtemp(prefix="fedlab-")
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write named tensors and a few words about them as safetensors, whole or not at all."""
    from safetensors.torch import save

    write_bytes(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, about))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what `write_tensors` wrote. Raises StoreError naming a file that is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} is damaged ({error}); delete its folder to run it again") from error
