"""Every run, folded away: one can be named, hidden, taken up again, and compared with another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from fedlab_kit.experiment import Experiment
from fedlab_kit.lab.compare import comparison, run_option, run_words, runs_table, told_apart
from fedlab_kit.lab.controls import folded, is_open
from fedlab_kit.lab.desk import Desk
from fedlab_kit.lab.figures import accuracy_curve, to_html
from fedlab_kit.lab.marks import Marks
from fedlab_kit.lab.shelf import SHORT, WRAP, Choice, button
from fedlab_kit.run import StoredRun


class RunShelf:
    """Works on a desk; `take` gets the settings that are taken up again, `follow` has what was done shown."""

    def __init__(self, desk: Desk, take: Callable[[Experiment], object], follow: Callable[[], object]) -> None:
        self._desk, self._take = desk, take
        self._shown: Any = None
        self.table, self.comparison, self.curve = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.run, self.other = Choice("Run", follow), Choice("compare with", follow)
        self.name = widgets.Text(placeholder="of the run above", description="Run name", **SHORT)
        self.buttons = {
            "Rename run": button("Rename run", "Give the run the name beside it", self._rename, follow),
            "Hide run": button("Hide run", "Take the run and its points out of plots and tables", self._hide, follow),
            "Use its settings": button("Use its settings", "Put its settings into the controls", self._use, follow),
        }
        marks = widgets.HBox([self.name, *self.buttons.values()], layout=WRAP)
        rows = [self.table, self.run.field, marks, self.other.field, self.comparison, self.curve]
        self.widget = folded("all runs, and compare two", rows, follow)

    def _rename(self) -> None:
        if self.run.value:
            self._desk.marks.name(self.run.value, self.name.value)

    def _hide(self) -> None:
        if self.run.value:
            self._desk.hide_run(self.run.value)

    def _use(self) -> None:
        if found := self._desk.settings(self.run.value):
            self._take(found)

    def draw(self) -> None:
        """Show the runs and the two that are compared, while unfolded."""
        runs, marks = self._desk.session.known, self._desk.marks
        now = ([(run.key, len(run.records)) for run in runs], marks.all, self.run.value, self.other.value)
        if not is_open(self.widget) or self._shown == now:
            return
        options = [(run_option(run, marks), run.key) for run in reversed(runs)]
        self.run.fill(options, self.run.value)
        self.other.fill([("none", None), *options], self.other.value)
        self.table.value = runs_table(runs, marks)
        hidden = self.run.value and marks[self.run.value].hidden
        self.buttons["Hide run"].description = "Show run" if hidden else "Hide run"
        self._compare({run.key: run for run in runs}, marks)
        self._shown = (*now[:2], self.run.value, self.other.value)

    def _compare(self, runs: dict[str, StoredRun], marks: Marks) -> None:
        one, other = runs.get(self.run.value), runs.get(self.other.value)
        if one is None or other is None or one is other:
            self.comparison.value = self.curve.value = ""
            return
        self.comparison.value = comparison(one, other, (run_words(one, marks), run_words(other, marks)))
        behind = [(told_apart(other, one, marks), other.records)]
        rounds = max(one.experiment.rounds, other.experiment.rounds)
        figure = accuracy_curve(one.records, behind, rounds, told_apart(one, other, marks))
        self.curve.value = to_html(figure)
