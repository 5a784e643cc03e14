"""The built-in models, small enough for a laptop's single core, and how any registered model is built."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fedlab_kit.catalog import lookup, model


def build(name: str, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """The registered model for samples of that shape, on the CPU, its initial weights a function of `seed` alone.

    The global random generator is left as it was. Raises ValueError for an unknown name, and when the function
    does not give a module that maps [n, *shape] to [n, classes].
    """
    function = lookup("model", name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        built = function(shape, classes)
        if not isinstance(built, nn.Module):
            raise ValueError(f"model {name!r} must be a torch.nn.Module, got {type(built).__name__}")
        _check_output(name, built, shape, classes)
    return built


def _check_output(name: str, built: nn.Module, shape: tuple[int, ...], classes: int) -> None:
    built.eval()
    try:
        with torch.no_grad():
            found = list(built(torch.zeros(2, *shape)).shape)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"model {name!r} does not take samples of shape {list(shape)}: {error}") from error
    if found != [2, classes]:
        raise ValueError(
            f"model {name!r} must map [2, {', '.join(map(str, shape))}] to [2, {classes}], got {found}"
        )
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
    """SimpleCNN, 21,840 parameters on 28x28: two 5x5 convolutions, each pooled by two, and two dense layers."""
    channels, height, width = _image(shape, smallest=16)
    pooled = [((side - 4) // 2 - 4) // 2 for side in (height, width)]
    return nn.Sequential(
        nn.Conv2d(channels, 10, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(20 * math.prod(pooled), 50), nn.ReLU(), nn.Linear(50, classes),
    )  # fmt: skip


@model
def resnet(shape: tuple[int, ...], classes: int) -> nn.Module:
    """A residual network of about 0.7 M parameters without normalization: see `ResNet`."""
    return ResNet(_image(shape, smallest=8)[0], classes)


class Block(nn.Module):
    """`relu(skip(x) + branch(x))`: two 3x3 convolutions whose second starts at zero, so that the block starts as its skip."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        nn.init.zeros_(self.conv2.weight)
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] -> [n, outputs, h / stride, w / stride]."""
        return torch.relu(self.skip(x) + self.conv2(torch.relu(self.conv1(x))))


class ResNet(nn.Module):
    """Four residual blocks that work at 7x7 and 4x4 on 28x28 images, then a mean over the pixels and a dense layer.

    No BatchNorm: its running statistics are what federated averaging of unlike clients breaks. Branches that start at
    zero take its place (Fixup, Zhang et al. 2019; SkipInit, De and Smith 2020), and leave a graph of Conv, Relu and Add
    alone, which quantizes and prunes well.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 32, 5, 2, 2)
        self.blocks = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 128, 2), Block(128, 128, 1))
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, h, w] -> logits [n, classes]."""
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


def _dense(shape: tuple[int, ...], *widths: int) -> nn.Sequential:
    sizes = (math.prod(shape), *widths)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _image(shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise ValueError(
            f"samples must be images [channels, {smallest} or more, {smallest} or more], got {list(shape)}"
        )
    channels, height, width = shape
    return channels, height, width
