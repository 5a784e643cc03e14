"""What a bench knows and does, without a widget: runs and points, what is written on them, what earlier benches left.

Session and Compressor do the work in threads of their own; everything here returns at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.lab.compressor import NO_RUN, Compressor
from fedlab_kit.lab.export import export
from fedlab_kit.lab.marks import Marks
from fedlab_kit.lab.points import Points
from fedlab_kit.lab.session import Session
from fedlab_kit.runs import history, runs_folder


class Desk:
    """One person's work on the store: `session` trains, `compressor` measures, `points` and `marks` keep.

    `recipe` says what to measure on a run that has just finished; `failed` is called with the words of every error.
    """

    def __init__(self, recipe: Callable[[], Recipe], failed: Callable[[str], None]) -> None:
        self.marks, (earlier, self._damaged) = Marks(runs_folder()), history()
        self.points = Points(self.marks, earlier)
        self.session = Session(lambda run: self.compressor.ask(run, recipe()), failed, earlier)
        self.compressor = Compressor(self.points, lambda: self.session.busy, failed)

    @property
    def store_error(self) -> str:
        """What of the store could not be read or written, "" if nothing."""
        names = ", ".join(self._damaged[:3]) + (" and more" if len(self._damaged) > 3 else "")
        left_out = f"{len(self._damaged)} stored run(s) cannot be read and are left out: {names}" if names else ""
        return "; ".join(filter(None, (left_out, self.marks.error)))

    def train(self, experiment: Experiment, wrong: str = "") -> None:
        """Begin a run; what is `wrong` with its settings, or a run that is under way, is answered in the status."""
        if wrong:
            self.session.refuse(f"Not started: {wrong}.")
        else:
            self.session.start(experiment)

    def measure(self, recipe: Recipe, wrong: str = "", delay: float = 0.0) -> None:
        """Measure a recipe on the last finished run when it has stood for `delay` seconds, or say why not."""
        finished = [run for run in self.session.runs if run.status == "finished"]
        if wrong:
            self.compressor.say(f"Not measured: {wrong}.")
        elif finished:
            self.compressor.ask(finished[-1], recipe, delay)
        else:
            self.compressor.say(NO_RUN)

    def pin(self, name: str) -> None:
        """Name the current point; pinning again renames it."""
        if self.points.current:
            self.marks.name(self.points.current.key, name)

    def hide(self) -> None:
        """Take the current point out of plot and table."""
        if self.points.current:
            self.marks.hide(self.points.current.key)

    def hide_run(self, key: str) -> None:
        """Take a run and its points out of sight, or bring them back."""
        (self.marks.show if self.marks[key].hidden else self.marks.hide)(key)

    def settings(self, key: str) -> Experiment | None:
        """Return the settings of a run, by its key."""
        return next((run.experiment for run in self.session.known if run.key == key), None)

    def export(self, folder: str | Path) -> Path:
        """Write the current point to a folder with its card, settings, table and report; return the folder's path.

        Raises ValueError without a point, StoreError when the folder cannot be written or holds other files.
        """
        current = self.points.current
        if current is None or current.artifact is None:
            raise ValueError("there is no point to export yet: press Run first")
        return export(folder, current.artifact, current.run, self.points.shown(current.run.experiment.dataset))

    def export_later(self, folder: str) -> None:
        """Export after what was asked for before; where to, or why not, is said in the compressor's status."""
        self.compressor.do("Exporting.", lambda: f"Exported to {self.export(folder)}: open report.html there.")
