"""Widgets made from field metadata: a new field of `Experiment` or `Recipe` brings its control with it.

ipywidgets' sliders cannot be given an accessible name. A number is therefore a named text field, which takes the
keyboard, beside a slider for the mouse that the style sheet takes out of the tab order and the accessibility tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from html import escape
from typing import Any, Literal, get_args, get_origin

import ipywidgets as widgets

from fedlab_kit.catalog import DATASETS, MODELS
from fedlab_kit.experiment import Settings, allowed

CATALOGS = {"dataset": DATASETS, "model": MODELS}
GROUPS = {
    "data": "data and clients",
    "training": "training",
    "rounds": "compression while training",
    "wire": "the wire",
    "privacy": "privacy",
    "compress": "compression of the trained model",
}
STYLE = """<style>
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
</style>"""


class Control:
    """One field as a labelled widget with a line below it for its error or hint.

    `field` is the widget that carries the accessible name, `widget` everything together.
    """

    def __init__(self, owner: type[Settings], name: str, value: Any) -> None:
        self.name = name
        self.info = owner.model_fields[name]
        self.extra: dict[str, Any] = self.info.json_schema_extra  # type: ignore[assignment]
        self.help = f"{self.info.description} Allowed: {_allowed(owner, name, self.extra)}."
        self.field = self._field(value)
        self.note = widgets.HTML(layout={"display": "none", "width": "auto"})
        self.widget = widgets.VBox([self._row(), self.note])

    @property
    def value(self) -> Any:
        """What stands in the field, valid or not."""
        return self.field.value

    @value.setter
    def value(self, value: Any) -> None:
        self.field.value = value

    def reset(self) -> None:
        """Go back to the field's default."""
        self.value = self.info.default

    def show(self, error: str, settings: dict[str, Any]) -> None:
        """Say what is wrong with the value, or for which other settings alone it has an effect."""
        when = (self.extra["when"] or {}).items()
        idle = [f"{name} {' or '.join(values)}" for name, values in when if settings[name] not in values]
        self.disable(bool(idle) and not error)
        (self.field.add_class if error else self.field.remove_class)("fedlab-wrong")
        if error:
            self.note.value = f'<div role="alert" class="fedlab-error">{escape(error)}</div>'
        elif idle:
            self.note.value = f'<div class="fedlab-hint fedlab-indent">only with {", ".join(idle)}</div>'
        self.note.layout.display = "" if error or idle else "none"

    def disable(self, disabled: bool) -> None:
        """Take the control out of use, or back."""
        self.field.disabled = disabled

    def _field(self, value: Any) -> Any:
        options = dict.fromkeys([*_choices(self.info), value])
        return widgets.Dropdown(options=list(options), value=value, **self._look())

    def _row(self) -> Any:
        return self.field

    def _look(self) -> dict[str, Any]:
        """Return label, tooltip and size, the same for every control so that they line up."""
        return {
            "description": self.info.title,
            "tooltip": self.help,
            "style": {"description_width": "150px"},
            "layout": {"width": "260px"},
        }


class Number(Control):
    """A number: a text field that takes any value and says when it is wrong, and a slider over the useful span."""

    def _field(self, value: Any) -> Any:
        kind = widgets.IntText if self.info.annotation is int else widgets.FloatText
        return kind(value=value, step=self.extra["step"] or _arrow_step(value), **self._look())

    def _row(self) -> Any:
        self.slider = self._slider()
        if self.slider is None:
            return self.field
        self._follow()
        self.field.observe(lambda change: self._follow(), "value")
        self.slider.observe(lambda change: self._lead(), "value")
        return widgets.HBox([self.field, self.slider])

    def _slider(self) -> Any:
        if not self.extra["span"]:
            return None
        low, high = self.extra["span"]
        look: dict[str, Any] = {"readout": False, "layout": {"width": "130px"}}
        if self.extra["log"]:
            ends = {"min": math.log10(low), "max": math.log10(high), "step": 0.01}
            slider = widgets.FloatLogSlider(value=low, **ends, **look)
        else:
            kind = widgets.IntSlider if self.info.annotation is int else widgets.FloatSlider
            slider = kind(value=low, min=low, max=high, step=self.extra["step"], **look)
        slider.add_class("fedlab-slider")
        return slider

    def disable(self, disabled: bool) -> None:
        """Take the control out of use, or back."""
        self.field.disabled = disabled
        if self.slider is not None:
            self.slider.disabled = disabled

    def _follow(self) -> None:
        """Put the slider where the field's value is, as far as it reaches."""
        if not math.isfinite(self.value):
            return
        if self.extra["log"]:
            self.field.step = _arrow_step(self.value)
        if not self._together():
            self.slider.value = self._nearest()

    def _lead(self) -> None:
        """Write the slider's value into the field."""
        if not self._together():
            value = self.slider.value
            digits = 2 if self.extra["log"] else 8
            self.value = value if isinstance(value, int) else float(f"{value:.{digits}g}")

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


