"""Runs: train an experiment, keep it, find it again, go on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from threading import Event
from typing import Any

import numpy as np
import torch

from fedlab_kit import catalog, code_reading, identity
from fedlab_kit.data import load
from fedlab_kit.experiment import SCHEMA, Experiment
from fedlab_kit.federation import setup
from fedlab_kit.federation.flat_model import FlatModel
from fedlab_kit.federation.rounds import Exchange, in_process, play
from fedlab_kit.federation.server import RoundRecord, ServerState, start
from fedlab_kit.federation.setup import Parents
from fedlab_kit.files import ROOT, at, spare_folder
from fedlab_kit.models import build
from fedlab_kit.run import Run, StoredRun, status
from fedlab_kit.store import RunFolder
from fedlab_kit.wire import make

ENGINES = ("process", "flower")


def train(
    experiment: Experiment,
    stop: Event | None = None,
    progress: Callable[[RoundRecord], None] | None = None,
    store: Path | None = None,
    engine: str = "process",
) -> Run:
    """Run an experiment, or answer it from the store, or go on where it stopped.

    `progress` is called with every record, stored ones at once. Setting `stop` ends the run before its next batch;
    the rounds so far are kept, and the same call later goes on to the same final weights. Another notebook that
    trains the same experiment at this moment is waited for. `store` is another folder to keep runs in than
    `runs_folder()`. `engine` is "process", all in this one, or "flower", every client a virtual node of Flower's
    simulation on Ray: the same numbers, for populations that outgrow one process. What a user wrote and the store could
    not tell from a later version is run every time, with a warning, and kept as long as this process. Raises ValueError
    for an impossible experiment or an unknown engine, OSError when the store is unreadable or full, and
    ModuleNotFoundError with the remedy when Flower is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "process":
        run = execute(experiment, stop, progress, store)
    else:
        need_flower()
        from fedlab_kit.scale.flower import simulate

        run = simulate(experiment, stop, progress, store)
    run.warn()
    return run


def need_flower() -> None:
    """Raise ModuleNotFoundError with the remedy when Flower or Ray is not installed."""
    for name in ("flwr", "ray"):
        if find_spec(name) is None:
            raise ModuleNotFoundError('this needs Flower: pip install -c constraints.txt -e ".[scale]"', name=name)


def execute(
    experiment: Experiment,
    stop: Event | None = None,
    progress: Callable[[RoundRecord], None] | None = None,
    store: Path | None = None,
    exchange: Exchange = in_process,
) -> Run:
    """Do what `train` says, with the messages of each round carried by `exchange`, see `play`."""
    if experiment.normalization == "own" and exchange is not in_process:
        raise ValueError("normalization must be shared on Flower: every client's own model is evaluated in one process")
    folder, unstored = _place(experiment, store)
    tell = progress or (lambda record: None)
    engine = "in process" if exchange is in_process else "flower"
    parents = parents_of(experiment, stop, store, exchange)
    with folder.locked(stop):
        task = setup.task(experiment, parents)
        state, records = folder.load(task)
        over = status(experiment, records) != "stopped"
        if not over and folder.out_of_reach(engine):
            state, records = start(task), []
        for record in records:
            tell(record)
        if not over:
            folder.prepare(state, records, engine)
            for latest, record in play(replace(state, copies=folder.copies), folder.clients, stop, exchange):
                state = latest
                folder.commit(state, record)  # before it is told
                records.append(record)
                tell(record)
            folder.describe(experiment, records, engine)
        return _run(folder, state, records, over, unstored)


def _place(experiment: Experiment, store: Path | None) -> tuple[RunFolder, str]:
    """Return the run's folder, and "" or why it is none of the store's but one that lasts as long as this process."""
    try:
        return RunFolder((store or runs_folder()) / identify(experiment)), ""
    except identity.Unknowable as error:
        return RunFolder(_spare() / token_hex(10)), str(error)


@cache
def _spare() -> Path:
    return spare_folder(execute)


def rounds(experiment: Experiment, stop: Event | None = None) -> Iterator[RoundRecord]:
    """Run the experiment and yield one `RoundRecord` a round; its rounds are not stored, those of its parents are.

    Setting `stop` ends the loop before the next batch, without a record of the broken round. Raises ValueError for a
    parent that diverged, as `train` does.
    """
    _place(experiment, None)  # has the catalog look at what a user has edited
    try:
        task = setup.task(experiment, parents_of(experiment, stop))
    except TimeoutError:  # stopped while a parent was trained
        return
    for _, record in play(start(task), {}, stop):
        yield record


def parents_of(
    experiment: Experiment, stop: Event | None = None, store: Path | None = None, exchange: Exchange = in_process
) -> Parents:
    """Return the finished models that the experiment starts and learns from, trained first where the store lacks them.

    ValueError if one has diverged, TimeoutError if `stop` came before one was finished.
    """
    wanted = (experiment.start, experiment.teacher)
    found = [None if one is None else _outcome(execute(one, stop, None, store, exchange)) for one in wanted]
    return Parents(*found)


def _outcome(run: Run) -> FlatModel:
    if run.status == "diverged":
        raise ValueError(f"the experiment that this one needs has diverged: {run.experiment!r}")
    if run.status == "stopped":
        raise TimeoutError(f"stopped before the experiment that this one needs was finished: {run.experiment!r}")
    return run.flat()


