"""What the server makes of a round's client updates: one update out of many, and the strategy's step along it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedlab_kit.compression.distill import distillation_gradient
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.devices import client_mask
from fedlab_kit.federation.messages import ClientUpdate
from fedlab_kit.federation.setup import Task, rng_for
from fedlab_kit.wire.privacy import noisy_mean

OptimizerState = dict[str, Tensor]
"""What the server keeps between rounds beside the weights: momentum, moments, the control variate, the mask."""

Strategy = Callable[[Experiment, OptimizerState, Tensor], tuple[Tensor, OptimizerState]]
PUBLIC_BATCH = 20
CROWD, ABSURD = 3, 100  # updates from which on one may be called absurd, and by how many medians


def average(experiment: Experiment, optimizer: OptimizerState, mean: Tensor) -> tuple[Tensor, OptimizerState]:
    """Step along the mean update [P] (FedAvg, McMahan et al. 2017)."""
    return experiment.server_lr * mean, optimizer


def momentum(experiment: Experiment, optimizer: OptimizerState, mean: Tensor) -> tuple[Tensor, OptimizerState]:
    """Step along the decaying sum of mean updates (FedAvgM, Hsu et al. 2019)."""
    velocity = experiment.server_momentum * optimizer.get("velocity", torch.zeros_like(mean)) + mean
    return experiment.server_lr * velocity, {**optimizer, "velocity": velocity}


def adam(experiment: Experiment, optimizer: OptimizerState, mean: Tensor) -> tuple[Tensor, OptimizerState]:
    """Step by first over root of second moment, beta 0.9 and 0.99, tau 0.001 (FedAdam, Reddi et al. 2021)."""
    first = 0.9 * optimizer.get("first", torch.zeros_like(mean)) + 0.1 * mean
    second = 0.99 * optimizer.get("second", torch.zeros_like(mean)) + 0.01 * mean**2
    return experiment.adam_lr * first / (second.sqrt() + 1e-3), {**optimizer, "first": first, "second": second}


STRATEGIES: dict[str, Strategy] = {
    **dict.fromkeys(("fedavg", "fedprox", "scaffold", "feddf", "median"), average),
    "fedavgm": momentum,
    "fedadam": adam,
}


def aggregate(
    task: Task, round: int, weights: Tensor, optimizer: OptimizerState, updates: Mapping[int, ClientUpdate]
) -> tuple[Tensor, OptimizerState]:
    """Return new weights [P] and optimizer state: the strategy's step from `weights` along the `updates` by client."""
    experiment, came = task.experiment, list(updates.values())
    if not came and experiment.privacy != "client":
        return weights, optimizer
    together, held = _together(task, round, updates)
    step, optimizer = STRATEGIES[experiment.strategy](experiment, optimizer, together)
    if held is not None:
        step = step * held  # where nobody contributed, the server keeps its own value, whatever its momentum
    if states := [update.state for update in came if update.state is not None]:
        optimizer = {**optimizer, "state": _merged(task, states, [update.samples for update in came])}
    if controls := [update.control for update in came if update.control is not None]:
        optimizer = {**optimizer, "control": optimizer["control"] + torch.stack(controls).sum(0) / experiment.clients}
    if experiment.strategy == "feddf":
        state = optimizer.get("state", task.initial_state)
        clients = [(weights + update.update, state if update.state is None else update.state) for update in came]
        return distil_ensemble(task, round, weights + step, state, clients, optimizer.get("mask")), optimizer
    return weights + step, optimizer


def _together(task: Task, round: int, updates: Mapping[int, ClientUpdate]) -> tuple[Tensor, Tensor | None]:
    """Return the cohort's update [P]: the mean by samples, the private mean over a fixed number, or the median.

    With slices also where anybody contributed, bool [P]; None elsewhere.
    """
    e, vectors = task.experiment, [update.update for update in updates.values()]
    if e.privacy == "client":
        on_cpu, rng = [vector.cpu() for vector in vectors], rng_for(e, "noise", round)
        private = noisy_mean(on_cpu, e.clip_norm, e.noise_multiplier, e.clients_per_round, rng, task.model.layout.size)
        private = private.to(e.device)
        return private if task.shared is None else private * task.shared, None  # no noise on what does not travel
    if e.strategy == "median":
        return median(vectors), None
    samples = [update.samples for update in updates.values()]
    if e.devices == "sliced":
        return mean_of_slices(vectors, samples, [client_mask(task, client, None) for client in updates])
    return mean(vectors, samples), None


