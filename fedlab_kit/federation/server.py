"""What the server does in a round: choose the cohort, broadcast, combine the updates, evaluate, keep the record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from math import isfinite
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from fedlab_kit.experiment import Experiment
from fedlab_kit.federation import setup
from fedlab_kit.federation.aggregate import OptimizerState, absurd, aggregate, mean
from fedlab_kit.federation.devices import client_mask, lateness, width
from fedlab_kit.federation.masking import adjusts, first_mask, next_mask
from fedlab_kit.federation.messages import (
    Broadcast,
    ClientState,
    ClientUpdate,
    open_broadcast,
    open_payload,
    pack_broadcast,
)
from fedlab_kit.federation.setup import Evaluation, Task, rng_for
from fedlab_kit.wire import PayloadError
from fedlab_kit.wire.privacy import poisson_sample

FLAGS = ("has_mask", "has_teacher")  # optimizer state: which clients are known to have them, bool [clients]


@dataclass(frozen=True)
class RoundRecord:
    """One round in plain numbers.

    `accuracy` in 0..1 on the validation split with its 95 % interval `low`..`high`; `loss` in nats (None when it is
    not finite); `uplink_bytes` and `downlink_bytes` are the lengths of all payloads of this round; `seconds` is wall
    time; `cohort` the clients sampled, `uplinks` and `downlinks` the bytes of each of them, `answered` those whose
    update was used; `correct` and `total` count the validation samples per class (or per site); `refused` names the
    clients whose payload could not be used or came late, with the reason; `note` says what else went wrong; `recall` is
    the share of each class that is answered right, None for a class of which nobody was held out.
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
    uplinks: tuple[int, ...] = ()
    downlinks: tuple[int, ...] = ()
    refused: tuple[tuple[int, str], ...] = ()
    note: str = ""
    recall: tuple[float | None, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the record as a dictionary that JSON can hold."""
        return asdict(self)

    @staticmethod
    def from_json(text: bytes) -> list[RoundRecord]:
        """Rebuild records from a JSON list of what `to_dict` gave. ValueError when a type is another one."""
        return _reader().validate_json(text, strict=True)

    @property
    def diverged(self) -> bool:
        """Whether training ended here because a number was no longer finite."""
        return self.loss is None


@cache
def _reader() -> TypeAdapter[list[RoundRecord]]:
    return TypeAdapter(list[RoundRecord])


@dataclass(frozen=True)
class ServerState:
    """All that the server remembers after `round` rounds.

    `weights` [P] is the global model; `optimizer` has, by name, what the strategy keeps (velocity; first and second
    moment; control), the model's `state`, the `mask`, and which clients have that and the teacher for certain.
    `copies` is what each client holds of the model since its last answer counted, by id, where the downlink sends
    differences: updated in place, for it may lie on a disk.
    """

    task: Task
    round: int
    weights: Tensor
    optimizer: OptimizerState = field(default_factory=dict)
    copies: MutableMapping[int, ClientState] = field(default_factory=dict)

    @property
    def experiment(self) -> Experiment:
        """What is asked for."""
        return self.task.experiment

    @property
    def state(self) -> Tensor:
        """The state [S] of the global model."""
        return self.optimizer.get("state", self.task.initial_state)


def start(experiment: Experiment | Task) -> ServerState:
    """Return the state before round one: the weights that the seed gives, or those of another run, and the mask.

    An experiment with a `start` or a `teacher` comes as a task, which has their models.
    """
    task = setup.task(experiment)
    experiment, weights, mask, optimizer = task.experiment, task.initial.clone(), first_mask(task), {}
    if experiment.strategy == "scaffold":
        optimizer["control"] = torch.zeros_like(weights)
    if experiment.teacher is not None:
        optimizer["has_teacher"] = torch.zeros(experiment.clients, dtype=torch.bool)
    if mask is not None:
        # A random mask follows from the seed; one that was pruned from another run has to be sent.
        optimizer |= {"mask": mask, "has_mask": torch.full((experiment.clients,), experiment.start is None)}
        weights = weights * mask
    return ServerState(task, 0, weights, optimizer)


def select(experiment: Experiment, round: int) -> list[int]:
    """Return the ids of the round's cohort, sorted; a function of (seed, round) alone.

    Client-level privacy needs Poisson sampling: each client comes with the same chance, so the number varies.
    """
    rng = rng_for(experiment, "select", round)
    if experiment.privacy == "client":
        return poisson_sample(experiment.clients, experiment.clients_per_round / experiment.clients, rng).tolist()
    return sorted(rng.choice(experiment.clients, experiment.clients_per_round, replace=False).tolist())


def answering(experiment: Experiment, round: int, ids: list[int]) -> list[int]:
    """Return those of the cohort that do not drop out in this round."""
    draws = rng_for(experiment, "dropout", round).random(len(ids))
    return [client for client, draw in zip(ids, draws, strict=True) if draw >= experiment.dropout]


def broadcast(state: ServerState, ids: list[int]) -> dict[int, bytes]:
    """Return what each client of the cohort is sent: the model, or how it differs from the client's copy."""
    task, optimizer, messages = state.task, state.optimizer, {}
    news = Broadcast(state.weights, state.state, optimizer.get("control"), optimizer.get("mask"))
    made: dict[object, bytes] = {}
    for client in ids:
        lacks = [name in optimizer and not bool(optimizer[name][client]) for name in FLAGS]
        # Clients who hold nothing and lack the same share one message.
        alike = (*lacks, width(task, client)) if state.experiment.downlink == "fp32" else client
        if alike not in made:
            copy = state.copies.get(client, {}).get("copy")
            made[alike] = pack_broadcast(task, state.round + 1, client, news, copy, *lacks)
        messages[client] = made[alike]
    return messages


def note_copies(state: ServerState, sent: Mapping[int, bytes], answered: Iterable[int], lost: Iterable[int]) -> None:
    """Note what clients hold after the round: those who `answered` open what was `sent`, and so does the server."""
    if state.experiment.downlink == "fp32":
        return
    masked = {"mask": state.optimizer["mask"]} if "mask" in state.optimizer else {}
    for client in answered:
        got = open_broadcast(state.task, client, sent[client], {**state.copies.get(client, {}), **masked})
        state.copies[client] = {"copy": got.weights.cpu()}
    state.copies.update({client: {} for client in lost})


def server_step(
    state: ServerState,
    sent: Mapping[int, bytes],
    payloads: Mapping[int, bytes],
    silent: Mapping[int, str] | None = None,
    kept: Mapping[int, ClientState] | None = None,
) -> tuple[ServerState, RoundRecord]:
    """Decode the payloads by client id, combine them, take the strategy's step, evaluate.

    The mean is weighted by samples over those who answered (McMahan et al. 2017); if nobody did, the model stays as
    it is. `sent` are the broadcasts to the cohort. `silent` says why a client sent nothing; the record lists it among
    the refused. `kept` is what clients keep, by id, where their models are their own and are to be evaluated. The
    record's `seconds` are left 0 for the loop to fill in.
    """
    task, (updates, refused) = state.task, _receive(state, sent, payloads)
    refusals = tuple(sorted((*refused.items(), *(silent or {}).items())))
    weights, optimizer = aggregate(task, state.round + 1, state.weights, state.optimizer, updates)
    for name in filter(optimizer.__contains__, FLAGS):  # who answered has it for certain, who was refused no longer
        optimizer = {**optimizer, name: optimizer[name].clone()}
        optimizer[name][list(updates)] = True
        optimizer[name][[client for client, _ in refusals]] = False
    weights, optimizer = _prune(state, updates, weights, optimizer)
    after = replace(state, round=state.round + 1, weights=weights, optimizer=optimizer)
    if task.shared is None:
        result = task.evaluate(weights, task.dataset.validation, after.state)
    else:
        result = task.evaluate_own(weights, {c: memory for c, memory in (kept or {}).items() if c not in refused})
    return after, _record(after, sent, payloads, tuple(updates), refusals, result)


def _record(
    after: ServerState,
    sent: Mapping[int, bytes],
    payloads: Mapping[int, bytes],
    answered: tuple[int, ...],
    refused: tuple[tuple[int, str], ...],
    result: Evaluation,
) -> RoundRecord:
    """Return the record of the round that led to `after`."""
    # All that the server remembers must be finite: an infinite moment stops every later step without a word.
    finite = all(bool(t.isfinite().all()) for t in (after.weights, *after.optimizer.values()) if t.is_floating_point())
    finite = finite and isfinite(result.loss) and (bool(answered) or any(payloads.values()) or not payloads)
    left = "was given noise alone" if after.experiment.privacy == "client" else "stays as it was"
    note = "" if answered else f"nobody answered: the model {left}"
    if not finite:
        note = f"diverged: the numbers are no longer finite; try a learning rate below {after.experiment.lr:g}"
    accuracy, low, high = result.accuracy()
    return RoundRecord(
        round=after.round,
        accuracy=accuracy,
        low=low,
        high=high,
        loss=result.loss if finite else None,
        uplink_bytes=sum(map(len, payloads.values())),
        downlink_bytes=sum(map(len, sent.values())),
        seconds=0.0,
        cohort=tuple(sent),
        uplinks=tuple(len(payloads.get(client, b"")) for client in sent),
        downlinks=tuple(map(len, sent.values())),
        answered=answered,
        correct=result.correct,
        total=result.total,
        refused=refused,
        note=note,
        recall=result.recall,
    )


def _receive(
    state: ServerState, sent: Mapping[int, bytes], payloads: Mapping[int, bytes]
) -> tuple[dict[int, ClientUpdate], dict[int, str]]:
    """Return the updates by client, and for each payload that is refused, by client, the reason."""
    task, round = state.task, state.round + 1
    updates, refused = {}, {}
    for client in sorted(payloads):
        try:
            if client not in sent:
                raise PayloadError("nobody asked it in this round")
            if late := lateness(task, round, client, len(sent[client]), len(payloads[client])):
                raise PayloadError(late)
            mask = client_mask(task, client, state.optimizer.get("mask"))
            update = open_payload(task, round, payloads[client], mask)
            if update.samples > (held := task.samples(client)):
                raise PayloadError(f"it claims {update.samples:,} samples and has {held:,}")
            updates[client] = update
        except PayloadError as error:
            refused[client] = str(error)
    # Client-level privacy clips instead: there no update may decide whether another's counts.
    for client, why in (absurd(updates) if state.experiment.privacy != "client" else {}).items():
        del updates[client]
        refused[client] = why
    return updates, refused


def _prune(
    state: ServerState, updates: Mapping[int, ClientUpdate], weights: Tensor, optimizer: OptimizerState
) -> tuple[Tensor, OptimizerState]:
    """Change the mask when it is due, and cut the weights and all that the strategy remembers where it cuts."""
    e, mask, round = state.experiment, optimizer.get("mask"), state.round + 1
    if adjusts(e, round) and (updates or e.privacy == "client"):  # who came is private
        grown = [update for update in updates.values() if update.growth is not None]
        gradients = [update.growth for update in grown if update.growth is not None]
        gradient = mean(gradients, [update.samples for update in grown]) if grown else None
        mask = next_mask(state.task, round, weights, mask, gradient)
        optimizer = {**optimizer, "mask": mask, "has_mask": torch.zeros(e.clients, dtype=torch.bool)}
        cut = ("velocity", "first", "second", "control")
        optimizer |= {name: optimizer[name] * mask for name in cut if name in optimizer}
    return (weights if mask is None else weights * mask), optimizer
