"""What the server does in a round: choose the cohort, broadcast, combine the answers, evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from math import isfinite
from statistics import median

import torch
from torch import Tensor

from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.combine import combine
from fedlab_kit.federation.devices import lateness, width
from fedlab_kit.federation.masking import adjusts, first_mask, next_mask
from fedlab_kit.federation.messages import Answer, Broadcast, ClientState, open_payload, pack_broadcast, seen
from fedlab_kit.federation.record import RoundRecord
from fedlab_kit.federation.strategies import Slots, mean
from fedlab_kit.federation.task import Evaluation, Task, chance, task
from fedlab_kit.wire import PayloadError
from fedlab_kit.wire.privacy import poisson_sample

NOBODY: Mapping[int, str] = {}
CROWD, ABSURD = 3, 100  # answers from which on one may be called absurd, and by how many medians


@dataclass(frozen=True)
class ServerState:
    """All that the server remembers after `round` rounds.

    `weights` [P] is the global model, `slots` what the strategy keeps (momentum, moments, the control variate) and the
    model's state, `sent` the bytes broadcast to each client of the round under way.
    """

    job: Task
    round: int
    weights: Tensor
    slots: Slots = field(default_factory=dict)
    sent: Mapping[int, int] = field(default_factory=dict)

    @property
    def experiment(self) -> Experiment:
        """What is asked for."""
        return self.job.experiment

    @property
    def state(self) -> Tensor:
        """The state [S] of the global model."""
        return self.slots.get("state", self.job.initial_state)


def start(experiment: Experiment | Task) -> ServerState:
    """Return the state before round one: the weights that the seed gives, or those of another run, and the mask.

    An experiment with a `start` or a `teacher` comes as a task, which has their models.
    """
    job = task(experiment)
    experiment, weights, mask, slots = job.experiment, job.initial.clone(), first_mask(job), {}
    if experiment.strategy == "scaffold":
        slots["control"] = torch.zeros_like(weights)
    if experiment.teacher is not None:
        slots["taught"] = torch.zeros(experiment.clients, dtype=torch.bool)
    if mask is not None:
        # A random mask follows from the seed; one that was pruned from another run has to be told.
        slots["mask"], slots["told"] = mask, torch.full((experiment.clients,), experiment.start is None)
        weights = weights * mask
    return ServerState(job, 0, weights, slots)


def select(experiment: Experiment, round: int) -> list[int]:
    """Return the ids of the round's cohort, sorted; a function of (seed, round) alone.

    Client-level privacy needs Poisson sampling: each client comes with the same chance, so the number varies.
    """
    rng = chance(experiment, "select", round)
    if experiment.privacy == "client":
        return poisson_sample(experiment.clients, experiment.clients_per_round / experiment.clients, rng).tolist()
    return sorted(rng.choice(experiment.clients, experiment.clients_per_round, replace=False).tolist())


def answering(experiment: Experiment, round: int, ids: list[int]) -> list[int]:
    """Return those of the cohort that do not drop out in this round."""
    draws = chance(experiment, "dropout", round).random(len(ids))
    return [client for client, draw in zip(ids, draws, strict=True) if draw >= experiment.dropout]


def broadcast(
    state: ServerState, ids: list[int], copies: Mapping[int, Tensor | None]
) -> tuple[dict[int, bytes], ServerState]:
    """Return what each client of the cohort is sent, and the state that has noted the bytes.

    `copies` are the weights [P] that each client holds since it was last sent something (None: never); the server
    keeps them for every downlink codec but fp32.
    """
    experiment, slots, job = state.experiment, state.slots, state.job
    parts = Broadcast(state.weights, state.state, slots.get("control"), slots.get("mask"))
    messages, made = {}, {}
    for client in ids:
        news = tuple(name in slots and not slots[name][client] for name in ("told", "taught"))
        # Clients who hold nothing and need the same news share one message.
        same = (news, width(job, client)) if experiment.downlink == "fp32" else client
        if same not in made:
            made[same] = pack_broadcast(job, state.round + 1, client, parts, copies.get(client), *map(bool, news))
        messages[client] = made[same]
    return messages, replace(state, sent={client: len(message) for client, message in messages.items()})


def without(state: ServerState, unreached: AbstractSet[int]) -> ServerState:
    """Return the state without the bytes of broadcasts that were never handed over."""
    return replace(state, sent={client: 0 if client in unreached else n for client, n in state.sent.items()})


def server_step(
    state: ServerState,
    payloads: Mapping[int, bytes],
    silent: Mapping[int, str] = NOBODY,
    kept: Mapping[int, ClientState] | None = None,
) -> tuple[ServerState, RoundRecord]:
    """Decode the payloads by client id, combine them, take the strategy's step, evaluate.

    The mean is weighted by samples over those who answered (McMahan et al. 2017); if nobody did, the model stays as
    it is. `silent` says why a client sent nothing; the record lists it among the refused. `kept` is what clients keep,
    by id, where their models are their own and are to be evaluated. The record's `seconds` are left 0 for the loop to
    fill in.
    """
    job = state.job
    answers, refused = _receive(job, state, payloads)
    silenced = tuple(sorted((*refused.items(), *silent.items())))
    weights, slots = combine(job, state.round + 1, state.weights, state.slots, answers)
    heard = _heard(slots, list(answers), [client for client, _ in silenced])
    weights, slots = _prune(job, state, answers, weights, heard)
    after = replace(state, round=state.round + 1, weights=weights, slots=slots, sent={})
    result = _evaluate(after, {c: m for c, m in (kept or {}).items() if c not in refused})
    record = _record(state, payloads, tuple(answers), silenced, result, _finite(after))
    return after, record


def _evaluate(state: ServerState, kept: Mapping[int, ClientState]) -> Evaluation:
    job = state.job
    if job.shared is None:
        return job.evaluate(state.weights, job.dataset.validation, state.state)
    return job.evaluate_own(job.own_model(state.weights, kept.get(client, {})) for client in range(len(job.shards)))


def _finite(state: ServerState) -> bool:
    """Whether all that the server remembers is finite: an infinite moment stops every later step without a word."""
    return all(bool(t.isfinite().all()) for t in (state.weights, *state.slots.values()) if t.is_floating_point())


def _record(
    state: ServerState,
    payloads: Mapping[int, bytes],
    answered: tuple[int, ...],
    refused: tuple[tuple[int, str], ...],
    result: Evaluation,
    finite: bool,
) -> RoundRecord:
    """Return the record of the round that follows `state`."""
    accuracy, low, high = result.accuracy()
    finite = finite and isfinite(result.loss) and (bool(answered) or any(payloads.values()) or not payloads)
    return RoundRecord(
        round=state.round + 1,
        accuracy=accuracy,
        low=low,
        high=high,
        loss=result.loss if finite else None,
        uplink_bytes=sum(map(len, payloads.values())),
        downlink_bytes=sum(state.sent.values()),
        seconds=0.0,
        cohort=tuple(state.sent),
        uplinks=tuple(len(payloads.get(client, b"")) for client in state.sent),
        downlinks=tuple(state.sent.values()),
        answered=answered,
        correct=result.correct,
        total=result.total,
        refused=refused,
        note=_note(state.experiment, finite, bool(answered)),
    )


def _note(experiment: Experiment, finite: bool, anybody: bool) -> str:
    if not finite:
        return f"diverged: the numbers are no longer finite; try a learning rate below {experiment.lr:g}"
    left = "the model was given noise alone" if experiment.privacy == "client" else "the model stays as it was"
    return "" if anybody else f"nobody answered: {left}"


def _receive(job: Task, state: ServerState, payloads: Mapping[int, bytes]) -> tuple[dict[int, Answer], dict[int, str]]:
    """Return the answers by client, and for each payload that is refused, by client, the reason."""
    answers, refused, round = {}, {}, state.round + 1
    for client in sorted(payloads):
        try:
            if client not in state.sent:
                raise PayloadError("nobody asked it in this round")
            if late := lateness(job, round, client, state.sent[client], len(payloads[client])):
                raise PayloadError(late)
            mask = seen(job, client, state.slots.get("mask"))
            answer = open_payload(job, round, payloads[client], mask)
            if answer.samples > (held := job.samples(client)):
                raise PayloadError(f"it claims {answer.samples:,} samples and has {held:,}")
            answers[client] = answer
        except PayloadError as error:
            refused[client] = str(error)
    # Client-level privacy clips instead: there no answer may decide whether another's counts.
    for client, why in (absurd(answers) if job.experiment.privacy != "client" else {}).items():
        del answers[client]
        refused[client] = why
    return answers, refused


def absurd(answers: Mapping[int, Answer]) -> dict[int, str]:
    """Return the clients, of three or more, one of whose vectors is above 100 times as long as the cohort's median."""
    found: dict[int, str] = {}
    for part in ("update", "state", "control") if len(answers) >= CROWD else ():
        vectors = {client: getattr(answer, part) for client, answer in answers.items()}
        lengths = {client: float(vector.norm()) for client, vector in vectors.items() if vector is not None}
        usual = median(lengths.values()) if lengths else 0.0
        for client, length in lengths.items():
            if not length <= ABSURD * usual and usual > 0:
                found[client] = f"its {part} is {length / usual:,.0f} times as long as the median of the cohort"
    return found


