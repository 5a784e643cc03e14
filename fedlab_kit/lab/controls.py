"""The controls: one field of `Experiment` or `Recipe` is one widget, made from the field's metadata, and together they
say what is valid and what is wrong.

ipywidgets' sliders cannot be given an accessible name. A number is therefore a named text field, which takes the
keyboard, beside a slider for the mouse that the style sheet takes out of the tab order and the accessibility tree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from html import escape
from threading import RLock
from typing import Any, Literal, TypeVar, get_args, get_origin

import ipywidgets as widgets

from fedlab_kit.catalog import DATASETS, MODELS
from fedlab_kit.settings import FieldError, Settings, allowed
from fedlab_kit.wire import CODECS

Kind = TypeVar("Kind", bound=Settings)
Moved = Callable[[type[Settings], bool], object]

CATALOGS: dict[str, Mapping[str, Any]] = {"dataset": DATASETS, "model": MODELS, "codec": CODECS}
NUMBERS = {int: r"[+-]?[0-9]{1,30}", float: r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,5})?"}
KNOB: dict[str, Any] = {"style": {"description_width": "150px"}, "layout": {"width": "260px"}}
"""The size of every control, so that they line up."""
CLASSES = tuple[int, ...]
ON_OFF = (("on", True), ("off", False))
GROUPS = {
    "data": "data and clients",
    "training": "training",
    "rounds": "compression while training",
    "wire": "the wire",
    "privacy": "privacy",
    "compress": "compression of the trained model",
}


class Control:
    """One field as a labelled widget with a line below it for its error or hint.

    `field` is the widget that carries the accessible name, `widget` everything together, `moved` hears of every change
    and whether a slider made it. One that is `locked` shows its value and takes no other.
    """

    slider: Any = None

    def __init__(self, settings: Settings, name: str) -> None:
        self.owner, self.name, self.locked = type(settings), name, False
        self.moved: Callable[[Control, bool], object] = lambda control, drag: None
        self.info = self.owner.model_fields[name]
        self.extra: dict[str, Any] = self.info.json_schema_extra  # type: ignore[assignment]
        catalog = CATALOGS.get(self.extra["source"])
        rule = f"one of {', '.join(catalog)}" if catalog else allowed(self.owner, name)
        self.help = f"{self.info.description} Allowed: {rule}."
        self.look: dict[str, Any] = {"description": self.info.title, "tooltip": self.help, **KNOB}
        self.field = self._field(getattr(settings, name))
        self.note = widgets.HTML(layout={"display": "none", "width": "auto"})
        self.widget = widgets.VBox([self._row(), self.note])
        self.field.observe(lambda change: self._changed(), "value")

    @property
    def value(self) -> Any:
        """What stands in the field, valid or not."""
        return self.field.value

    @value.setter
    def value(self, value: Any) -> None:
        if not isinstance(value, bool) and value not in self.field.options:  # of another notebook's catalog, say
            self.field.options = (*self.field.options, value)
        self.field.value = value

    def show(self, error: str, settings: dict[str, Any]) -> None:
        """Say what is wrong with the value, or what it needs to have an effect."""
        idle = "locked" if self.locked else self._idle(settings)
        self.disable(bool(idle) and not error)
        (self.field.add_class if error else self.field.remove_class)("fedlab-wrong")
        if error:
            self.note.value = f'<div role="alert" class="fedlab-error">{escape(error)}</div>'
        elif idle:
            self.note.value = f'<div class="fedlab-hint fedlab-indent">{idle}</div>'
        self.note.layout.display = "" if error or idle else "none"

    def mark(self, changed: bool) -> None:
        """Mark the control as changed since the last run, or not."""
        if changed != ("fedlab-changed" in self.widget._dom_classes):
            (self.widget.add_class if changed else self.widget.remove_class)("fedlab-changed")

    def disable(self, disabled: bool) -> None:
        """Take the control out of use, or back."""
        for one in filter(None, (self.field, self.slider)):
            one.disabled = disabled

    def _changed(self) -> None:
        self.moved(self, False)

    def _idle(self, settings: dict[str, Any]) -> str:
        """What the field needs to have an effect, "" when it has one."""
        if self.name in ("temperature", "distill_weight") and settings.get("teacher") is None:
            averages = self.name == "temperature" and settings.get("strategy") == "feddf"
            return "" if averages else "needs a teacher"
        when = (self.extra["when"] or {}).items()
        missing = [f"{name} {' or '.join(values)}" for name, values in when if settings[name] not in values]
        return f"only with {', '.join(missing)}" if missing else ""

    def _field(self, value: Any) -> Any:
        options = dict.fromkeys([*_choices(self.info), value])
        named = ON_OFF if self.info.annotation is bool else list(options)
        if self.info.annotation == CLASSES:
            named = [(", ".join(map(str, some)) or "none", some) for some in options]
        return widgets.Dropdown(options=named, value=value, **self.look)

    def _row(self) -> Any:
        return self.field


class Number(Control):
    """A number: a text field that is read as it is typed, and a slider over the useful span.

    A browser's own number field would make 25 of "2.5" and 19 of "1e9" without a word.
    """

    @property
    def value(self) -> Any:
        """The number that stands in the field, or its text where that is no number of the kind."""
        text, kind = self.field.value.strip(), self.info.annotation
        return kind(text) if re.fullmatch(NUMBERS[kind], text) else text  # type: ignore[index,misc]

    @value.setter
    def value(self, value: Any) -> None:
        self.field.value = str(value)

    def _field(self, value: Any) -> Any:
        return widgets.Text(value=str(value), continuous_update=False, **self.look)

    def _row(self) -> Any:
        if not self.extra["span"]:
            return self.field
        (low, high), step = self.extra["span"], self.extra["step"]
        look: dict[str, Any] = {"readout": False, "layout": {"width": "130px"}}
        if self.extra["log"]:
            ends = {"min": math.log10(low), "max": math.log10(high), "step": 0.01}
            self.slider = widgets.FloatLogSlider(value=low, **ends, **look)
        else:
            kind = widgets.IntSlider if self.info.annotation is int else widgets.FloatSlider
            self.slider = kind(value=low, min=low, max=high, step=step, **look)
        self.slider.add_class("fedlab-slider")
        self._leading = False
        self._follow()
        self.slider.observe(lambda change: self._lead(), "value")
        return widgets.HBox([self.field, self.slider], layout={"flex_flow": "row wrap"})

    def _changed(self) -> None:
        self._follow()
        self.moved(self, self.slider is not None and self._leading)

    def _follow(self) -> None:
        """Put the slider where the field's value is, as far as it reaches."""
        if self.slider is not None and not isinstance(self.value, str) and not self._together():
            self.slider.value = self._nearest()

    def _lead(self) -> None:
        """Write the slider's value into the field."""
        if isinstance(self.value, str) or not self._together():
            value, self._leading = self.slider.value, True
            self.value = value if isinstance(value, int) else float(f"{value:.{2 if self.extra['log'] else 8}g}")
            self._leading = False

    def _nearest(self) -> float:
        low, high = self.extra["span"]
        return min(max(self.value, low), high)

    def _together(self) -> bool:
        """Whether the slider stands as near to the field's value as its ends and steps allow.

        A browser rounds what it is sent to a step of the slider and sends that back: the value that was typed stays.
        """
        ends = [self.slider.value, self._nearest()]
        here, there = map(math.log10, ends) if self.extra["log"] else ends
        return abs(here - there) < 0.6 * self.slider.step


