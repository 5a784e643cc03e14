"""The fast path gives what autograd and SGD give, client by client. In double precision, so that ties do not flip."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedlab_kit.compression.distill import hard_gradient
from fedlab_kit.federation.fast_path import Stack, empty_aligned

IMAGE = (1, 28, 28)
MODELS = {
    "logistic": ((60,), lambda: nn.Sequential(nn.Linear(60, 7))),
    "logistic on images": ((1, 8, 8), lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 7))),
    "without bias": ((12,), lambda: nn.Sequential(nn.Linear(12, 9, bias=False), nn.ReLU(), nn.Linear(9, 7))),
    "linear after linear": ((12,), lambda: nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 7))),
    "mlp": (
        IMAGE,
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 7)
        ),
    ),
    "cnn": (
        IMAGE,
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(320, 50), nn.ReLU(), nn.Linear(50, 7)),
        ),
    ),
    "relu before the pool, remainders dropped": (
        (3, 15, 13),
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(5 * 2 * 2, 7)),
        ),
    ),
    "even kernels, whose last patch reaches beyond the image": (
        (2, 9, 11),
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 3, 2), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(3, 4, 2, bias=False), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(4 * 1 * 2, 7)),
        ),
    ),
    "pool of four, no relu": (
        (1, 14, 14),
        lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(54, 7)),
    ),
    "convolutions without a pool": (
        (2, 7, 6),
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 3, 1), nn.Flatten(), nn.Linear(18, 7)
        ),
    ),
}


def make(name: str, clients: int) -> tuple[nn.Sequential, tuple[int, ...], Tensor]:
    """Return the model, the shape of a sample, and different weights for every client [C, P]."""
    torch.manual_seed(1)
    shape, build = MODELS[name]
    module = build().double()
    start = nn.utils.parameters_to_vector(module.parameters()).detach()
    return module, shape, start + 0.05 * torch.randn(clients, len(start), dtype=torch.float64)


def seed(labels: Tensor, scale: Tensor):
    """Return the gradient of the weighted cross entropy at the logits."""
    return lambda logits: (logits.softmax(-1) - F.one_hot(labels, logits.size(-1))) * scale[..., None]


def mean(*shape: int) -> Tensor:
    """Return the weights of samples [C, B] that make the sum of their losses a mean."""
    return torch.full(shape, 1 / shape[-1], dtype=torch.float64)


def slopes(module: nn.Sequential, weights: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """Oracle: autograd's gradient of the mean cross entropy at flat weights [P]."""
    named = dict(module.named_parameters())
    parts = weights.split([p.numel() for p in named.values()])
    tensors = {k: w.view_as(p).requires_grad_() for (k, p), w in zip(named.items(), parts, strict=True)}
    loss = F.cross_entropy(functional_call(module, tensors, (x,)), labels)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(tensors.values()))])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_steps_equal_autograd_and_sgd_on_each_client(name, clients):
    module, shape, weights = make(name, clients)
    expected, stack = weights.clone(), Stack(module, shape)
    assert Stack.supports(module, shape)
    for _ in range(4):
        x, labels = torch.randn(clients, 5, *shape, dtype=torch.float64), torch.randint(0, 7, (clients, 5))
        stack.step(weights, x, seed(labels, mean(clients, 5)), lr=0.3)
        for c in range(clients):
            expected[c] -= 0.3 * slopes(module, expected[c].clone(), x[c], labels[c])
    assert (weights - make(name, clients)[2]).abs().max() > 1e-3  # it has moved
    close(weights, expected)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_the_module(name):
    module, shape, weights = make(name, 1)
    nn.utils.vector_to_parameters(weights[0], module.parameters())
    stack, x = Stack(module, shape), torch.randn(7, *shape, dtype=torch.float64)
    close(stack.logits(weights[0], x), module(x).detach())
    stack._chunk = 3  # 3 + 3 + 1
    close(stack.logits(weights[0], x), module(x).detach())


