"""The workbench: knobs, Run and Stop, words on what is going on, and two plots, in core ipywidgets alone.

Session and Compressor do the work in threads of their own and know no widget; this view looks at them several times
a second. So a callback never blocks (on which thread it runs depends on the kernel's version), drawing costs training
little however fast the rounds come, and the last state is always drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from fedlab_kit.deployment.artifact import Artifact
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.lab.compressor import DELAY, NO_RUN, Compressor
from fedlab_kit.lab.controls import Controls
from fedlab_kit.lab.export import export
from fedlab_kit.lab.follow import Follower
from fedlab_kit.lab.history import History
from fedlab_kit.lab.marks import Marks
from fedlab_kit.lab.pictures import CurvePicture, ScatterPicture
from fedlab_kit.lab.points import Point, Points, Row
from fedlab_kit.lab.screen import Screen, status
from fedlab_kit.lab.session import Session, difference
from fedlab_kit.runs import Run, find, runs_folder
from fedlab_kit.settings import Settings

TEXT = "fk.Bench: run this notebook to see and use the workbench."
ACTIONS = ("run", "stop", "new_seed", "show", "pin", "hide", "undo", "name_run", "hide_run", "use_run", "refresh")


class Bench:
    """A workbench: train with Run, compress while the slider is still warm, and see accuracy against size at once.

    `experiment` and `recipe` are where the controls start, `controls` names the fields on the first screen; all
    others are folded away below. Fields of the experiment take effect with Run; fields of the recipe are answered at
    once by a file made from the last finished run. What earlier benches left in the store stands faintly behind.
    Raises ValueError for a name that is not a field.
    Example: `fk.Bench(fk.Experiment(model="mlp"), controls=["prune_ratio", "dtype", "alpha"])`.
    """

    def __init__(
        self,
        experiment: Experiment | None = None,
        recipe: Recipe | None = None,
        controls: Sequence[str] = ("prune_ratio", "dtype", "temperature"),
    ) -> None:
        self.controls = Controls(experiment or default_experiment(), recipe or Recipe())
        self._history, self.marks = History(runs_folder()), Marks(runs_folder())
        self.session = Session(self._finished, self.controls.complain, self._history.runs)
        points = Points(self.marks, self._history)
        self.compressor = Compressor(points, lambda: self.busy, self.controls.complain)
        self._shown = False
        self._first = self.experiment.dataset
        self._curve, self._scatter = CurvePicture(), ScatterPicture()
        self._follower = Follower(self.session, self.compressor, self._draw)
        actions = {**{name: getattr(self, name) for name in ACTIONS}, "export": self._export}
        self.screen = Screen(self.controls, [self.controls[name] for name in controls], actions)
        self.screen.axis.observe(lambda change: self.refresh(), "value")
        self.controls.changed = self._changed
        self.refresh()

    @property
    def experiment(self) -> Experiment:
        """What the train controls say now; a field with a wrong value keeps its last right one."""
        return self.controls.settings(Experiment)

    @property
    def recipe(self) -> Recipe:
        """What the compress controls say now, likewise."""
        return self.controls.settings(Recipe)

    @property
    def runs(self) -> list[Run]:
        """The runs of this bench, oldest first; a teacher that was trained here comes before its student."""
        return self.session.runs

    @property
    def points(self) -> list[Row]:
        """The points this bench was asked for, oldest first, as rows for a `pandas.DataFrame`."""
        return self.compressor.points.rows()

    @property
    def history(self) -> list[Row]:
        """The points on the plot, those of earlier benches first: all of the store on the same data set."""
        return self.compressor.points.shown(self._dataset)

    @property
    def artifact(self) -> Artifact | None:
        """The artifact of the current point."""
        return self.compressor.artifact

    @property
    def status(self) -> str:
        """What is going on with the run, as the screen says it."""
        return self.session.status

    @property
    def busy(self) -> bool:
        """Whether a run is under way."""
        return self.session.busy

    def run(self, block: bool = False) -> None:
        """Train what the controls say, then measure it; with `block`, return when all of it has been drawn.

        A wrong value, or a run that is still under way, is answered in the status and starts nothing.
        """
        if wrong := self.controls.wrong(Experiment):
            self.session.refuse(f"Not started: {wrong}.")
        else:
            self.session.start(self.experiment)
        self._follower.follow()
        if block:
            self.wait()

    def stop(self) -> None:
        """End the run that is under way before its next batch; its rounds are kept."""
        self.session.stop()
        self.refresh()

    def new_seed(self, block: bool = False) -> None:
        """Run the same settings with the next seed: other weights, partition, cohorts and batches."""
        if not self.busy:
            self.controls["seed"].value = self.experiment.seed + 1
        self.run(block)

    def compress(self, block: bool = False) -> None:
        """Measure what the compress controls say on the last finished run; with `block`, return when it is drawn.

        Controls that are moved do this by themselves.
        """
        self._measure()
        self._follower.follow()
        if block:
            self.wait()

    def show(self, number: int = 0) -> None:
        """Make a point the current one, by its number, or the one that is chosen on the screen."""
        if number or self.screen.points.point.value:
            self.compressor.choose(number or self.screen.points.point.value)
        self._follower.follow()

    def pin(self, name: str = "") -> None:
        """Name the current point, by what stands in the field if no name is given; pinning again renames it."""
        if current := self.compressor.points.current:
            self.marks.name(current.key, name or self.screen.points.name.value)
        self.refresh()

    def hide(self) -> None:
        """Take the current point out of plot and table."""
        if current := self.compressor.points.current:
            self.marks.hide(current.key)
        self.refresh()

    def undo(self) -> None:
        """Take back the last name, or the last hiding, of a point or a run."""
        self.marks.undo()
        self.refresh()

    def name_run(self, name: str = "") -> None:
        """Name the run that is chosen below the plots, by what stands in the field if no name is given."""
        if key := self.screen.runs.run.value:
            self.marks.name(key, name or self.screen.runs.name.value)
        self.refresh()

    def hide_run(self) -> None:
        """Take the run that is chosen below the plots, and its points, out of sight, or bring it back."""
        if key := self.screen.runs.run.value:
            (self.marks.show if self.marks[key].hidden else self.marks.hide)(key)
        self.refresh()

    def use_run(self) -> None:
        """Put the settings of the run that is chosen below the plots into the controls; Run then takes it up again."""
        chosen = [run for run in self.session.known if run.key == self.screen.runs.run.value]
        for run in chosen:
            self.controls.take(run.experiment)

    def export(self, folder: str | Path = "") -> Path:
        """Write the current point with card, settings, table and report to a folder, and return that.

        The name in the field is taken if none is given. Raises ValueError without a point, StoreError when the folder
        cannot be written.
        """
        current = self.compressor.points.current
        if current is None or current.artifact is None:
            raise ValueError("there is no point to export yet: press Run first")
        rows = self.compressor.points.shown(current.run.experiment.dataset)
        return export(folder or self.screen.points.folder.value, current.artifact, _whole(current), rows)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is going on and all has been drawn, at most `timeout` seconds; whether that is so."""
        return self._follower.wait(timeout)

    def refresh(self) -> None:
        """Show the present state."""
        self._follower.draw()

    def _draw(self) -> None:
        busy, screen, session, points = self.busy, self.screen, self.session, self.compressor.points
        changed = difference(self.experiment, session.experiment)
        screen.run.disabled = screen.seed.disabled = busy
        screen.stop.disabled = not busy
        hint = f"Changed since the bold curve: {changed}. Press Run." if changed and not busy else ""
        screen.hint.value = f'<div class="fedlab-hint">{escape(hint)}</div>'
        screen.store_status.value = f'<div class="fedlab-error">{escape(self._store_error)}</div>'
        screen.train_status.value = status(self.status)
        before = " A run is under way: the points are of those before it." if busy and self.points else ""
        screen.compress_status.value = status(self.compressor.status + before)
        screen.curve.value = self._curve.draw(session, self.marks, self.experiment)
        earlier = screen.points.earlier.value
        screen.scatter.value = self._scatter.draw(points, self._dataset, screen.axis.value, earlier)
        screen.points.draw(points, self._dataset, self._scatter.table)
        screen.runs.draw(session.known, self.marks)
        at_hand = self.experiment.dataset in {self._first, *(run.experiment.dataset for run in self.runs)}
        screen.clients.draw(self.experiment, session.stage, session.records, at_hand)

    @property
    def _dataset(self) -> str:
        """The data set whose runs and points are shown: that of the bold curve, else the one that is chosen."""
        return (self.session.experiment or self.experiment).dataset

    @property
    def _store_error(self) -> str:
        return "; ".join(filter(None, (self._history.error, self.marks.error)))

    def _export(self) -> None:
        self.compressor.do("Exporting.", lambda: f"Exported to {self.export()}: open report.html there.")
        self._follower.follow()

    def _changed(self, owner: type[Settings]) -> None:
        if owner is Recipe:
            self._measure(DELAY)
            self._follower.follow()
        else:
            if not self.busy:
                self.session.refuse("")
            self.refresh()

    def _measure(self, delay: float = 0.0) -> None:
        finished = [run for run in self.runs if run.status == "finished"]
        if wrong := self.controls.wrong(Recipe):
            self.compressor.refuse(f"Not measured: {wrong}.")
        elif finished:
            self.compressor.ask(finished[-1], self.recipe, delay)
        else:
            self.compressor.refuse(NO_RUN)

    def _finished(self, run: Run) -> None:
        self.compressor.ask(run, self.recipe)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """Show the widgets; where none can be shown, one line that never changes, which notebook tests compare."""
        if not self._shown:
            self._shown = True
            self.compressor.prepare(self.experiment)
            self._follower.follow()
        return {**self.screen.widget._repr_mimebundle_(**options), "text/plain": TEXT}


def _whole(point: Point) -> Run:
    """Return the run of a point with its model, which a run of an earlier bench lacks until now."""
    run = point.run if isinstance(point.run, Run) else find(point.run.experiment)
    if run is None or run.key != point.run.key:
        raise ValueError("this point's run was made by other versions: press Run with its settings to make it again")
    return run


def default_experiment() -> Experiment:
    """A small student of a larger teacher, so that each of the three knobs has something to do."""
    return Experiment(model="student", teacher=Experiment())
