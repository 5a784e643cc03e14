"""Runs: train an experiment, keep it, find it again, go on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlab_kit import catalog
from fedlab_kit.data import Dataset, load
from fedlab_kit.experiment import SCHEMA, Experiment
from fedlab_kit.federation.record import RoundRecord
from fedlab_kit.federation.rounds import Exchange, in_process, play
from fedlab_kit.federation.server import ServerState, start
from fedlab_kit.federation.task import OUTCOMES, strata, task
from fedlab_kit.files import ROOT
from fedlab_kit.partition import label_counts, partition
from fedlab_kit.statistics import Z95, wilson
from fedlab_kit.store import RunFolder
from fedlab_kit.wire import make
from fedlab_kit.wire.privacy import epsilon


@dataclass(frozen=True, eq=False)
class Run:
    """What came out of one experiment: its records, and its final weights [P].

    `status` is "finished", "stopped" or "diverged", `note` the reason of the last. `measured` says when, on which
    machine, with which torch and in how many seconds the records were made; `from_store` whether that was earlier.
    """

    experiment: Experiment
    path: Path
    records: tuple[RoundRecord, ...]
    weights: Tensor
    status: str
    measured: dict[str, Any] = field(repr=False)
    from_store: bool = False

    def __repr__(self) -> str:
        score = f"{self.accuracy:.1%}" if self.records else "no round"
        return f"Run({self.experiment!r}, {self.status} after {len(self.records)} rounds, {score})"

    @property
    def key(self) -> str:
        """The hash by which the store finds the run, see `identify`."""
        return self.path.name

    @property
    def accuracy(self) -> float:
        """Validation accuracy after the last round, 0..1. Raises ValueError when no round was finished."""
        if not self.records:
            raise ValueError("no round was finished, so there is no accuracy yet: train the experiment again")
        return self.records[-1].accuracy

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `accuracy`."""
        return self.records[-1].low, self.records[-1].high

    @property
    def note(self) -> str:
        """What the last round had to say, "" normally."""
        return self.records[-1].note if self.records else ""

    @property
    def uplink_bytes(self) -> int:
        """Bytes that all clients sent in all rounds."""
        return sum(record.uplink_bytes for record in self.records)

    @property
    def downlink_bytes(self) -> int:
        """Bytes that the server sent to all clients in all rounds."""
        return sum(record.downlink_bytes for record in self.records)

    @property
    def client_bytes(self) -> int:
        """Bytes on disk of what clients keep between rounds: residuals, control variates, masks, copies."""
        return sum(file.stat().st_size for file in (self.path / "clients").glob("*.safetensors"))

    @property
    def dataset(self) -> Dataset:
        """The data the run was trained on."""
        return load(self.experiment.dataset)

    @property
    def shards(self) -> list[Tensor]:
        """Each client's indices into `dataset.train`."""
        return task(self.experiment).shards

    @cached_property
    def model(self) -> nn.Module:
        """The trained model on the CPU, in evaluation mode; it takes preprocessed inputs."""
        flat = task(self.experiment).model
        flat.weights.copy_(self.weights)
        return deepcopy(flat.module).cpu().eval()

    def test(self) -> tuple[float, float, float]:
        """Return accuracy, low and high (95 %) on the test split, which nothing else opens."""
        job = task(self.experiment)
        result = job.evaluate(self.weights, job.dataset.test)
        hits, total = sum(result.correct), sum(result.total)
        return hits / total, *wilson(hits, total)

    def epsilon(self, delta: float = 1e-5) -> float:
        """Return what privacy was spent at `delta`, by opacus's accountant; infinite when `privacy` is off.

        At client level for every client; at record level for the samples of the client that fared worst.
        """
        e = self.experiment
        if e.privacy == "client":
            return epsilon(e.noise_multiplier, e.clients_per_round / e.clients, len(self.records), delta)
        if e.privacy == "off":
            return float("inf")
        asked = Counter(client for record in self.records for client in record.answered)
        spent = [0.0]
        for client, rounds in asked.items():
            size = len(self.shards[client])
            rate, steps = min(1.0, e.batch_size / size), -(-size // e.batch_size) * e.local_epochs * rounds
            spent.append(epsilon(e.noise_multiplier, rate, steps, delta))
        return max(spent)

    def client_accuracy(self, record: int = -1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return accuracy, low and high (95 %) per client, each [clients], after one of the rounds."""
        return client_accuracy(self.experiment, self.records[record])


def client_accuracy(experiment: Experiment, record: RoundRecord) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return accuracy, low and high (95 %) per client, each [clients], after the round of a record.

    Clients that are sites are measured on their site's validation samples. Elsewhere clients differ in their
    label mix alone, so the accuracies per class are weighted by the client's own mix (post-stratification):
    every validation sample counts for every client, and no client is judged on what it trained on.
    """
    e, dataset = experiment, load(experiment.dataset)
    shards = partition(dataset, e.partition, e.clients, e.alpha, e.seed)
    total = np.maximum(np.array(record.total, dtype=float), 1)
    rate = np.array(record.correct) / total
    mix = label_counts(strata(e, dataset.train), shards, len(total)).numpy()
    mix = mix / mix.sum(1, keepdims=True)
    # Agresti and Coull's two extra hits and misses keep the spread of a class above zero at 0 % and 100 %.
    smooth = (np.array(record.correct) + 2) / (total + 4)
    half = Z95 * np.sqrt((mix**2) @ (smooth * (1 - smooth) / (total + 4)))
    mean = mix @ rate
    return mean, np.clip(mean - half, 0, 1), np.clip(mean + half, 0, 1)


def train(
    experiment: Experiment,
    stop: Event | None = None,
    progress: Callable[[RoundRecord], None] | None = None,
    store: Path | None = None,
    exchange: Exchange = in_process,
) -> Run:
    """Run an experiment, or answer it from the store, or go on where it stopped.

    `progress` is called with every record, stored ones at once. Setting `stop` ends the run before its next batch;
    the rounds so far are kept, and the same call later goes on to the same final weights. Another notebook that
    trains the same experiment at this moment is waited for. `store` is another folder to keep runs in than
    `runs_folder()`; `exchange` carries the messages, see `play`. Raises ValueError for an impossible experiment and
    OSError when the store is unreadable or full.
    """
    folder = RunFolder((store or runs_folder()) / identify(experiment))
    tell = progress or (lambda record: None)
    engine = "in process" if exchange is in_process else "flower"
    _train_parents(experiment, stop, store, exchange)
    with folder.locked(stop):
        state, records = folder.load(experiment)
        if not (from_store := _over(state, records)) and folder.out_of_reach(engine):
            state, records = start(experiment), []
        for record in records:
            tell(record)
        if from_store:
            return _run(folder, state, records, from_store)
        folder.prepare(experiment, records, engine)
        for latest, record in play(state, folder.clients, stop, exchange):
            state = latest
            folder.commit(state, record)
            records.append(record)
            tell(record)
        folder.describe(experiment, records, engine)
        return _run(folder, state, records, from_store)


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
    return _run(folder, state, records, from_store=True) if _over(state, records) else None


def history() -> list[dict[str, Any]]:
    """Return the stored runs, newest first: key, experiment (non-default fields), rounds, accuracy, when, machine."""
    found = []
    for file in runs_folder().glob("*/experiment.json"):
        folder = RunFolder(file.parent)
        try:
            about, records = folder.about(), folder.records()
        except (OSError, ValueError):
            continue  # damaged, or being made at this moment: train says so when it is asked for
        if records:
            found.append({**about, "key": file.parent.name, "rounds": len(records), "accuracy": records[-1].accuracy})
    return sorted(found, key=lambda run: run["when"], reverse=True)


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
    model, dataset, *codecs = parts(experiment)
    used = [model, dataset, *(method for codec in codecs for method in (codec.encode, codec.decode))]
    facts = {
        "schema": SCHEMA,
        "experiment": experiment.changes(),
        "versions": [version("fedlab-kit"), torch.__version__],
        "data": load(experiment.dataset).digest,
        "source": [catalog.source(thing) for thing in used if not catalog.is_built_in(thing)],
        "parents": [identify(parent) for parent in experiment.parents],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def parts(experiment: Experiment) -> list[Any]:
    """Return what an experiment names: the functions of its model and its data set, the classes of its two codecs."""
    functions = [catalog.lookup("model", experiment.model), catalog.lookup("dataset", experiment.dataset)]
    return [*functions, type(make(experiment.uplink)), type(make(experiment.downlink))]


def _over(state: ServerState, records: list[RoundRecord]) -> bool:
    return state.round >= state.experiment.rounds or (bool(records) and records[-1].diverged)


def _run(folder: RunFolder, state: ServerState, records: list[RoundRecord], from_store: bool) -> Run:
    diverged = bool(records) and records[-1].diverged
    status = "diverged" if diverged else "finished" if _over(state, records) else "stopped"
    about = folder.about()
    measured = {name: about[name] for name in ("when", "machine", "torch", "seconds")}
    weights = state.weights.cpu()
    return Run(state.experiment, folder.path, tuple(records), weights, status, measured, from_store)
