"""The workbench: knobs, Run and Stop, words on what is going on, and two plots, in core ipywidgets alone.

Session and Compressor do the work in threads of their own and know no widget; this view looks at them several times
a second. So a callback never blocks (on which thread it runs depends on the kernel's version), drawing costs training
little however fast the rounds come, and the last state is always drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from threading import Event, Lock, Thread
from time import perf_counter
from typing import Any

from fedlab_kit.deployment.artifact import Artifact
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.lab.compressor import DELAY, NO_RUN, Compressor
from fedlab_kit.lab.controls import Controls
from fedlab_kit.lab.export import export
from fedlab_kit.lab.pictures import CurvePicture, ScatterPicture
from fedlab_kit.lab.points import Row
from fedlab_kit.lab.screen import Screen, status
from fedlab_kit.lab.session import Session, difference
from fedlab_kit.runs import Run
from fedlab_kit.settings import Settings

TEXT = "fk.Bench: run this notebook to see and use the workbench."
PAUSE = 0.1  # seconds between two looks at a run under way


class Bench:
    """A workbench: train with Run, compress while the slider is still warm, and see accuracy against size at once.

    `experiment` and `recipe` are where the controls start, `controls` names the fields on the first screen; all
    others are folded away below. Fields of the experiment take effect with Run; fields of the recipe are answered at
    once by a file made from the last finished run. Raises ValueError for a name that is not a field.
    Example: `fk.Bench(fk.Experiment(model="mlp"), controls=["prune_ratio", "dtype", "alpha"])`.
    """

    def __init__(
        self,
        experiment: Experiment | None = None,
        recipe: Recipe | None = None,
        controls: Sequence[str] = ("prune_ratio", "dtype", "temperature"),
    ) -> None:
        self.controls = Controls(experiment or default_experiment(), recipe or Recipe())
        self.session = Session(self._finished, self.controls.complain)
        self.compressor = Compressor(lambda: self.busy, self.controls.complain)
        self._shown = False
        self._curve, self._scatter = CurvePicture(), ScatterPicture()
        self._drawing = Lock()
        self._quiet = Event()
        self._quiet.set()
        actions = {name: getattr(self, name) for name in ("run", "stop", "new_seed", "pin", "hide", "undo")}
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
        """The points on the plot, oldest first: settings and measurements by name, as `pandas.DataFrame` takes them."""
        return self.compressor.points.rows()

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
        self._follow()
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
        self._follow()
        if block:
            self.wait()

    def pin(self, name: str = "") -> None:
        """Name the current point, by what stands in the field if no name is given."""
        if current := self.compressor.points.current:
            self.compressor.points.pin(current.number, name or self.screen.name.value)
        self.refresh()

    def hide(self) -> None:
        """Take the current point out of plot and table."""
        if current := self.compressor.points.current:
            self.compressor.points.hide(current.number)
        self.refresh()

    def undo(self) -> None:
        """Take back the last `pin` or `hide`."""
        self.compressor.points.undo()
        self.refresh()

    def export(self, folder: str | Path) -> Path:
        """Write the current point to a folder with its card, settings, table and report, and return its path.

        Raises ValueError when there is no point yet, StoreError when the folder cannot be written or holds other files.
        """
        current = self.compressor.points.current
        if current is None:
            raise ValueError("there is no point to export yet: press Run first")
        return export(folder, current.artifact, current.run, self.points)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is going on and all has been drawn, at most `timeout` seconds; whether that is so."""
        return self._quiet.wait(timeout)

    def refresh(self) -> None:
        """Show the present state."""
        with self._drawing:
            busy, screen = self.busy, self.screen
            changed = difference(self.experiment, self.session.experiment)
            screen.run.disabled = screen.seed.disabled = busy
            screen.stop.disabled = not busy
            hint = f"Changed since the bold curve: {changed}. Press Run." if changed and not busy else ""
            screen.hint.value = f'<div class="fedlab-hint">{escape(hint)}</div>'
            screen.train_status.value = status(self.status)
            before = " A run is under way: the points are of those before it." if busy and self.points else ""
            screen.compress_status.value = status(self.compressor.status + before)
            screen.curve.value = self._curve.draw(self.session, self.experiment.rounds)
            screen.scatter.value = self._scatter.draw(self.compressor.points, screen.axis.value)
            screen.table.value = self._scatter.table

    def _changed(self, owner: type[Settings]) -> None:
        if owner is Recipe:
            self._measure(DELAY)
            self._follow()
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

    def _follow(self) -> None:
        """Show what is going on until nothing is."""
        self.refresh()
        with self._drawing:
            if self._quiet.is_set():
                self._quiet.clear()
                Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Look at both workers until neither has anything to do, and once more after that."""
        pause, done = PAUSE, False
        while not done:
            active = self.busy or self.compressor.busy
            if self.busy:
                self.session.wait(pause)
            elif active:
                self.compressor.watch(PAUSE)
            began = perf_counter()
            try:
                self.refresh()
            except Exception as error:  # what cannot be drawn must not end the watch: the buttons depend on it
                self.compressor.refuse(f"Not drawn: {type(error).__name__}: {error}")
            pause = max(PAUSE, 4 * (perf_counter() - began))  # a slow machine spends its time on training
            with self._drawing:
                if done := not (active or self.busy or self.compressor.busy):
                    self._quiet.set()

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """Show the widgets; where none can be shown, one line that never changes, which notebook tests compare."""
        if not self._shown:
            self._shown = True
            self.compressor.prepare(self.experiment)
            self._follow()
        return {**self.screen.widget._repr_mimebundle_(**options), "text/plain": TEXT}


def default_experiment() -> Experiment:
    """A small student of a larger teacher, so that each of the three knobs has something to do."""
    return Experiment(model="student", teacher=Experiment())