def _choices(info: Any) -> list[Any]:
    """Return a Literal's values, yes and no, or the names in the field's catalog; nothing for any other field."""
    if info.annotation is bool:
        return [value for _, value in ON_OFF]
    if info.annotation == CLASSES:  # none, or one of ten; more of them in code
        return [(), *((label,) for label in range(10))]
    literal = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
    return [*literal, *CATALOGS.get(info.json_schema_extra["source"], ())]


def fields_with_control(owner: type[Settings]) -> list[str]:
    """Return the fields that one widget can hold: numbers and choices, not settings within settings."""
    return [name for name, info in owner.model_fields.items() if info.annotation in NUMBERS or _choices(info)]


class Controls:
    """The controls of some settings, an Experiment and a Recipe, say: what was last valid, and what is wrong now.

    `errors` maps names of fields to their one-line messages; `changed` is called with the class of the settings
    that somebody has just changed, and whether a slider did it. Those named in `locked` keep their value.
    """

    def __init__(self, *settings: Settings, locked: Iterable[str] = ()) -> None:
        self.errors: dict[str, str] = {}
        self.changed: Moved = lambda owner, drag: None
        self._checking = RLock()  # messages of two fields may come in two threads
        self._taking = False
        self._settings = {type(one): one for one in settings}
        self._controls: dict[str, Control] = {}
        for one in settings:
            for name in fields_with_control(type(one)):
                kind = Number if type(one).model_fields[name].annotation in NUMBERS else Control
                self._controls[name] = kind(one, name)
                self._controls[name].moved = self._moved
        for name in locked:
            self[name].locked = True
        for owner in self._settings:
            self.check(owner)

    def __getitem__(self, name: str) -> Control:
        if name not in self._controls:
            raise ValueError(f"controls must be among {', '.join(self._controls)}, got {name!r}")
        return self._controls[name]

    def settings(self, owner: type[Kind]) -> Kind:
        """The newest value of a class of settings; a field with a wrong value keeps its last right one."""
        return self._settings[owner]  # type: ignore[return-value]

    def of(self, owner: type[Settings]) -> dict[str, Control]:
        """The controls of one class of settings, by name."""
        return {name: control for name, control in self._controls.items() if control.owner is owner}

    def wrong(self, owner: type[Settings]) -> str:
        """What is wrong with one class of settings, as a sentence; "" if nothing is."""
        return "; ".join(message for name, message in self.errors.items() if name in self.of(owner))

    def check(self, owner: type[Settings], moved: str = "", drag: bool = False) -> None:
        """Validate what stands in the fields, show each error beside its control, and call `changed`.

        An error of a field without a control (a teacher, say) is shown beside the control that was `moved`.
        """
        with self._checking:
            self._check(owner, moved)
            silent = self._taking
        if not silent:
            self.changed(owner, drag)

    def take(self, *settings: Settings, tell: bool = True) -> None:
        """Put other settings into the controls, with what has no control; what is locked stays as it is."""
        with self._checking:
            self._taking = True  # `changed` is called once at the end, not for each of the fields
            for one in settings:
                fixed = {name: c.value for name, c in self.of(type(one)).items() if c.locked}
                one = one.replace(**fixed) if fixed else one
                for name, control in self.of(type(one)).items():
                    control.value = getattr(one, name)
                self._settings[type(one)] = one
                self._check(type(one), "")
            self._taking = False
        for one in settings if tell else ():
            self.changed(type(one), False)

    def complain(self, error: Exception) -> None:
        """Show an error that came later, from the work, beside the control of the field that it carries."""
        control = self._controls.get(getattr(error, "field", ""))
        if control is not None:
            control.show(str(error), dict(self._settings[control.owner]))

    def mark(self, owner: type[Settings], since: Settings | None) -> None:
        """Mark the controls whose value differs from other settings."""
        now = self._settings[owner]
        for name, control in self.of(owner).items():
            control.mark(since is not None and getattr(now, name) != getattr(since, name))

    def _moved(self, control: Control, drag: bool) -> None:
        self.check(control.owner, control.name, drag)

    def _check(self, owner: type[Settings], moved: str) -> None:
        controls, before = self.of(owner), self._settings[owner]
        values = {name: control.value for name, control in controls.items()}
        self._settings[owner], errors = validate(before, {**values, **parents(before, values)})
        errors = {name if name in controls else moved: message for name, message in errors.items()}
        self.errors = {name: e for name, e in self.errors.items() if name not in controls} | errors
        for name, control in controls.items():
            control.show(errors.get(name, ""), {**dict(self._settings[owner]), **values})


def parents(settings: Settings, values: dict[str, Any]) -> dict[str, Any]:
    """Return the experiments within `settings` on the data set that is chosen now: a teacher goes with its student."""
    found = {name: getattr(settings, name, None) for name in ("teacher", "start")}
    return {name: one.replace(dataset=values["dataset"]) for name, one in found.items() if one is not None}


def validate(settings: Settings, values: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """Return `settings` with those of the `values` that are valid together, and a message for each that is not."""
    good, errors = dict(values), dict[str, str]()
    while True:
        try:
            return settings.replace(**good), errors
        except FieldError as error:
            errors[error.field] = str(error)
            if good.pop(error.field, None) is None:  # two fields that do not fit: neither is taken over
                return settings, errors


def help_text(controls: Iterable[Control]) -> Any:
    """Return what each control means, folded into one line."""
    items = "".join(f"<dt><b>{c.info.title}</b></dt><dd>{escape(c.help)}</dd>" for c in controls)
    return widgets.HTML(
        f'<details class="fedlab-help"><summary>What these settings mean</summary><dl>{items}</dl></details>',
        layout={"max_width": "400px"},
    )
