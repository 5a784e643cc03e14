"""The pictures of the bench as HTML, drawn anew only when what they show has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from fedlab_kit import partition
from fedlab_kit.data import load
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.record import RoundRecord
from fedlab_kit.lab import clients
from fedlab_kit.lab.canvas import to_html
from fedlab_kit.lab.curve import LiveCurve, accuracy_curve, describe_curve
from fedlab_kit.lab.marks import Marks
from fedlab_kit.lab.plots import accuracy_against, describe_points
from fedlab_kit.lab.points import Points, table
from fedlab_kit.lab.session import Session
from fedlab_kit.runs import client_accuracy

MOST = 100  # clients who can be told apart in a picture


class CurvePicture:
    """Accuracy per round of a session: cheap pictures while a run is under way, a fine one when it has ended."""

    def __init__(self) -> None:
        self._shown: Any = None
        self._html = ""
        self._live: LiveCurve | None = None
        self._live_of: Any = None

    def draw(self, session: Session, marks: Marks, asked: Experiment) -> str:
        """Return the picture; before the first run it is that of `asked`."""
        stage = session.stage or asked
        records, earlier, rounds = session.records, session.curves(stage.dataset, marks), stage.rounds
        behind = tuple((label, len(curve)) for label, curve in earlier)
        now = (stage, len(records), behind, session.busy)
        if self._shown == now:
            return self._html
        alt = describe_curve(records, earlier, rounds)
        if session.busy:
            if self._live is None or self._live_of != (stage, behind):
                self._live, self._live_of = LiveCurve(earlier, rounds), (stage, behind)
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

    def draw(self, points: Points, dataset: str, axis: str, earlier: bool) -> str:
        """Return the picture of the points on a data set, with or without those of `earlier` benches."""
        now = (points.all, points.asked, points.current, points.marks.all, dataset, axis, earlier)
        if self._shown == now:
            return self._html
        rows, number = points.shown(dataset, earlier), points.current.number if points.current else None
        current = next((index for index, row in enumerate(rows) if row["point"] == number), None)
        self._html = to_html(accuracy_against(rows, axis, current=current), describe_points(rows, axis, current))
        self.table = table(rows, number)
        self._shown = now
        return self._html


class ClientPictures:
    """What each client holds, and how well the model serves it."""

    def __init__(self) -> None:
        self._dealt: Any = None
        self._fared: Any = None
        self._labels = self._accuracy = ""

    def labels(self, asked: Experiment, at_hand: bool) -> str:
        """Return the labels of each client's samples, where the data set is `at_hand`."""
        e = asked
        now = (e.dataset, e.partition, e.clients, e.alpha, e.seed, at_hand)
        if self._dealt != now:
            self._dealt = now
            self._labels = _drawn(e, _labels) if at_hand else _note("Press Run to load the data set.")
        return self._labels

    def accuracy(self, stage: Experiment | None, records: Sequence[RoundRecord]) -> str:
        """Return each client's accuracy after the last of the records."""
        now = (stage, len(records))
        if self._fared != now:
            self._fared = now
            self._accuracy = _note("No round yet.")
            if stage is not None and records:
                self._accuracy = _drawn(stage, lambda e: _fares(e, records[-1]))
        return self._accuracy


def _drawn(e: Experiment, draw: Callable[[Experiment], str]) -> str:
    if e.clients > MOST:
        return _note(f"Clients are drawn one by one up to {MOST} of them; these settings have {e.clients:,}.")
    try:
        return draw(e)
    except (ValueError, OSError) as error:
        return _note(str(error))


def _labels(e: Experiment) -> str:
    dataset = load(e.dataset)
    shards = partition.partition(dataset, e.partition, e.clients, e.alpha, e.seed)
    counts = partition.label_counts(dataset.train.y, shards, len(dataset.classes)).tolist()
    return to_html(clients.label_counts(counts, dataset.classes), clients.describe_labels(counts, dataset.classes))


def _fares(e: Experiment, record: RoundRecord) -> str:
    names = load(e.dataset).sites if e.partition == "site" else ()
    mean, low, high = (values.tolist() for values in client_accuracy(e, record))
    return to_html(clients.client_accuracy(mean, low, high, names), clients.describe_clients(mean, names))


def _note(text: str) -> str:
    return f'<div class="fedlab-hint">{escape(text)}</div>'
