"""Local training: a client's batches, and the three ways in which its weights go down their gradient."""

from __future__ import annotations

from threading import Event

import numpy as np
import torch
from torch import Tensor, nn

from fedlab_kit.federation.layers import room
from fedlab_kit.federation.objective import Objective
from fedlab_kit.federation.task import Task, chance
from fedlab_kit.models import Draws
from fedlab_kit.wire.privacy import poisson_sample, private_gradient


class Stopped(Exception):
    """Raised between two batches when somebody asked to stop; the round leaves no trace."""


def plan(job: Task, round: int, client: int) -> np.ndarray:
    """Return the client's batches as sample indices [steps, batch]; -1 fills the last batch of an epoch."""
    experiment, shard = job.experiment, job.shards[client].numpy()
    rng = chance(experiment, "batches", round, client)
    steps = -(-len(shard) // experiment.batch_size)
    batches = np.full((experiment.local_epochs, steps * experiment.batch_size), -1)
    for epoch in batches:
        epoch[: len(shard)] = rng.permutation(shard)
    return batches.reshape(-1, experiment.batch_size)


def descend(
    job: Task, round: int, ids: list[int], plans: list[np.ndarray], objective: Objective, stop: Event | None
) -> tuple[Tensor, Tensor]:
    """Return the clients' trained weights [C, P] and states [C, S]; `ids` and `plans` come in order of falling size."""
    trained, states = room(objective.start, *objective.start.shape).copy_(objective.start), objective.state.clone()
    private = job.experiment.privacy == "record"
    size = job.model.stack.stack_size if job.model.stack and not private else 1
    for first in range(0, len(ids), size):
        rows, here = slice(first, first + size), (trained[first : first + size], objective, first, stop)
        if private:
            states[first] = _train_private(
                job, ids[first], round, len(plans[first]), trained[rows], objective, first, stop
            )
        elif job.model.stack:
            _train_stacked(job, plans[rows], *here)
        else:
            states[first] = _train_one(job, ids[first], round, plans[first], *here)
    return trained, states


def _train_stacked(
    job: Task, plans: list[np.ndarray], weights: Tensor, objective: Objective, first: int, stop: Event | None
) -> None:
    """Train a few clients at once, in place; a client that has done its batches leaves the stack."""
    assert job.model.stack
    lr, device = job.experiment.lr, job.experiment.device
    for step in range(len(plans[0])):
        _check(stop)
        rows = torch.from_numpy(np.stack([plan[step] for plan in plans if step < len(plan)])).to(device)
        valid, index = rows >= 0, rows.clamp(min=0)
        scale = (valid / valid.sum(1, keepdim=True))[..., None]
        x = job.inputs(index.view(-1)).view(*rows.shape, *job.dataset.shape)
        now = weights[: len(rows)]
        drift = objective.drift(now, slice(first, first + len(rows)))
        job.model.stack.step(
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
    client: int,
    round: int,
    batches: np.ndarray,
    weights: Tensor,
    objective: Objective,
    row: int,
    stop: Event | None,
) -> Tensor:
    """Train one client of any model by autograd: `weights` [1, P], in place; return its state [S] afterwards."""
    lr, model, draws = job.experiment.lr, job.model, _draws(job, round, client)
    norms = [m for m in model.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    model.state = objective.state[row]
    model.module.train()
    for batch in batches:
        _check(stop)
        index = torch.from_numpy(batch[batch >= 0]).to(job.experiment.device)
        for norm in norms:  # a batch of one sample has no statistics of its own: BatchNorm uses the running ones
            norm.train(len(index) > 1)
        drift = objective.drift(weights, slice(row, row + 1))
        model.weights.copy_(job.on_grid(weights[0]))
        model.gradient.zero_()
        with draws.inside():
            logits = model.module(job.inputs(index))
            logits.backward(objective.slope(logits.detach(), index).div_(len(index)))
        if drift is not None:
            model.gradient.add_(drift[0])
        weights[0].sub_(model.gradient, alpha=lr)
        objective.confine(weights, row)
    return model.state


def _train_private(
    job: Task, client: int, round: int, steps: int, weights: Tensor, objective: Objective, row: int, stop: Event | None
) -> Tensor:
    """Do `_train_one` by DP-SGD (Abadi et al. 2016) on Poisson batches of the client's samples."""
    experiment, model, shard, draws = job.experiment, job.model, job.shards[client], _draws(job, round, client)
    rng = chance(experiment, "private", round, client)
    expected = min(experiment.batch_size, len(shard))
    model.state = objective.state[row]
    model.module.train()
    for _ in range(steps):
        _check(stop)
        index = shard[poisson_sample(len(shard), expected / len(shard), rng)].to(experiment.device)
        drift = objective.drift(weights, slice(row, row + 1))
        model.weights.copy_(weights[0])
        x, y = job.inputs(index), job.y[index]
        norm, noise = experiment.clip_norm, experiment.noise_multiplier
        with draws.inside():
            gradient = private_gradient(model.module, x, y, norm, noise, expected, rng).to(weights.device)
        weights[0].sub_(gradient, alpha=experiment.lr)
        if drift is not None:
            weights[0].sub_(drift[0], alpha=experiment.lr)
        objective.confine(weights, row)
    return model.state


def _draws(job: Task, round: int, client: int) -> Draws:
    """Return the stream of the module's own randomness (dropout): it follows from (seed, round, client)."""
    return Draws(int(chance(job.experiment, "module", round, client).integers(2**63)))


def _check(stop: Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Stopped
