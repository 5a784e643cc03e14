"""The live chart: a `Plot` as points one can touch, in one small widget of our own; its picture stands there before it.

The front end is `chart.js` with `chart.css`: one ES module, nothing fetched from anywhere. A kernel cannot see whether
the page has anywidget's front end, so the picture is drawn until the chart has reported itself.
"""

from __future__ import annotations

import json
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import traitlets

from fedlab_kit.lab.plot import Plot, to_html

SCRIPT = Path(__file__).with_name("chart.js").read_text("utf-8")
STYLE = Path(__file__).with_name("chart.css").read_text("utf-8")


class Chart(anywidget.AnyWidget):
    """A chart whose `chosen` is the key of the mark or line that was clicked last, "" for none; it can also be set.

    Show `box`, which holds the picture until `ready`. `plot` and `earlier` are JSON for the front end; hollow marks,
    which rarely change and may be thousands, travel in the latter alone.
    """

    _esm = SCRIPT
    _css = STYLE
    plot = traitlets.Unicode("{}").tag(sync=True)
    earlier = traitlets.Unicode("[]").tag(sync=True)
    chosen = traitlets.Unicode("").tag(sync=True)
    ready = traitlets.Bool(False).tag(sync=True)

    def __init__(self) -> None:
        super().__init__()
        self._shown: Plot | None = None
        self.picture = widgets.HTML()
        cover = widgets.VBox(
            [self], layout={"display": "none"}
        )  # also hides what Jupyter says where there is no front end
        self.box = widgets.VBox([self.picture, cover])
        self.observe(lambda change: self._swap(cover.layout), "ready")

    def show(self, plot: Plot) -> None:
        """Draw a plot in place of the last one; the plot's `current` mark becomes the chosen one."""
        if plot == self._shown:
            return
        self._shown = plot
        if not self.ready:
            self.picture.value = to_html(plot)
        with self.hold_sync():
            self.plot, self.earlier = _written(plot)
            self.chosen = plot.current or self.chosen

    def _swap(self, layout: Any) -> None:
        layout.display = "" if self.ready else "none"
        self.picture.value = "" if self.ready or self._shown is None else to_html(self._shown)


def live_html(*plots: Plot) -> str:
    """Return charts for a page without a kernel: pictures that a script makes live, and that remain in print."""
    charts = "".join(
        f'<div data-plot="{escape(now)}" data-earlier="{escape(earlier)}">{to_html(plot)}</div>'
        for plot in plots
        for now, earlier in [_written(plot)]
    )
    return f'{charts}<style>{STYLE}</style><script type="module">{SCRIPT}\nwake();</script>'


def _written(plot: Plot) -> tuple[str, str]:
    """Return the plot and its hollow marks as JSON."""
    now, earlier = (tuple(mark for mark in plot.marks if mark.hollow is hollow) for hollow in (False, True))
    whole: list[Any] = [replace(plot, marks=now), earlier]
    one, other = (json.dumps(part, default=vars, allow_nan=False, separators=(",", ":")) for part in whole)
    return one, other
