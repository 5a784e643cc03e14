"""Pruning: toy cases by hand, the library's answers, and what must not change."""

from decimal import ROUND_HALF_UP, Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedlab_kit.compression.prune import (
    ChannelPlan,
    magnitude_mask,
    mask_ratio,
    plan_channels,
    prune_channels,
    prune_weights,
    random_mask,
    regrow,
    sparsity,
)
from fedlab_kit.models import build

SHAPE = (1, 28, 28)


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


def test_a_ratio_that_empties_a_layer_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.mul_(1e-6)
    with pytest.raises(ValueError, match=r"prune_ratio 0\.5 would remove every weight of layer '1'"):
        prune_weights(model, 0.5)


def test_a_plan_rounds_wide_layers_to_blocks_and_prints_itself() -> None:
    plan = plan_channels(build("cnn", SHAPE, 10, seed=0), SHAPE, 0.3)
    assert plan.rows == (("0", 10, 7), ("3", 20, 14), ("7", 50, 32))  # 35 of 50 are left, 32 is a block
    assert plan.removed == pytest.approx(1 - 53 / 80)
    assert "3                           20 ->   14 channels" in str(plan)
    assert str(plan).endswith("asked 0.30, removes 0.34 of the channels")
    assert plan_channels(build("cnn", SHAPE, 10, seed=0), SHAPE, 0.3, multiple=1).rows[2] == ("7", 50, 35)


@pytest.mark.parametrize("name", ["cnn", "mlp", "resnet", "logistic"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_channels_go_as_planned_and_the_classes_stay(name: str, ratio: float) -> None:
    model = build(name, SHAPE, 10, seed=0).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = plan_channels(model, SHAPE, ratio)
    pruned = prune_channels(model, SHAPE, plan)
    widths = {key: module.weight.shape[0] for key, module in pruned.named_modules() if hasattr(module, "weight")}
    assert {key: after for key, _, after in plan.rows}.items() <= widths.items()
    assert pruned(torch.rand(3, *SHAPE)).shape == (3, 10)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert abs(plan.removed - ratio) < 0.1 or not plan.rows


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_halves_of_a_channel_and_of_a_block_stay(ratio: float, multiple: int) -> None:
    """Rounded as at school, 2.5 blocks to 3 and 4.5 to 5: of 40 channels pruned by half stay 24, of 72 stay 40."""
    for width in (2, 5, 6, 7, 9, 10, 14, 18, 30, 40, 48, 56, 72, 80, 88, 104):
        model = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))
        step = multiple if width >= 32 else 1
        blocks = (Decimal(width) * Decimal(1 - ratio) / step).quantize(Decimal(1), ROUND_HALF_UP)
        assert plan_channels(model, (2,), ratio, multiple).rows == (("0", width, max(1, int(blocks)) * step),)


def test_the_channels_that_go_are_those_of_smallest_norm() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0] * 3, [9.0] * 3, [2.0] * 3, [8.0] * 3]))
        model[0].bias.zero_()
        model[2].weight.fill_(1.0)
    pruned = prune_channels(model, (3,), plan_channels(model, (3,), 0.5))
    assert pruned[0].weight[:, 0].tolist() == [9.0, 8.0]
    assert pruned[2].weight.shape == (2, 2)


def test_group_norm_keeps_its_groups() -> None:
    model = nn.Sequential(nn.Conv2d(1, 48, 3), nn.GroupNorm(6, 48), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 4, 2))
    plan = plan_channels(model, (1, 4, 4), 0.4)
    assert plan.rows == (("0", 48, 24),)  # 28.8 rounded to a multiple of 8 and of 6
    assert prune_channels(model, (1, 4, 4), plan)(torch.rand(2, 1, 4, 4)).shape == (2, 2)


def test_a_ratio_without_a_channel_left_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"prune_ratio 0\.96 would remove all 10 channels of layer '0'"):
        plan_channels(build("cnn", SHAPE, 10, seed=0), SHAPE, 0.96)


def test_an_empty_plan_removes_nothing() -> None:
    assert ChannelPlan(0.5, ()).removed == 0


def test_the_cubic_schedule_by_hand() -> None:
    assert [mask_ratio(r, 2, 6, 0.8) for r in (0, 2, 4, 6, 9)] == pytest.approx([0, 0, 0.7, 0.8, 0.8])
    assert mask_ratio(3, 3, 3, 0.5) == 0.5
    # from 0.4 on, half of the time leaves an eighth of the way
    assert [mask_ratio(r, 2, 6, 0.8, 0.4) for r in (0, 2, 4, 6, 9)] == pytest.approx([0.4, 0.4, 0.75, 0.8, 0.8])


def test_a_magnitude_mask_by_hand() -> None:
    weights = torch.tensor([0.1, -3.0, 0.2, 5.0, 0.0, 0.3])  # a weight [2, 2], then a bias [2]
    assert magnitude_mask(weights, [(2, 2), (2,)], 0.5).tolist() == [False, True, False, True, True, True]


@given(st.integers(0, 1000), st.floats(0, 0.999))
@settings(deadline=None, max_examples=30)
def test_masks_keep_exactly_the_share(seed: int, ratio: float) -> None:
    shapes = [(7, 5), (7,), (3, 7)]
    weights = torch.randn(35 + 7 + 21, generator=torch.Generator().manual_seed(seed)).round()  # with ties
    for mask in (magnitude_mask(weights, shapes, ratio), random_mask(shapes, ratio, seed)):
        assert int((~mask).sum()) == round(ratio * 56)
        assert mask[35:42].all()
    assert torch.equal(random_mask(shapes, ratio, seed), random_mask(shapes, ratio, seed))


def test_regrowing_by_hand() -> None:
    weights = torch.tensor([1.0, 4.0, 2.0, 0.0, 0.0, 0.0, 9.0])
    mask = torch.tensor([True, True, True, False, False, False, True])
    gradient = torch.tensor([9.0, 0.0, 0.0, 0.1, -0.7, 0.2, 0.0])
    after = regrow(mask, weights, gradient, [(2, 3), (1,)], share=1 / 3)
    assert after.tolist() == [False, True, True, False, True, False, True]  # 1.0 goes, the steepest comes
    assert regrow(torch.ones(7, dtype=torch.bool), weights, gradient, [(2, 3), (1,)], 0.5).all()
