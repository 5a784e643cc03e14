"""Threads of a bench: a worker that does the newest wish, and the loop that draws what others do."""

from __future__ import annotations

from collections.abc import Callable
from threading import Condition, Lock, Thread, main_thread
from time import monotonic, perf_counter
from typing import NamedTuple

PAUSE = 0.1  # seconds between two pictures of a run under way


class Job(NamedTuple):
    """Something to do, when, and whether all else comes first."""

    do: Callable[[], object]
    due: float
    resting: bool


class Worker:
    """Does jobs one at a time, in a thread that ends when there is none left.

    Of jobs under one name only the newest is done, when it has stood for its `delay`; jobs without a name are all done,
    in their order; those that are `resting` when there is nothing else to do. `failed` hears of every exception: a
    thread's traceback goes nowhere in a notebook. Only a `daemon` leaves a job half done when the program ends;
    otherwise the one under way is waited for and the rest is dropped.
    """

    def __init__(self, failed: Callable[[Exception], object], daemon: bool = False) -> None:
        self._failed, self._daemon = failed, daemon
        self._news = Condition()
        self._jobs: dict[object, Job] = {}
        self._doing: Job | None = None
        self._thread: Thread | None = None
        self.closed = False

    @property
    def busy(self) -> bool:
        """Whether something is done or waits that does not rest."""
        return any(not job.resting for job in [*self._jobs.values(), *filter(None, [self._doing])])

    @property
    def resting(self) -> bool:
        """Whether anything at all is done or waits."""
        return self._thread is not None

    def ask(self, do: Callable[[], object], name: str = "", delay: float = 0.0, resting: bool = False) -> None:
        """Have a job done after `delay` seconds; it takes the place of one of its name that has not begun."""
        with self._news:
            if self.closed:
                return
            self._jobs[name or object()] = Job(do, monotonic() + delay, resting)
            if self._thread is None:
                self._thread = Thread(target=self._work, daemon=self._daemon)
                self._thread.start()
            self._news.notify_all()

    def waits(self, name: str) -> bool:
        """Whether a job of this name has not begun yet."""
        return name in self._jobs

    def wait(self, timeout: float | None = None, resting: bool = False) -> bool:
        """Wait until nothing is left to do, at most `timeout` seconds; whether that is so."""
        with self._news:
            return self._news.wait_for(lambda: not (self.resting if resting else self.busy), timeout)

    def close(self) -> None:
        """Drop what has not begun, and take nothing more."""
        with self._news:
            self.closed = True
            self._jobs.clear()
            self._news.notify_all()

    def _work(self) -> None:
        while job := self._next():
            try:
                job.do()
            except Exception as error:
                self._failed(error)

    def _next(self) -> Job | None:
        """Wait for the next job that is due; None, and the thread is over, when there is none."""
        with self._news:
            self._doing = None
            self._news.notify_all()
            while self._jobs and (self._daemon or main_thread().is_alive()):
                name, job = min(self._jobs.items(), key=lambda one: (one[1].resting, one[1].due))
                if (left := job.due - monotonic()) <= 0:
                    self._doing = self._jobs.pop(name)
                    return job
                self._news.wait(min(left, 0.5))
            self._jobs.clear()
            self._thread = None
            self._news.notify_all()
            return None


class Refresh:
    """Draws the present state when it is asked to, in a thread of its own: nobody who presses or types waits for it.

    `ask(soon=False)`, for what comes many times a second, takes a fifth of the time at most: the rest is training's.
    """

    def __init__(self, draw: Callable[[], object], failed: Callable[[Exception], object]) -> None:
        self._draw, self.worker = draw, Worker(failed, daemon=True)
        self._drawing, self._next = Lock(), 0.0

    def ask(self, soon: bool = True) -> None:
        """Have the state drawn that stands when it is drawn."""
        if soon or not self.worker.waits("draw"):
            self.worker.ask(self.draw, "draw", 0.0 if soon else max(0.0, self._next - monotonic()))

    def draw(self) -> None:
        """Show the present state, now."""
        with self._drawing:
            began = perf_counter()
            try:
                self._draw()
            finally:
                self._next = monotonic() + max(PAUSE, 4 * (perf_counter() - began))
