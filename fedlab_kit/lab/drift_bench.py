"""A bench for drift: knobs for a stream of patients, what the monitor sees of it, and its alarms."""

from __future__ import annotations

from functools import partial
from typing import Any

import ipywidgets as widgets

from fedlab_kit.data import Dataset
from fedlab_kit.deployment.artifact import Artifact
from fedlab_kit.deployment.monitor import Alarm, Monitor, Stream, draw
from fedlab_kit.lab.chart import Chart
from fedlab_kit.lab.controls import KNOB, Controls, help_text
from fedlab_kit.lab.figures import alarm_table, distances
from fedlab_kit.lab.layout import halves, heading, page, status
from fedlab_kit.lab.worker import Worker
from fedlab_kit.settings import complaint

TEXT = "Watch: run this notebook to see and use the bench for drift and alarm."


class Watch:
    """Send made-up streams of a hospital's held-out patients through an artifact and see when its monitor gives alarm.

    `stream` is where the controls start, `site` the hospital (the first unless given). The monitor's reference are
    the training patients. Raises ValueError for a data set without tables or sites, or an unknown site.
    Example: `Watch(artifact, Stream(offset=0.3), site="rural")`.
    """

    def __init__(self, artifact: Artifact, stream: Stream | None = None, site: str = "") -> None:
        self.artifact, self.dataset = artifact, _table(artifact)
        if site and site not in self.dataset.sites:
            raise ValueError(f"site must be one of {', '.join(self.dataset.sites)}, got {site!r}")
        self.alarms: list[Alarm] = []
        self.controls = Controls(stream or Stream())
        self.site = widgets.Dropdown(
            options=list(self.dataset.sites),
            value=site or self.dataset.sites[0],
            description="Hospital",
            tooltip="Whose patients come.",
            **KNOB,
        )
        self.status, self.chart, self.table = widgets.HTML(), Chart(), widgets.HTML()
        knobs = list(self.controls.of(Stream).values())
        left = [heading("Stream", "answers at once"), self.site, *(knob.widget for knob in knobs), help_text(knobs)]
        self.widget = page([halves(left, [self.chart.box, self.status, self.table])])
        self._worker = Worker(self._failed, daemon=True)
        self.controls.changed = lambda owner, drag: self.ask()
        self.site.observe(lambda change: self.ask(), "value")

    @property
    def stream(self) -> Stream:
        """What the controls say now; a field with a wrong value keeps its last right one."""
        return self.controls.settings(Stream)

    def ask(self, block: bool = False) -> None:
        """Have the stream watched that the controls describe; with `block`, return when it is on the screen."""
        if wrong := self.controls.wrong(Stream):
            self.status.value = status(f"Not watched: {wrong}.")
            return
        self.status.value = status("Watching.")
        self._worker.ask(partial(self._answer, self.site.value, self.stream), "stream")
        if block:
            self.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is asked for any more, at most `timeout` seconds; whether that is so."""
        return self._worker.wait(timeout)

    def _failed(self, error: Exception) -> None:
        self.status.value = status(f"Error: {complaint(error)}")
        self.controls.complain(error)

    def _answer(self, site: str, stream: Stream) -> None:
        known = self.dataset
        rows, _ = draw(known.test, known.sites.index(site), known.preprocess, stream)
        monitor = Monitor(self.artifact, known.train)
        monitor.watch(site, rows)
        drifts = monitor.sites[site].drifts
        looks = drifts["inputs"].looks if drifts else []
        begin = stream.begin if stream.begin < stream.patients else None
        self.alarms = monitor.alarms
        self.chart.show(distances(looks, begin))
        self.table.value = alarm_table(self.alarms) if self.alarms else ""
        self.status.value = status(_said(self.alarms, begin, site))

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """Show the widgets; where none can be shown, one line that never changes, which notebook tests compare."""
        if not self.table.value and not self.chart.picture.value:
            self.ask()
        return {**self.widget._repr_mimebundle_(**options), "text/plain": TEXT}


def _table(artifact: Artifact) -> Dataset:
    known = artifact.dataset
    if len(known.shape) != 1 or not known.sites:
        raise ValueError(f"dataset must be a table with sites, {known.name!r} is none")
    return known


def _said(alarms: list[Alarm], begin: int | None, site: str) -> str:
    """What the alarms mean, in a sentence or two."""
    first = next((alarm.patient for alarm in alarms if begin is not None and alarm.patient > begin), None)
    false = sum(begin is None or alarm.patient <= begin for alarm in alarms)
    early = f" {false} false alarm{'' if false == 1 else 's'} before that." if false else ""
    if begin is None:
        return f"{site}: nothing changes, {false or 'no'} false alarm{'' if false == 1 else 's'}."
    if first is None:
        return f"{site}: the change after {begin} patients is not caught.{early}"
    return f"{site}: the change after {begin} patients is caught {first - begin} patients later.{early}"