def _heard(slots: Slots, answered: list[int], refused: list[int]) -> Slots:
    """Note who has the mask and the teacher for certain: those who answered, and no longer those who were refused."""
    noted: Slots = {name: slots[name].clone() for name in ("told", "taught") if name in slots}
    for flags in noted.values():
        flags[answered] = True
        flags[refused] = False
    return {**slots, **noted}


def _prune(
    job: Task, state: ServerState, answers: Mapping[int, Answer], weights: Tensor, slots: Slots
) -> tuple[Tensor, Slots]:
    """Change the mask when it is due, and cut the weights and all that the strategy remembers where it cuts."""
    mask, round = slots.get("mask"), state.round + 1
    if adjusts(state.experiment, round) and (answers or state.experiment.privacy == "client"):  # who came is private
        growths = {client: answer.growth for client, answer in answers.items() if answer.growth is not None}
        gradient = mean(list(growths.values()), [answers[c].samples for c in growths]) if growths else None
        mask = next_mask(job, round, weights, mask, gradient)
        slots = {**slots, "mask": mask, "told": torch.zeros(state.experiment.clients, dtype=torch.bool)}
        slots |= {name: slots[name] * mask for name in ("velocity", "first", "second", "control") if name in slots}
    return (weights if mask is None else weights * mask), slots
