"""What came out of one experiment: its records in figures, and its final model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from fedlab_kit.clients import client_accuracy
from fedlab_kit.data import Dataset, load
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.flat import FlatModel
from fedlab_kit.federation.record import RoundRecord
from fedlab_kit.federation.task import Task
from fedlab_kit.partition import partition
from fedlab_kit.store import RunFolder
from fedlab_kit.wire.privacy import epsilon

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
        """The data the run was trained on."""
        return load(self.experiment.dataset)

    @property
    def shards(self) -> list[Tensor]:
        """Each client's indices into `dataset.train`."""
        e = self.experiment
        return partition(self.dataset, e.partition, e.clients, e.alpha, e.seed)

    def client_accuracy(self, record: int = -1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return accuracy, low and high (95 %) per client, each [clients], after one of the rounds."""
        return client_accuracy(self.experiment, self.records[record])

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
