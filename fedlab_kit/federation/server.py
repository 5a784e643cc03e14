"""What the server does in a round: choose the cohort, broadcast, combine the answers, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.task import Task, chance, task
from fedlab_kit.statistics import wilson
from fedlab_kit.wire import PayloadError, make, pack, unpack

Slots = dict[str, Tensor]


@dataclass(frozen=True)
class ServerState:
    """All that the server remembers after `round` rounds.

    `weights` [P] is the global model, `slots` what the strategy keeps (momentum, moments, the control variate),
    `sent` the bytes broadcast to each client of the round under way.
    """

    experiment: Experiment
    round: int
    weights: Tensor
    slots: Slots = field(default_factory=dict)
    sent: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundRecord:
    """One round in plain numbers.

    `accuracy` in 0..1 on the validation split with its 95 % interval `low`..`high`; `loss` in nats (None when it is
    not finite); `uplink_bytes` and `downlink_bytes` are the lengths of all payloads of this round; `seconds` is wall
    time; `cohort` the clients sampled, `answered` those whose update was used; `correct` and `total` count the
    validation samples per class (or per site); `refused` names the clients whose payload could not be used, with the
    reason; `note` says what else went wrong.
    """

    round: int
    accuracy: float
    low: float
    high: float
    loss: float | None
    uplink_bytes: int
    downlink_bytes: int
    seconds: float
    cohort: tuple[int, ...]
    answered: tuple[int, ...]
    correct: tuple[int, ...]
    total: tuple[int, ...]
    refused: tuple[tuple[int, str], ...] = ()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as a dictionary that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RoundRecord:
        """Rebuild a record from `to_dict` after a trip through JSON."""
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**{**values, "refused": tuple((client, why) for client, why in values["refused"])})

    @property
    def diverged(self) -> bool:
        """Whether training ended here because a number was no longer finite."""
        return self.loss is None


def start(experiment: Experiment) -> ServerState:
    """Return the state before round one: the weights that the seed gives."""
    weights = task(experiment).initial.clone()
    slots = {"control": torch.zeros_like(weights)} if experiment.strategy == "scaffold" else {}
    return ServerState(experiment, 0, weights, slots)


def select(experiment: Experiment, round: int) -> list[int]:
    """Return the ids of the round's cohort, sorted; a function of (seed, round) alone."""
    rng = chance(experiment, "select", round)
    return sorted(rng.choice(experiment.clients, experiment.clients_per_round, replace=False).tolist())


def answering(experiment: Experiment, round: int, ids: list[int]) -> list[int]:
    """Return those of the cohort that do not drop out in this round."""
    draws = chance(experiment, "dropout", round).random(len(ids))
    return [client for client, draw in zip(ids, draws, strict=True) if draw >= experiment.dropout]


def broadcast(state: ServerState, ids: list[int]) -> tuple[dict[int, bytes], ServerState]:
    """Return what each client of the cohort is sent, and the state that has noted the bytes."""
    vectors = [state.weights, *([state.slots["control"]] if state.experiment.strategy == "scaffold" else [])]
    rng = chance(state.experiment, "broadcast", state.round + 1)
    message = b"".join(pack(make("fp32"), v.cpu(), samples=0, rng=rng) for v in vectors)
    return dict.fromkeys(ids, message), replace(state, sent=dict.fromkeys(ids, len(message)))


def server_step(state: ServerState, payloads: Mapping[int, bytes]) -> tuple[ServerState, RoundRecord]:
    """Decode the payloads by client id, combine them, take the strategy's step, evaluate.

    The mean is weighted by samples over those who answered (McMahan et al. 2017); if nobody did, the model stays as
    it is. The record's `seconds` are left 0 for the loop to fill in.
    """
    experiment, job = state.experiment, task(state.experiment)
    updates, refused = _receive(job, payloads)
    weights, slots = _combine(job, state, updates)
    result = job.evaluate(weights, job.dataset.validation)
    finite = isfinite(result.loss) and (bool(updates) or any(payloads.values()) or not payloads)
    hits, total = sum(result.correct), sum(result.total)
    low, high = wilson(hits, total)
    record = RoundRecord(
        round=state.round + 1,
        accuracy=hits / total,
        low=low,
        high=high,
        loss=result.loss if finite else None,
        uplink_bytes=sum(map(len, payloads.values())),
        downlink_bytes=sum(state.sent.values()),
        seconds=0.0,
        cohort=tuple(state.sent),
        answered=tuple(updates),
        correct=result.correct,
        total=result.total,
        refused=refused,
        note=_note(experiment, finite, bool(updates)),
    )
    return replace(state, round=record.round, weights=weights, slots=slots, sent={}), record


