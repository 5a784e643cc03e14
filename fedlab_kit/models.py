"""The built-in models, small enough for a laptop's single core, and how any registered model is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fedlab_kit.catalog import lookup, model
from fedlab_kit.settings import complaint

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


class Draws:
    """A stream of torch's global generator of its own, for modules that draw from no other."""

    _turn = RLock()  # the generator belongs to the process, threads take turns

    def __init__(self, seed: int) -> None:
        self._state = torch.Generator().manual_seed(seed).get_state()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Draw from this stream inside the block; afterwards the global generator is as it was."""
        with self._turn:
            outside = torch.get_rng_state()
            torch.set_rng_state(self._state)
            try:
                yield
            finally:
                self._state = torch.get_rng_state()
                torch.set_rng_state(outside)


def build(name: str, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """Return the registered model for samples of that shape, its initial weights a function of `seed` alone.

    The global random generator is left as it was. Raises ValueError for an unknown name, and when the function
    does not give a module that maps [n, *shape] to [n, classes].
    """
    function = lookup("model", name)
    with Draws(seed).inside():
        built = function(shape, classes)
        if not isinstance(built, nn.Module):
            raise ValueError(f"model {name!r} must be a torch.nn.Module, got {type(built).__name__}")
        if wrong := [tensor for tensor, values in built.named_parameters() if not values.isfinite().all()]:
            raise ValueError(f"model {name!r} must begin with finite weights, {wrong[0]} holds NaN or infinity")
        check_output(repr(name), built.eval(), torch.zeros(2, *shape), classes)
    return built.train()


def as_batch(inputs: Tensor | Sequence[int]) -> Tensor:
    """Return a preprocessed batch [n, ...] as it is; for the shape of a sample, two made-up ones between 0 and 1."""
    if isinstance(inputs, Tensor):
        return inputs
    return torch.rand(2, *inputs, generator=torch.Generator().manual_seed(0))


def flops(model: nn.Module, inputs: Tensor | Sequence[int]) -> int:
    """Count the floating-point operations of the float model on one sample; a multiply-add is two.

    `inputs` is a preprocessed batch [n, ...], whose first sample is taken, or a sample's shape. Those of matrices,
    convolutions, recurrent layers and attention count, element by element nothing does.
    """
    copied = deepcopy(model).cpu().eval().requires_grad_(True)  # with gradients torch takes no path that it fuses
    sample, counter = as_batch(inputs)[:1].cpu().clone(), _Counter()
    with torch.enable_grad(), Draws(0).inside(), counter:
        copied(sample)
    return counter.total


class _Counter(TorchDispatchMode):
    """Adds up the operations of all that torch does inside the block; unlike torch's own in this thread alone."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if count := FLOPS.get(func.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=output)
        return output


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """[n, heads, queries, d], [n, heads, keys, d], [n, heads, keys, e]: each query with each key and value."""
    return 2 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _recurrent(x: Tensor, inputs: Tensor, hidden: Tensor, *_: Any, **__: Any) -> int:
    """[steps, n, features]: each step multiplies by both weights."""
    return 2 * x[..., 0].numel() * (inputs.numel() + hidden.numel())


ATEN = torch.ops.aten
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    ATEN.mkldnn_rnn_layer: _recurrent,
    ATEN._trilinear: lambda x, weight, *_, **__: 2 * len(x) * weight.numel(),  # nn.Bilinear
    ATEN.mv: lambda matrix, *_, **__: 2 * matrix.numel(),
    ATEN.addmv: lambda _, matrix, *__, **___: 2 * matrix.numel(),
    ATEN.dot: lambda vector, *_, **__: 2 * vector.numel(),
}
"""What torch's own counter knows, and what it passes over on a CPU."""


def check_output(name: str, module: nn.Module, sample: Tensor, classes: int) -> None:
    """Raise ValueError, in one line, unless a module maps prepared samples [n, ...] to float32 logits [n, classes]."""
    shape, wanted = list(sample.shape), [len(sample), classes]
    try:
        with torch.no_grad():
            found = module(sample)
    except Exception as error:
        raise ValueError(
            f"model {name} does not take samples of shape {shape[1:]}, build it for them: {complaint(error)}"
        ) from error
    if not isinstance(found, Tensor):
        parts = f" of {', '.join(map(repr, found))}" if isinstance(found, dict) else ""
        kind = f"{type(found).__name__}{parts}"
        raise ValueError(f"model {name} must return one tensor of logits, got a {kind}: let forward return them alone")
    if list(found.shape) != wanted or found.dtype != torch.float32:
        kind = "" if found.dtype == torch.float32 else f" of {found.dtype}"
        raise ValueError(f"model {name} must map {shape} to {wanted}, got {list(found.shape)}{kind}: one logit a class")


