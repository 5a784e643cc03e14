"""Runs: train an experiment, keep it, find it again, go on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

import torch

from fedlab_kit import catalog
from fedlab_kit.data import load
from fedlab_kit.experiment import SCHEMA, Experiment
from fedlab_kit.federation.record import RoundRecord
from fedlab_kit.federation.rounds import Exchange, in_process, play
from fedlab_kit.federation.server import start
from fedlab_kit.federation.task import OUTCOMES
from fedlab_kit.files import ROOT, at
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
    folder = RunFolder((store or runs_folder()) / identify(experiment))
    tell = progress or (lambda record: None)
    engine = "in process" if exchange is in_process else "flower"
    _train_parents(experiment, stop, store, exchange)
    with folder.locked(stop):
        state, records = folder.load(experiment)
        over = status(experiment, records) != "stopped"
        if not over and folder.out_of_reach(engine):
            state, records = start(experiment), []
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
        return Run(experiment, folder.path, tuple(records), folder.measured(), over, state.weights.cpu())


def _train_parents(
    experiment: Experiment, stop: Event | None, store: Path | None = None, exchange: Exchange = in_process
) -> None:
    """Make the final models at hand that the experiment learns or starts from. ValueError if one has none."""
    for parent in experiment.parents:
        run = train(parent, stop, store=store, exchange=exchange)
        if run.status == "diverged":
            raise ValueError(f"the experiment that this one needs has diverged: {parent!r}")
        if run.status == "stopped":
            raise TimeoutError(f"stopped before the experiment that this one needs was finished: {parent!r}")
        OUTCOMES[parent] = run.weights.to(experiment.device)


def find(experiment: Experiment) -> Run | None:
    """Return the finished (or diverged) run of this experiment from the store, or None."""
    folder = RunFolder(path_of(experiment))
    if not folder.path.exists():
        return None
    _train_parents(experiment, None)
    state, records = folder.load(experiment)
    if status(experiment, records) == "stopped":
        return None
    return Run(experiment, folder.path, tuple(records), folder.measured(), True, state.weights.cpu())


def history() -> tuple[tuple[StoredRun, ...], list[str]]:
    """Return the stored runs that have a whole round, oldest first, and the folders that cannot be read."""
    found, damaged = [], []
    for path in sorted(runs_folder().iterdir()) if runs_folder().is_dir() else ():
        if path.name.startswith(".") or (path.is_file() and path.suffix):  # marks.json is nobody's run
            continue
        folder, file = RunFolder(path), path / "experiment.json"
        try:
            records = tuple(folder.whole())
            if not records and not file.exists():  # about to begin
                continue
            run = StoredRun(Experiment(**folder.about()["experiment"]), path, records, folder.measured(), True)
            age = run.measured["when"], file.stat().st_mtime_ns  # `when` has whole seconds; the file tells the rest
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            damaged.append(path.name)
            continue
        if run.records:
            found.append((age, run))
    return tuple(run for _, run in sorted(found, key=lambda one: one[0])), damaged


def runs_folder() -> Path:
    """Where runs are kept: the folder that FEDLAB_RUNS names (relative to the project's root), or `runs/` there."""
    return ROOT / at(os.environ.get("FEDLAB_RUNS") or "runs")


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
