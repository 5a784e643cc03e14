"""Plain files that are whole or absent: written beside their place, brought to the disk and then renamed.

Tensors and JSON carry a seal, the SHA-256 of all the rest, by which a reader finds a flipped bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from threading import get_ident
from typing import Any

from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
"""The project's root, against which relative folders are resolved (kernels run in their notebook's folder)."""


UNSEALED = b"0" * 64  # what stands in a file in the place of its seal while that is computed


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


def at(path: Path | str) -> Path:
    """Return a path as people mean it: `~` is their home."""
    return Path(os.path.expanduser(path))


def file_name(name: str) -> str:
    """Return a name as a part of a file's name that any system takes: ASCII letters, digits, `_`, `-`, at most 60."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).lstrip("-")[:60] or "_"


def damaged(path: Path, why: object) -> StoreError:
    """Return the error that says which file of a run is damaged or lost, and the remedy."""
    return StoreError(f"{path} is damaged ({why}); delete the run's folder to run it again")


def to_disk(path: Path) -> None:
    """Have a file, or what a folder lists where the platform can, on the disk before anything goes on."""
    with suppress(OSError) if path.is_dir() else writing(path):  # Windows opens no folder
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: Path, content: bytes, listed: bool = True) -> None:
    """Write a file so that a reader, a kill or a power cut sees the old content or the new one and nothing between.

    `listed` is False where the caller brings the folder to the disk, after many files. Raises StoreError (an OSError)
    when the disk is full or read-only; the half-written file is removed.
    """
    beside = _beside(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(content)
            to_disk(beside)
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        if listed:
            to_disk(path.parent)


@contextmanager
def filling(target: Path) -> Iterator[Path]:
    """Give a folder to fill that takes the place of `target` when all went well: whole, on the disk, or not at all.

    Raises StoreError when it cannot be written.
    """
    with writing(target):
        sweep_up(target.parent, escape(target.name))
        beside = _beside(target)
        made, old = beside / "made", beside / "old"
        try:
            made.mkdir(parents=True)
            yield made
            for file in (*made.iterdir(), made):
                to_disk(file)
            if target.exists():
                os.replace(target, old)
            os.replace(made, target)
            to_disk(target.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{get_ident()}")


def sweep_up(folder: Path, names: str = "*") -> None:
    """Remove what processes that are over left half-written of such `names`; never what a living one may be writing."""
    import psutil

    for left in folder.glob(f".{names}.*.*"):
        if writer := re.fullmatch(r"\..+\.(\d{1,9})\.\d+", left.name):
            with suppress(OSError, psutil.AccessDenied):
                try:
                    over = psutil.Process(int(writer[1])).create_time() > left.stat().st_mtime + 1  # its number again
                except psutil.NoSuchProcess:
                    over = True
                if over:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()


def is_number(value: object) -> bool:
    """Say whether a value out of a JSON file is a number to work with: finite, and not true or false."""
    return type(value) in (int, float) and abs(value) < 1e18  # type: ignore[arg-type]


def spare_folder(owner: object) -> Path:
    """Return a new temporary folder, for what another place does not take; it goes when its owner does."""
    folder = tempfile.mkdtemp(prefix="fedlab-")
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary with its seal, whole or not at all."""
    write_bytes(path, json.dumps({**content, "seal": _seal(content)}, indent=1).encode())


def read_json(path: Path) -> dict[str, Any]:
    """Return what `write_json` wrote, or any dictionary without a seal. Raises StoreError naming a damaged file."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        seal = content.pop("seal", None)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, error) from error
    if seal not in (None, _seal(content)):
        raise damaged(path, "its digest is another one")
    return content


def _seal(content: dict[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str], listed: bool = True) -> str:
    """Write named tensors and a few words about them as safetensors, see `write_bytes`; returns the seal."""
    from safetensors.torch import save

    about = {**about, "seal": UNSEALED.decode()}
    content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, about)
    seal = hashlib.sha256(content).hexdigest()
    write_bytes(path, content.replace(UNSEALED, seal.encode(), 1), listed)
    return seal


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what `write_tensors` wrote, its "seal" among the words. Raises StoreError naming a file that is damaged.

    A file of an older version has no seal; whether that is enough is for the caller to say.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about: dict[str, str] = header.get("__metadata__", {})
        seal = str(about.get("seal", ""))
        if seal and hashlib.sha256(content.replace(seal.encode(), UNSEALED, 1)).hexdigest() != seal:
            raise ValueError("its digest is another one")
        return load(content), about
    except (OSError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
        raise damaged(path, error) from error


def read_about(path: Path) -> dict[str, str]:
    """Return the words alone of a file that `write_tensors` wrote; the tensors are not read and the seal not checked.

    Raises StoreError naming a file that is cut or no safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error
