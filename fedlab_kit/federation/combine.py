"""What the server makes of a round's answers: one update out of many, and the strategy's step along it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlab_kit.federation.ensemble import distil_ensemble
from fedlab_kit.federation.messages import Answer, seen
from fedlab_kit.federation.strategies import STRATEGIES, Slots, mean, mean_of_views, median
from fedlab_kit.federation.task import Task, chance
from fedlab_kit.wire.privacy import noisy_mean


def combine(
    job: Task, round: int, weights: Tensor, slots: Slots, answers: Mapping[int, Answer]
) -> tuple[Tensor, Slots]:
    """Return the new weights [P] and slots: the strategy's step from `weights` along what the answers say together."""
    experiment = job.experiment
    if not answers and experiment.privacy != "client":
        return weights, slots
    together, held = _aggregate(job, round, answers)
    step, slots = STRATEGIES[experiment.strategy](experiment, slots, together)
    if held is not None:
        step = step * held  # where nobody contributed, the server keeps its own value, whatever its momentum
    stepped = weights + step
    if states := [answer.state for answer in answers.values() if answer.state is not None]:
        slots = {**slots, "state": _merged(job, states, [answer.samples for answer in answers.values()])}
    controls = [answer.control for answer in answers.values() if answer.control is not None]
    if controls:
        slots = {**slots, "control": slots["control"] + torch.stack(controls).sum(0) / experiment.clients}
    if experiment.strategy == "feddf":
        state = slots.get("state", job.initial_state)
        clients = [(weights + a.update, state if a.state is None else a.state) for a in answers.values()]
        stepped = distil_ensemble(job, round, stepped, state, clients, slots.get("mask"))
    return stepped, slots


def _merged(job: Task, states: list[Tensor], samples: list[int]) -> Tensor:
    """Return what the clients' states [S] are together: running statistics as floats, counters as whole numbers."""
    merged = median(states) if job.experiment.strategy == "median" else mean(states, samples)
    return torch.where(job.model.whole, merged.round(), merged.float().double())  # what a buffer holds, exactly


def _aggregate(job: Task, round: int, answers: Mapping[int, Answer]) -> tuple[Tensor, Tensor | None]:
    """Return the cohort's update [P]: the mean by samples, the private mean over a fixed number, or the median.

    With slices also where anybody contributed, bool [P]; None elsewhere.
    """
    experiment, updates = job.experiment, [answer.update for answer in answers.values()]
    if experiment.privacy == "client":
        rng = chance(experiment, "noise", round)
        on_cpu, size = [update.cpu() for update in updates], job.model.layout.size
        expected, noise = experiment.clients_per_round, experiment.noise_multiplier
        private = noisy_mean(on_cpu, experiment.clip_norm, noise, expected, rng, size)
        return private.to(experiment.device), None
    if experiment.strategy == "median":
        return median(updates), None
    samples = [answer.samples for answer in answers.values()]
    if experiment.devices == "sliced":
        whole = torch.ones_like(updates[0], dtype=torch.bool)
        views = [whole if (mask := seen(job, client, None)) is None else mask for client in answers]
        return mean_of_views(updates, samples, views)
    return mean(updates, samples), None
