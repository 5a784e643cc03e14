"""How the server turns the clients' mean update into its own step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedlab_kit.experiment import Experiment

Slots = dict[str, Tensor]
"""What the server keeps between rounds, by name: momentum, moments, the control variate, the mask."""

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
    "feddf": average,
    "median": average,
}


def mean(updates: list[Tensor], samples: list[int]) -> Tensor:
    """Return the mean of updates [P] weighted by samples."""
    total = torch.zeros_like(updates[0])
    for update, count in zip(updates, samples, strict=True):
        total.add_(update, alpha=count / sum(samples))
    return total


def mean_of_views(updates: list[Tensor], samples: list[int], views: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean of updates [P] over those clients that hold the entry, and where there is any, bool [P].

    `views` [P] say which entries each client holds; its update is 0 elsewhere (HeteroFL, Diao et al. 2021).
    """
    total, weight = torch.zeros_like(updates[0]), torch.zeros_like(updates[0])
    for update, count, view in zip(updates, samples, views, strict=True):
        total.add_(update, alpha=count)
        weight.add_(view, alpha=count)
    return total / weight.clamp(min=1), weight > 0


def median(updates: list[Tensor]) -> Tensor:
    """Return the median of updates [P], entry by entry: a few poisoned ones cannot move it far (Yin et al. 2018)."""
    ordered, half = torch.stack(updates).sort(0).values, len(updates) // 2
    return ordered[half] if len(updates) % 2 else (ordered[half - 1] + ordered[half]) / 2
