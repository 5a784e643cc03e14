"""What stands on the workbench's screen and where, and what of its state is shown there: knobs above two charts, what
takes effect with Run on the left, what answers at once on the right, everything else folded away below.

`Screen.draw` is called whenever something has changed; a widget is touched only when what it shows has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from threading import get_ident
from time import sleep
from typing import Any

import ipywidgets as widgets

from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.lab.chart import Chart
from fedlab_kit.lab.client_figures import MOST, accuracy_of_each, labels_held
from fedlab_kit.lab.controls import GROUPS, Control, Controls, help_text
from fedlab_kit.lab.figures import AXES, accuracy_against, accuracy_curve
from fedlab_kit.lab.history import DAYS, Filter, Row
from fedlab_kit.lab.plot import Axis, Kind, Line, Mark, Plot, room, to_html
from fedlab_kit.lab.style import BLUE, GREY, percent
from fedlab_kit.lab.text import comparison, difference, run_option, run_words, runs_table, table, told_apart, words
from fedlab_kit.lab.workbench import Workbench, earlier_curves
from fedlab_kit.run import absent
from fedlab_kit.settings import Settings

STYLE = Path(__file__).with_name("layout.css").read_text("utf-8")
HALF = {"flex": "1 1 420px", "min_width": "0"}
WRAP = {"flex_flow": "row wrap"}
LOOK: dict[str, Any] = {"style": {"description_width": "115px"}, "layout": {"width": "400px", "max_width": "98%"}}
SHORT: dict[str, Any] = {"style": {"description_width": "95px"}, "layout": {"width": "240px"}}
GRACE = 0.05  # seconds


def button(name: str, tooltip: str, *actions: Callable[[], object], style: str = "") -> Any:
    """Return a named button that does some actions one after the other.

    Whoever types a value and presses a button means that value. JupyterLab sends the first message of every widget to
    the kernel's main thread and later ones to another, so the value may come after the press: it gets a moment's grace.
    """
    made = widgets.Button(
        description=name, tooltip=tooltip, button_style=style, layout={"width": "auto", "min_width": "64px"}
    )
    made.on_click(lambda _: _press(actions))
    return made


def _press(actions: Sequence[Callable[[], object]]) -> None:
    sleep(GRACE)
    for action in actions:
        action()


class Choice:
    """A list to choose one thing from, whose entries change as the work goes on; `chosen` hears of people alone."""

    def __init__(self, name: str, chosen: Callable[[], object], none: str = "none yet") -> None:
        self._none = (none, None)
        self.field = widgets.Dropdown(options=[self._none], description=name, **LOOK)
        self._filling = 0
        self.field.observe(lambda change: None if self._filling == get_ident() else chosen(), "value")

    @property
    def value(self) -> Any:
        """What is chosen now."""
        return self.field.value

    def fill(self, options: Sequence[tuple[str, Any]], value: Any) -> None:
        """Offer (label, value) pairs and choose one of the values."""
        new = tuple(options) or (self._none,)
        value = value if value in [one for _, one in new] else new[0][1]
        self._filling = get_ident()
        try:
            if new != self.field.options:
                self.field.options = new
            if value != self.field.value:
                self.field.value = value
        finally:
            self._filling = 0


class Once:
    """Remembers what was shown last under a name."""

    def __init__(self) -> None:
        self._shown: dict[str, Any] = {}

    def changed(self, name: str, *now: Any) -> bool:
        """Whether something else than now was shown last."""
        if self._shown.get(name) == now:
            return False
        self._shown[name] = now
        return True


class PointPanel:
    """The table of points, what of them is shown, and what can be done to the current one."""

    def __init__(self, workbench: Workbench, choose: Callable[[int], object]) -> None:
        self._workbench, self._choose = workbench, choose
        self.table = widgets.HTML()
        self.point = Choice("Point", lambda: self.point.value and choose(self.point.value))
        self.name = widgets.Text(placeholder="of the current point", description="Name", **SHORT)
        self.folder = widgets.Text(value="my-model", description="Folder", **SHORT)
        self.filters = {
            "data": widgets.Dropdown(description="Data", **SHORT),
            "model": widgets.Dropdown(description="Model", **SHORT),
            "strategy": widgets.Dropdown(description="Strategy", **SHORT),
            "time": widgets.Dropdown(description="Measured", **SHORT),
            "tag": widgets.Text(placeholder="part of a name", description="Named", continuous_update=False, **SHORT),
        }
        self.filters["time"].options = [("at any time", ""), ("for this bench", "this bench"), *((d, d) for d in DAYS)]
        self.buttons = {
            "Pin": button("Pin", "Give the current point the name beside it", self._pin),
            "Hide": button("Hide", "Take the current point out of plot and table", workbench.hide),
            "Undo": button("Undo", "Take back the last Pin, Rename or Hide, of points and runs", workbench.undo),
            "Export": button("Export", "Write the current point to the folder, with a report", self._export),
        }
        self.draw_filters()
        for one in self.filters.values():
            one.observe(lambda change: self._filter(), "value")
        *marks, export = self.buttons.values()
        rows = (widgets.HBox([self.name, *marks], layout=WRAP), widgets.HBox([self.folder, export], layout=WRAP))
        shown = folded("which points are shown", [widgets.HBox(list(self.filters.values()), layout=WRAP)])
        self.widget = widgets.VBox([self.table, self.point.field, *rows, shown])

    def _pin(self) -> None:
        self._workbench.pin(self.name.value)

    def _export(self) -> None:
        self._workbench.export_later(self.folder.value)

    def _filter(self) -> None:
        self._workbench.filter = Filter(**{name: one.value or "" for name, one in self.filters.items()})
        self._workbench.notify()

    def draw_filters(self) -> None:
        """Offer what the store has to filter by."""
        runs = [run.experiment for run in self._workbench.session.known]
        wanted = self._workbench.filter._asdict()
        for name, first in (("data", [("these data and clients", "these"), ("all", "")]), ("model", [("all", "")]),
                            ("strategy", [("all", "")])):  # fmt: skip
            found = sorted({getattr(e, "dataset" if name == "data" else name) for e in runs} | {wanted[name]})
            options = [*first, *((one, one) for one in found if one not in dict(first).values())]
            if list(self.filters[name].options) != options:
                self.filters[name].options = options
        for name, one in self.filters.items():
            one.value = wanted[name]

    def draw(self, rows: Sequence[Row], current: int | None) -> None:
        """Show the table, and offer every point on the data set."""
        self.table.value = table(rows, current)
        options = [(words(row), row["point"]) for row in reversed(rows)]
        hidden = [p for p in self._workbench.points.all if self._workbench.points.hidden(p)]
        options += [(f"{words(self._workbench.points.row(p))} (hidden)", p.number) for p in reversed(hidden)]
        self.point.fill([*([] if current else [("choose one", None)]), *options] if options else [], current)


class RunPanel:
    """Every run, folded away: one can be named, hidden, taken up again, and compared with another."""

    def __init__(self, workbench: Workbench, controls: Controls) -> None:
        self._workbench, self._controls = workbench, controls
        self._once = Once()
        self.table, self.comparison, self.curve = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.run, self.other = Choice("Run", workbench.notify), Choice("compare with", workbench.notify)
        self.name = widgets.Text(placeholder="of the run above", description="Run name", **SHORT)
        self.buttons = {
            "Rename run": button("Rename run", "Give the run the name beside it", self._rename),
            "Hide run": button("Hide run", "Take the run and its points out of plots and tables", self._hide),
            "Use its settings": button("Use its settings", "Put its settings into the controls", self._use),
        }
        marks = widgets.HBox([self.name, *self.buttons.values()], layout=WRAP)
        rows = [self.table, self.run.field, marks, self.other.field, self.comparison, self.curve]
        self.widget = folded("all runs, and compare two", rows, workbench.notify)

    def _rename(self) -> None:
        if self.run.value:
            self._workbench.name_run(self.run.value, self.name.value)

    def _hide(self) -> None:
        if self.run.value:
            self._workbench.hide_run(self.run.value)

    def _use(self) -> None:
        if found := self._workbench.settings(self.run.value):
            self._controls.take(found)

    def draw(self) -> None:
        """Show the runs and the two that are compared, while unfolded."""
        runs, marks = self._workbench.session.known, self._workbench.marks
        now = [(run.key, len(run.records)) for run in runs], marks.all
        if not is_open(self.widget) or not self._once.changed("runs", *now, self.run.value, self.other.value):
            return
        options = [(run_option(run, marks), run.key) for run in reversed(runs)]
        self.run.fill(options, self.run.value)
        self.other.fill([("none", None), *options], self.other.value)
        self.table.value = runs_table(runs, marks)
        hidden = self.run.value and marks[self.run.value].hidden
        self.buttons["Hide run"].description = "Show run" if hidden else "Hide run"
        known = {run.key: run for run in runs}
        self._compare(known.get(self.run.value), known.get(self.other.value))
        self._once.changed("runs", *now, self.run.value, self.other.value)

    def _compare(self, one: Any, other: Any) -> None:
        marks = self._workbench.marks
        if one is None or other is None or one is other:
            self.comparison.value = self.curve.value = ""
            return
        self.comparison.value = comparison(one, other, (run_words(one, marks), run_words(other, marks)))
        behind = [(told_apart(other, one, marks), other.records)]
        rounds = max(one.experiment.rounds, other.experiment.rounds)
        self.curve.value = to_html(accuracy_curve(one.records, behind, rounds, told_apart(one, other, marks)))


class ClientPanel:
    """What each client holds under the settings of the controls, and how the last round serves it, folded away."""

    def __init__(self, workbench: Workbench, asked: Experiment) -> None:
        self._session, self._first = workbench.session, asked.dataset
        self.labels, self.accuracy = widgets.HTML(), widgets.HTML()
        self.widget = folded("what each client holds and gets", [self.labels, self.accuracy], workbench.notify)
        self._once = Once()

    def draw(self, asked: Experiment) -> None:
        """Show both while unfolded; what a data set holds only where it is at hand, not to be fetched first."""
        if not is_open(self.widget):
            return
        stage, records = self._session.stage, self._session.records
        at_hand = asked.dataset in {self._first, *(run.experiment.dataset for run in self._session.runs)}
        dealt = (asked.dataset, asked.partition, asked.clients, asked.alpha, asked.missing, asked.seed, at_hand)
        if self._once.changed("dealt", *dealt):
            self.labels.value = _drawn(asked, labels_held) if at_hand else hint("Press Run to load the data set.")
        if self._once.changed("fared", stage, len(records)):
            self.accuracy.value = hint("No round yet.")
            if stage is not None and records:
                drawn = _drawn(stage, lambda e: accuracy_of_each(e, records[-1]))
                self.accuracy.value = drawn + hint(absent(stage, records))


def _drawn(e: Experiment, draw: Callable[[Experiment], str]) -> str:
    if e.clients > MOST:
        return hint(f"Clients are drawn one by one up to {MOST} of them; these settings have {e.clients:,}.")
    try:
        return draw(e)
    except (ValueError, OSError) as error:
        return hint(str(error))


class StudyPanel:
    """What one knob does: the current settings with that knob over its range, or with other seeds."""

    def __init__(self, workbench: Workbench, controls: Controls, first: Sequence[Control]) -> None:
        self._workbench, self._controls = workbench, controls
        self.knob = widgets.Dropdown(
            options=[(c.info.title, c.name) for o in (Recipe, Experiment) for c in controls.of(o).values()],
            value=first[0].name if first else "prune_ratio",
            description="Knob",
            **LOOK,
        )
        self.buttons = {
            "Vary this knob": button("Vary this knob", "The same with this knob over its range", self._vary),
            "Repeat over seeds": button("Repeat over seeds", "The same with other random choices", self._repeat),
        }
        self.picture = widgets.HTML()
        rows = [self.knob, widgets.HBox(list(self.buttons.values()), layout=WRAP), self.picture]
        self.widget = folded("what one knob does", rows, workbench.notify)
        self._once = Once()

    def _vary(self) -> None:
        self._workbench.vary(self.knob.value, self._controls.settings(Experiment), self._controls.settings(Recipe))

    def _repeat(self) -> None:
        self._workbench.vary("seed", self._controls.settings(Experiment), self._controls.settings(Recipe))

    def draw(self) -> None:
        """Show what is known of it, while unfolded."""
        if is_open(self.widget) and self._once.changed("study", self._workbench.study, self._workbench.points.all):
            name, found = self._workbench.studied()
            self.picture.value = to_html(study(name, found)) if found else ""


def study(name: str, found: Sequence[tuple[Any, Row | None]]) -> Plot:
    """Show accuracy for each value of one knob, in the order in which they were tried."""
    label = str({**Recipe.model_fields, **Experiment.model_fields}[name].title)
    marks = tuple(
        Mark(str(place), label, place, 100 * row["accuracy"], 100 * row["low"], 100 * row["high"])
        for place, (_, row) in enumerate(found)
        if row
    )
    told = ", ".join(f"{value}: {percent(row['accuracy']) if row else 'no point'}" for value, row in found)
    return Plot(
        Axis(label, ends=(-0.5, len(found) - 0.5), names=tuple(str(value) for value, _ in found)),
        Axis("Accuracy on validation (%)", ends=room(marks)),
        (Kind(label, BLUE, "o"),),
        marks,
        (Line("line", label, tuple((mark.x, mark.y) for mark in marks)),) if marks else (),
        alt=f"Accuracy by {label}: {told}.",
    )


class SharePanel:
    """The state of the bench as a line of text, to be taken to another bench or pasted from one."""

    def __init__(self, read: Callable[[], str], write: Callable[[str], object]) -> None:
        self._read, self._write = read, write
        self.text = widgets.Textarea(description="State", layout={"width": "400px", "max_width": "98%"})
        self.said = widgets.HTML()
        buttons = [
            button("Show state", "Write what this bench is set to into the field", self._show),
            button("Open state", "Set this bench to what stands in the field", self._open),
        ]
        rows = [self.text, widgets.HBox(buttons, layout=WRAP), self.said]
        self.widget = folded("a state to share", rows)

    def _show(self) -> None:
        self.text.value = self._read()
        self.said.value = hint("Paste it into another bench, or open it by fk.Bench.from_state(text).")

    def _open(self) -> None:
        try:
            self._write(self.text.value)
            self.said.value = hint("Opened.")
        except (ValueError, TypeError) as error:
            self.said.value = f'<div role="alert" class="fedlab-error">{escape(str(error))}</div>'


class Screen:
    """The widgets of one bench, `widget` all of them, and what stands in them."""

    def __init__(
        self,
        workbench: Workbench,
        controls: Controls,
        first: Sequence[str],
        hidden: Sequence[str],
        presses: Mapping[str, Callable[..., Any]],
    ) -> None:
        self._workbench, self._controls, self._once = workbench, controls, Once()
        self._drawing = 0
        self.run = button("Run", "Train with these settings", presses["Run"], style="primary")
        self.stop = button("Stop", "End the run before its next batch", presses["Stop"])
        self.seed = button("New seed", "Run again with other random choices", presses["New seed"])
        knobs = [controls[name] for name in first]
        self.points, self.runs = PointPanel(workbench, presses["Choose"]), RunPanel(workbench, controls)
        self.clients = ClientPanel(workbench, controls.settings(Experiment))
        self.study = StudyPanel(workbench, controls, knobs)
        self.share = SharePanel(presses["Read"], presses["Write"])
        self.axis = widgets.Dropdown(
            options=[(axis.label, name) for name, axis in AXES.items()],
            value=workbench.axis,
            description="Accuracy against",
            **LOOK,
        )
        self.axis.observe(lambda change: self._turn(), "value")
        self.train_status, self.hint, self.compress_status = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.store_status = widgets.HTML()
        self.curve, self.scatter = Chart(), Chart()
        self.scatter.observe(lambda change: self._touch(change.new, presses["Choose"]), "chosen")
        self.curve.observe(lambda change: self._take(change.new), "chosen")
        self.widget = page([self.store_status, *self._rows(knobs, [*first, *hidden])])

    def _turn(self) -> None:
        self._workbench.axis = self.axis.value
        self._workbench.notify()

    def _touch(self, key: str, choose: Callable[[int], object]) -> None:
        """Make the point that was clicked the current one, unless it is."""
        current = self._workbench.points.current
        if self._drawing != get_ident() and key.isdigit() and not (current and current.number == int(key)):
            choose(int(key))

    def _take(self, key: str) -> None:
        """Put the settings of the curve that was clicked into the controls."""
        kind, _, place = key.partition("/")
        if kind == "earlier" and self._drawing != get_ident():
            self._controls.take(self._behind()[int(place)][1].experiment)

    def _behind(self) -> list[tuple[str, Any]]:
        asked = self._controls.settings(Experiment)
        return earlier_curves(self._workbench.session, self._workbench.marks, asked, self._workbench.filter)

    def _rows(self, knobs: Sequence[Control], without: Sequence[str]) -> list[Any]:
        """Return knobs, the drawer with all others, charts, and what can be done with runs and points."""
        mine = {owner: [c for c in knobs if c.owner is owner] for owner in (Experiment, Recipe)}
        folds = [fold for owner in (Experiment, Recipe) for fold in groups(self._controls, owner, without)]
        return [
            halves(
                [heading("Train", "takes effect with Run"), *shown(mine[Experiment]),
                 widgets.HBox([self.run, self.stop, self.seed], layout=WRAP), self.hint, self.train_status],
                [heading("Compress", "answers at once, for a finished run"), *shown(mine[Recipe]),
                 self.compress_status],
            ),
            widgets.HBox(folds).add_class("fedlab-drawer"),
            halves([self.curve.box], [self.scatter.box, self.axis]),
            halves(
                [self.runs.widget, self.clients.widget, self.study.widget, self.share.widget],
                [self.points.widget],
            ),
        ]  # fmt: skip

    def close(self) -> None:
        """Give back all widgets."""
        for one in _every(self.widget):
            one.close()

    @property
    def like(self) -> Experiment:
        """The settings whose data and clients are shown: those of the bold curve, else those of the controls."""
        return self._workbench.session.experiment or self._controls.settings(Experiment)

    def draw(self) -> None:
        """Show the present state."""
        self._drawing = get_ident()  # what is drawn now nobody has clicked
        try:
            self._draw()
        finally:
            self._drawing = 0

    def _draw(self) -> None:
        session, asked = self._workbench.session, self._controls.settings(Experiment)
        self.run.disabled = self.seed.disabled = busy = session.busy
        self.stop.disabled = not busy
        self.store_status.value = f'<div class="fedlab-error">{escape(self._workbench.store_error)}</div>'
        self._draw_training(asked, busy)
        self._draw_points(busy)
        for panel in (self.runs, self.study):
            panel.draw()
        self.clients.draw(asked)

    def _draw_training(self, asked: Experiment, busy: bool) -> None:
        session = self._workbench.session
        changed = difference(asked, session.experiment)
        self._controls.mark(Experiment, session.experiment)
        self.hint.value = hint(f"Changed since the bold curve: {changed}. Press Run." if changed and not busy else "")
        bar = f'<progress aria-label="Progress of the run" value="{session.done:.3f}"></progress>' if busy else ""
        self.train_status.value = status(session.status, bar)
        stage, records = session.stage or asked, session.records
        behind = [(label, run.records) for label, run in self._behind()]
        if self._once.changed("curve", stage, len(records), [(label, len(curve)) for label, curve in behind], busy):
            self.curve.show(accuracy_curve(records, behind, stage.rounds))

    def _draw_points(self, busy: bool) -> None:
        bench, points, near = self._workbench, self._workbench.points, self._workbench.compressor.nearest
        before = " A run is under way: the points are of those before it." if busy and points.all else ""
        self.compress_status.value = status(bench.compressor.status + before, grey=near is not None)
        now = points.all, points.asked, points.current, points.marks.all
        like = (self.like.dataset, self.like.clients)
        if self._once.changed("points", *now, like, bench.axis, bench.filter, near):
            rows, number = points.shown(self.like, bench.filter), points.current.number if points.current else None
            place = {row["point"]: index for index, row in enumerate(rows)}
            plot = accuracy_against(rows, bench.axis, current=place.get(number or 0))
            self.scatter.show(_with_nearest(plot, str(near)) if near else plot)
            self.points.draw_filters()
            self.points.draw(rows, number)


def _with_nearest(plot: Plot, key: str) -> Plot:
    """Return a plot with a grey ring round the known point that stands for one that is being measured."""
    near = [
        replace(mark, key="nearest", kind="nearest known", name="", hollow=True)
        for mark in plot.marks
        if mark.key == key
    ]
    return replace(plot, current="", kinds=(*plot.kinds, Kind("nearest known", GREY, "o", hollow=True)),
                   marks=(*plot.marks, *near))  # fmt: skip


def groups(controls: Controls, owner: type[Settings], without: Sequence[str]) -> list[Any]:
    """Return the controls that are not on the first screen, folded away in their groups."""
    grouped: dict[str, list[Control]] = {}
    for name, control in controls.of(owner).items():
        if name not in without:
            grouped.setdefault(control.extra["group"], []).append(control)
    return [folded(GROUPS.get(group, group), shown(some)) for group, some in grouped.items()]


def page(rows: list[Any]) -> Any:
    """Return the whole of a bench, with the style of its parts."""
    return widgets.VBox([widgets.HTML(f"<style>{STYLE}</style>"), *rows]).add_class("fedlab-bench")


def shown(knobs: Sequence[Control]) -> list[Any]:
    """Return knobs with what they mean."""
    return [*(knob.widget for knob in knobs), help_text(knobs)] if knobs else []


def halves(left: Iterable[Any], right: Iterable[Any]) -> Any:
    """Return two columns that stand side by side where there is room."""
    return widgets.HBox([widgets.VBox(list(side), layout=HALF) for side in (left, right)], layout=WRAP)


def heading(title: str, meaning: str) -> Any:
    """Return what stands above a side of the bench."""
    return widgets.HTML(f'<div class="fedlab-side" role="heading" aria-level="2">{title} <span>{meaning}</span></div>')


def status(text: str, bar: str = "", grey: bool = False) -> str:
    """Return words that a screen reader reads out when they change."""
    look = "fedlab-status fedlab-hint" if grey else "fedlab-status"
    return f'{bar}<div class="{look}" role="status" aria-live="polite">{escape(text)}</div>'


def hint(text: str) -> str:
    """Return words in the background."""
    return f'<div class="fedlab-hint">{escape(text)}</div>'


def folded(title: str, rows: list[Any], moved: Callable[[], object] = lambda: None) -> Any:
    """Return a button that shows and hides rows of widgets, and calls `moved` then; an Accordion has no keyboard."""
    body = widgets.VBox(rows, layout={"display": "none", "padding": "0 0 8px 0"})
    made = widgets.Button(description=f"Show {title}", layout={"width": "auto", "max_width": "none"})

    def toggle(_: object) -> None:
        hidden = body.layout.display == "none"
        body.layout.display = "" if hidden else "none"
        made.description = f"{'Hide' if hidden else 'Show'} {title}"
        moved()

    made.on_click(toggle)
    return widgets.VBox([made, body], layout={"align_items": "flex-start", "max_width": "100%"})


def _every(widget: Any) -> list[Any]:
    """Return a widget and all that it holds, with their layouts and styles."""
    held = [inner for child in getattr(widget, "children", ()) for inner in _every(child)]
    return [widget, *held, *(getattr(widget, name) for name in ("layout", "style") if hasattr(widget, name))]


def is_open(whole: Any) -> bool:
    """Whether what `folded` made is unfolded now."""
    return whole.children[1].layout.display != "none"
