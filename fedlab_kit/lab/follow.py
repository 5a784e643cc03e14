"""A thread that draws what the workers do until neither has anything to do, and once more after that."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Lock, Thread
from time import perf_counter

from fedlab_kit.lab.compressor import Compressor
from fedlab_kit.lab.session import Session

PAUSE = 0.1  # seconds between two looks at a run under way


class Follower:
    """Looks at a session and a compressor several times a second while either is busy; `draw` shows their state.

    Nothing is drawn by those who press and type: they ask for it by `follow`, which returns at once. So the next thing
    they do is never kept waiting by a picture of the last.
    """

    def __init__(self, session: Session, compressor: Compressor, draw: Callable[[], None]) -> None:
        self._session, self._compressor, self._draw = session, compressor, draw
        self._drawing, self._starting = Lock(), Lock()
        self._asked, self._quiet = Event(), Event()
        self._quiet.set()

    def draw(self) -> None:
        """Show the present state, now."""
        with self._drawing:
            self._draw()

    def follow(self) -> None:
        """Have the present state shown, and what follows until nothing is going on."""
        with self._starting:
            self._asked.set()
            if self._quiet.is_set():
                self._quiet.clear()
                Thread(target=self._watch, daemon=True).start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is going on and all has been drawn, at most `timeout` seconds; whether that is so."""
        return self._quiet.wait(timeout)

    def _watch(self) -> None:
        while True:
            self._asked.clear()
            active = self._session.busy or self._compressor.busy
            pause = self._draw_in()
            with self._starting:
                if not (active or self._asked.is_set()):
                    self._quiet.set()
                    return
            if self._session.busy:
                self._session.wait(pause)
            elif self._compressor.busy:
                self._compressor.watch(PAUSE)

    def _draw_in(self) -> float:
        """Show the present state; returns the seconds to pause, so that a slow machine spends its time on training.

        The first point of a run is not kept waiting.
        """
        began = perf_counter()
        try:
            self.draw()
        except Exception as error:  # what cannot be drawn must not end the watch: the buttons depend on it
            self._compressor.say(f"Not drawn: {type(error).__name__}: {error}")
        return max(PAUSE, 4 * (perf_counter() - began)) if self._session.records else PAUSE
