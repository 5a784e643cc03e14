"""All controls of the workbench together: what they say, what is wrong with it, and how they are folded away."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from threading import RLock
from typing import Any, TypeVar

import ipywidgets as widgets

from fedlab_kit.lab.control import Control, fields_with_control, make_control
from fedlab_kit.settings import Settings

Kind = TypeVar("Kind", bound=Settings)

GROUPS = {
    "data": "data and clients",
    "training": "training",
    "rounds": "compression while training",
    "wire": "the wire",
    "privacy": "privacy",
    "compress": "compression of the trained model",
}


class Controls:
    """The controls of some settings, an Experiment and a Recipe, say: what was last valid, and what is wrong now.

    `errors` maps names of fields to their one-line messages; `changed` is called with the class of the settings
    that somebody has just changed.
    """

    def __init__(self, *settings: Settings) -> None:
        self.errors: dict[str, str] = {}
        self.changed: Callable[[type[Settings]], None] = lambda owner: None
        self._checking, self._taking = RLock(), False  # messages of two fields may come in two threads
        self._settings = {type(one): one for one in settings}
        self._controls = {name: make_control(one, name) for one in settings for name in fields_with_control(type(one))}
        for control in self._controls.values():
            control.field.observe(lambda change, control=control: self.check(control.owner, control.name), "value")
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

    def check(self, owner: type[Settings], moved: str = "") -> None:
        """Validate what stands in the fields, show each error beside its control, and call `changed`.

        An error of a field without a control (a teacher, say) is shown beside the control that was `moved`.
        """
        with self._checking:
            self._check(owner, moved)
            silent = self._taking
        if not silent:
            self.changed(owner)

    def take(self, settings: Settings) -> None:
        """Put other settings of a class into the controls, with what has no control."""
        owner = type(settings)
        with self._checking:
            self._taking = True  # `changed` is called once at the end, not for each of the fields
            for name, control in self.of(owner).items():
                put(control, getattr(settings, name))
            self._settings[owner], self._taking = settings, False
        self.check(owner)

    def _check(self, owner: type[Settings], moved: str) -> None:
        controls, before = self.of(owner), self._settings[owner]
        values = {name: control.value for name, control in controls.items()}
        self._settings[owner], errors = validate(before, {**values, **parents(before, values)})
        errors = {name if name in controls else moved: message for name, message in errors.items()}
        self.errors = {name: e for name, e in self.errors.items() if name not in controls} | errors
        for name, control in controls.items():
            control.show(errors.get(name, ""), {**dict(self._settings[owner]), **values})

    def complain(self, message: str) -> None:
        """Show an error that came later, from the work, beside the control whose field it names first."""
        control = self._controls.get(message.split(" ")[0])
        if control is not None:
            control.show(message, dict(self._settings[control.owner]))

    def groups(self, owner: type[Settings], without: Iterable[str]) -> list[Any]:
        """Return the controls that are not on the first screen, folded away in their groups."""
        grouped: dict[str, list[Control]] = {}
        for name, control in self.of(owner).items():
            if name not in without:
                grouped.setdefault(control.extra["group"], []).append(control)
        return [fold(GROUPS.get(group, group), controls) for group, controls in grouped.items()]


def put(control: Control, value: Any) -> None:
    """Show a value in its control, also a model or data set that another notebook registered and this one did not."""
    field = control.field
    if isinstance(field, widgets.Dropdown) and not isinstance(value, bool) and value not in field.options:
        field.options = (*field.options, value)
    control.value = value


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
        except ValueError as error:
            name = str(error).split(" ")[0]
            errors[name] = str(error)
            if good.pop(name, None) is None:  # two fields that do not fit: neither is taken over
                return settings, errors


def fold(title: str, controls: list[Control]) -> Any:
    """Return a button that shows and hides controls and their help."""
    return folded(title, [*(control.widget for control in controls), help_text(controls)])


def folded(title: str, rows: list[Any], moved: Callable[[], object] = lambda: None) -> Any:
    """Return a button that shows and hides rows of widgets, and calls `moved` then; an Accordion has no keyboard."""
    body = widgets.VBox(rows, layout={"display": "none", "padding": "0 0 8px 0"})
    button = widgets.Button(description=f"Show {title}", layout={"width": "320px", "max_width": "98%"})
    whole = widgets.VBox([button, body])
    button.on_click(lambda _: _toggle(button, body, title, moved))
    return whole


def is_open(whole: Any) -> bool:
    """Whether what `folded` made is unfolded now."""
    return whole.children[1].layout.display != "none"


def help_text(controls: list[Control]) -> Any:
    """Return what each control means, folded into one line."""
    items = "".join(f"<dt><b>{c.info.title}</b></dt><dd>{escape(c.help)}</dd>" for c in controls)
    return widgets.HTML(
        f'<details class="fedlab-help"><summary>What these settings mean</summary><dl>{items}</dl></details>',
        layout={"max_width": "400px"},
    )


def _toggle(button: Any, body: Any, title: str, moved: Callable[[], object]) -> None:
    hidden = body.layout.display == "none"
    body.layout.display = "" if hidden else "none"
    button.description = f"{'Hide' if hidden else 'Show'} {title}"
    moved()
