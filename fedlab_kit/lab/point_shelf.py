"""The table of points, with what can be done to the current one: change, name, hide and export it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from fedlab_kit.lab.desk import Desk
from fedlab_kit.lab.points import Points, words
from fedlab_kit.lab.shelf import SHORT, WRAP, Choice, button


class PointShelf:
    """Works on a desk; `follow` has what was done shown. A widget is touched only when what it shows has changed."""

    def __init__(self, desk: Desk, follow: Callable[[], object]) -> None:
        self._desk, self._follow = desk, follow
        self._shown: Any = None
        self.table = widgets.HTML()
        self.point = Choice("Point", self.show)
        self.earlier = widgets.Checkbox(value=True, description="Points of earlier benches", indent=False)
        self.earlier.observe(lambda change: follow(), "value")
        self.name = widgets.Text(placeholder="of the current point", description="Name", **SHORT)
        self.folder = widgets.Text(value="my-model", description="Folder", **SHORT)
        self.buttons = {
            "Pin": button("Pin", "Give the current point the name beside it", self._pin, follow),
            "Hide": button("Hide", "Take the current point out of plot and table", desk.hide, follow),
            "Undo": button(
                "Undo", "Take back the last Pin, Rename or Hide, of points and runs", desk.marks.undo, follow
            ),
            "Export": button("Export", "Write the current point to the folder, with a report", self._export, follow),
        }
        *marks, export = self.buttons.values()
        rows = (widgets.HBox([self.name, *marks], layout=WRAP), widgets.HBox([self.folder, export], layout=WRAP))
        self.widget = widgets.VBox([self.table, self.point.field, *rows, self.earlier])

    def show(self) -> None:
        """Make the chosen point the current one."""
        if self.point.value:
            self._desk.compressor.choose(self.point.value)
            self._follow()

    def _pin(self) -> None:
        self._desk.pin(self.name.value)

    def _export(self) -> None:
        self._desk.export_later(self.folder.value)

    def draw(self, dataset: str, table: str) -> None:
        """Show the table, and offer every point on the data set."""
        self.table.value = table
        points = self._desk.points
        now = (points.all, points.current, points.marks.all, dataset)
        if self._shown != now:
            self._shown = now
            self.point.fill(_options(points, dataset), points.current.number if points.current else None)


def _options(points: Points, dataset: str) -> list[tuple[str, int | None]]:
    """Offer the points of a data set, newest first; one that is hidden says so."""
    options: list[tuple[str, int | None]] = [] if points.current else [("choose one", None)]
    for point in reversed(points.all):
        if point.run.experiment.dataset == dataset:
            hidden = points.marks[point.key].hidden or points.marks[point.run.key].hidden
            options.append((words(points.row(point)) + (" (hidden)" if hidden else ""), point.number))
    return options if len(options) > 1 or points.current else []
