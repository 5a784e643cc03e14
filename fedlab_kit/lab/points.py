"""The points of a bench: each one artifact of one run, those of earlier benches first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlab_kit.deployment.artifact import Artifact, check_card, slug
from fedlab_kit.experiment import Recipe
from fedlab_kit.files import read_json
from fedlab_kit.lab.canvas import html_table, human_bytes, human_ms, percent, with_interval
from fedlab_kit.lab.marks import Mark, Marks
from fedlab_kit.lab.wording import moment, origin
from fedlab_kit.run import StoredRun
from fedlab_kit.sweep import ENDS, MEASURED

Row = dict[str, Any]
LAST = 6  # points in the table


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

    @property
    def key(self) -> str:
        """What the file depends on: the run, and the part of the recipe that is in effect."""
        return f"{self.run.key}/{slug(self.recipe)}"

    def row(self, mark: Mark, run_name: str = "") -> Row:
        """The point as plots and tables want it."""
        figures = self.card["measured"]
        return {
            "point": self.number,
            "name": mark.name,
            "run_name": run_name,
            "dataset": self.run.experiment.dataset,
            "model": self.run.experiment.model,
            **dict(self.recipe),
            **{field: figures[field] for field in MEASURED},
            **dict(zip(ENDS, [*figures["interval"], *figures["lost_interval"]], strict=True)),
            "uplink_bytes": self.run.uplink_bytes,
            "downlink_bytes": self.run.downlink_bytes,
            "seconds": self.run.measured["seconds"],
            "earlier": self.earlier,
            "when": self.card["when"],
            "machine": self.card["machine"],
            "run": self.run.key,
            "path": self.path,
        }


class Points:
    """Every point in order, which of them this bench was asked for, and the current one; marks are kept by `marks`."""

    def __init__(self, marks: Marks, runs: Iterable[StoredRun] = ()) -> None:
        self.marks = marks
        self.all = _stored(runs)
        self.asked: tuple[int, ...] = ()
        self.current: Point | None = None

    def add(self, run: StoredRun, recipe: Recipe, artifact: Artifact) -> None:
        """Put an artifact at the end, or in the place of its like, and make it the current point."""
        before = self.find(run, recipe)
        number = before.number if before else len(self.all) + 1
        point = Point(number, run, recipe, artifact.path, artifact.card, False, artifact)
        self.all = (*self.all[: number - 1], point, *self.all[number:])
        self.show(point)

    def find(self, run: StoredRun, recipe: Recipe) -> Point | None:
        """The point of this run and recipe, if it was measured before."""
        key = f"{run.key}/{slug(recipe)}"
        return next((point for point in self.all if point.key == key), None)

    def opened(self, point: Point, artifact: Artifact) -> Point:
        """Keep the artifact of a point of an earlier bench; returns the point with it."""
        whole = replace(point, artifact=artifact, card=artifact.card)
        self.all = tuple(whole if one.number == point.number else one for one in self.all)
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
        return [self.row(point) for point in self._visible() if point.number in self.asked]

    def shown(self, dataset: str, earlier: bool = True) -> list[Row]:
        """The points on one data set that are not hidden: those of earlier benches, then those asked for here."""
        asked = {number: place for place, number in enumerate(self.asked)}
        points = [p for p in self._visible() if p.run.experiment.dataset == dataset and (earlier or p.number in asked)]
        return [self.row(point) for point in sorted(points, key=lambda p: asked.get(p.number, -1))]

    def row(self, point: Point) -> Row:
        """One point with the names it and its run have been given."""
        return point.row(self.marks[point.key], self.marks[point.run.key].name)

    def _visible(self) -> list[Point]:
        return [p for p in self.all if not (self.marks[p.key].hidden or self.marks[p.run.key].hidden)]


def _stored(runs: Iterable[StoredRun]) -> tuple[Point, ...]:
    """Return the points of stored runs, in the order of their measurement."""
    found = sorted((one for run in runs for one in _points_of(run)), key=lambda one: one[0])
    return tuple(replace(point, number=number) for number, (_, point) in enumerate(found, start=1))


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


def words(row: Row) -> str:
    """Say which recipe a point is, e.g. "3: cnn, channel 0.5 int8 static"; names come in front."""
    recipe = Recipe(**{field: row[field] for field in Recipe.model_fields})
    name = f"{row['name']}, " if row["name"] else ""
    return f"{row['point']}: {name}{row['run_name'] or row['model']}, {slug(recipe).replace('-', ' ')}"


def said(row: Row) -> str:
    """Say what was measured on a point, and when."""
    text = (
        f"{words(row)}: {with_interval(row['accuracy'], row['low'], row['high'])}, "
        f"{human_bytes(row['bytes'])}, {human_bytes(row['zstd_bytes'])} with zstd; "
        f"{origin(row['earlier'], row)}."
    )
    return f"{text} Note: {row['note']}." if row["note"] else text


def table(rows: Sequence[Row], current: int | None) -> str:
    """Return the last points, newest first, as an HTML table; the current one is bold."""
    if not rows:
        return ""
    last = rows[: -LAST - 1 : -1]
    where = ", ".join(sorted({row["machine"] for row in last}))
    some = f"The last {LAST} of {len(rows)} points" if len(rows) > LAST else "All points"
    heads = ("Point", "Accuracy", "File", "zstd", "Latency", "Measured")
    place = next((index for index, row in enumerate(last) if row["point"] == current), None)
    return html_table(f"{some}, measured on {where}", heads, map(_line, last), current=place)


def _line(row: Row) -> tuple[str, ...]:
    return (
        words(row),
        percent(row["accuracy"]),
        human_bytes(row["bytes"]),
        human_bytes(row["zstd_bytes"]),
        human_ms(row["latency_ms"]),
        moment(row) if row["earlier"] else "now",
    )