def test_single_precision_stays_within_rounding():
    module, shape, weights = make("mlp", 2)
    single, stack = weights.float(), Stack(module, shape)
    for _ in range(5):
        x, labels = torch.randn(2, 10, *shape), torch.randint(0, 7, (2, 10))
        stack.step(weights, x.double(), seed(labels, mean(2, 10)), lr=0.1)
        stack.step(single, x, seed(labels, mean(2, 10).float()), lr=0.1)
    torch.testing.assert_close(single, weights.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_prefix_of_the_clients_steps_and_the_others_stay(name):
    module, shape, weights = make(name, 3)
    before, stack = weights.clone(), Stack(module, shape)
    x, labels = torch.randn(2, 4, *shape, dtype=torch.float64), torch.randint(0, 7, (2, 4))
    stack.step(weights[:2], x, seed(labels, mean(2, 4)), lr=0.1)
    assert torch.equal(weights[2], before[2])
    close(weights[1], before[1] - 0.1 * slopes(module, before[1].clone(), x[1], labels[1]))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_padded_samples_change_nothing(name):
    module, shape, weights = make(name, 2)
    expected, stack = weights.clone(), Stack(module, shape)
    x, labels = torch.randn(2, 6, *shape, dtype=torch.float64), torch.randint(0, 7, (2, 6))
    valid = (torch.arange(6) < torch.tensor([[6], [4]])).double()
    stack.step(weights, x, seed(labels, valid / valid.sum(1, keepdim=True)), lr=0.1)
    for c, count in enumerate((6, 4)):
        expected[c] -= 0.1 * slopes(module, expected[c].clone(), x[c, :count], labels[c, :count])
    close(weights, expected)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_straight_through_takes_the_gradient_elsewhere(name):
    module, shape, weights = make(name, 2)
    rounded = (weights * 16).round() / 16
    expected, kept, stack = weights.clone(), rounded.clone(), Stack(module, shape)
    x, labels = torch.randn(2, 4, *shape, dtype=torch.float64), torch.randint(0, 7, (2, 4))
    stack.step(weights, x, seed(labels, mean(2, 4)), lr=0.1, at=rounded)
    for c in range(2):
        expected[c] -= 0.1 * slopes(module, rounded[c].clone(), x[c], labels[c])
    close(weights, expected)
    assert torch.equal(rounded, kept)


def test_of_equal_values_in_a_pool_the_first_gets_the_gradient():
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(1, 2))
    module.double()
    x, labels = torch.arange(16.0).double().view(1, 1, 4, 4), torch.tensor([0])
    weights = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    weights[2] = 0  # the second convolution makes all 16 pixels equal
    expected = weights - slopes(module, weights.clone(), x, labels)
    rows = weights.unsqueeze(0)
    Stack(module, (1, 4, 4)).step(rows, x.unsqueeze(0), seed(labels.unsqueeze(0), mean(1, 1)), lr=1.0)
    close(rows[0], expected)


def test_the_module_itself_is_left_alone():
    module, shape, weights = make("cnn", 1)
    before = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    labels = torch.randint(0, 7, (1, 2))
    x = torch.randn(1, 2, *shape, dtype=torch.float64)
    Stack(module, shape).step(weights, x, seed(labels, mean(1, 2)), lr=0.1)
    assert torch.equal(nn.utils.parameters_to_vector(module.parameters()), before)


def test_small_models_are_stacked_higher_than_large_ones():
    small, large = (nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10)) for width in (10, 4000))
    assert Stack(small, (784,)).stack_size > Stack(large, (784,)).stack_size == 1


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x)


class Twice(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def shared() -> nn.Sequential:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


def tied() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    return module


def frozen() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[0].weight.requires_grad_(False)
    return module


def parametrized() -> nn.Sequential:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))


