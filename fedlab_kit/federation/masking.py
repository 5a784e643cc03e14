"""Sparse training: the server's mask, when it changes, and to what.

`gradual` and `one-shot` start dense and prune by magnitude (Zhu and Gupta 2017), `dynamic` starts from a random mask
and exchanges weights (FedDST, Bibikar et al. 2022, with the clients' gradients added up by the server), `fixed` keeps a
random mask and shows what the others gain.
"""

from __future__ import annotations

from math import ceil, cos, pi

import torch
from torch import Tensor

from fedlab_kit.compression.prune import mask_ratio, masked_share, random_mask, regrow, shrink
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.setup import Task

EXCHANGE = 0.2  # share of the kept weights that a dynamic mask exchanges at first; it falls to 0 by a cosine


def first_mask(task: Task) -> Tensor | None:
    """Return the mask before round one, bool [P], or None where nothing is masked; every client can work it out.

    What a `start` was pruned of stays zero. A dynamic or a fixed mask has its full size from the beginning: what it
    still lacks is drawn at random, or after a pruned start taken from its smallest weights.
    """
    experiment, candidates = task.experiment, task.model.prunable
    whole = experiment.mask_ratio and experiment.mask_schedule in ("dynamic", "fixed")
    if was_pruned(experiment):
        kept, scores = (task.initial != 0) | ~candidates, task.initial.abs()
        if experiment.mask_schedule == "fixed":
            scores = torch.rand(len(kept), generator=torch.Generator().manual_seed(experiment.seed)).to(kept.device)
        return shrink(kept, scores, candidates, experiment.mask_ratio) if whole else kept
    if whole:
        return random_mask(candidates, experiment.mask_ratio, experiment.seed)
    return None


def was_pruned(experiment: Experiment) -> bool:
    """Whether a model begins with weights pruned away: by the start recipe, or in the rounds of its start."""
    start, recipe = experiment.start, experiment.start_recipe
    if start is None:
        return False
    by_recipe = recipe is not None and recipe.prune == "weight" and recipe.prune_ratio > 0
    return by_recipe or start.mask_ratio > 0 or was_pruned(start)


def adjusts(experiment: Experiment, round: int) -> bool:
    """Whether the mask changes after this round: about ten times, until 60 % (dynamic: 75 %) of the rounds."""
    if not experiment.mask_ratio or experiment.mask_schedule == "fixed":
        return False
    if experiment.mask_schedule == "one-shot":
        return round == ceil(experiment.rounds / 2)
    last, every = _last(experiment), max(1, experiment.rounds // 10)
    return round <= last and (round % every == 0 or round == last)


def grows(experiment: Experiment, round: int) -> bool:
    """Whether clients also send the largest gradients of pruned weights in this round."""
    return experiment.mask_schedule == "dynamic" and adjusts(experiment, round)


def exchanged(experiment: Experiment, round: int) -> float:
    """Return the share of kept weights that a dynamic mask exchanges after this round."""
    return EXCHANGE / 2 * (1 + cos(pi * round / (_last(experiment) + 1)))


def next_mask(task: Task, round: int, weights: Tensor, mask: Tensor | None, gradient: Tensor | None) -> Tensor:
    """Return the mask after this round for the averaged `weights` [P]; `gradient` [P] only where the mask grows."""
    experiment, candidates = task.experiment, task.model.prunable
    if mask is not None and gradient is not None:
        return regrow(mask, weights, gradient, candidates, exchanged(experiment, round))
    first, last = (0, _last(experiment)) if experiment.mask_schedule == "gradual" else (round - 1, round)
    begun = first_mask(task)
    before = 0.0 if begun is None else masked_share(begun, candidates)
    ratio = mask_ratio(round, first, last, experiment.mask_ratio, before)
    return shrink(torch.ones_like(candidates) if mask is None else mask, weights.abs(), candidates, ratio)


def dense_gradient(task: Task, weights: Tensor, state: Tensor, client: int, mask: Tensor) -> Tensor:
    """Return the client's gradient [P] over at most 200 of its samples, zero where the mask keeps."""
    model, index = task.model, task.shards[client][:200].to(task.experiment.device)
    model.load(weights, state)
    model.gradient.zero_()
    model.module.eval()
    torch.nn.functional.cross_entropy(model.module(task.inputs(index)), task.y[index]).backward()
    return model.gradient.masked_fill(mask, 0.0)


def _last(experiment: Experiment) -> int:
    return ceil(experiment.rounds * (0.75 if experiment.mask_schedule == "dynamic" else 0.6))