def _run(
    folder: RunFolder, state: ServerState, records: Sequence[RoundRecord], from_store: bool, unstored: str = ""
) -> Run:
    model, task = (state.weights.cpu(), state.state), state.task.apart()
    return Run(task.experiment, folder.path, tuple(records), folder.measured(), from_store, *model, task, unstored)


def find(experiment: Experiment) -> Run | None:
    """Return the finished (or diverged) run of this experiment from the store, or None."""
    folder, unstored = _place(experiment, None)
    if unstored or not folder.path.exists():
        return None
    state, records = folder.load(setup.task(experiment, parents_of(experiment)))
    return None if status(experiment, records) == "stopped" else _run(folder, state, records, True)


def history() -> tuple[tuple[StoredRun, ...], list[str]]:
    """Return the stored runs that have a whole round, oldest first, and the folders that cannot be read."""
    found, damaged = dict[tuple[str, int, str], StoredRun](), []
    for path in sorted(runs_folder().iterdir()) if runs_folder().is_dir() else ():
        if path.name.startswith(".") or (path.is_file() and path.suffix):  # marks.json is nobody's run
            continue
        folder, file = RunFolder(path), path / "experiment.json"
        try:
            if (records := folder.whole()) or file.exists():  # else it is about to begin
                experiment, older = Experiment(**folder.about()["experiment"]), made_by(path) == OLDER
                run = StoredRun(experiment, path, tuple(records), folder.measured(), True, older=older)
                # `when` has whole seconds; the file tells the rest
                found[run.measured["when"], file.stat().st_mtime_ns, path.name] = run
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            damaged.append(path.name)
    return tuple(run for _, run in sorted(found.items()) if run.records), damaged


TODAY, OLDER, DAMAGED = "today's code", "older code", "damaged"


def made_by(folder: Path) -> str:
    """Say which code made a run's folder: TODAY, OLDER, or DAMAGED where the folder cannot tell."""
    try:
        made = RunFolder(folder).about().get("code")
    except (OSError, ValueError, AttributeError):
        return DAMAGED
    return TODAY if made == code_reading.own_code() else OLDER


def free() -> tuple[int, int]:
    """Delete the runs of older code, but for those in use; return how many they were and how many bytes."""
    at_once, count, freed = Event(), 0, 0
    at_once.set()
    for folder in filter(is_run, runs_folder().glob("*")):
        with suppress(TimeoutError), RunFolder(folder).locked(at_once):
            if made_by(folder) == OLDER:
                count, freed = count + 1, freed + size(folder)
                shutil.rmtree(folder)
    return count, freed


def is_run(path: Path) -> bool:
    """Say whether something in the store is a run's folder."""
    return path.is_dir() and re.fullmatch("[0-9a-f]{20}", path.name) is not None


def size(folder: Path) -> int:
    """Count the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def runs_folder() -> Path:
    """Where runs are kept: the folder that FEDLAB_RUNS names (relative to the project's root), or `runs/` there."""
    return ROOT / at(os.environ.get("FEDLAB_RUNS") or "runs")


def path_of(experiment: Experiment) -> Path:
    """Return the folder of the experiment's run, whether it exists or not."""
    return runs_folder() / identify(experiment)


def identify(experiment: Experiment) -> str:
    """Return a short SHA-256 of all that decides a run's outcome: equal keys mean equal outcomes.

    All fields, the data's digest, the code of the package and what it computes with, and all that a user wrote and
    the experiment reaches, its parents' too: when one of them changes, the experiment is run again. Raises
    `identity.Unknowable` where that cannot be told, and what `load` and `build` do.
    """
    facts = {
        "schema": SCHEMA,
        "experiment": experiment.model_dump(mode="json", exclude={"start", "teacher"}),
        "versions": [torch.__version__, np.__version__, code_reading.own_code()],
        "definitions": definitions(experiment),
        "data": load(experiment.dataset).digest,  # after the definitions: they say whether it is still true
        "parents": [parent and identify(parent) for parent in (experiment.start, experiment.teacher)],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def definitions(experiment: Experiment) -> list[str]:
    """Return the fingerprints of the experiment's model, data set and codecs, its parents' aside.

    A model of a user's own counts as it is built, too: its first weights may be read from a file.
    """
    model, _, *codecs = parts(experiment)
    names = [("model", experiment.model), ("dataset", experiment.dataset)]
    found = [identity.current(*name) for name in names]
    found += [identity.fingerprint(codec, f"codec {codec.name!r}") for codec in codecs]
    if not catalog.is_built_in(model):
        dataset = load(experiment.dataset)
        built = build(experiment.model, dataset.shape, len(dataset.classes), experiment.seed)
        found.append(identity.fingerprint(built, f"model {experiment.model!r}"))
    return found


def parts(experiment: Experiment) -> list[Any]:
    """Return what an experiment names: the functions of its model and its data set, the classes of its two codecs."""
    functions = [catalog.lookup("model", experiment.model), catalog.lookup("dataset", experiment.dataset)]
    return [*functions, type(make(experiment.uplink)), type(make(experiment.downlink))]
