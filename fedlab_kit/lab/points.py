"""The points of a session: each one artifact of one run, with the marks that a person put on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fedlab_kit.deployment.artifact import Artifact, slug
from fedlab_kit.experiment import Recipe
from fedlab_kit.lab.canvas import human_bytes, human_ms, percent
from fedlab_kit.runs import Run
from fedlab_kit.sweep import MEASURED

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Point:
    """One measured artifact; `number` counts from 1 in the order of measurement."""

    number: int
    run: Run
    recipe: Recipe
    artifact: Artifact

    @property
    def key(self) -> tuple[str, str]:
        """What the file depends on: the run, and the part of the recipe that is in effect."""
        return self.run.key, slug(self.recipe)

    def row(self, name: str = "") -> Row:
        """The point as plots and tables want it."""
        measured = {field: getattr(self.artifact, field) for field in MEASURED}
        low, high = self.artifact.interval
        return {
            "point": self.number,
            "name": name,
            "model": self.run.experiment.model,
            **dict(self.recipe),
            **measured,
            "low": low,
            "high": high,
            "uplink_bytes": self.run.uplink_bytes,
            "downlink_bytes": self.run.downlink_bytes,
            "seconds": self.run.measured["seconds"],
            "path": self.artifact.path,
        }


class Points:
    """Every point of a session in order, and its marks, which can be undone: its name once pinned, hidden or not."""

    def __init__(self) -> None:
        self.all: tuple[Point, ...] = ()
        self.current: Point | None = None
        self.names: dict[int, str] = {}
        self.hidden: frozenset[int] = frozenset()
        self._before: list[tuple[dict[int, str], frozenset[int]]] = []

    def add(self, run: Run, recipe: Recipe, artifact: Artifact) -> None:
        """Put a new artifact at the end and make it the current point."""
        self.current = Point(len(self.all) + 1, run, recipe, artifact)
        self.all = (*self.all, self.current)

    def find(self, run: Run, recipe: Recipe) -> Point | None:
        """The point of this run and recipe, if it was measured before."""
        return next((point for point in self.all if point.key == (run.key, slug(recipe))), None)

    def show(self, run: Run, recipe: Recipe) -> None:
        """Make the point of this run and recipe the current one, and bring it back if it was hidden."""
        if found := self.find(run, recipe):
            self.current, self.hidden = found, self.hidden - {found.number}

    def rows(self) -> list[Row]:
        """The points that are not hidden."""
        return [point.row(self.names.get(point.number, "")) for point in self.all if point.number not in self.hidden]

    def pin(self, number: int, name: str) -> None:
        """Name a point; an empty name takes it off again."""
        self._remember()
        self.names = {**self.names, number: name}

    def hide(self, number: int) -> None:
        """Take a point out of plot and table."""
        self._remember()
        self.hidden = self.hidden | {number}

    def undo(self) -> bool:
        """Take back the last mark; False when there is none."""
        if not self._before:
            return False
        self.names, self.hidden = self._before.pop()
        return True

    def _remember(self) -> None:
        self._before.append((self.names, self.hidden))


def words(row: Row) -> str:
    """Say which recipe a point is, e.g. "3: cnn, channel 0.5 int8 static"; a name comes in front."""
    recipe = Recipe(**{field: row[field] for field in Recipe.model_fields})
    name = f"{row['name']}, " if row["name"] else ""
    return f"{row['point']}: {name}{row['model']}, {slug(recipe).replace('-', ' ')}"


def said(row: Row) -> str:
    """Say what was measured on a point."""
    text = (
        f"{words(row)}: {percent(row['accuracy'])} (95 % interval {percent(row['low'])} to {percent(row['high'])}), "
        f"{human_bytes(row['bytes'])}, {human_bytes(row['zstd_bytes'])} with zstd."
    )
    return f"{text} Note: {row['note']}." if row["note"] else text


def table(rows: Sequence[Row], current: int | None, most: int = 6) -> str:
    """Return the last points, newest first, as an HTML table; the current one is bold."""
    if not rows:
        return ""
    heads = ("Point", "Accuracy", "File", "zstd", "Latency")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    lines = "".join(_line(row, row["point"] == current) for row in reversed(rows[-most:]))
    more = f"<caption>The last {most} of {len(rows)} points</caption>" if len(rows) > most else ""
    return f'<table class="fedlab-points">{more}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'


def _line(row: Row, current: bool) -> str:
    cells = (
        percent(row["accuracy"]),
        human_bytes(row["bytes"]),
        human_bytes(row["zstd_bytes"]),
        human_ms(row["latency_ms"]),
    )
    look = ' class="fedlab-current" aria-current="true"' if current else ""
    return f'<tr{look}><th scope="row">{escape(words(row))}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
