"""Pruning: toy cases by hand, the library's answers, and what must not change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedlab_kit.compression.prune import (
    magnitude_mask,
    mask_ratio,
    prunable,
    prune,
    prune_weights,
    random_mask,
    regrow,
)
from fedlab_kit.experiment import Recipe
from fedlab_kit.federation.flat_model import FlatModel, Layout


def sparsity(model: nn.Module) -> float:
    weights = torch.cat([weight.flatten() for weight in prunable(model).values()])
    return int((weights == 0).sum()) / len(weights)


def test_weight_pruning_is_global_and_leaves_biases_and_the_original() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.1]]))
        model[2].weight.copy_(torch.tensor([[0.2, -5.0]]))
        model[0].bias.fill_(0.01)
    pruned = prune_weights(model, 0.5)
    assert pruned[0].weight.tolist() == [[0.0, -2.0], [3.0, 0.0]]
    assert pruned[2].weight.tolist() == [[0.0, -5.0]]
    assert pruned[0].bias.tolist() == model[0].bias.tolist()
    assert sparsity(pruned) == 0.5
    assert sparsity(model) == 0.0
    assert list(pruned.state_dict()) == list(model.state_dict())  # no weight_orig, no weight_mask, same order
    assert not pruned[0]._forward_pre_hooks


def test_norms_and_biases_are_never_pruned() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.fill_(1e-6)
    pruned = prune_weights(model, 0.5)
    assert torch.equal(pruned[1].weight, model[1].weight)
    assert sum(int((pruned[k].weight == 0).sum()) for k in (0, 2)) == 12 and sparsity(pruned) == 0.5


class Everything(nn.Module):
    """One layer of each kind that has weights, a tied one, a frozen one, and parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, groups=2)
        self.depthwise, self.transposed = nn.Conv1d(4, 4, 1, groups=4), nn.ConvTranspose2d(4, 2, 3)
        self.table, self.lstm = nn.Embedding(7, 4), nn.LSTM(4, 8, bidirectional=True, proj_size=3)
        self.gru, self.heads = nn.GRU(4, 5, num_layers=2), nn.MultiheadAttention(4, 2, kdim=3, add_bias_kv=True)
        self.same, self.plane = nn.MultiheadAttention(4, 2), nn.LayerNorm([4, 3, 3])
        self.norm, self.frozen = nn.BatchNorm2d(4), nn.Linear(4, 4).requires_grad_(False)
        self.one, self.head = nn.Linear(4, 1), nn.Linear(4, 7)
        self.head.weight = self.table.weight
        self.matrix, self.places = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(1, 5, 4))
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(4, 1, 1))
        self.bias = nn.Parameter(torch.randn(5, 4))


WEIGHTS = [
    *("matrix", "places", "conv.weight", "grouped.weight", "depthwise.weight", "transposed.weight", "table.weight"),
    *(f"lstm.weight_{kind}_l0{way}" for way in ("", "_reverse") for kind in ("ih", "hh", "hr")),
    *(f"gru.weight_{kind}_l{layer}" for layer in (0, 1) for kind in ("ih", "hh")),
    *("heads.q_proj_weight", "heads.k_proj_weight", "heads.v_proj_weight", "heads.out_proj.weight"),
    *("same.in_proj_weight", "same.out_proj.weight", "one.weight"),
]


def test_every_trained_weight_is_seen_once_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = Everything()
    assert list(prunable(model)) == WEIGHTS
    pruned, before = prune_weights(model, 0.4), dict(model.named_parameters())
    every = torch.cat([before[name].flatten() for name in WEIGHTS]).abs()
    limit = every.sort().values[round(0.4 * len(every)) - 1]
    for name, after in pruned.named_parameters():
        kept = before[name].abs() > limit if name in WEIGHTS else torch.ones_like(after)
        assert torch.equal(after, before[name] * kept), name
    assert sparsity(pruned) == round(0.4 * len(every)) / len(every)
    assert pruned.head.weight is pruned.table.weight and not pruned.frozen.weight.requires_grad
    assert not any(
        (p == 0).logical_and(p.signbit()).any() for p in pruned.parameters()
    )  # no minus zero, which zips worse


