"""The workbench: knobs, Run and Stop, a status in words and a live plot, in core ipywidgets alone.

The session does the work in a thread of its own and knows no widget; this view looks at it several times a second.
So a callback never blocks (on which thread it runs depends on the kernel's version), drawing costs training little
however fast the rounds come, and the last state is always drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from threading import Lock, Thread
from time import perf_counter
from typing import Any

import ipywidgets as widgets

from fedlab_kit.experiment import Experiment
from fedlab_kit.lab.canvas import to_html
from fedlab_kit.lab.controls import STYLE, Controls, help_text
from fedlab_kit.lab.curve import LiveCurve, accuracy_curve, describe_curve
from fedlab_kit.lab.session import Session, difference
from fedlab_kit.runs import Run

TEXT = "fk.Bench: run this notebook to see and use the workbench."
PAUSE = 0.1  # seconds between two looks at the session


class Bench:
    """A workbench for federated training: set the controls, press Run, look, and run again.

    `experiment` is where the controls start, `controls` names the fields on the first screen; all others are folded
    away below. Raises ValueError for a name that is not a field. Example: `fk.Bench(controls=["alpha", "lr"])`.
    """

    def __init__(
        self, experiment: Experiment | None = None, *, controls: Sequence[str] = ("model", "alpha", "lr")
    ) -> None:
        self.session = Session()
        self.controls = Controls(experiment or Experiment())
        self._drawn: Any = None
        self._live: LiveCurve | None = None
        self._drawing = Lock()
        self._watcher: Thread | None = None
        self._build([self.controls[name] for name in controls])
        self.controls.changed = self._settings_changed
        self.refresh()

    @property
    def experiment(self) -> Experiment:
        """What the controls say now; a field with a wrong value keeps its last right one."""
        return self.controls.settings  # type: ignore[return-value]

    @property
    def runs(self) -> list[Run]:
        """The runs of this bench, oldest first."""
        return self.session.runs

    @property
    def status(self) -> str:
        """What is going on, as the screen says it."""
        return self.session.status

    @property
    def busy(self) -> bool:
        """Whether a run is under way."""
        return self.session.busy

    def run(self, block: bool = False) -> None:
        """Train what the controls say; with `block`, return when it has ended and been drawn.

        A wrong value, or a run that is still under way, is answered in the status and starts nothing.
        """
        if self.controls.errors:
            self.session.refuse(f"Not started: {'; '.join(self.controls.errors.values())}.")
        elif self.session.start(self.experiment):
            self._watcher = Thread(target=self._watch, daemon=True)
            self._watcher.start()
        self.refresh()
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

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the run has ended and been drawn, at most `timeout` seconds; whether it has."""
        if self._watcher is not None:
            self._watcher.join(timeout)
        return not self.busy

    def refresh(self) -> None:
        """Show the session's present state."""
        with self._drawing:
            busy, changed = self.busy, difference(self.experiment, self.session.experiment)
            self._run.disabled = self._seed.disabled = busy
            self._stop.disabled = not busy
            self._status.value = (
                f'<div class="fedlab-status" role="status" aria-live="polite">{escape(self.status)}</div>'
            )
            hint = f"Changed since the bold curve: {changed}. Press Run." if changed and not busy else ""
            self._hint.value = f'<div class="fedlab-hint">{escape(hint)}</div>'
            self._draw()

    def _settings_changed(self) -> None:
        if not self.busy:
            self.session.refuse("")
        self.refresh()

    def _draw(self) -> None:
        """Draw the curves, unless they are on the screen already: cheaply while a run is under way."""
        session, records, earlier = self.session, self.session.records, self.session.curves()
        now = (session.experiment, len(records), len(earlier), session.busy)
        if self._drawn == now:
            return
        rounds = (session.experiment or self.experiment).rounds
        alt = describe_curve(records, earlier, rounds)
        if session.busy:
            if self._live is None:
                self._live = LiveCurve(earlier, rounds)
            self._figure.value = self._live.to_html(records, alt)
        else:
            self._live = None
            self._figure.value = to_html(accuracy_curve(records, earlier, rounds), alt)
        self._drawn = now

    def _watch(self) -> None:
        """Look at the session until its worker has ended, and once more after that."""
        pause = PAUSE
        while not self.session.wait(pause):
            began = perf_counter()
            self.refresh()
            pause = max(PAUSE, 4 * (perf_counter() - began))  # a slow machine spends its time on training
        self.refresh()
        self.controls.complain(self.session.error)

    def _build(self, first: list[Any]) -> None:
        self._run = _button("Run", "Train with these settings", "primary", self.run)
        self._stop = _button("Stop", "End the run before its next batch", "", self.stop)
        self._seed = _button("New seed", "Run again with other random choices", "", self.new_seed)
        self._status, self._hint, self._figure = widgets.HTML(), widgets.HTML(), widgets.HTML()
        wrap = {"flex_flow": "row wrap"}
        buttons = widgets.HBox([self._run, self._stop, self._seed], layout=wrap)
        knobs = [*(control.widget for control in first), help_text(first), buttons, self._hint]
        folded = self.controls.groups(without=[control.name for control in first])
        left = widgets.VBox([*knobs, *folded], layout={"flex": "1 1 400px", "max_width": "420px"})
        right = widgets.VBox([self._status, self._figure], layout={"flex": "1 1 440px", "min_width": "0"})
        self.widget = widgets.VBox([widgets.HTML(STYLE), widgets.HBox([left, right], layout=wrap)])

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """Show the widgets; where none can be shown, one line that never changes, which notebook tests compare."""
        return {**self.widget._repr_mimebundle_(**options), "text/plain": TEXT}


def _button(name: str, tooltip: str, style: str, action: Any) -> Any:
    button = widgets.Button(
        description=name, tooltip=tooltip, button_style=style, layout={"width": "auto", "min_width": "90px"}
    )
    button.on_click(lambda _: action())
    return button