@model
def logistic(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Multinomial logistic regression."""
    return _dense(shape, classes)


@model
def mlp(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two hidden layers, 128 and 64 units."""
    return _dense(shape, 128, 64, classes)


@model
def half_mlp(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Half of `mlp`: 64 and 32 units; its student in the article."""
    return _dense(shape, 64, 32, classes)


@model("2nn")
def two_nn(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The 2NN of McMahan et al. (2017): two hidden layers of 200 units, 199,210 parameters on MNIST."""
    return _dense(shape, 200, 200, classes)


@model
def cnn(shape: tuple[int, ...], classes: int) -> nn.Module:
    """SimpleCNN, 21,840 parameters on 28x28: two 5x5 convolutions, each pooled by two, and two dense layers.

    It starts from He et al.'s weights (2015): in twenty rounds it then learns what takes sixty from PyTorch's.
    """
    features, wide = two_convolutions(shape, 10, 20)
    return nn.Sequential(*features, _he(nn.Linear(wide, 50)), nn.ReLU(), _he(nn.Linear(50, classes), 0.5))


@model
def student(shape: tuple[int, ...], classes: int) -> nn.Module:
    """A small `cnn`, 3,898 parameters on 28x28: 6 and 12 channels, one dense layer; it learns from a teacher."""
    features, wide = two_convolutions(shape, 6, 12)
    return nn.Sequential(*features, _he(nn.Linear(wide, classes), 0.5))


@model
def resnet(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return a residual network of about 0.7 M parameters without normalization: see `ResNet`."""
    return ResNet(_image(shape, smallest=8), classes)


class Block(nn.Module):
    """`relu(skip(x) + branch(x))`; the branch ends in a convolution of zeros, so the block starts as its skip."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = _he(nn.Conv2d(inputs, outputs, 3, padding=1), 0.5)
        self.conv2 = _he(nn.Conv2d(outputs, outputs, 3, padding=1), 0.0)
        self.skip = nn.Identity() if inputs == outputs else _he(nn.Conv2d(inputs, outputs, 1), 0.5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] -> [n, outputs, h, w]."""
        return torch.relu(self.skip(x) + self.conv2(torch.relu(self.conv1(x))))


class ResNet(nn.Module):
    """Five residual blocks at a half, a quarter and an eighth of the image's size, each after a 2x2 maximum.

    No BatchNorm: its running statistics are what federated averaging of unlike clients breaks. Branches that start at
    zero take its place (Fixup, Zhang et al. 2019; SkipInit, De and Smith 2020), and leave a graph of Conv, Relu,
    MaxPool, Add and one Gemm, which quantizes and prunes well.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.stem = _he(nn.Conv2d(channels, 32, 5, padding=2), 0.5**0.5)
        self.pool = nn.MaxPool2d(2)
        self.large = Block(32, 32)
        self.medium = nn.Sequential(Block(32, 64), Block(64, 64))
        self.small = nn.Sequential(Block(64, 128), Block(128, 128))
        self.head = _he(nn.Linear(128 * (height // 8) * (width // 8), classes), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, h, w] -> logits [n, classes]."""
        x = self.large(torch.relu(self.pool(self.stem(x))))
        x = self.medium(self.pool(x))
        x = self.small(self.pool(x))
        return self.head(x.flatten(1))


def _he(layer: Layer, gain: float = 1.0) -> Layer:
    """Draw He et al.'s weights (2015) times `gain`, and set the biases to zero."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    with torch.no_grad():
        layer.weight.mul_(gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _dense(shape: tuple[int, ...], *widths: int) -> nn.Sequential:
    sizes = (math.prod(shape), *widths)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def two_convolutions(shape: tuple[int, ...], first: int, second: int) -> tuple[list[nn.Module], int]:
    """Return two 5x5 convolutions, each pooled by two, as layers that end in a row of features, and how many."""
    channels, height, width = _image(shape, smallest=16)
    layers: list[nn.Module] = [_he(nn.Conv2d(channels, first, 5)), nn.MaxPool2d(2), nn.ReLU()]
    layers += [_he(nn.Conv2d(first, second, 5)), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()]
    return layers, second * math.prod(((side - 4) // 2 - 4) // 2 for side in (height, width))


def _image(shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise ValueError(
            f"samples must be images [channels, {smallest} or more, {smallest} or more], got {list(shape)}"
        )
    channels, height, width = shape
    return channels, height, width