def test_masks_in_the_rounds_and_recipes_mean_the_same_weights() -> None:
    model = Everything()
    layout = Layout({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    model.forward = lambda x: model.head(x)  # the flat model wants to see it run
    flat = FlatModel(model, torch.randn(2, 4))
    assert flat.layout.names == layout.names
    assert {name for name, part in layout.tensors(flat.prunable).items() if part.all()} == set(WEIGHTS)
    assert {name for name, part in layout.tensors(flat.prunable).items() if part.any()} == set(WEIGHTS)


def test_a_model_without_a_trained_weight_is_noted() -> None:
    frozen = nn.Linear(3, 2).requires_grad_(False)
    same, note = prune(frozen, (3,), Recipe(prune_ratio=0.5), "frozen")
    assert note == "weight pruning removed nothing: no weight is trained" and torch.equal(same.weight, frozen.weight)
    assert prune(frozen, (3,), Recipe(), "frozen") == (frozen, "")
    assert prune(nn.Linear(3, 2), (3,), Recipe(prune_ratio=0.5), "trained")[1] == ""


def test_a_ratio_that_empties_a_layer_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.mul_(1e-6)
    with pytest.raises(ValueError, match=r"prune_ratio 0\.5 would remove every weight of layer '1'"):
        prune_weights(model, 0.5)


def test_the_cubic_schedule_by_hand() -> None:
    assert [mask_ratio(r, 2, 6, 0.8) for r in (0, 2, 4, 6, 9)] == pytest.approx([0, 0, 0.7, 0.8, 0.8])
    assert mask_ratio(3, 3, 3, 0.5) == 0.5
    # from 0.4 on, half of the time leaves an eighth of the way
    assert [mask_ratio(r, 2, 6, 0.8, 0.4) for r in (0, 2, 4, 6, 9)] == pytest.approx([0.4, 0.4, 0.75, 0.8, 0.8])


def test_a_magnitude_mask_by_hand() -> None:
    weights = torch.tensor([0.1, -3.0, 0.2, 5.0, 0.0, 0.3])  # a weight [2, 2], then a bias [2]
    candidates = torch.tensor([True] * 4 + [False] * 2)
    assert magnitude_mask(weights, candidates, 0.5).tolist() == [False, True, False, True, True, True]


@given(st.integers(0, 1000), st.floats(0, 0.999))
@settings(deadline=None, max_examples=30)
def test_masks_keep_exactly_the_share(seed: int, ratio: float) -> None:
    candidates = torch.cat([torch.ones(35), torch.zeros(7), torch.ones(21)]).bool()
    weights = torch.randn(35 + 7 + 21, generator=torch.Generator().manual_seed(seed)).round()  # with ties
    for mask in (magnitude_mask(weights, candidates, ratio), random_mask(candidates, ratio, seed)):
        assert int((~mask).sum()) == round(ratio * 56)
        assert mask[35:42].all()
    assert torch.equal(random_mask(candidates, ratio, seed), random_mask(candidates, ratio, seed))


def test_regrowing_by_hand() -> None:
    weights = torch.tensor([1.0, 4.0, 2.0, 0.0, 0.0, 0.0, 9.0])
    mask = torch.tensor([True, True, True, False, False, False, True])
    gradient = torch.tensor([9.0, 0.0, 0.0, 0.1, -0.7, 0.2, 0.0])
    candidates = torch.tensor([True] * 6 + [False])
    after = regrow(mask, weights, gradient, candidates, share=1 / 3)
    assert after.tolist() == [False, True, True, False, True, False, True]  # 1.0 goes, the steepest comes
    assert regrow(torch.ones(7, dtype=torch.bool), weights, gradient, candidates, 0.5).all()
