"""Masks, schedules and channel plans: which weights go, when, and what is left of the network.

Weight pruning sets single weights to zero and keeps the architecture; channel pruning removes whole channels and
returns a smaller one. Both leave the given module untouched. The mask functions at the end work on flat weight
vectors [P] and serve pruning inside the rounds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from threading import RLock

import torch
from torch import Tensor, nn

# Measured in onnxruntime: layers of 32 channels or more run in blocks, and with counts between the blocks a pruned
# resnet is up to 1.7 times slower than the unpruned one; below that, rounding gains nothing.
WIDE, MULTIPLE = 32, 8

TURN = RLock()  # torch's exporter and pruner follow a model through state of the process: one thread at a time


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that are pruned, by the name of their layer: those of two dimensions or more."""
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    return {name: w for name, w in weights.items() if isinstance(w, nn.Parameter) and w.ndim >= 2}


def sparsity(model: nn.Module) -> float:
    """Return the share of zeros among all prunable weights."""
    weights = prunable(model).values()
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))


def prune_weights(model: nn.Module, ratio: float) -> nn.Module:
    """Return a copy with the share `ratio` of all weights set to zero, the smallest magnitudes of the whole model.

    Global magnitude pruning (Han et al. 2015). Raises ValueError when the ratio empties a whole layer.
    """
    from torch.nn.utils import prune

    pruned, hooked = copy.deepcopy(model), copy.deepcopy(model)
    layers = [hooked.get_submodule(name) for name in prunable(hooked)]
    if ratio == 0 or not layers:
        return pruned
    prune.global_unstructured(
        [(layer, "weight") for layer in layers], pruning_method=prune.L1Unstructured, amount=ratio
    )
    for layer in layers:
        prune.remove(layer, "weight")
    pruned.load_state_dict(hooked.state_dict())  # removing the hooks has changed the order of the parameters
    for name, weight in prunable(pruned).items():
        if not weight.any():
            raise ValueError(f"prune_ratio {ratio:g} would remove every weight of layer {name!r}; choose a smaller one")
    return pruned


@dataclass(frozen=True)
class ChannelPlan:
    """What channel pruning is about to do: (layer, channels before, channels after) in the order of the network."""

    ratio: float
    rows: tuple[tuple[str, int, int], ...]

    @property
    def removed(self) -> float:
        """The share of channels that really goes, after rounding."""
        before = sum(before for _, before, _ in self.rows)
        after = sum(after for _, _, after in self.rows)
        return 1 - after / before if before else 0.0

    def __str__(self) -> str:
        lines = [f"{name:24} {before:5} -> {after:4} channels" for name, before, after in self.rows]
        return "\n".join([*lines, f"asked {self.ratio:.2f}, removes {self.removed:.2f} of the channels"])


def plan_channels(model: nn.Module, shape: Sequence[int], ratio: float, multiple: int = MULTIPLE) -> ChannelPlan:
    """Plan the removal of the share `ratio` of channels from every layer but the last, for inputs of `shape`.

    What is left of a layer of 32 channels or more is rounded to the nearest `multiple`, because the runtime works in
    blocks of channels (1: no rounding, to see what it is good for). Groups keep their number. Raises ValueError when
    a layer would lose all of its channels.
    """
    groups = [int(getattr(m, "num_groups", getattr(m, "groups", 1))) for m in model.modules()]
    rows = []
    for name, width in _widths(model, shape).items():
        after = _kept(width, ratio, multiple, math.lcm(*groups))
        if after < 1:
            raise ValueError(
                f"prune_ratio {ratio:g} would remove all {width} channels of layer {name!r}; choose a smaller one"
            )
        rows.append((name, width, after))
    return ChannelPlan(ratio, tuple(rows))


def _kept(width: int, ratio: float, multiple: int, group: int) -> int:
    """How many of a layer's channels stay: rounded to blocks where it is wide, to whole groups everywhere."""
    left = width * (1 - ratio)
    step = math.lcm(multiple, group) if width >= WIDE and left >= multiple / 2 else group
    return min(width, math.floor(left / step + 0.5) * step)


