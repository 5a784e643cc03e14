"""What of a desk's state stands where on the screen: called several times a second while work goes on."""

from __future__ import annotations

from html import escape

from fedlab_kit.experiment import Experiment
from fedlab_kit.lab.controls import Controls
from fedlab_kit.lab.desk import Desk
from fedlab_kit.lab.pictures import CurvePicture, ScatterPicture
from fedlab_kit.lab.screen import Screen, status
from fedlab_kit.lab.wording import difference


class View:
    """Draws one desk, and what the controls say now, on one screen."""

    def __init__(self, desk: Desk, controls: Controls, screen: Screen) -> None:
        self._desk, self._controls, self._screen = desk, controls, screen
        self._first = controls.settings(Experiment).dataset  # what a notebook names may be fetched to be drawn
        self._curve, self._scatter = CurvePicture(), ScatterPicture()

    @property
    def dataset(self) -> str:
        """The data set whose runs and points are shown: that of the bold curve, else the one that is chosen."""
        return (self._desk.session.experiment or self._controls.settings(Experiment)).dataset

    def draw(self) -> None:
        """Show the present state."""
        screen, asked = self._screen, self._controls.settings(Experiment)
        busy = self._desk.session.busy
        screen.run.disabled = screen.seed.disabled = busy
        screen.stop.disabled = not busy
        screen.store_status.value = f'<div class="fedlab-error">{escape(self._desk.store_error)}</div>'
        self._draw_training(asked, busy)
        self._draw_points(busy)
        screen.runs.draw()
        self._draw_clients(asked)

    def _draw_training(self, asked: Experiment, busy: bool) -> None:
        screen, session = self._screen, self._desk.session
        changed = difference(asked, session.experiment)
        hint = f"Changed since the bold curve: {changed}. Press Run." if changed and not busy else ""
        screen.hint.value = f'<div class="fedlab-hint">{escape(hint)}</div>'
        screen.train_status.value = status(session.status)
        screen.curve.value = self._curve.draw(session, self._desk.marks, asked)

    def _draw_points(self, busy: bool) -> None:
        screen, points = self._screen, self._desk.points
        before = " A run is under way: the points are of those before it." if busy and points.all else ""
        screen.compress_status.value = status(self._desk.compressor.status + before)
        earlier = screen.points.earlier.value
        screen.scatter.value = self._scatter.draw(points, self.dataset, screen.axis.value, earlier)
        screen.points.draw(self.dataset, self._scatter.table)

    def _draw_clients(self, asked: Experiment) -> None:
        session = self._desk.session
        at_hand = asked.dataset in {self._first, *(run.experiment.dataset for run in session.runs)}
        self._screen.clients.draw(asked, session.stage, session.records, at_hand)
