"""What a client does in a round: open the broadcast, train on its own samples, pack its update."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Event

import torch
from torch import Tensor

from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.descent import descend, plan
from fedlab_kit.federation.devices import width
from fedlab_kit.federation.masking import dense_gradient, grows
from fedlab_kit.federation.messages import Answer, Broadcast, ClientState, keep, open_broadcast, pack_payload
from fedlab_kit.federation.objective import Objective
from fedlab_kit.federation.task import Task, task
from fedlab_kit.wire.privacy import clip


def client_step(
    experiment: Experiment | Task, round: int, client_id: int, broadcast: bytes, client_state: ClientState
) -> tuple[bytes, ClientState]:
    """Train one client and return its payload and its new state.

    `broadcast` is what the server sent it, `client_state` what it kept from earlier rounds ({} at first). An experiment
    with a `start` or a `teacher` comes as a task, which has their models. Raises
    `PayloadError` when the broadcast is damaged.
    """
    payloads, states = cohort_step(experiment, round, {client_id: broadcast}, {client_id: client_state})
    return payloads[client_id], states[client_id]


def cohort_step(
    experiment: Experiment | Task,
    round: int,
    broadcasts: Mapping[int, bytes],
    states: Mapping[int, ClientState],
    stop: Event | None = None,
) -> tuple[dict[int, bytes], dict[int, ClientState]]:
    """Do `client_step` for several clients at once; `stop` is looked at before every batch (raises `Stopped`)."""
    if not broadcasts:
        return {}, {}
    job = task(experiment)
    ids = sorted(broadcasts, key=lambda client: (-job.samples(client), client))
    received = _open(job, ids, broadcasts, states)
    job.teach(ids)
    objective = _objective(job, received, [states[client] for client in ids])
    plans = [plan(job, round, client) for client in ids]
    trained, inner = descend(job, round, ids, plans, objective, stop)
    growths = [_growth(job, round, *client) for client in zip(ids, trained, inner, received, strict=True)]
    updates = trained.sub_(objective.start)  # in place: these are the largest tensors of a round
    payloads, after = {}, {}
    for k, client in enumerate(ids):
        answer = Answer(job.samples(client), updates[k], inner[k], growth=growths[k])
        answer, memory = _answer(job, answer, received[k], len(plans[k]), states[client])
        payloads[client], after[client] = pack_payload(job, round, client, answer, received[k].mask, memory)
    job.model.check_constants()
    return payloads, after


def _open(
    job: Task, ids: list[int], broadcasts: Mapping[int, bytes], states: Mapping[int, ClientState]
) -> list[Broadcast]:
    """Open the broadcasts; one that goes to several clients who hold no weights or mask is opened once."""
    opened: dict[tuple[bytes, float], Broadcast] = {}
    received = []
    for client in ids:
        message, memory = broadcasts[client], states[client]
        if memory.keys() & {"copy", "mask", "own", "state"}:
            received.append(open_broadcast(job, client, message, memory))
        else:
            key = message, width(job, client)
            opened[key] = opened.get(key) or open_broadcast(job, client, message, {})
            received.append(opened[key])
    return received


def _objective(job: Task, received: list[Broadcast], states: list[ClientState]) -> Objective:
    first = received[0].weights
    if all(broadcast.weights is first for broadcast in received):
        start = first.expand(len(received), -1)  # everybody was sent the same: one copy in memory will do
    else:
        start = torch.stack([broadcast.weights for broadcast in received])
    shift = None
    if job.experiment.strategy == "scaffold":
        own = [state.get("control", torch.zeros(start.shape[1])).to(start.device) for state in states]
        shift = torch.stack([b.control - c for b, c in zip(received, own, strict=True) if b.control is not None])
    pull = job.experiment.proximal_mu if job.experiment.strategy == "fedprox" else 0.0
    mask = received[0].mask
    if job.experiment.devices == "sliced":
        views = [b.weights.new_ones(b.weights.shape) if b.mask is None else b.mask.float() for b in received]
        mask = torch.stack(views)
    return Objective(job, start, torch.stack([b.state for b in received]), pull, shift, mask)


def _growth(job: Task, round: int, client: int, trained: Tensor, state: Tensor, got: Broadcast) -> Tensor | None:
    """Return the gradient by which pruned weights grow back, in a round where they do."""
    if got.mask is None or not grows(job.experiment, round):
        return None
    return dense_gradient(job, trained, state, client, got.mask)


def _answer(job: Task, answer: Answer, got: Broadcast, steps: int, state: ClientState) -> tuple[Answer, ClientState]:
    """Return what the client has to say of what it learned, and what it keeps until it is next asked."""
    experiment, memory, update = job.experiment, keep(job, got, state), answer.update
    if job.shared is not None and answer.state is not None:
        memory["own"], memory["state"] = (got.weights + update).cpu()[~job.shared], answer.state
        update = update * job.shared.to(update.device)
    if experiment.privacy == "client":
        update = clip(update, experiment.clip_norm)
    control = None
    if got.control is not None:
        # Option II of Karimireddy et al. 2020: the mean gradient that was really used becomes the control.
        own = state.get("control", torch.zeros_like(update)).to(update.device)
        new = own - got.control - update / (steps * experiment.lr)
        if got.mask is not None:
            own, new = own * got.mask, new * got.mask
        control, memory["control"] = new - own, new.cpu()
    return answer._replace(update=update, control=control), memory
