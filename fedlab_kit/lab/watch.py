"""A bench for drift: knobs for a stream of patients, what the monitor sees of it, and its alarms; core ipywidgets.

A worker thread of its own answers the newest wish; a control that is moved never waits for it.
"""

from __future__ import annotations

from threading import Condition, Thread
from typing import Any

import ipywidgets as widgets

from fedlab_kit.data import Dataset
from fedlab_kit.deployment.artifact import Artifact
from fedlab_kit.deployment.monitor import Alarm, Monitor
from fedlab_kit.deployment.stream import Stream, draw
from fedlab_kit.lab.control import KNOB, Control
from fedlab_kit.lab.controls import Controls, help_text
from fedlab_kit.lab.figures import alarm_table, distances, to_html
from fedlab_kit.lab.screen import halves, heading, page, status
from fedlab_kit.settings import complaint

TEXT = "Watch: run this notebook to see and use the bench for drift and alarm."
Wish = tuple[str, Stream]


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
        self._news, self._working = Condition(), False
        self._wish: Wish | None = None
        self.controls = Controls(stream or Stream())
        self.site = widgets.Dropdown(
            options=list(self.dataset.sites),
            value=site or self.dataset.sites[0],
            description="Hospital",
            tooltip="Whose patients come.",
            **KNOB,
        )
        self.status, self.picture, self.table = widgets.HTML(), widgets.HTML(), widgets.HTML()
        knobs: list[Control] = list(self.controls.of(Stream).values())
        left = [heading("Stream", "answers at once"), self.site, *(knob.widget for knob in knobs), help_text(knobs)]
        right = [self.picture, self.status, self.table]
        self.widget = page([halves(left, right)])
        self.controls.changed = lambda owner: self.ask()
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
        with self._news:
            self._wish = (self.site.value, self.stream)
            self.status.value = status("Watching.")
            if not self._working:
                self._working = True
                Thread(target=self._work, daemon=True).start()
        if block:
            self.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is asked for any more, at most `timeout` seconds; whether that is so."""
        with self._news:
            return self._news.wait_for(lambda: not self._working, timeout)

    def _work(self) -> None:
        """Answer the newest wish until there is none."""
        while True:
            with self._news:
                wish, self._wish = self._wish, None
                if wish is None:
                    self._working = False
                    self._news.notify_all()
                    return
            try:
                self._answer(*wish)
            except Exception as error:  # a thread's traceback goes nowhere in a notebook
                self.status.value = status(f"Error: {complaint(error)}")
                self.controls.complain(complaint(error))

    def _answer(self, site: str, stream: Stream) -> None:
        known = self.dataset
        rows, _ = draw(known.test, known.sites.index(site), known.preprocess, stream)
        monitor = Monitor(self.artifact, known.train)
        monitor.watch(site, rows)
        drifts = monitor.sites[site].drifts
        looks = drifts["inputs"].looks if drifts else []
        begin = stream.begin if stream.begin < stream.patients else None
        self.alarms = monitor.alarms
        self.picture.value = to_html(distances(looks, begin))
        self.table.value = alarm_table(self.alarms) if self.alarms else ""
        self.status.value = status(_said(self.alarms, begin, site))

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """Show the widgets; where none can be shown, one line that never changes, which notebook tests compare."""
        if not self.picture.value:
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
