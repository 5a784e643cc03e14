"""What each client holds under the settings of the controls, and how the last round serves it, folded away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import ipywidgets as widgets

from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.server import RoundRecord
from fedlab_kit.lab.client_pictures import MOST, accuracy_of_each, labels_held
from fedlab_kit.lab.controls import folded, is_open
from fedlab_kit.run import absent


class ClientShelf:
    """Two pictures, drawn only while they are unfolded and anew only when what they show has changed."""

    def __init__(self, follow: Callable[[], object]) -> None:
        self.labels, self.accuracy = widgets.HTML(), widgets.HTML()
        self.widget = folded("what each client holds and gets", [self.labels, self.accuracy], follow)
        self._dealt: Any = None
        self._fared: Any = None

    def draw(self, asked: Experiment, stage: Experiment | None, records: Sequence[RoundRecord], at_hand: bool) -> None:
        """Show both; that of the labels only where the data set is `at_hand`, not to be fetched first."""
        if not is_open(self.widget):
            return
        dealt = (asked.dataset, asked.partition, asked.clients, asked.alpha, asked.missing, asked.seed, at_hand)
        if self._dealt != dealt:
            self._dealt = dealt
            self.labels.value = _drawn(asked, labels_held) if at_hand else _note("Press Run to load the data set.")
        if self._fared != (stage, len(records)):
            self._fared = (stage, len(records))
            self.accuracy.value = _note("No round yet.")
            if stage is not None and records:
                never = absent(stage, records)
                drawn = _drawn(stage, lambda e: accuracy_of_each(e, records[-1]))
                self.accuracy.value = drawn + (_note(never) if never else "")


def _drawn(e: Experiment, draw: Callable[[Experiment], str]) -> str:
    if e.clients > MOST:
        return _note(f"Clients are drawn one by one up to {MOST} of them; these settings have {e.clients:,}.")
    try:
        return draw(e)
    except (ValueError, OSError) as error:
        return _note(str(error))


def _note(text: str) -> str:
    return f'<div class="fedlab-hint">{escape(text)}</div>'