def images(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


REFUSED = {
    "batch norm": ((4,), lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))),
    "dropout": ((4,), lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))),
    "another activation": ((4,), lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))),
    "no sequential": ((4,), lambda: nn.Linear(4, 2)),
    "a sequential with its own forward": ((4,), lambda: Twice(nn.Linear(4, 2))),
    "residual": ((4,), lambda: nn.Sequential(Residual(), nn.Linear(4, 2))),
    "nested": ((4,), lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2))),
    "empty": ((4,), lambda: nn.Sequential()),
    "relu last": ((4,), lambda: nn.Sequential(nn.Linear(4, 2), nn.ReLU())),
    "relu first": ((4,), lambda: nn.Sequential(nn.ReLU(), nn.Linear(4, 2))),
    "a layer used twice": ((4,), shared),
    "tied weights": ((4,), tied),
    "frozen weights": ((4,), frozen),
    "a parametrized weight": ((4,), parametrized),
    "images not flattened": ((1, 4, 4), lambda: nn.Sequential(nn.Linear(4, 2))),
    "flattened in part": ((1, 4, 4), lambda: nn.Sequential(nn.Flatten(2), nn.Linear(16, 2))),
    "padding": ((1, 8, 8), lambda: images(nn.Conv2d(1, 2, 3, padding=1))),
    "same padding": ((1, 8, 8), lambda: images(nn.Conv2d(1, 2, 3, padding="same"))),
    "stride": ((1, 8, 8), lambda: images(nn.Conv2d(1, 2, 3, stride=2))),
    "dilation": ((1, 8, 8), lambda: images(nn.Conv2d(1, 2, 3, dilation=2))),
    "groups": ((2, 8, 8), lambda: images(nn.Conv2d(2, 2, 3, groups=2))),
    "oblong kernel": ((1, 8, 8), lambda: images(nn.Conv2d(1, 2, (3, 1)))),
    "overlapping pool": ((1, 8, 8), lambda: images(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2, 1))),
    "pool of three": ((1, 8, 8), lambda: images(nn.Conv2d(1, 2, 3), nn.MaxPool2d(3))),
    "padded pool": ((1, 8, 8), lambda: images(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2, padding=1))),
    "rounded up pool": ((1, 8, 8), lambda: images(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2, ceil_mode=True))),
    "pool after pool": ((1, 8, 8), lambda: images(nn.Conv2d(1, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d(2))),
    "average pool": ((1, 8, 8), lambda: images(nn.Conv2d(1, 2, 3), nn.AvgPool2d(2))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_know_is_left_to_the_general_path(name):
    shape, build = REFUSED[name]
    module = build()
    if any(isinstance(layer, nn.LazyLinear) for layer in module.children()):
        module(torch.zeros(1, *shape))  # gives the last layer its size
    assert not Stack.supports(module, shape)


def test_lazy_layers_are_plain_once_they_have_a_size():
    module = images(nn.Conv2d(1, 2, 3), nn.MaxPool2d((2, 2), (2, 2)))
    module(torch.zeros(1, 1, 8, 8))
    assert Stack.supports(module, (1, 8, 8))


@pytest.mark.parametrize(
    ("shape", "kernel", "channels", "pool", "batch", "classes"),
    [((1, 28, 28), 5, 10, 2, 10, 10), ((3, 13, 13), 3, 5, 2, 7, 3),
     ((2, 17, 17), 5, 7, 4, 6, 3), ((3, 9, 9), 3, 3, 1, 9, 5)],
)  # fmt: skip
def test_a_clients_weights_do_not_depend_on_how_many_are_trained_with_it(shape, kernel, channels, pool, batch, classes):
    """Bit for bit, also where a processor's matrix product rounds by the alignment of its numbers."""
    torch.manual_seed(0)
    body = [nn.Conv2d(shape[0], channels, kernel), *([nn.MaxPool2d(pool)] if pool > 1 else []), nn.ReLU(), nn.Flatten()]
    width = nn.Sequential(*body)(torch.zeros(1, *shape)).shape[1]
    net = nn.Sequential(*body, nn.Linear(width, 9), nn.ReLU(), nn.Linear(9, classes))
    stack, start = Stack(net, shape), torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    x, y = torch.randn(4, batch, *shape), torch.randint(0, classes, (4, batch))

    def trained(first, last):
        weights = empty_aligned(start, last - first, len(start)).copy_(start)
        for _ in range(3):
            stack.step(weights, x[first:last], lambda logits: hard_gradient(logits, y[first:last]) / batch, 0.1)
        return weights

    together = trained(0, 4)
    assert all(torch.equal(trained(k, k + 1)[0], together[k]) for k in range(4))
    assert torch.equal(trained(1, 3), together[1:3])
