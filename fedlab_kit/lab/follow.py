"""A thread that draws what the workers do until neither has anything to do, and once more after that."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Lock, Thread
from time import perf_counter

from fedlab_kit.lab.compressor import Compressor
from fedlab_kit.lab.session import Session

PAUSE = 0.1  # seconds between two looks at a run under way


class Follower:
    """Looks at a session and a compressor several times a second while either is busy; `draw` shows their state."""

    def __init__(self, session: Session, compressor: Compressor, draw: Callable[[], None]) -> None:
        self._session, self._compressor, self._draw = session, compressor, draw
        self._drawing = Lock()
        self._quiet = Event()
        self._quiet.set()

    def draw(self) -> None:
        """Show the present state, now."""
        with self._drawing:
            self._draw()

    def follow(self) -> None:
        """Show the present state, and what follows until nothing is going on."""
        self.draw()
        with self._drawing:
            if self._quiet.is_set():
                self._quiet.clear()
                Thread(target=self._watch, daemon=True).start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is going on and all has been drawn, at most `timeout` seconds; whether that is so."""
        return self._quiet.wait(timeout)

    def _watch(self) -> None:
        pause, done = PAUSE, False
        while not done:
            active = self._session.busy or self._compressor.busy
            if self._session.busy:
                self._session.wait(pause)
            elif active:
                self._compressor.watch(PAUSE)
            began = perf_counter()
            try:
                self.draw()
            except Exception as error:  # what cannot be drawn must not end the watch: the buttons depend on it
                self._compressor.refuse(f"Not drawn: {type(error).__name__}: {error}")
            pause = max(PAUSE, 4 * (perf_counter() - began))  # a slow machine spends its time on training
            with self._drawing:
                if done := not (active or self._session.busy or self._compressor.busy):
                    self._quiet.set()
