"""What people write on runs and points, a name or "hidden": kept beside the store, taken back step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from fedlab_kit.files import StoreError, sweep_up, write_bytes


class Mark(NamedTuple):
    """What stands on one run or point."""

    name: str = ""
    hidden: bool = False


class Marks:
    """Marks by key: a run's key, or a point's `<run>/<recipe>`; what has none is neither named nor hidden.

    They are kept in `marks.json` in the store's folder. A change is written at once and touches its own key alone, so
    that two notebooks on one store keep each other's marks. `error` is a sentence on what could not be read or
    written, "" normally: marks are then kept in memory, and written with the next change that can be.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "marks.json"
        self.error = ""
        self.all: dict[str, Mark] = {}
        self._unwritten: dict[str, Mark] = {}
        self._before: list[tuple[str, Mark]] = []
        try:
            self.all = _read(self.file)
        except OSError as error:
            self.error = str(error)

    def __getitem__(self, key: str) -> Mark:
        return self.all.get(key, Mark())

    def name(self, key: str, name: str) -> None:
        """Write a name on something; an empty one takes it off."""
        self._remember(key)
        self._set(key, self[key]._replace(name=name.strip()))

    def hide(self, key: str) -> None:
        """Take something out of sight."""
        self._remember(key)
        self._set(key, self[key]._replace(hidden=True))

    def show(self, key: str) -> None:
        """Bring something back that was hidden."""
        if self[key].hidden:
            self._set(key, self[key]._replace(hidden=False))

    def undo(self) -> bool:
        """Take back the last change that was made here; False when there is none."""
        if not self._before:
            return False
        self._set(*self._before.pop())
        return True

    def _remember(self, key: str) -> None:
        self._before.append((key, self[key]))

    def _set(self, key: str, mark: Mark) -> None:
        from filelock import FileLock

        self.all = {**self.all, key: mark}
        self._unwritten[key] = mark
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.file.with_name(".marks.lock"), timeout=2):
                sweep_up(self.file.parent, self.file.name)
                self.all = {**_read(self.file), **self._unwritten}
                write_bytes(self.file, _written(self.all))
            self._unwritten, self.error = {}, ""
        except StoreError as error:
            self.error = str(error)
        except OSError as error:  # of the folder or the lock
            self.error = f"cannot write {self.file}: {error.strerror or error}"


def _read(file: Path) -> dict[str, Mark]:
    """Return the marks of a file, none when there is no file. Raises StoreError when it is damaged."""
    try:
        content: dict[str, dict[str, Any]] = json.loads(file.read_text())
        marks = {key: Mark(**mark) for key, mark in content.items()}
        if not all(isinstance(mark.name, str) and isinstance(mark.hidden, bool) for mark in marks.values()):
            raise TypeError("a name must be text and hidden must be true or false")
        return marks
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{file} is damaged ({error}); names and what was hidden are lost, delete it") from error


def _written(marks: dict[str, Mark]) -> bytes:
    kept = {key: mark._asdict() for key, mark in sorted(marks.items()) if mark != Mark()}
    return json.dumps(kept, indent=1).encode()