def prune_channels(model: nn.Module, shape: Sequence[int], plan: ChannelPlan) -> nn.Module:
    """Return a copy with the channels of the plan removed, the least important first, and all that depends on them.

    torch-pruning's dependency graph (Fang et al. 2023) with group magnitude, p = 2; class outputs are kept.
    """
    import torch_pruning

    pruned = copy.deepcopy(model).eval()
    # half a channel more than is kept, so that the library's rounding down lands on it
    ratios = {
        pruned.get_submodule(name): 1 - (after + 0.5) / before for name, before, after in plan.rows if after < before
    }
    rest = [layer for layer in map(pruned.get_submodule, prunable(pruned)) if layer not in ratios]
    with TURN, torch.enable_grad():
        torch_pruning.pruner.BasePruner(
            pruned,
            torch.zeros(1, *shape),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.0,
            pruning_ratio_dict=ratios,
            ignored_layers=rest,
        ).step()
    return pruned.train(model.training)


def _widths(model: nn.Module, shape: Sequence[int]) -> dict[str, int]:
    """The output channels of every prunable layer but the last one to run, which gives the class outputs."""
    order: list[str] = []
    weights = prunable(model)
    with ExitStack() as hooks, torch.no_grad():
        for name in weights:
            handle = model.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
            hooks.callback(handle.remove)
        model(torch.zeros(1, *shape))
    return {name: weights[name].shape[0] for name in dict.fromkeys(order) if name != order[-1]}


def mask_ratio(round: int, first: int, last: int, ratio: float, before: float = 0.0) -> float:
    """The prune ratio of a round under gradual pruning: cubic from `before` at round `first` to `ratio` at `last` on.

    Zhu and Gupta 2017: many weights go early, when they are easily replaced, few at the end.
    """
    if round < first:
        return before
    if round >= last:
        return ratio
    return ratio - (ratio - before) * (1 - (round - first) / (last - first)) ** 3


def prunable_mask(shapes: Sequence[Sequence[int]]) -> Tensor:
    """Which entries of a flat vector [P] belong to tensors of two dimensions or more; bool [P]."""
    return torch.cat([torch.full((math.prod(shape),), len(shape) >= 2) for shape in shapes])


def masked_share(mask: Tensor, shapes: Sequence[Sequence[int]]) -> float:
    """The share of the prunable entries that a mask [P] has removed."""
    candidates = prunable_mask(shapes).to(mask.device)
    return 1 - int((mask & candidates).sum()) / max(1, int(candidates.sum()))


def magnitude_mask(weights: Tensor, shapes: Sequence[Sequence[int]], ratio: float) -> Tensor:
    """Keep all but the share `ratio` of the prunable entries, those of smallest magnitude; bool [P], True = kept.

    `shapes` are the tensors' shapes in the order of the flat vector. Ties fall in that order, so the count is exact.
    """
    return shrink(torch.ones_like(weights, dtype=torch.bool), weights.abs(), shapes, ratio)


def shrink(mask: Tensor, scores: Tensor, shapes: Sequence[Sequence[int]], ratio: float) -> Tensor:
    """Remove the lowest `scores` [P] from a mask until the share `ratio` of the prunable entries is gone.

    What is gone stays gone, more than the share too.
    """
    candidates = prunable_mask(shapes).to(mask.device)
    kept, total = mask & candidates, int(candidates.sum())
    return ~candidates | _largest(scores, kept, min(int(kept.sum()), total - round(ratio * total)))


def random_mask(shapes: Sequence[Sequence[int]], ratio: float, seed: int) -> Tensor:
    """Keep a random set of the same size instead: the negative control; bool [P]."""
    candidates = prunable_mask(shapes)
    scores = torch.rand(len(candidates), generator=torch.Generator().manual_seed(seed))
    return shrink(torch.ones_like(candidates), scores, shapes, ratio)


def regrow(mask: Tensor, weights: Tensor, gradient: Tensor, shapes: Sequence[Sequence[int]], share: float) -> Tensor:
    """Exchange the share `share` of the kept weights: the smallest magnitudes go, the largest gradients come.

    The number kept stays the same; what has just gone may not come back at once. All are [P], the gradient is the
    dense one (of pruned weights too). FedDST (Bibikar et al. 2022), after RigL (Evci et al. 2020).
    """
    candidates = prunable_mask(shapes).to(mask.device)
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
