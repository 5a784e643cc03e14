"""What a client does in a round: unpack the broadcast, train on its own samples, pack its update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Event

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.task import Task, chance, task
from fedlab_kit.wire import finite, make, pack, unpack

ClientState = dict[str, Tensor]


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
    opened = {message: _unpack(job, message) for message in set(broadcasts.values())}  # mostly one and the same
    received = [opened[broadcasts[client]] for client in ids]
    start = torch.stack([vectors[0] for vectors in received])
    if experiment.strategy == "scaffold":
        control = torch.stack([vectors[1] for vectors in received])
        own = torch.stack([states[c].get("control", torch.zeros(start.shape[1])) for c in ids]).to(start.device)
        rule = Rule(start, shift=control - own)
    else:
        rule = Rule(start, pull=experiment.proximal_mu if experiment.strategy == "fedprox" else 0.0)
    plans = [_plan(job, round, client) for client in ids]
    trained = _train(job, round, ids, plans, rule, stop)
    payloads, after = {}, {}
    for k, client in enumerate(ids):
        vectors = [trained[k] - start[k]]
        after[client] = dict(states[client])
        if experiment.strategy == "scaffold":
            # Option II of Karimireddy et al. 2020: the mean gradient that was really used becomes the control.
            new = own[k] - control[k] - vectors[0] / (len(plans[k]) * experiment.lr)
            vectors.append(new - own[k])
            after[client]["control"] = new.cpu()
        payloads[client] = _pack(job, round, client, vectors)
    return payloads, after


@dataclass(frozen=True)
class Rule:
    """What a strategy adds to the clients' gradients: `shift` [C, P], and a `pull` back towards `start` [C, P].

    FedProx (Li et al. 2020) pulls with mu; SCAFFOLD (Karimireddy et al. 2020) shifts by the control variates.
    """

    start: Tensor
    pull: float = 0.0
    shift: Tensor | None = None

    def gradient(self, weights: Tensor, rows: slice) -> Tensor | None:
        """Return what to add for the clients in `rows`, whose weights now are `weights` [rows, P]."""
        if self.shift is not None:
            return self.shift[rows]
        return self.pull * (weights - self.start[rows]) if self.pull else None


def _pack(job: Task, round: int, client: int, vectors: list[Tensor]) -> bytes:
    """Return the client's payload; an empty one says that its training diverged and there is nothing to send."""
    vectors = [vector.cpu() for vector in vectors]
    if not all(map(finite, vectors)):
        return b""
    rng = chance(job.experiment, "encode", round, client)
    frames = [pack(make("fp32"), v, samples=job.samples(client), rng=rng) for v in vectors]
    return b"".join(frames)


def _unpack(job: Task, broadcast: bytes) -> list[Tensor]:
    count = 2 if job.experiment.strategy == "scaffold" else 1
    _, vectors = unpack(broadcast, make("fp32"), size=job.model.layout.size, count=count)
    return [vector.to(job.experiment.device) for vector in vectors]


def _plan(job: Task, round: int, client: int) -> np.ndarray:
    """Return the client's batches as sample indices [steps, batch]; -1 fills the last batch of an epoch."""
    experiment, shard = job.experiment, job.shards[client].numpy()
    rng = chance(experiment, "batches", round, client)
    steps = -(-len(shard) // experiment.batch_size)
    plan = np.full((experiment.local_epochs, steps * experiment.batch_size), -1)
    for epoch in plan:
        epoch[: len(shard)] = rng.permutation(shard)
    return plan.reshape(-1, experiment.batch_size)


def _train(job: Task, round: int, ids: list[int], plans: list[np.ndarray], rule: Rule, stop: Event | None) -> Tensor:
    """Return the clients' trained weights [C, P]; `ids` and `plans` come in order of falling size."""
    trained = rule.start.clone()
    size = job.stack.stack_size if job.stack else 1
    for first in range(0, len(ids), size):
        rows = slice(first, first + size)
        if job.stack:
            _train_stacked(job, plans[rows], trained[rows], rule, first, stop)
        else:
            _train_one(job, plans[first], trained[first], rule, first, stop, seed=(round, ids[first]))
    return trained


def _train_stacked(
    job: Task, plans: list[np.ndarray], weights: Tensor, rule: Rule, first: int, stop: Event | None
) -> None:
    """Train a few clients at once, in place; a client that has done its batches leaves the stack."""
    assert job.stack
    experiment = job.experiment
    for step in range(len(plans[0])):
        _check(stop)
        rows = torch.from_numpy(np.stack([plan[step] for plan in plans if step < len(plan)]))
        rows = rows.to(experiment.device)
        active, valid = len(rows), rows >= 0
        index = rows.clamp(min=0).view(-1)
        x = job.inputs(index).view(*rows.shape, *job.dataset.shape)
        now = weights[:active]
        extra = rule.gradient(now, slice(first, first + active))
        labels, scale = job.y[index].view_as(rows), valid / valid.sum(1, keepdim=True)
        job.stack.step(now, x, lambda logits, y=labels, s=scale: slope(logits, y, s), experiment.lr)  # type: ignore[misc]
        if extra is not None:
            now.sub_(extra, alpha=experiment.lr)


def slope(logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient of the cross entropy at `logits` [C, B, K]; `scale` [C, B] is 1/batch, 0 for padding."""
    slopes = logits.softmax(-1)
    slopes.scatter_add_(-1, labels[..., None], torch.full_like(slopes[..., :1], -1))
    return slopes.mul_(scale[..., None])


def _train_one(
    job: Task,
    plan: np.ndarray,
    weights: Tensor,
    rule: Rule,
    row: int,
    stop: Event | None,
    seed: tuple[int, int],
) -> None:
    """Train one client of any model by autograd, in place; module randomness follows from (seed, round, client)."""
    experiment, model = job.experiment, job.model
    trainable = slice(0, model.layout.trainable)
    model.weights.copy_(weights)
    averages = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.module.modules())
    with torch.random.fork_rng():
        torch.manual_seed(int(chance(experiment, "module", *seed).integers(2**63)))
        for batch in plan:
            _check(stop)
            index = torch.from_numpy(batch[batch >= 0]).to(experiment.device)
            # A batch of one sample has no statistics of its own: BatchNorm uses the running ones.
            model.module.train(len(index) > 1 or not averages)
            extra = rule.gradient(model.weights, slice(row, row + 1))
            model.gradient.zero_()
            F.cross_entropy(model.module(job.inputs(index)), job.y[index]).backward()
            if extra is not None:
                model.gradient.add_(extra.view(-1))
            model.weights[trainable].sub_(model.gradient[trainable], alpha=experiment.lr)
    weights.copy_(model.weights)


def _check(stop: Event | None) -> None:
    if stop is not None and stop.is_set():
        raise Stopped
