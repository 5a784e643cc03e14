"""What came out of one experiment: its records in figures, and its final model."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from fedlab_kit.clients import client_accuracy, client_names
from fedlab_kit.data import Dataset, load
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.flat_model import FlatModel
from fedlab_kit.federation.server import RoundRecord, answering, select
from fedlab_kit.federation.setup import Task
from fedlab_kit.partition import data_of, shards_of
from fedlab_kit.store import RunFolder
from fedlab_kit.wire.privacy import Privacy, Releases, outside, spent

FEW = 4  # clients that are told one by one


@dataclass(frozen=True, eq=False, repr=False)
class StoredRun:
    """A run as curves and tables need it, which its folder at `path` tells without the model.

    `measured` says when, on which machine, with which torch and in how many seconds the records were made;
    `from_store` whether that was earlier; `older` whether by other code of the package: such a run can be looked at
    and exported, and nothing goes on from it.
    """

    experiment: Experiment
    path: Path
    records: tuple[RoundRecord, ...]
    measured: dict[str, Any]
    from_store: bool
    older: bool = field(default=False, kw_only=True)

    def __repr__(self) -> str:
        score = f"{self.accuracy:.1%}" if self.records else "no round"
        return f"{type(self).__name__}({self.experiment!r}, {self.status} after {len(self.records)} rounds, {score})"

    @property
    def key(self) -> str:
        """The hash by which the store finds the run, see `runs.identify`."""
        return self.path.name

    @property
    def status(self) -> str:
        """Return "finished", "stopped" or "diverged"; `note` has the reason of the last."""
        return status(self.experiment, self.records)

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
        """What the last round had to say, and which clients never took part; "" normally."""
        said = self.records[-1].note if self.records else ""
        return "; ".join(filter(None, (said, absent(self.experiment, self.records))))

    @cached_property
    def uplink_bytes(self) -> int:
        """Bytes that all clients sent in all rounds."""
        return sum(record.uplink_bytes for record in self.records)

    @cached_property
    def downlink_bytes(self) -> int:
        """Bytes that the server sent to all clients in all rounds."""
        return sum(record.downlink_bytes for record in self.records)

    @property
    def client_bytes(self) -> int:
        """Bytes on disk of what clients keep between rounds: residuals, control variates, masks, copies."""
        return sum(file.stat().st_size for file in (self.path / "clients").glob("*.safetensors"))

    @property
    def dataset(self) -> Dataset:
        """The data the run was trained on, as its clients have them."""
        return data_of(self.experiment)

    @property
    def shards(self) -> list[Tensor]:
        """Each client's indices into `dataset.train`."""
        return shards_of(self.experiment)

    def client_accuracy(self, record: int = -1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return accuracy, low and high (95 %) per client, each [clients], after one of the rounds."""
        return client_accuracy(self.experiment, self.records[record])

    def epsilon(self, delta: float = 1e-5) -> float:
        """Return what privacy was spent at `delta`, see `privacy`; infinite when `privacy` is off."""
        return self.privacy(delta).epsilon

    def privacy(self, delta: float | None = None) -> Privacy:
        """Return what privacy was spent, on the client (at record level: the training sample) that fared worst.

        All sums that left count, used or not, those of a round under way and of the runs that this one starts or
        learns from included. `delta` is 1e-5 unless given, less where that is too much: ValueError at 1 / population.
        """
        e = self.experiment
        population, unit = (e.clients, "clients") if e.privacy == "client" else (len(self.dataset.train), "samples")
        delta = min(1e-5, 0.1 / population) if delta is None else delta
        if not 0 < delta < 1 / population:
            raise ValueError(f"delta must be above 0 and below 1 / {population} (one over the {unit}), got {delta}")
        ledgers, why = _ledgers(e, len(self.records) + (self.status == "stopped"))
        worst = float("inf") if why else max((spent(ledger, delta) for ledger in ledgers), default=0.0)
        if worst == float("inf") and not why:
            why = f"noise_multiplier {min(noise for ledger in ledgers for noise, *_ in ledger):g} hides nothing"
        return Privacy(e.privacy, worst, delta, why, outside(e))


@dataclass(frozen=True, eq=False, repr=False)
class Run(StoredRun):
    """What came out of one experiment: its records, and its final model as `weights` [P] and `state` [S].

    `task` is what the rounds worked on, and keeps the code of that time: a cell that is edited later changes no run.
    `unstored` says why the store cannot keep it, "" normally: then it lasts as long as this process. Where clients
    keep their normalization to themselves the global model is complete with what it began with, and `client_model`
    gives each client's own.
    """

    weights: Tensor
    state: Tensor
    task: Task
    unstored: str = ""

    @cached_property
    def model(self) -> nn.Module:
        """The trained model on the CPU, in evaluation mode; it takes preprocessed inputs."""
        return self._module(None)

    @property
    def shards(self) -> list[Tensor]:
        """Each client's indices into `dataset.train`."""
        return self.task.shards

    def client_model(self, client: int) -> nn.Module:
        """Return a client's own model, likewise: the global one where normalization is shared."""
        if not 0 <= client < self.experiment.clients:
            raise ValueError(f"client must be 0 to {self.experiment.clients - 1}, got {client}")
        return self._module(client)

    def tensors(self, client: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the weights [P] and the state [S] of the global model, or of a client's own."""
        if client is None or self.experiment.normalization == "shared":
            return self.weights, self.state
        return self.task.own_model(self.weights, RunFolder(self.path).memory(client))

    def flat(self) -> FlatModel:
        """Return the trained model as another experiment begins from it or learns from it."""
        if self.experiment.normalization == "own":
            raise ValueError("normalization must be shared in a start or a teacher: each client has a model of its own")
        sample = self.dataset.preprocess(self.dataset.train.x[:8])
        return FlatModel(deepcopy(self.model), sample, self.experiment.device)

    def warn(self) -> None:
        """Warn in one line of a run that the store cannot keep."""
        if self.unstored:
            warnings.warn(f"not stored: {self.unstored}", stacklevel=3)

    def test(self) -> tuple[float, float, float]:
        """Return accuracy, low and high (95 %) on the test split, which nothing else opens."""
        if self.experiment.normalization == "own":
            raise ValueError("normalization must be shared for one accuracy on the test split: each client has a model")
        return self.task.evaluate(self.weights, self.dataset.filled("test"), self.state).accuracy()

    def _module(self, client: int | None) -> nn.Module:
        with self.task.lock:
            self.task.model.load(*self.tensors(client))
            return deepcopy(self.task.model.module).cpu().eval()


def absent(experiment: Experiment, records: Sequence[RoundRecord]) -> str:
    """Say whose updates no round of a finished run used, never asked or in vain; "" if everybody's were used."""
    took = {client for record in records for client in record.answered}
    if status(experiment, records) != "finished" or not (missing := experiment.clients - len(took)):
        return ""
    if missing > FEW:
        return f"{missing:,} of {experiment.clients:,} clients never took part"
    *others, last = (str(client) for client in range(experiment.clients) if client not in took)
    return f"clients {', '.join(others)} and {last} never took part" if others else f"client {last} never took part"


def status(experiment: Experiment, records: Sequence[RoundRecord]) -> str:
    """Say what an experiment's rounds so far make it: "finished", "stopped" or "diverged"."""
    if records and records[-1].diverged:
        return "diverged"
    return "finished" if len(records) >= experiment.rounds else "stopped"


def _ledgers(experiment: Experiment, rounds: int) -> tuple[Collection[tuple[Releases, ...]], str]:
    """Return what was released about each client or sample, equal lists once; or () and why nothing bounds it."""
    level, parents = experiment.privacy, _ancestors(experiment)
    if level == "off":
        return (), "privacy is off"
    mine = _releases(experiment, rounds)
    if not parents:
        return {(releases,) for releases in mine}, ""
    held, past = _held(experiment, level), defaultdict[object, tuple[Releases, ...]](tuple)
    for parent in parents:
        theirs, name = _held(parent, level), f"{parent.model} on {parent.dataset}, which it builds on,"
        shared = {samples for samples in held if samples & frozenset().union(*theirs)}
        if shared and parent.privacy != level:
            how = "without privacy" if parent.privacy == "off" else f"with {parent.privacy}-level privacy"
            return (), f"{name} saw the same samples {how}"
        if level == "client" and not shared <= set(theirs):
            return (), f"{name} dealt the same samples to other clients"
        for samples, releases in zip(theirs, _releases(parent, parent.rounds), strict=True):
            for sample in samples:
                past[sample] += (releases,)
    return {(own, *past[one]) for samples, own in zip(held, mine, strict=True) for one in samples}, ""


def _ancestors(experiment: Experiment) -> list[Experiment]:
    return [*dict.fromkeys(one for parent in experiment.parents for one in (parent, *_ancestors(parent)))]


def _held(experiment: Experiment, level: str) -> list[frozenset[object]]:
    """Return each client's samples, known by their raw values in any data set; at client level also a site's name."""
    x, names = load(experiment.dataset).train.x, client_names(experiment) if level == "client" else ()
    rows = [(x[shard].flatten(1).float() + 0.0).numpy() for shard in shards_of(experiment)]  # + 0.0: no -0.0
    return [frozenset([*(hash(row.tobytes()) for row in held), *names[c : c + 1]]) for c, held in enumerate(rows)]


def _releases(experiment: Experiment, rounds: int) -> list[Releases]:
    """Return what each client released in so many rounds: whoever does not drop out sends, used or not."""
    e = experiment
    if e.privacy == "client":
        return [(e.noise_multiplier, e.clients_per_round / e.clients, rounds)] * e.clients
    sent = Counter(client for round in range(1, rounds + 1) for client in answering(e, round, select(e, round)))
    sizes = [len(shard) for shard in shards_of(e)]
    steps = [-(-size // e.batch_size) * e.local_epochs * sent[client] for client, size in enumerate(sizes)]
    return [(e.noise_multiplier, min(1.0, e.batch_size / n), many) for n, many in zip(sizes, steps, strict=True)]
