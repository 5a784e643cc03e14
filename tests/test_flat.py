"""Three kinds of tensors: what is trained, what is state, and what stays."""

import pytest
import torch
from torch import nn

from fedlab_kit.federation.flat_model import FlatModel

X = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def test_parameters_state_and_nothing_else():
    flat = FlatModel(net(), X)
    assert flat.layout.names == ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias")
    assert flat.layout.size == 6 + 3 + 3 + 3 + 3 + 1 and flat.layout.sizes[0] == 6
    assert flat.state_layout.names == ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert flat.whole.tolist() == [False] * 6 + [True]
    assert flat.variances.tolist() == [False] * 3 + [True] * 3 + [False]
    assert flat.norms == {"1.weight", "1.bias"}


def test_vector_and_module_are_the_same_numbers():
    flat = FlatModel(net(), X)
    flat.weights.zero_()
    assert all(bool((p == 0).all()) for p in flat.module.parameters())
    with torch.no_grad():
        flat.module[0].weight[1, 0] = 5.0
    assert flat.weights[2] == 5.0
    assert flat.layout.tensors(flat.weights)["0.weight"][1, 0] == 5.0


def test_gradients_land_in_the_vector():
    module, flat = net(), FlatModel(net(), X)
    module(X).pow(2).sum().backward()
    flat.module(X).pow(2).sum().backward()
    assert torch.equal(flat.gradient, torch.cat([p.grad.reshape(-1) for p in module.parameters()]))


def test_a_step_moves_the_state_and_not_the_weights():
    flat = FlatModel(net(), X)
    before, state = flat.weights.clone(), flat.state
    flat.module.train()(X)
    assert torch.equal(flat.weights, before) and flat.state[-1] == state[-1] + 1
    flat.load(before, state)
    assert torch.equal(flat.state, state) and flat.module[1].num_batches_tracked.dtype == torch.int64


class Odd(nn.Module):
    """A frozen layer, a tied one, a constant, a moving average of its own, and a cache."""

    def __init__(self, inner=None):
        super().__init__()
        self.a, self.b, self.frozen = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
        self.b.weight = self.a.weight
        self.register_buffer("place", torch.ones(2))
        self.register_buffer("average", torch.zeros(2))
        self.cache, self.inner = None, inner

    def forward(self, x):
        self.cache = torch.ones(2)
        if self.training:
            self.average.lerp_(x.mean(0).detach(), 0.1)
        if self.inner:
            self.inner(self)
        return self.frozen(self.b(self.a(x))) + self.place


def test_what_training_changes_is_state_whoever_wrote_it():
    flat = FlatModel(Odd(), X)
    assert flat.layout.names == ("a.weight", "a.bias", "b.bias")
    assert flat.state_layout.names == ("average",)


def count(module):
    module.steps = getattr(module, "steps", 0) + 1


def test_what_a_model_remembers_outside_of_buffers_is_refused_by_name():
    with pytest.raises(ValueError, match=r"model attribute steps changes while training .* make it a buffer"):
        FlatModel(Odd(count), X)


def test_a_constant_that_moves_after_all_is_named():
    flat = FlatModel(Odd(), X)
    flat.check_constants()
    flat.module.place.add_(1)
    with pytest.raises(ValueError, match="model buffer place must change in every training step or never"):
        flat.check_constants()


def test_other_precisions_and_models_without_anything_to_train_are_refused_by_name():
    with pytest.raises(ValueError, match=r"model tensor 1\.weight must be float32, got torch\.float64"):
        FlatModel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1).double()), X)
    with pytest.raises(ValueError, match="model Linear must have a parameter to train, all are frozen"):
        FlatModel(nn.Linear(2, 1).requires_grad_(False), X)
