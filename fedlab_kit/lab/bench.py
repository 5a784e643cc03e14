"""The workbench: knobs, Run and Stop, words on what is going on, and two charts.

Data walk one way: `Controls` say what is asked, `Workbench` does it in threads of its own and knows no widget, `Screen`
shows what there is when `Refresh` has it drawn. So a callback never waits for work (on which thread it runs depends on
the kernel's version), drawing costs training little however fast the rounds come, and the last state is always drawn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlab_kit.deployment.artifact import Artifact
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.files import at
from fedlab_kit.lab.controls import Controls
from fedlab_kit.lab.history import Filter, Row
from fedlab_kit.lab.layout import Screen
from fedlab_kit.lab.workbench import DELAY, Workbench
from fedlab_kit.lab.worker import Refresh
from fedlab_kit.run import Run
from fedlab_kit.settings import Settings, complaint

TEXT = "fk.Bench: run this notebook to see and use the workbench."
STATE = ("experiment", "recipe", "controls", "locked", "hidden", "axis", "filter")
_IN_CELLS: dict[str, Bench] = {}  # what each cell shows, by the cell's id


class Bench:
    """A workbench: train with Run, compress while the slider is still warm, and see accuracy against size at once.

    `experiment` and `recipe` are where the controls start, `controls` names the fields on the first screen; all
    others are folded away below, but for those that are `hidden`; those that are `locked` keep their value. Fields of
    the experiment take effect with Run; fields of the recipe are answered at once by a file made from the last finished
    run, or from a stored one of just these settings. What earlier benches left in the store stands faintly behind.
    Raises ValueError for a name that is not a field.
    Example: `fk.Bench(fk.Experiment(model="mlp"), controls=["prune_ratio", "dtype", "alpha"])`.
    """

    def __init__(
        self,
        experiment: Experiment | None = None,
        recipe: Recipe | None = None,
        controls: Sequence[str] = ("prune_ratio", "dtype", "temperature"),
        locked: Sequence[str] = (),
        hidden: Sequence[str] = (),
    ) -> None:
        self._names = {"controls": [*controls], "locked": [*locked], "hidden": [*hidden]}
        self.controls = Controls(experiment or default_experiment(), recipe or Recipe(), locked=locked)
        self.workbench = Workbench(self.controls.complain)
        presses: dict[str, Callable[..., Any]] = {
            **{"Run": self.run, "Stop": self.stop, "New seed": self.new_seed, "Choose": self.choose},
            **{"Read": lambda: json.dumps(self.state()), "Write": self.open},
        }
        self.screen = Screen(self.workbench, self.controls, controls, hidden, presses)
        self._refresh = Refresh(self.screen.draw, self._undrawn)
        self._shown = False
        self.controls.changed = self._changed
        self.workbench.recipe = self.recipe
        self.workbench.aim(self.experiment)
        self.workbench.listen(self._refresh.ask)
        self.refresh()

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | str | Path) -> Bench:
        """Return a bench as another one was, from its `state`, that as JSON text, or a file of it.

        Raises ValueError for what is no state of a bench.
        """
        told = _read(state)
        made = cls(**{name: told[name] for name in ("controls", "locked", "hidden") if name in told})
        made.open(told)
        return made

    def state(self) -> dict[str, Any]:
        """Return all that this bench is set to, ready for JSON: another bench takes it by `from_state`."""
        settings = {"experiment": self.experiment.changes(), "recipe": self.recipe.changes()}
        shown = {"axis": self.workbench.axis, "filter": self.workbench.filter._asdict()}
        return {**settings, **self._names, **shown}

    def open(self, state: Mapping[str, Any] | str | Path) -> None:
        """Set the controls, and what is shown, as another bench had them; what is locked here stays as it is."""
        told = _read(state)
        self.controls.take(Experiment(**told.get("experiment", {})), Recipe(**told.get("recipe", {})))
        self.workbench.filter = Filter(**told.get("filter", {}))
        self.screen.axis.value = told.get("axis", self.workbench.axis)
        self.workbench.notify()

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
        return self.workbench.session.runs

    @property
    def points(self) -> list[Row]:
        """The points this bench was asked for, oldest first, as rows for a `pandas.DataFrame`."""
        return self.workbench.points.rows()

    @property
    def history(self) -> list[Row]:
        """The points on the plot, those of earlier benches first: see the filter below the table."""
        self.workbench.whole.wait()
        return self.workbench.points.shown(self.screen.like, self.workbench.filter)

    @property
    def artifact(self) -> Artifact | None:
        """The artifact of the current point."""
        return self.workbench.compressor.artifact

    @property
    def status(self) -> str:
        """What is going on with the run, as the screen says it."""
        return self.workbench.session.status

    @property
    def busy(self) -> bool:
        """Whether a run is under way."""
        return self.workbench.session.busy

    def run(self, block: bool = False) -> None:
        """Train what the controls say, then measure it; with `block`, return when all of it has been drawn.

        A wrong value, or a run that is still under way, is answered in the status and starts nothing.
        """
        self.workbench.train(self.experiment, wrong=self.controls.wrong(Experiment))
        self.wait() if block else None

    def stop(self) -> None:
        """End the run that is under way before its next batch; its rounds are kept."""
        self.workbench.session.stop()

    def new_seed(self, block: bool = False) -> None:
        """Run the same settings with the next seed: other weights, partition, cohorts and batches."""
        if not self.busy:
            self.controls["seed"].value = self.experiment.seed + 1
        self.run(block)

    def compress(self, block: bool = False) -> None:
        """Measure what the compress controls say on the run at hand; with `block`, return when it is drawn.

        Controls that are moved do this by themselves.
        """
        self.workbench.measure(self.recipe, self.controls.wrong(Recipe))
        self.wait() if block else None

    def choose(self, number: int) -> None:
        """Make a point the current one, and set the controls to what made it."""
        point = self.workbench.points.all[number - 1]
        self.controls.take(point.run.experiment, point.recipe, tell=False)
        self.workbench.choose(number)

    def export(self, folder: str | Path) -> Path:
        """Write the current point with card, settings, table and report to a folder, and return that.

        Raises ValueError when there is no point yet, StoreError when the folder cannot be written or holds other files.
        """
        return self.workbench.export(folder)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is going on and all has been drawn, at most `timeout` seconds; whether that is so."""
        return self.workbench.wait(timeout) and self._refresh.worker.wait(timeout)

    def refresh(self) -> None:
        """Show the present state, now."""
        self._refresh.draw()

    def close(self) -> None:
        """Stop what is going on and give back threads, widgets and their memory; runs and points stay in the store."""
        self.workbench.close()
        self._refresh.worker.close()
        self.screen.close()

    def _changed(self, owner: type[Settings], drag: bool) -> None:
        if owner is Recipe:
            self.workbench.measure(self.recipe, self.controls.wrong(Recipe), DELAY if drag else 0.0, drag)
        else:
            self.workbench.aim(self.experiment)

    def _undrawn(self, error: Exception) -> None:
        """Say what could not be drawn, without drawing that: the next change does."""
        self.workbench.compressor.status = f"Not drawn: {complaint(error)}"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """Show the widgets; where none can be shown, one line that never changes, which notebook tests compare."""
        if not self._shown:
            self._shown = True
            _take_the_place(self)
            self.workbench.compressor.prepare(self.experiment)
        return {**self.screen.widget._repr_mimebundle_(**options), "text/plain": TEXT}


def _take_the_place(bench: Bench) -> None:
    """Close the bench that this cell has shown before."""
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    cell = getattr(shell, "parent_header", {}).get("metadata", {}).get("cellId") if shell else None
    if cell:
        if cell in _IN_CELLS:
            _IN_CELLS[cell].close()
        _IN_CELLS[cell] = bench


def _read(state: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """Return a state of a bench. Raises ValueError, naming what is wrong, for anything else."""
    try:
        if isinstance(state, Path) or (isinstance(state, str) and not state.lstrip().startswith("{")):
            state = at(state).read_text("utf-8")
        told = json.loads(state) if isinstance(state, str) else dict(state)
    except (OSError, ValueError) as error:
        raise ValueError(f"state must be what bench.state() gives, as JSON or a file of it: {error}") from None
    if unknown := [name for name in told if name not in STATE]:
        raise ValueError(f"state must have {', '.join(STATE)}, got {unknown[0]!r}")
    return told


def default_experiment() -> Experiment:
    """A small student of a larger teacher, whose clients have no 3, so that each of the three knobs does something."""
    return Experiment(model="student", missing=(3,), teacher=Experiment(rounds=100, lr=0.1))