class Controls:
    """The controls of one `Settings` value: what was last valid, and what is wrong now.

    `settings` is the newest value without a wrong field in it, `errors` maps names to their one-line messages.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.errors: dict[str, str] = {}
        self.changed: Callable[[], None] = lambda: None
        self._controls = {name: _control(settings, name) for name in fields_with_control(type(settings))}
        for control in self._controls.values():
            control.field.observe(lambda change: self.check(), "value")
        self.check()

    def __getitem__(self, name: str) -> Control:
        if name not in self._controls:
            raise ValueError(f"controls must be among {', '.join(self._controls)}, got {name!r}")
        return self._controls[name]

    def check(self) -> None:
        """Validate what stands in the fields, show each error beside its control, and call `changed`."""
        values = {name: control.value for name, control in self._controls.items()}
        self.settings, self.errors = validate(self.settings, values)
        for name, control in self._controls.items():
            control.show(self.errors.get(name, ""), {**dict(self.settings), **values})
        self.changed()

    def complain(self, message: str) -> None:
        """Show an error that came later, from the run, beside the control whose field it names first."""
        name = message.split(" ")[0]
        if name in self._controls:
            self._controls[name].show(message, dict(self.settings))

    def groups(self, without: Iterable[str]) -> list[Any]:
        """Return the controls that are not on the first screen, folded away in their groups."""
        grouped: dict[str, list[Control]] = {}
        for name, control in self._controls.items():
            if name not in without:
                grouped.setdefault(control.extra["group"], []).append(control)
        return [fold(GROUPS.get(group, group), controls) for group, controls in grouped.items()]


def validate(settings: Settings, values: dict[str, Any]) -> tuple[Settings, dict[str, str]]:
    """Return `settings` with those of the `values` that are valid together, and a message for each that is not."""
    good, errors = dict(values), dict[str, str]()
    while True:
        try:
            return settings.replace(**good), errors
        except ValueError as error:
            name = str(error).split(" ")[0]
            errors[name] = str(error)
            if good.pop(name, None) is None:  # two fields that do not fit: neither is taken over
                return settings, errors


def fold(title: str, controls: list[Control]) -> Any:
    """Return a button that shows and hides controls and their help; an Accordion cannot be opened by keyboard."""
    rows = [control.widget for control in controls]
    body = widgets.VBox([*rows, help_text(controls)], layout={"display": "none", "padding": "0 0 8px 0"})
    button = widgets.Button(description=f"Show {title}", layout={"width": "260px"})
    button.on_click(lambda _: _toggle(button, body, title))
    return widgets.VBox([button, body])


def help_text(controls: list[Control]) -> Any:
    """Return what each control means, folded into one line."""
    items = "".join(f"<dt><b>{c.info.title}</b></dt><dd>{escape(c.help)}</dd>" for c in controls)
    return widgets.HTML(
        f'<details class="fedlab-help"><summary>What these settings mean</summary><dl>{items}</dl></details>',
        layout={"max_width": "400px"},
    )


def _toggle(button: Any, body: Any, title: str) -> None:
    hidden = body.layout.display == "none"
    body.layout.display = "" if hidden else "none"
    button.description = f"{'Hide' if hidden else 'Show'} {title}"


def fields_with_control(owner: type[Settings]) -> list[str]:
    """Return the fields that one widget can hold: numbers and choices, not settings within settings."""
    return [name for name, info in owner.model_fields.items() if _is_number(info) or _choices(info)]


def _control(settings: Settings, name: str) -> Control:
    owner = type(settings)
    kind = Number if _is_number(owner.model_fields[name]) else Control
    return kind(owner, name, getattr(settings, name))


def _is_number(info: Any) -> bool:
    return info.annotation in (int, float)


def _choices(info: Any) -> list[str]:
    """Return a Literal's values or the names in the field's catalog; nothing for any other field."""
    literal = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
    return [*literal, *CATALOGS.get(info.json_schema_extra["source"], ())]


def _allowed(owner: type[Settings], name: str, extra: dict[str, Any]) -> str:
    catalog = CATALOGS.get(extra["source"])
    return f"one of {', '.join(catalog)}" if catalog else allowed(owner, name)


def _arrow_step(value: float) -> float:
    """Return how far an arrow key moves a value on a logarithmic scale: about one unit of its first digit.

    A browser steps to multiples of the step, so 0.1 -> 0.15 -> 0.2 -> 0.3 upwards and 0.1 -> 0.05 -> 0.04 downwards.
    """
    if value <= 0:
        return 0.001
    unit = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return unit / 2 if math.isclose(value, unit) else unit
