"""The built-in models, small enough for a laptop's single core, and how any registered model is built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from threading import RLock
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedlab_kit.catalog import lookup, model

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
        _check_output(name, built, shape, classes)
    return built


def flops(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Count the floating-point operations of the float model on one sample; a multiply-add is two."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, *shape, device=next(model.parameters()).device))
    return counter.get_total_flops()


def _check_output(name: str, built: nn.Module, shape: tuple[int, ...], classes: int) -> None:
    built.eval()
    try:
        with torch.no_grad():
            found = built(torch.zeros(2, *shape))
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"model {name!r} does not take samples of shape {list(shape)}: {why}") from error
    if not isinstance(found, Tensor):
        raise ValueError(
            f"model {name!r} must return the logits alone, a tensor [n, {classes}], got {type(found).__name__}"
        )
    if (given := list(found.shape)) != [2, classes]:
        raise ValueError(f"model {name!r} must map [2, {', '.join(map(str, shape))}] to [2, {classes}], got {given}")
    built.train()


@model
def logistic(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Multinomial logistic regression."""
    return _dense(shape, classes)


@model
def mlp(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two hidden layers, 128 and 64 units."""
    return _dense(shape, 128, 64, classes)


@model
def student(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Half of `mlp`: 64 and 32 units; what a larger teacher is distilled into."""
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
    channels, height, width = _image(shape, smallest=16)
    pooled = [((side - 4) // 2 - 4) // 2 for side in (height, width)]
    return nn.Sequential(
        _he(nn.Conv2d(channels, 10, 5)), nn.MaxPool2d(2), nn.ReLU(),
        _he(nn.Conv2d(10, 20, 5)), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), _he(nn.Linear(20 * math.prod(pooled), 50)), nn.ReLU(), _he(nn.Linear(50, classes), 0.5),
    )  # fmt: skip


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


def _image(shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise ValueError(
            f"samples must be images [channels, {smallest} or more, {smallest} or more], got {list(shape)}"
        )
    channels, height, width = shape
    return channels, height, width