def _merged(task: Task, states: list[Tensor], samples: list[int]) -> Tensor:
    """Return what the clients' states [S] are together: running statistics as floats, counters as whole numbers."""
    merged = median(states) if task.experiment.strategy == "median" else mean(states, samples)
    return torch.where(task.model.whole, merged.round(), merged.float().double())  # what a buffer holds, exactly


def mean(updates: list[Tensor], samples: list[int]) -> Tensor:
    """Return the mean of updates [P] weighted by samples."""
    total = torch.zeros_like(updates[0])
    for update, count in zip(updates, samples, strict=True):
        total.add_(update, alpha=count / sum(samples))
    return total


def mean_of_slices(updates: list[Tensor], samples: list[int], masks: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Return the mean of updates [P] over those clients that hold the entry, and where there is any, bool [P].

    `masks` [P] say which entries each client holds, None all; its update is 0 elsewhere (HeteroFL, Diao et al. 2021).
    """
    total, weight = torch.zeros_like(updates[0]), torch.zeros_like(updates[0])
    for update, count, mask in zip(updates, samples, masks, strict=True):
        total.add_(update, alpha=count)
        weight.add_(1 if mask is None else mask, alpha=count)
    return total / weight.clamp(min=1), weight > 0


def median(updates: list[Tensor]) -> Tensor:
    """Return the median of updates [P], entry by entry: a few poisoned ones cannot move it far (Yin et al. 2018)."""
    ordered, half = torch.stack(updates).sort(0).values, len(updates) // 2
    return ordered[half] if len(updates) % 2 else (ordered[half - 1] + ordered[half]) / 2


def absurd(updates: Mapping[int, ClientUpdate]) -> dict[int, str]:
    """Return the clients, of three or more, one of whose vectors is above 100 times as long as the cohort's median."""
    found: dict[int, str] = {}
    for part in ("update", "state", "control") if len(updates) >= CROWD else ():
        vectors = {client: getattr(update, part) for client, update in updates.items()}
        lengths = {client: float(vector.norm()) for client, vector in vectors.items() if vector is not None}
        usual = statistics.median(lengths.values()) if lengths else 0.0
        for client, length in lengths.items():
            if not length <= ABSURD * usual and usual > 0:
                found[client] = f"its {part} is {length / usual:,.0f} times as long as the median of the cohort"
    return found


def distil_ensemble(
    task: Task, round: int, weights: Tensor, state: Tensor, clients: list[tuple[Tensor, Tensor]], mask: Tensor | None
) -> Tensor:
    """Return `weights` [P] after SGD towards the mean logits of the `clients`' models (FedDF, Lin et al. 2020).

    A client's model is its weights [P] and its state [S]; `state` is that of the average. The public split is used
    without its labels; `server_epochs` passes, the clients' learning rate, T^2 KL.
    """
    e, public, model, weights = task.experiment, task.dataset.public, task.model, weights.clone()
    target = torch.stack([task.logits(own, public, theirs) for own, theirs in clients]).mean(0)
    inputs = task.dataset.preprocess(public.x.to(e.device))
    unlabelled = torch.zeros(len(public), dtype=torch.int64, device=target.device)
    model.state = state
    model.module.eval()
    for epoch in range(e.server_epochs):
        order = torch.from_numpy(rng_for(e, "public", round, epoch).permutation(len(public)))
        for index in order.to(target.device).split(PUBLIC_BATCH):
            model.weights.copy_(weights)
            model.gradient.zero_()
            logits = model.module(inputs[index])
            gradient = distillation_gradient(logits.detach(), target[index], unlabelled[index], e.temperature, 1.0)
            logits.backward(gradient.div_(len(index)))
            step = model.gradient if task.shared is None else model.gradient * task.shared.to(weights.device)
            weights.sub_(step, alpha=e.lr)
            if mask is not None:
                weights.mul_(mask)
    return weights