def _note(experiment: Experiment, finite: bool, anybody: bool) -> str:
    if not finite:
        return f"diverged: the numbers are no longer finite; try a learning rate below {experiment.lr:g}"
    return "" if anybody else "nobody answered: the model stays as it was"


def _receive(
    job: Task, payloads: Mapping[int, bytes]
) -> tuple[dict[int, tuple[int, list[Tensor]]], tuple[tuple[int, str], ...]]:
    """Return samples and vectors by client, and for each payload that is refused the client and the reason."""
    updates, refused = {}, []
    for client in sorted(payloads):
        try:
            updates[client] = _decode(job, payloads[client])
        except PayloadError as error:
            refused.append((client, str(error)))
    return updates, tuple(refused)


def _combine(job: Task, state: ServerState, updates: Mapping[int, tuple[int, list[Tensor]]]) -> tuple[Tensor, Slots]:
    """Return the new weights [P] and slots: the strategy's step along the weighted mean update."""
    if not updates:
        return state.weights, state.slots
    experiment, slots, trainable = state.experiment, state.slots, job.model.layout.trainable
    mean, samples = torch.zeros_like(state.weights), sum(count for count, _ in updates.values())
    for count, vectors in updates.values():
        mean.add_(vectors[0], alpha=count / samples)
    step, slots = STRATEGIES[experiment.strategy](experiment, slots, mean)
    step[trainable:] = mean[trainable:]  # running statistics are averaged; a server optimizer has no business there
    if "control" in slots:
        shift = torch.stack([vectors[1] for _, vectors in updates.values()]).sum(0)
        slots = {**slots, "control": slots["control"] + shift / experiment.clients}
    return state.weights + step, slots


def _decode(job: Task, payload: bytes) -> tuple[int, list[Tensor]]:
    count = 2 if job.experiment.strategy == "scaffold" else 1
    if not payload:
        raise PayloadError("an empty payload: its training diverged")
    samples, vectors = unpack(payload, make("fp32"), size=job.model.layout.size, count=count)
    if not samples:
        raise PayloadError("an update made of no samples")
    return samples, [vector.to(job.experiment.device) for vector in vectors]


Strategy = Callable[[Experiment, Slots, Tensor], tuple[Tensor, Slots]]


def average(experiment: Experiment, slots: Slots, mean: Tensor) -> tuple[Tensor, Slots]:
    """Step along the mean update [P] (FedAvg, McMahan et al. 2017)."""
    return experiment.server_lr * mean, slots


def momentum(experiment: Experiment, slots: Slots, mean: Tensor) -> tuple[Tensor, Slots]:
    """Step along the decaying sum of mean updates (FedAvgM, Hsu et al. 2019)."""
    velocity = experiment.server_momentum * slots.get("velocity", torch.zeros_like(mean)) + mean
    return experiment.server_lr * velocity, {**slots, "velocity": velocity}


def adam(experiment: Experiment, slots: Slots, mean: Tensor) -> tuple[Tensor, Slots]:
    """Step by first over root of second moment, beta 0.9 and 0.99, tau 0.001 (FedAdam, Reddi et al. 2021)."""
    first = 0.9 * slots.get("first", torch.zeros_like(mean)) + 0.1 * mean
    second = 0.99 * slots.get("second", torch.zeros_like(mean)) + 0.01 * mean**2
    return experiment.adam_lr * first / (second.sqrt() + 1e-3), {**slots, "first": first, "second": second}


STRATEGIES: dict[str, Strategy] = {
    "fedavg": average,
    "fedprox": average,
    "fedavgm": momentum,
    "fedadam": adam,
    "scaffold": average,
}
