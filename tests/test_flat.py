"""One vector, and a module that looks into it."""

import pytest
import torch
from torch import nn

from fedlab_kit.federation.flat import FlatModel


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def test_layout_lists_parameters_then_floating_buffers():
    layout = FlatModel(net()).layout
    assert layout.names == (
        "0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "1.running_mean", "1.running_var",
    )  # fmt: skip
    assert layout.trainable == 6 + 3 + 3 + 3 + 3 + 1
    assert layout.size == layout.trainable + 6
    assert layout.slices[0] == slice(0, 6) and layout.slices[-1] == slice(22, 25)


def test_vector_and_module_are_the_same_numbers():
    flat = FlatModel(net())
    flat.weights.zero_()
    assert all(bool((p == 0).all()) for p in flat.module.parameters())
    with torch.no_grad():
        flat.module[0].weight[1, 0] = 5.0
    assert flat.weights[2] == 5.0
    assert flat.layout.tensors(flat.weights)["0.weight"][1, 0] == 5.0


def test_gradients_land_in_the_vector():
    module, flat = net(), FlatModel(net())
    x = torch.randn(4, 2)
    module(x).pow(2).sum().backward()
    flat.module(x).pow(2).sum().backward()
    expected = torch.cat([p.grad.reshape(-1) for p in module.parameters()])
    assert torch.equal(flat.gradient[: flat.layout.trainable], expected)
    assert not flat.gradient[flat.layout.trainable :].any()


def test_running_statistics_move_inside_the_vector():
    flat = FlatModel(net())
    before = flat.weights.clone()
    flat.module.train()(torch.randn(8, 2))
    changed = flat.weights != before
    assert changed[flat.layout.trainable :].any() and not changed[: flat.layout.trainable].any()


def test_other_precisions_are_refused_by_name():
    with pytest.raises(ValueError, match=r"model tensor 1\.weight must be float32, got torch\.float64"):
        FlatModel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1).double()))
