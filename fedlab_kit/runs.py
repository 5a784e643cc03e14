"""Runs: train an experiment, keep it, find it again, go on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

import torch

from fedlab_kit import catalog
from fedlab_kit.data import load
from fedlab_kit.experiment import SCHEMA, Experiment
from fedlab_kit.federation.flat import FlatModel
from fedlab_kit.federation.record import RoundRecord
from fedlab_kit.federation.rounds import Exchange, in_process, play
from fedlab_kit.federation.server import ServerState, start
from fedlab_kit.federation.task import Parents, task
from fedlab_kit.files import ROOT
from fedlab_kit.run import Run, StoredRun, status
from fedlab_kit.store import RunFolder
from fedlab_kit.wire import make


def train(
    experiment: Experiment,
    stop: Event | None = None,
    progress: Callable[[RoundRecord], None] | None = None,
    store: Path | None = None,
    exchange: Exchange = in_process,
) -> Run:
    """Do what `scale.engines.train` says, with the messages of each round carried by `exchange`, see `play`."""
    if experiment.normalization == "own" and exchange is not in_process:
        raise ValueError("normalization must be shared on Flower: every client's own model is evaluated in one process")
    folder = RunFolder((store or runs_folder()) / identify(experiment))
    tell = progress or (lambda record: None)
    engine = "in process" if exchange is in_process else "flower"
    parents = parents_of(experiment, stop, store, exchange)
    with folder.locked(stop):
        job = task(experiment, parents)
        state, records = folder.load(job)
        over = status(experiment, records) != "stopped"
        if not over and folder.out_of_reach(engine):
            state, records = start(job), []
        for record in records:
            tell(record)
        if not over:
            folder.prepare(experiment, records, engine)
            for latest, record in play(state, folder.clients, stop, exchange):
                state = latest
                folder.commit(state, record)
                records.append(record)
                tell(record)
            folder.describe(experiment, records, engine)
        return _run(folder, state, records, over)


def rounds(experiment: Experiment, stop: Event | None = None) -> Iterator[RoundRecord]:
    """Run the experiment and yield one `RoundRecord` a round; its rounds are not stored, those of its parents are.

    Setting `stop` ends the loop before the next batch, without a record of the broken round. Raises ValueError for a
    parent that diverged, as `train` does.
    """
    try:
        job = task(experiment, parents_of(experiment, stop))
    except TimeoutError:  # stopped while a parent was trained
        return
    for _, record in play(start(job), {}, stop):
        yield record


def parents_of(
    experiment: Experiment, stop: Event | None = None, store: Path | None = None, exchange: Exchange = in_process
) -> Parents:
    """Return the finished models that the experiment starts and learns from, trained first where the store lacks them.

    ValueError if one has diverged, TimeoutError if `stop` came before one was finished.
    """
    wanted = (experiment.start, experiment.teacher)
    found = [None if one is None else _outcome(train(one, stop, None, store, exchange)) for one in wanted]
    return Parents(*found)


def _outcome(run: Run) -> FlatModel:
    if run.status == "diverged":
        raise ValueError(f"the experiment that this one needs has diverged: {run.experiment!r}")
    if run.status == "stopped":
        raise TimeoutError(f"stopped before the experiment that this one needs was finished: {run.experiment!r}")
    return run.flat()


def _run(folder: RunFolder, state: ServerState, records: Sequence[RoundRecord], from_store: bool) -> Run:
    model, job = (state.weights.cpu(), state.state), state.job
    return Run(job.experiment, folder.path, tuple(records), folder.measured(), from_store, *model, job.parents)


def find(experiment: Experiment) -> Run | None:
    """Return the finished (or diverged) run of this experiment from the store, or None."""
    folder = RunFolder(path_of(experiment))
    if not folder.path.exists():
        return None
    state, records = folder.load(task(experiment, parents_of(experiment)))
    return None if status(experiment, records) == "stopped" else _run(folder, state, records, True)


def history() -> tuple[tuple[StoredRun, ...], list[str]]:
    """Return the stored runs that have a whole round, oldest first, and the folders that cannot be read."""
    found, damaged = [], []
    for file in sorted(runs_folder().glob("*/experiment.json")):
        folder = RunFolder(file.parent)
        try:
            experiment = Experiment(**folder.about()["experiment"])
            run = StoredRun(experiment, folder.path, tuple(folder.records()), folder.measured(), from_store=True)
            age = run.measured["when"], file.stat().st_mtime_ns  # `when` has whole seconds; the file tells the rest
        except (OSError, ValueError, TypeError, KeyError):
            damaged.append(folder.path.name)
            continue
        if run.records:
            found.append((age, run))
    return tuple(run for _, run in sorted(found, key=lambda one: one[0])), damaged


def runs_folder() -> Path:
    """Where runs are kept: the folder that FEDLAB_RUNS names (relative to the project's root), or `runs/` there."""
    return ROOT / os.environ.get("FEDLAB_RUNS", "runs")


def path_of(experiment: Experiment) -> Path:
    """Return the folder of the experiment's run, whether it exists or not."""
    return runs_folder() / identify(experiment)


def identify(experiment: Experiment) -> str:
    """Return a short SHA-256 of all that decides a run's outcome.

    The non-default fields, the schema, the package and torch versions, the data's digest and the source of what a
    user registered: when one of them changes, the experiment is run again.
    """
    facts = {
        "schema": SCHEMA,
        "experiment": experiment.changes(),
        "versions": [version("fedlab-kit"), torch.__version__],
        "data": load(experiment.dataset).digest,
        "source": sources(experiment),
        "parents": [identify(parent) for parent in experiment.parents],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def sources(experiment: Experiment) -> list[str]:
    """Return the source of the model, the data set and the codecs that are not built in, its parents' aside."""
    model, dataset, *codecs = parts(experiment)
    used = [model, dataset, *(method for codec in codecs for method in (codec.encode, codec.decode))]
    return [catalog.source(thing) for thing in used if not catalog.is_built_in(thing)]


def parts(experiment: Experiment) -> list[Any]:
    """Return what an experiment names: the functions of its model and its data set, the classes of its two codecs."""
    functions = [catalog.lookup("model", experiment.model), catalog.lookup("dataset", experiment.dataset)]
    return [*functions, type(make(experiment.uplink)), type(make(experiment.downlink))]
