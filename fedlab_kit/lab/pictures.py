"""The two pictures of the bench as HTML, drawn anew only when what they show has changed."""

from __future__ import annotations

from typing import Any

from fedlab_kit.experiment import Experiment
from fedlab_kit.lab.canvas import to_html
from fedlab_kit.lab.curve import LiveCurve, accuracy_curve, describe_curve
from fedlab_kit.lab.plots import accuracy_against, describe_points
from fedlab_kit.lab.points import Points, table
from fedlab_kit.lab.session import Session


class CurvePicture:
    """Accuracy per round of a session: cheap pictures while a run is under way, a fine one when it has ended."""

    def __init__(self) -> None:
        self._shown: Any = None
        self._html = ""
        self._live: LiveCurve | None = None
        self._live_of: Experiment | None = None

    def draw(self, session: Session, rounds: int) -> str:
        """Return the picture; `rounds` is how far its axis reaches before the first run."""
        records, earlier = session.records, session.curves()
        now = (session.stage, len(records), len(earlier), session.busy)
        if self._shown == now:
            return self._html
        rounds = session.stage.rounds if session.stage else rounds
        alt = describe_curve(records, earlier, rounds)
        if session.busy:
            if self._live is None or self._live_of != session.stage:
                self._live, self._live_of = LiveCurve(earlier, rounds), session.stage
            self._html = self._live.to_html(records, alt)
        else:
            self._live = None
            self._html = to_html(accuracy_curve(records, earlier, rounds), alt)
        self._shown = now
        return self._html


class ScatterPicture:
    """Accuracy against a quantity for the points of a session; `table` holds the last of them in figures."""

    def __init__(self) -> None:
        self.table = ""
        self._shown: Any = None
        self._html = ""

    def draw(self, points: Points, axis: str) -> str:
        """Return the picture."""
        now = (points.all, points.current, points.names, points.hidden, axis)
        if self._shown == now:
            return self._html
        rows, number = points.rows(), points.current.number if points.current else None
        current = next((index for index, row in enumerate(rows) if row["point"] == number), None)
        self._html = to_html(accuracy_against(rows, axis, current=current), describe_points(rows, axis, current))
        self.table = table(rows, number)
        self._shown = now
        return self._html
