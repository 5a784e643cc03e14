"""What stands on the workbench's screen and where: knobs above two plots, what takes effect with Run on the left,
what answers at once on the right, everything else folded away below. Core ipywidgets alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

import ipywidgets as widgets

from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.lab.client_shelf import ClientShelf
from fedlab_kit.lab.control import Control
from fedlab_kit.lab.controls import Controls, help_text
from fedlab_kit.lab.desk import Desk
from fedlab_kit.lab.figures import AXES
from fedlab_kit.lab.point_shelf import PointShelf
from fedlab_kit.lab.run_shelf import RunShelf
from fedlab_kit.lab.shelf import WRAP, button

STYLE = """<style>
.fedlab-bench { --jp-widgets-dropdown-arrow: url("data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' \
viewBox='0 0 18 18'%3E%3Cpath fill='%23808080' d='M4 6h10l-5 6z'/%3E%3C/svg%3E"); }
.fedlab-slider .noUi-handle { visibility: hidden; box-shadow: none; }
.fedlab-slider .noUi-touch-area { visibility: visible; border-radius: 50%; cursor: grab;
  background: var(--jp-brand-color1, #1976d2); border: 1px solid var(--jp-layout-color0, #fff); }
.fedlab-slider [disabled] .noUi-touch-area { background: #808080; cursor: default; }
.fedlab-wrong input, .fedlab-wrong select { outline: 2px solid #d55e00; }
.fedlab-error { color: var(--jp-error-color1, #c62828); line-height: 1.4; }
.fedlab-indent { margin-left: 158px; }
.fedlab-status { line-height: 1.4; min-height: 2.8em; }
.fedlab-hint, .fedlab-help { color: var(--jp-ui-font-color2, #767676); line-height: 1.4; }
.fedlab-help summary { cursor: pointer; }
.fedlab-bench .widget-label { white-space: normal; line-height: 14px; align-self: center; height: auto; }
.fedlab-side { font-weight: 600; }
.fedlab-side span { font-weight: 400; color: var(--jp-ui-font-color2, #767676); }
.jp-RenderedHTMLCommon .fedlab-points, .fedlab-points { font-size: 12px; line-height: 1.4; margin: 0; border: 0;
  border-collapse: collapse; table-layout: auto; }
.fedlab-wide { overflow-x: auto; }
.fedlab-points caption { text-align: left; }
.fedlab-points th, .fedlab-points td { text-align: left; padding: 2px 10px 2px 0; font-weight: 400; }
.fedlab-points tbody th { min-width: 7em; }
.fedlab-points td { white-space: nowrap; }
.fedlab-points td:last-child { white-space: normal; min-width: 6em; }
.fedlab-points.fedlab-compared td { white-space: normal; }
.fedlab-points thead th { color: var(--jp-ui-font-color2, #767676); }
.fedlab-points .fedlab-current * { font-weight: 600; }
</style>"""
HALF = {"flex": "1 1 420px", "min_width": "0"}


class Screen:
    """The widgets of one bench, without a thought of what they show; `widget` holds them all."""

    def __init__(
        self,
        desk: Desk,
        controls: Controls,
        first: list[Control],
        presses: Mapping[str, Callable[[], object]],
        follow: Callable[[], object],
    ) -> None:
        self.run = button("Run", "Train with these settings", presses["Run"], style="primary")
        self.stop = button("Stop", "End the run before its next batch", presses["Stop"])
        self.seed = button("New seed", "Run again with other random choices", presses["New seed"])
        self.points, self.runs, self.clients = (
            PointShelf(desk, follow),
            RunShelf(desk, controls.take, follow),
            ClientShelf(follow),
        )
        self.axis = widgets.Dropdown(
            options=[(axis.label, name) for name, axis in AXES.items()],
            value="zstd_bytes",
            description="Accuracy against",
            style={"description_width": "115px"},
            layout={"width": "400px", "max_width": "98%"},
        )
        self.axis.observe(lambda change: follow(), "value")
        self.train_status, self.hint, self.curve = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.compress_status, self.scatter = widgets.HTML(), widgets.HTML()
        self.store_status = widgets.HTML()
        self.widget = page([self.store_status, *self._rows(controls, first)])

    def _rows(self, controls: Controls, first: list[Control]) -> list[Any]:
        """Return three rows of two halves: knobs, plots, and what is folded away; each wraps on a narrow screen."""
        names = [control.name for control in first]
        knobs = {owner: [c for c in first if c.owner is owner] for owner in (Experiment, Recipe)}
        train = [
            heading("Train", "takes effect with Run"),
            *shown(knobs[Experiment]),
            widgets.HBox([self.run, self.stop, self.seed], layout=WRAP),
            self.hint,
            self.train_status,
        ]
        compress = [
            heading("Compress", "answers at once, for the last finished run"),
            *shown(knobs[Recipe]),
            self.compress_status,
        ]
        return [
            halves(train, compress),
            halves([self.curve], [self.scatter, self.axis]),
            halves(
                [*controls.groups(Experiment, names), self.clients.widget, self.runs.widget],
                [self.points.widget, *controls.groups(Recipe, names)],
            ),
        ]


def page(rows: list[Any]) -> Any:
    """Return the whole of a bench, with the style of its parts."""
    whole = widgets.VBox([widgets.HTML(STYLE), *rows])
    whole.add_class("fedlab-bench")
    return whole


def shown(knobs: list[Control]) -> list[Any]:
    """Return knobs with what they mean."""
    return [*(knob.widget for knob in knobs), help_text(knobs)] if knobs else []


def halves(left: Iterable[Any], right: Iterable[Any]) -> Any:
    """Return two columns that stand side by side where there is room."""
    return widgets.HBox([widgets.VBox(list(side), layout=HALF) for side in (left, right)], layout=WRAP)


def heading(title: str, meaning: str) -> Any:
    """Return what stands above a side of the bench."""
    return widgets.HTML(f'<div class="fedlab-side" role="heading" aria-level="3">{title} <span>{meaning}</span></div>')


def status(text: str) -> str:
    """Return words that a screen reader reads out when they change."""
    return f'<div class="fedlab-status" role="status" aria-live="polite">{escape(text)}</div>'
