"""Train many experiments, on a second core as well when that pays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Event, Thread
from time import monotonic

from fedlab_kit import catalog
from fedlab_kit.experiment import Experiment
from fedlab_kit.files import ROOT
from fedlab_kit.run import Run
from fedlab_kit.runs import find, parts, train

PATIENCE = 2.0  # seconds of training before a second process is started: it needs as long to import torch
Tell = Callable[[int, int, str], None]


def stored(experiment: Experiment) -> Run | Exception | None:
    """Return what the store has of an experiment: its run, none, or the error that says why nobody can tell."""
    try:
        return find(experiment)
    except Exception as error:
        return error


def train_all(experiments: Sequence[Experiment], stop: Event | None, tell: Tell) -> dict[Experiment, Run | Exception]:
    """Train what the store lacks, from the first to the last; a second process comes from the last to the first.

    The store's locks keep the two apart: what the other has done is there, what it is doing is waited for. `tell`
    gets how many are done, of how many. Returns what was trained here, which the store may be unable to keep, or the
    error that it ended in. Returns early when `stop` is set; every round that was finished is kept.
    """
    missing = [experiment for experiment in experiments if stored(experiment) is None]
    second, trained = SecondProcess(missing[:1:-1]), dict[Experiment, Run | Exception]()
    try:
        for done, experiment in enumerate(missing, 1):
            try:
                trained[experiment] = run = train(experiment, stop, lambda record: second.start_if_it_pays())
                run.warn()
            except Exception as error:
                trained[experiment] = error
            if stop is not None and stop.is_set():  # in the middle of it, or while a teacher was trained
                del trained[experiment]
                break
            tell(min(done + second.done, len(missing)), len(missing), "experiments trained")
    finally:
        second.end()
    return trained


class SecondProcess:
    """Trains experiments on another core, as long as its parent lives; `done` counts those that it has finished."""

    def __init__(self, experiments: Sequence[Experiment]) -> None:
        self.done = 0
        able = (os.cpu_count() or 1) > 1 and all(map(built_in, experiments))
        self._experiments = list(experiments) if able else []
        self._begin = monotonic() + PATIENCE
        self._process: subprocess.Popen[str] | None = None

    def start_if_it_pays(self) -> None:
        """Start once training has gone on for a while and there is something to do."""
        if self._process is not None or not self._experiments or monotonic() < self._begin:
            return
        command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            start_new_session=True,  # interrupting a kernel meets the parent alone, which then ends this one
        )
        assert self._process.stdin
        self._process.stdin.write(json.dumps([experiment.changes() for experiment in self._experiments]) + "\n")
        self._process.stdin.flush()
        self._counter = Thread(target=self._count, args=(self._process,), daemon=True)
        self._counter.start()

    def end(self) -> None:
        """Stop it before its next batch; while it still starts up, at once."""
        if self._process is None:
            return
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()  # what it has written is whole: see files.py
            self._process.wait()
        self._counter.join()

    def _count(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        with process.stdout as lines:
            for _ in lines:
                self.done += 1


def serve() -> None:
    """Train the experiments in the first line of standard input, and say so for each, until that input ends.

    What goes wrong with one is left to the parent, which comes to the same experiment and says it to a person.
    """
    stop, experiments = Event(), json.loads(sys.stdin.readline())
    Thread(target=_set_at_the_end, args=(stop,), daemon=True).start()
    for changes in experiments:
        with suppress(Exception):
            train(Experiment(**changes), stop)
        if stop.is_set():
            return
        print("done", flush=True)


def _set_at_the_end(stop: Event) -> None:
    sys.stdin.read()
    stop.set()


def built_in(experiment: Experiment) -> bool:
    """Say whether another process knows all that the experiment names: nothing was registered in a notebook."""
    return all(map(catalog.is_built_in, parts(experiment))) and all(map(built_in, experiment.parents))
