"""What the shelves below the plots are made of: buttons, lists to choose from, and their sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from time import sleep
from typing import Any

import ipywidgets as widgets

WRAP = {"flex_flow": "row wrap"}
LOOK: dict[str, Any] = {"style": {"description_width": "95px"}, "layout": {"width": "400px", "max_width": "98%"}}
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

    def __init__(self, name: str, chosen: Callable[[], object]) -> None:
        self.field = widgets.Dropdown(options=[("none yet", None)], description=name, **LOOK)
        self._filling = 0
        self.field.observe(lambda change: None if self._filling == get_ident() else chosen(), "value")

    @property
    def value(self) -> Any:
        """What is chosen now."""
        return self.field.value

    def fill(self, options: Sequence[tuple[str, Any]], value: Any) -> None:
        """Offer (label, value) pairs and choose one of the values."""
        new = tuple(options) or (("none yet", None),)
        value = value if value in [one for _, one in new] else new[0][1]
        self._filling = get_ident()
        try:
            if new != self.field.options:
                self.field.options = new
            if value != self.field.value:
                self.field.value = value
        finally:
            self._filling = 0
