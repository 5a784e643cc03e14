"""What benches have left on the store: every point, and what people wrote on runs and points, a name or "hidden"."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

from fedlab_kit.deployment.artifact import Artifact, check_card, slug
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.files import StoreError, read_json, sweep_up, write_bytes
from fedlab_kit.run import StoredRun
from fedlab_kit.sweep import ENDS, MEASURED

Row = dict[str, Any]
DAYS = {"today": 1, "this week": 7}  # to the day: what was measured within that many times 24 hours


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


@dataclass(frozen=True, eq=False)
class Point:
    """One measured artifact, as its card describes it; `number` counts from 1 in the order of measurement.

    `earlier` says that it was measured before this bench, or by another one; `artifact` is None until it is opened.
    """

    number: int
    run: StoredRun
    recipe: Recipe
    path: Path
    card: dict[str, Any]
    earlier: bool
    artifact: Artifact | None = None

    @cached_property
    def key(self) -> str:
        """What the file depends on: the run, and the part of the recipe that is in effect."""
        return f"{self.run.key}/{slug(self.recipe)}"

    @cached_property
    def facts(self) -> Row:
        """All that is known of the point, as plots and tables want it."""
        figures, e = self.card["measured"], self.run.experiment
        return {
            "point": self.number,
            **dict.fromkeys(("name", "run_name"), ""),
            **{name: getattr(e, name) for name in ("dataset", "model", "strategy", "clients", "seed")},
            **dict(self.recipe),
            **{field: figures[field] for field in MEASURED},
            **dict(zip(ENDS, [*figures["interval"], *figures["lost_interval"]], strict=True)),
            **{f"latency_{name}": self.card.get("latency", {}).get(name) for name in ("low", "high", "ratio")},
            **{name: getattr(self.run, name) for name in ("uplink_bytes", "downlink_bytes")},
            "seconds": self.run.measured["seconds"],
            "earlier": self.earlier,
            **{name: self.card[name] for name in ("when", "machine")},
            "run": self.run.key,
            "path": self.path,
        }

    def row(self, mark: Mark, run_name: str = "") -> Row:
        """The point with the names that it and its run have been given."""
        return {**self.facts, "name": mark.name, "run_name": run_name}


class Filter(NamedTuple):
    """Which runs and points are shown; "" is any.

    `data` is a data set, or "these": that of the settings at hand, with as many clients. `tag` is a part of a name that
    was given. `time` is "this bench" for what it was asked for, or a key of `DAYS`.
    """

    data: str = "these"
    model: str = ""
    strategy: str = ""
    tag: str = ""
    time: str = ""

    def takes(self, e: Experiment, like: Experiment, names: str, when: str, here: bool) -> bool:
        """Say whether something is shown: its experiment, its names, when it was measured, and if for this bench."""
        these = (e.dataset, e.clients) == (like.dataset, like.clients)
        if not (these if self.data == "these" else self.data in ("", e.dataset)):
            return False
        if self.time in DAYS:
            here = datetime.fromisoformat(when) > datetime.now(UTC) - timedelta(days=DAYS[self.time])
        same = self.model in ("", e.model) and self.strategy in ("", e.strategy)
        return same and self.tag.lower() in names.lower() and (here or not self.time)


ALL = Filter()


class Points:
    """Every point in order, which of them this bench was asked for, and the current one; marks are kept by `marks`."""

    def __init__(self, marks: Marks, runs: Iterable[StoredRun] = ()) -> None:
        self.marks = marks
        self.all: tuple[Point, ...] = ()
        self.asked: tuple[int, ...] = ()
        self.current: Point | None = None
        self.read(runs)

    def read(self, runs: Iterable[StoredRun]) -> None:
        """Begin with the points of stored runs, in the order of their measurement."""
        found = sorted((one for run in runs for one in _points_of(run)), key=lambda one: one[0])
        self.all = tuple(replace(point, number=number) for number, (_, point) in enumerate(found, start=1))

    def add(self, run: StoredRun, recipe: Recipe, artifact: Artifact) -> Point:
        """Put an artifact at the end, or in the place of its like, and make it the current point."""
        before = self.find(run, recipe)
        number = before.number if before else len(self.all) + 1
        point = Point(number, run, recipe, artifact.path, artifact.card, False, artifact)
        self.all = (*self.all[: number - 1], point, *self.all[number:])
        self.show(point)
        return point

    def take_back(self, number: int) -> None:
        """Forget the last point, and remove its files: nobody asked for what a slider passes on its way."""
        if number == len(self.all):
            point, self.all = self.all[-1], self.all[:-1]
            self.asked = tuple(one for one in self.asked if one != number)
            self.current = None if self.current is point else self.current
            for file in point.path.parent.glob(f"{escape(point.path.name)}*"):
                file.unlink(missing_ok=True)

    def find(self, run: StoredRun, recipe: Recipe) -> Point | None:
        """The point of this run and recipe, if it was measured before."""
        key = f"{run.key}/{slug(recipe)}"
        return next((point for point in self.all if point.key == key), None)

    def nearest(self, run: StoredRun, recipe: Recipe) -> Point | None:
        """The known point of a run whose recipe is nearest: as few other choices as may be, then the nearest ratio."""
        wanted = recipe.in_effect()

        def apart(point: Point) -> tuple[int, float]:
            differ = [name for name, value in point.recipe.in_effect().items() if value != wanted.get(name)]
            return len(set(differ) - {"prune_ratio"}), abs(point.recipe.prune_ratio - recipe.prune_ratio)

        return min((point for point in self.all if point.run.key == run.key), key=apart, default=None)

    def opened(self, point: Point, artifact: Artifact) -> Point:
        """Keep the artifact of a point, with what was measured on it since; returns the point with it."""
        whole = replace(point, artifact=artifact, card=artifact.card)
        self.all = tuple(whole if one.number == point.number else one for one in self.all)
        if self.current and self.current.number == point.number:
            self.current = whole
        return whole

    def count(self, point: Point) -> None:
        """Count a point of an earlier bench among those that this one was asked for."""
        if point.number not in self.asked:
            self.asked = (*self.asked, point.number)

    def show(self, point: Point) -> None:
        """Make a point the current one and the last that was asked for; bring it back if it was hidden."""
        for key in (point.key, point.run.key):
            self.marks.show(key)
        self.asked = (*(number for number in self.asked if number != point.number), point.number)
        self.current = point

    def rows(self) -> list[Row]:
        """The points this bench was asked for, in the order of measurement, without those that are hidden."""
        return [self.row(point) for point in self.all if point.number in self.asked and not self.hidden(point)]

    def shown(self, like: Experiment, wanted: Filter = ALL) -> list[Row]:
        """The points that a filter takes and nobody hid: those of earlier benches, then those asked for here."""
        place = {number: index for index, number in enumerate(self.asked)}
        rows = [(point, self.row(point)) for point in self.all if not self.hidden(point)]
        taken = [
            row
            for point, row in rows
            if wanted.takes(
                point.run.experiment, like, f"{row['name']} {row['run_name']}", row["when"], row["point"] in place
            )
        ]
        return sorted(taken, key=lambda row: place.get(row["point"], -1))

    def row(self, point: Point) -> Row:
        """One point with the names it and its run have been given."""
        return point.row(self.marks[point.key], self.marks[point.run.key].name)

    def hidden(self, point: Point) -> bool:
        """Whether a point, or its run, was taken out of sight."""
        return self.marks[point.key].hidden or self.marks[point.run.key].hidden


def _points_of(run: StoredRun) -> Iterator[tuple[tuple[str, int], Point]]:
    """Yield a run's points, each with its age; without a file, or with another version's card, it is none."""
    for file in (run.path / "artifacts").glob("*.onnx.json"):
        artifact = file.with_suffix("")
        try:
            card = read_json(file)
            check_card(card)  # one that lacks a figure must not stop every bench on this store
            point = Point(0, run, Recipe(**card["recipe"]), artifact, card, earlier=True)
            age = card["when"], artifact.stat().st_mtime_ns
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            continue
        yield age, point
