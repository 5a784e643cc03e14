"""Weight pruning: which weights count, which go, and the masks and schedules of pruning inside the rounds.

Single weights become zero and the architecture stays; whole channels go in `channels`. The given module is left
untouched. The mask functions at the end work on flat weight vectors [P].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedlab_kit.compression.channels import plan_channels, prune_channels
from fedlab_kit.experiment import Recipe

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""The layers that count as normalization."""


def prune(model: nn.Module, inputs: Tensor | Sequence[int], recipe: Recipe, name: str) -> tuple[nn.Module, str]:
    """Return the model as the recipe prunes it (at ratio 0 itself) and what to note; errors as in `plan_channels`."""
    if recipe.prune_ratio == 0:
        return model, ""
    if recipe.prune == "weight":
        nothing = "" if prunable(model) else "weight pruning removed nothing: no weight is trained"
        return prune_weights(model, recipe.prune_ratio), nothing
    plan = plan_channels(model, inputs, recipe.prune_ratio, name=name)
    return prune_channels(model, plan), plan.note


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that are pruned, by name: what is trained and has two dimensions or more; tied ones once.

    Embeddings and tables of positions count; biases, normalization and vectors of a model's own (a class token) do not.
    """
    owners = dict(model.named_modules())
    found = {}
    for name, weight in model.named_parameters():
        path, _, last = name.rpartition(".")
        own = not type(owners[path]).__module__.startswith("torch.nn.modules.")
        axes = sum(length > 1 for length in weight.shape) if own else weight.ndim
        if weight.requires_grad and axes >= 2 and "bias" not in last and not isinstance(owners[path], NORMS):
            found[name] = weight
    return found


@torch.no_grad()
def prune_weights(model: nn.Module, ratio: float) -> nn.Module:
    """Return a copy, the share `ratio` of all weights zero: the smallest of the whole model (Han et al. 2015)."""
    from torch.nn.utils import parameters_to_vector
    from torch.nn.utils.prune import L1Unstructured

    pruned = copy.deepcopy(model)
    weights = prunable(pruned)
    if ratio == 0 or not weights:
        return pruned
    flat = parameters_to_vector(weights.values())
    mask = L1Unstructured(ratio).compute_mask(flat, torch.ones_like(flat))
    parts = mask.split([weight.numel() for weight in weights.values()])
    for (name, weight), part in zip(weights.items(), parts, strict=True):
        if not weight.masked_fill_(part.view_as(weight) == 0, 0.0).any():
            lost = f"every weight of layer {name.removesuffix('.weight')!r}"
            raise ValueError(f"prune_ratio {ratio:g} would remove {lost}; choose a smaller one")
    return pruned


def mask_ratio(round: int, first: int, last: int, ratio: float, before: float = 0.0) -> float:
    """The prune ratio of a round under gradual pruning: cubic from `before` at round `first` to `ratio` at `last` on.

    Zhu and Gupta 2017: many weights go early, when they are easily replaced, few at the end.
    """
    if round < first:
        return before
    if round >= last:
        return ratio
    return ratio - (ratio - before) * (1 - (round - first) / (last - first)) ** 3


def masked_share(mask: Tensor, candidates: Tensor) -> float:
    """The share of the prunable entries, `candidates` [P], that a mask [P] has removed."""
    return 1 - int((mask & candidates).sum()) / max(1, int(candidates.sum()))


def magnitude_mask(weights: Tensor, candidates: Tensor, ratio: float) -> Tensor:
    """Keep all but the share `ratio` of the `candidates` [P], by magnitude, ties in order; bool [P], True = kept."""
    return shrink(torch.ones_like(candidates), weights.abs(), candidates, ratio)


def shrink(mask: Tensor, scores: Tensor, candidates: Tensor, ratio: float) -> Tensor:
    """Remove the lowest `scores` [P] from a mask until at least the share `ratio` of the `candidates` [P] is gone."""
    kept, total = mask & candidates, int(candidates.sum())
    return ~candidates | _largest(scores, kept, min(int(kept.sum()), total - round(ratio * total)))


def random_mask(candidates: Tensor, ratio: float, seed: int) -> Tensor:
    """Keep a random set of the same size instead: the negative control; bool [P]."""
    scores = torch.rand(len(candidates), generator=torch.Generator().manual_seed(seed)).to(candidates.device)
    return shrink(torch.ones_like(candidates), scores, candidates, ratio)


def regrow(mask: Tensor, weights: Tensor, gradient: Tensor, candidates: Tensor, share: float) -> Tensor:
    """Exchange the share `share` of the kept weights: the smallest magnitudes go, the largest gradients come.

    The number kept stays the same; what has just gone may not come back at once. All are [P], the gradient is the
    dense one (of pruned weights too). FedDST (Bibikar et al. 2022), after RigL (Evci et al. 2020).
    """
    kept = mask & candidates
    exchanged = min(round(share * int(kept.sum())), int((candidates & ~mask).sum()))
    gone = _largest(-weights.abs(), kept, exchanged)
    come = _largest(gradient.abs(), candidates & ~mask, exchanged)
    return (mask & ~gone) | come


def _largest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Mark the `count` candidates with the largest scores; of equal scores the later one loses."""
    order = scores.masked_fill(~among, -math.inf).argsort(descending=True, stable=True)
    marked = torch.zeros_like(among)
    marked[order[:count]] = True
    return marked
