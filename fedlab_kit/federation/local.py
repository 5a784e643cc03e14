"""What a client does in a round: open the broadcast, train on its own samples, pack its update."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Event

import numpy as np
import torch
from torch import Tensor, nn

from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.devices import width
from fedlab_kit.federation.masking import dense_gradient, grows
from fedlab_kit.federation.messages import Answer, Broadcast, ClientState, keep, open_broadcast, pack_payload
from fedlab_kit.federation.objective import Objective
from fedlab_kit.federation.task import Task, chance, task
from fedlab_kit.wire.privacy import clip, poisson_sample, private_gradient


class Stopped(Exception):
    """Raised between two batches when somebody asked to stop; the round leaves no trace."""


def client_step(
    experiment: Experiment, round: int, client_id: int, broadcast: bytes, client_state: ClientState
) -> tuple[bytes, ClientState]:
    """Train one client and return its payload and its new state.

    `broadcast` is what the server sent it, `client_state` what it kept from earlier rounds ({} at first). Raises
    `PayloadError` when the broadcast is damaged.
    """
    payloads, states = cohort_step(experiment, round, {client_id: broadcast}, {client_id: client_state})
    return payloads[client_id], states[client_id]


def cohort_step(
    experiment: Experiment,
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
    plans = [_plan(job, round, client) for client in ids]
    trained = _train(job, round, ids, plans, objective, stop)
    growths = [_growth(job, round, *client) for client in zip(ids, trained, received, strict=True)]
    updates = trained.sub_(objective.start)  # in place: these are the largest tensors of a round
    payloads, after = {}, {}
    for k, client in enumerate(ids):
        answer, memory = _answer(job, client, updates[k], growths[k], received[k], len(plans[k]), states[client])
        payloads[client], after[client] = pack_payload(job, round, client, answer, received[k].mask, memory)
    return payloads, after


def _open(
    job: Task, ids: list[int], broadcasts: Mapping[int, bytes], states: Mapping[int, ClientState]
) -> list[Broadcast]:
    """Open the broadcasts; one that goes to several clients who hold no weights or mask is opened once."""
    opened: dict[tuple[bytes, float], Broadcast] = {}
    received = []
    for client in ids:
        message, memory = broadcasts[client], states[client]
        if memory.keys() & {"copy", "mask"}:
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
    return Objective(job, start, pull, shift, mask)


def _growth(job: Task, round: int, client: int, trained: Tensor, got: Broadcast) -> Tensor | None:
    """Return the gradient by which pruned weights grow back, in a round where they do."""
    if got.mask is None or not grows(job.experiment, round):
        return None
    return dense_gradient(job, trained, client, got.mask)


def _answer(
    job: Task, client: int, update: Tensor, growth: Tensor | None, got: Broadcast, steps: int, state: ClientState
) -> tuple[Answer, ClientState]:
    """Return what the client has to say and what it keeps until it is next asked."""
    experiment, memory, control = job.experiment, keep(job.experiment, got, state), None
    if experiment.privacy == "client":
        update = clip(update, experiment.clip_norm)
    if got.control is not None:
        # Option II of Karimireddy et al. 2020: the mean gradient that was really used becomes the control.
        own = state.get("control", torch.zeros_like(update)).to(update.device)
        new = own - got.control - update / (steps * experiment.lr)
        control, memory["control"] = new - own, new.cpu()
    return Answer(job.samples(client), update, control, growth), memory


def _plan(job: Task, round: int, client: int) -> np.ndarray:
    """Return the client's batches as sample indices [steps, batch]; -1 fills the last batch of an epoch."""
    experiment, shard = job.experiment, job.shards[client].numpy()
    rng = chance(experiment, "batches", round, client)
    steps = -(-len(shard) // experiment.batch_size)
    plan = np.full((experiment.local_epochs, steps * experiment.batch_size), -1)
    for epoch in plan:
        epoch[: len(shard)] = rng.permutation(shard)
    return plan.reshape(-1, experiment.batch_size)


def _train(
    job: Task, round: int, ids: list[int], plans: list[np.ndarray], objective: Objective, stop: Event | None
) -> Tensor:
    """Return the clients' trained weights [C, P]; `ids` and `plans` come in order of falling size."""
    trained = objective.start.clone()
    private = job.experiment.privacy == "record"
    size = job.stack.stack_size if job.stack and not private else 1
    for first in range(0, len(ids), size):
        rows = slice(first, first + size)
        if private:
            _train_private(job, ids[first], round, len(plans[first]), trained[rows], objective, first, stop)
        elif job.stack:
            _train_stacked(job, plans[rows], trained[rows], objective, first, stop)
        else:
            _train_one(job, plans[first], trained[rows], objective, first, stop, seed=(round, ids[first]))
    return trained


def _train_stacked(
    job: Task, plans: list[np.ndarray], weights: Tensor, objective: Objective, first: int, stop: Event | None
) -> None:
    """Train a few clients at once, in place; a client that has done its batches leaves the stack."""
    assert job.stack
    lr, device = job.experiment.lr, job.experiment.device
    for step in range(len(plans[0])):
        _check(stop)
        rows = torch.from_numpy(np.stack([plan[step] for plan in plans if step < len(plan)])).to(device)
        valid, index = rows >= 0, rows.clamp(min=0)
        scale = (valid / valid.sum(1, keepdim=True))[..., None]
        x = job.inputs(index.view(-1)).view(*rows.shape, *job.dataset.shape)
        now = weights[: len(rows)]
        drift = objective.drift(now, slice(first, first + len(rows)))
        job.stack.step(
            now,
            x,
            lambda logits, index=index, scale=scale: objective.slope(logits, index).mul_(scale),  # type: ignore[misc]
            lr,
            forward=None if job.experiment.qat == "off" else job.on_grid(now),
        )
        if drift is not None:
            now.sub_(drift, alpha=lr)
        objective.confine(now, first)


def _train_one(
    job: Task,
    plan: np.ndarray,
    weights: Tensor,
    objective: Objective,
    row: int,
    stop: Event | None,
    seed: tuple[int, int],
) -> None:
    """Train one client of any model by autograd: `weights` [1, P], in place.

    The module's own randomness (dropout) follows from (seed, round, client).
    """
    lr, model = job.experiment.lr, job.model
    parameters, statistics = slice(0, model.layout.trainable), slice(model.layout.trainable, None)
    averages = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.module.modules())
    with torch.random.fork_rng():
        torch.manual_seed(int(chance(job.experiment, "module", *seed).integers(2**63)))
        for batch in plan:
            _check(stop)
            index = torch.from_numpy(batch[batch >= 0]).to(job.experiment.device)
            # A batch of one sample has no statistics of its own: BatchNorm uses the running ones.
            model.module.train(len(index) > 1 or not averages)
            drift = objective.drift(weights, slice(row, row + 1))
            model.weights.copy_(job.on_grid(weights[0]))
            model.gradient.zero_()
            logits = model.module(job.inputs(index))
            logits.backward(objective.slope(logits.detach(), index).div_(len(index)))
            if drift is not None:
                model.gradient.add_(drift[0])
            weights[0, parameters].sub_(model.gradient[parameters], alpha=lr)
            weights[0, statistics] = model.weights[statistics]
            objective.confine(weights, row)


def _train_private(
    job: Task, client: int, round: int, steps: int, weights: Tensor, objective: Objective, row: int, stop: Event | None
) -> None:
    """Train one client by DP-SGD (Abadi et al. 2016) on Poisson batches of its samples: `weights` [1, P], in place."""
    experiment, model, shard = job.experiment, job.model, job.shards[client]
    rng = chance(experiment, "private", round, client)
    expected, parameters = min(experiment.batch_size, len(shard)), slice(0, model.layout.trainable)
    model.module.train()
    for _ in range(steps):
        _check(stop)
        index = shard[poisson_sample(len(shard), expected / len(shard), rng)].to(experiment.device)
        drift = objective.drift(weights, slice(row, row + 1))
        model.weights.copy_(weights[0])
        x, y = job.inputs(index), job.y[index]
        norm, noise = experiment.clip_norm, experiment.noise_multiplier
        gradient = private_gradient(model.module, x, y, norm, noise, expected, rng).to(weights.device)
        weights[0, parameters].sub_(gradient, alpha=experiment.lr)
        if drift is not None:
            weights[0, parameters].sub_(drift[0, parameters], alpha=experiment.lr)
        objective.confine(weights, row)


def _check(stop: Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Stopped
