"""What stands below the plots: points to name, hide and export, runs to name, hide and compare, each client's share.

Each shelf is a few widgets and a `draw`, which shows what it is given and touches a widget only when that changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any

import ipywidgets as widgets

from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.record import RoundRecord
from fedlab_kit.lab.canvas import to_html
from fedlab_kit.lab.compare import AnyRun, comparison, run_option, run_words, runs_table
from fedlab_kit.lab.controls import folded, is_open
from fedlab_kit.lab.curve import accuracy_curve, describe_curve
from fedlab_kit.lab.marks import Marks
from fedlab_kit.lab.pictures import ClientPictures
from fedlab_kit.lab.points import Points, words

WRAP = {"flex_flow": "row wrap"}
LOOK: dict[str, Any] = {"style": {"description_width": "95px"}, "layout": {"width": "400px", "max_width": "98%"}}
SHORT: dict[str, Any] = {"style": {"description_width": "95px"}, "layout": {"width": "260px"}}


def button(name: str, tooltip: str, action: Callable[[], object], style: str = "") -> Any:
    """Return a named button."""
    made = widgets.Button(
        description=name, tooltip=tooltip, button_style=style, layout={"width": "auto", "min_width": "70px"}
    )
    made.on_click(lambda _: action())
    return made


class Choice:
    """A list to choose one thing from, whose entries change as the work goes on; `chosen` hears of people alone."""

    def __init__(self, name: str, chosen: Callable[[], object]) -> None:
        self.field = widgets.Dropdown(options=[("none yet", None)], description=name, **LOOK)
        self._filling = 0
        self.field.observe(lambda change: None if self._filling == get_ident() else chosen(), "value")

    @property
    def value(self) -> Any:
        """What is chosen now."""
        return self.field.value

    def fill(self, options: Sequence[tuple[str, Any]], value: Any) -> None:
        """Offer (label, value) pairs and choose one of the values."""
        new = tuple(options) or (("none yet", None),)
        value = value if value in [one for _, one in new] else new[0][1]
        self._filling = get_ident()
        try:
            if new != self.field.options:
                self.field.options = new
            if value != self.field.value:
                self.field.value = value
        finally:
            self._filling = 0


class PointShelf:
    """The table of points; the current one can be changed, named, hidden and exported."""

    def __init__(self, actions: dict[str, Callable[[], object]]) -> None:
        self.table = widgets.HTML()
        self.point = Choice("Point", actions["show"])
        self.earlier = widgets.Checkbox(value=True, description="Points of earlier benches", indent=False)
        self.earlier.observe(lambda change: actions["refresh"](), "value")
        self.name = widgets.Text(placeholder="of the current point", description="Name", **SHORT)
        self.hide = button("Hide", "Take the current point out of plot and table", actions["hide"])
        self.folder = widgets.Text(value="my-model", description="Folder", **SHORT)
        self.undo = button("Undo", "Take back the last Pin, Rename or Hide, of points and runs", actions["undo"])
        pin = button("Pin", "Give the current point the name beside it", actions["pin"])
        export = button("Export", "Write the current point to the folder beside it, with a report", actions["export"])
        marks = widgets.HBox([self.name, pin, self.hide, self.undo], layout=WRAP)
        away = widgets.HBox([self.folder, export], layout=WRAP)
        self.widget = widgets.VBox([self.table, self.point.field, marks, away, self.earlier])
        self._shown: Any = None

    def draw(self, points: Points, dataset: str, table: str) -> None:
        """Show the table, and offer every point on the data set."""
        self.table.value = table
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


class RunShelf:
    """Every run, folded away: one can be named, hidden, taken up again, and compared with another."""

    def __init__(self, actions: dict[str, Callable[[], object]]) -> None:
        self.table, self.comparison, self.curve = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.run = Choice("Run to compare", actions["refresh"])
        self.other = Choice("with run", actions["refresh"])
        self.name = widgets.Text(placeholder="of the run above", description="Run name", **SHORT)
        self.hide = button("Hide run", "Take the run and its points out of plots and tables", actions["hide_run"])
        rename = button("Rename run", "Give the run the name beside it", actions["name_run"])
        use = button("Use its settings", "Put the run's settings into the controls", actions["use_run"])
        marks = widgets.HBox([self.name, rename, self.hide, use], layout=WRAP)
        rows = [self.table, self.run.field, marks, self.other.field, self.comparison, self.curve]
        self.widget = folded("all runs, and compare two", rows, actions["refresh"])
        self._shown: Any = None

    def draw(self, runs: Sequence[AnyRun], marks: Marks) -> None:
        """Show the runs and the two that are compared."""
        now = ([(run.key, len(run.records)) for run in runs], marks.all, self.run.value, self.other.value)
        if not is_open(self.widget) or self._shown == now:
            return
        options = [(run_option(run, marks), run.key) for run in reversed(runs)]
        self.run.fill(options, self.run.value)
        self.other.fill([("none", None), *options], self.other.value)
        self.table.value = runs_table(runs, marks)
        self.hide.description = "Show run" if self.run.value and marks[self.run.value].hidden else "Hide run"
        self._compare({run.key: run for run in runs}, marks)
        self._shown = (*now[:2], self.run.value, self.other.value)

    def _compare(self, runs: dict[str, AnyRun], marks: Marks) -> None:
        one, other = runs.get(self.run.value), runs.get(self.other.value)
        if one is None or other is None or one is other:
            self.comparison.value = self.curve.value = ""
            return
        names = run_words(one, marks), run_words(other, marks)
        self.comparison.value = comparison(one, other, names)
        behind = [(names[1], other.records)]
        rounds = max(one.experiment.rounds, other.experiment.rounds)
        figure = accuracy_curve(one.records, behind, rounds, names[0])
        self.curve.value = to_html(figure, describe_curve(one.records, behind, rounds))


class ClientShelf:
    """What each client holds under the settings of the controls, and how the last round serves it, folded away."""

    def __init__(self, refresh: Callable[[], object]) -> None:
        self.labels, self.accuracy = widgets.HTML(), widgets.HTML()
        self.widget = folded("what each client holds and gets", [self.labels, self.accuracy], refresh)
        self._pictures = ClientPictures()

    def draw(self, asked: Experiment, stage: Experiment | None, records: Sequence[RoundRecord], at_hand: bool) -> None:
        """Show both pictures; that of the labels only where the data set is `at_hand`, not to be fetched first."""
        if is_open(self.widget):
            self.labels.value = self._pictures.labels(asked, at_hand)
            self.accuracy.value = self._pictures.accuracy(stage, records)
