"""The pictures of the bench as HTML, drawn anew only when what they show has changed."""

from __future__ import annotations

from typing import Any

from fedlab_kit.experiment import Experiment
from fedlab_kit.lab.figures import Curve, accuracy_against, accuracy_curve, to_html
from fedlab_kit.lab.marks import Marks
from fedlab_kit.lab.points import Points, table
from fedlab_kit.lab.session import Session
from fedlab_kit.lab.wording import difference, role

BEHIND = 6  # earlier curves in a picture


class CurvePicture:
    """Accuracy per round of a session."""

    def __init__(self) -> None:
        self._shown: Any = None
        self._html = ""

    def draw(self, session: Session, marks: Marks, asked: Experiment) -> str:
        """Return the picture; before the first run it is that of `asked`."""
        stage = session.stage or asked
        records, earlier, rounds = session.records, earlier_curves(session, marks, asked), stage.rounds
        behind = tuple((label, len(curve)) for label, curve in earlier)
        now = (stage, len(records), behind)
        if self._shown == now:
            return self._html
        self._html = to_html(accuracy_curve(records, earlier, rounds))
        self._shown = now
        return self._html


def earlier_curves(session: Session, marks: Marks, asked: Experiment) -> list[Curve]:
    """Return the latest runs on the data set of the current one, besides that and hidden ones.

    Each is labelled by its name, or by what sets it apart from the current run; before the first, from what is `asked`.
    """
    current = session.experiment or asked
    others = [
        run
        for run in session.known
        if run.experiment != session.stage and run.experiment.dataset == current.dataset and not marks[run.key].hidden
    ]
    return [(marks[run.key].name or _label(run.experiment, current), run.records) for run in others[-BEHIND:]]


def _label(earlier: Experiment, current: Experiment) -> str:
    part = role(earlier, current)
    return f"{part} {earlier.model}" if part else difference(earlier, current) or "these settings"


class ScatterPicture:
    """Accuracy against a quantity for the points of a session; `table` holds the last of them in figures."""

    def __init__(self) -> None:
        self.table = ""
        self._shown: Any = None
        self._html = ""

    def draw(self, points: Points, dataset: str, axis: str, earlier: bool) -> str:
        """Return the picture of the points on a data set, with or without those of `earlier` benches."""
        now = (points.all, points.asked, points.current, points.marks.all, dataset, axis, earlier)
        if self._shown == now:
            return self._html
        rows, number = points.shown(dataset, earlier), points.current.number if points.current else None
        current = next((index for index, row in enumerate(rows) if row["point"] == number), None)
        self._html = to_html(accuracy_against(rows, axis, current=current))
        self.table = table(rows, number)
        self._shown = now
        return self._html
