"""The workbench: knobs, Run and Stop, words on what is going on, and two plots, in core ipywidgets alone.

`Desk` does the work in threads of its own and knows no widget; a `Follower` has its state drawn several times a
second. So a callback never waits for work (on which thread it runs depends on the kernel's version), drawing costs
training little however fast the rounds come, and the last state is always drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlab_kit.deployment.artifact import Artifact
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.lab.compressor import DELAY
from fedlab_kit.lab.controls import Controls
from fedlab_kit.lab.desk import Desk
from fedlab_kit.lab.follow import Follower
from fedlab_kit.lab.points import Row
from fedlab_kit.lab.screen import Screen
from fedlab_kit.lab.view import View
from fedlab_kit.run import Run
from fedlab_kit.settings import Settings

TEXT = "fk.Bench: run this notebook to see and use the workbench."


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
        self.desk = Desk(lambda: self.recipe, self.controls.complain)
        presses = {"Run": self.run, "Stop": self.stop, "New seed": self.new_seed}
        first = [self.controls[name] for name in controls]
        self.screen = Screen(self.desk, self.controls, first, presses, lambda: self._follower.follow())
        self._view = View(self.desk, self.controls, self.screen)
        self._follower = Follower(self.desk.session, self.desk.compressor, self._view.draw)
        self._shown = False
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
        return self.desk.session.runs

    @property
    def points(self) -> list[Row]:
        """The points this bench was asked for, oldest first, as rows for a `pandas.DataFrame`."""
        return self.desk.points.rows()

    @property
    def history(self) -> list[Row]:
        """The points on the plot, those of earlier benches first: all of the store on the same data set."""
        return self.desk.points.shown(self._view.dataset)

    @property
    def artifact(self) -> Artifact | None:
        """The artifact of the current point."""
        return self.desk.compressor.artifact

    @property
    def status(self) -> str:
        """What is going on with the run, as the screen says it."""
        return self.desk.session.status

    @property
    def busy(self) -> bool:
        """Whether a run is under way."""
        return self.desk.session.busy

    def run(self, block: bool = False) -> None:
        """Train what the controls say, then measure it; with `block`, return when all of it has been drawn.

        A wrong value, or a run that is still under way, is answered in the status and starts nothing.
        """
        self.desk.train(self.experiment, self.controls.wrong(Experiment))
        self._follow(block)

    def stop(self) -> None:
        """End the run that is under way before its next batch; its rounds are kept."""
        self.desk.session.stop()
        self._follow()

    def new_seed(self, block: bool = False) -> None:
        """Run the same settings with the next seed: other weights, partition, cohorts and batches."""
        if not self.busy:
            self.controls["seed"].value = self.experiment.seed + 1
        self.run(block)

    def compress(self, block: bool = False) -> None:
        """Measure what the compress controls say on the last finished run; with `block`, return when it is drawn.

        Controls that are moved do this by themselves.
        """
        self.desk.measure(self.recipe, self.controls.wrong(Recipe))
        self._follow(block)

    def export(self, folder: str | Path) -> Path:
        """Write the current point with card, settings, table and report to a folder, and return that.

        Raises ValueError when there is no point yet, StoreError when the folder cannot be written or holds other files.
        """
        return self.desk.export(folder)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is going on and all has been drawn, at most `timeout` seconds; whether that is so."""
        return self._follower.wait(timeout)

    def refresh(self) -> None:
        """Show the present state, now."""
        self._follower.draw()

    def _follow(self, block: bool = False) -> None:
        self._follower.follow()
        if block:
            self.wait()

    def _changed(self, owner: type[Settings]) -> None:
        if owner is Recipe:
            self.desk.measure(self.recipe, self.controls.wrong(Recipe), DELAY)
        elif not self.busy:
            self.desk.session.refuse("")
        self._follow()

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """Show the widgets; where none can be shown, one line that never changes, which notebook tests compare."""
        if not self._shown:
            self._shown = True
            self.desk.compressor.prepare(self.experiment)
            self._follow()
        return {**self.screen.widget._repr_mimebundle_(**options), "text/plain": TEXT}


def default_experiment() -> Experiment:
    """A small student of a larger teacher, whose clients have no 3, so that each of the three knobs does something."""
    return Experiment(model="student", missing=(3,), teacher=Experiment(rounds=100, lr=0.1))
