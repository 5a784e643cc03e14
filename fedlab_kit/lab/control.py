"""One field of `Experiment` or `Recipe` as a widget, made from the field's metadata.

ipywidgets' sliders cannot be given an accessible name. A number is therefore a named text field, which takes the
keyboard, beside a slider for the mouse that the style sheet takes out of the tab order and the accessibility tree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any, Literal, get_args, get_origin

import ipywidgets as widgets

from fedlab_kit.catalog import DATASETS, MODELS
from fedlab_kit.settings import Settings, allowed
from fedlab_kit.wire import CODECS

CATALOGS: dict[str, Mapping[str, Any]] = {"dataset": DATASETS, "model": MODELS, "codec": CODECS}
KNOB: dict[str, Any] = {"style": {"description_width": "150px"}, "layout": {"width": "260px"}}
"""The size of every control, so that they line up."""
ON_OFF = (("on", True), ("off", False))
CLASSES = tuple[int, ...]


class Control:
    """One field as a labelled widget with a line below it for its error or hint.

    `field` is the widget that carries the accessible name, `widget` everything together.
    """

    def __init__(self, owner: type[Settings], name: str, value: Any) -> None:
        self.owner = owner
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

    def show(self, error: str, settings: dict[str, Any]) -> None:
        """Say what is wrong with the value, or what it needs to have an effect."""
        idle = self._idle(settings)
        self.disable(bool(idle) and not error)
        (self.field.add_class if error else self.field.remove_class)("fedlab-wrong")
        if error:
            self.note.value = f'<div role="alert" class="fedlab-error">{escape(error)}</div>'
        elif idle:
            self.note.value = f'<div class="fedlab-hint fedlab-indent">{idle}</div>'
        self.note.layout.display = "" if error or idle else "none"

    def disable(self, disabled: bool) -> None:
        """Take the control out of use, or back."""
        self.field.disabled = disabled

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
        return widgets.Dropdown(options=named, value=value, **self._look())

    def _row(self) -> Any:
        return self.field

    def _look(self) -> dict[str, Any]:
        return {"description": self.info.title, "tooltip": self.help, **KNOB}


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


def make_control(settings: Settings, name: str) -> Control:
    """Return the control of one field, at its value in `settings`."""
    owner = type(settings)
    kind = Number if _is_number(owner.model_fields[name]) else Control
    return kind(owner, name, getattr(settings, name))


def fields_with_control(owner: type[Settings]) -> list[str]:
    """Return the fields that one widget can hold: numbers and choices, not settings within settings."""
    return [name for name, info in owner.model_fields.items() if _is_number(info) or _choices(info)]


def _is_number(info: Any) -> bool:
    return info.annotation in (int, float)


def _choices(info: Any) -> list[Any]:
    """Return a Literal's values, yes and no, or the names in the field's catalog; nothing for any other field."""
    if info.annotation is bool:
        return [value for _, value in ON_OFF]
    if info.annotation == CLASSES:  # none, or one of ten; more of them in code
        return [(), *((label,) for label in range(10))]
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
