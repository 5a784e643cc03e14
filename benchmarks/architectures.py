"""Any model to a file: thirteen architectures by seven recipes, each file beside the torch module it was made from."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedlab_kit as fk
from benchmarks.harness import Row, fresh, peak_mb
from fedlab_kit.data import load
from fedlab_kit.models import build

BUILT_IN = ("logistic", "mlp", "student", "2nn", "cnn", "resnet")
RECIPES = {
    "fp32": fk.Recipe(),
    "fp16": fk.Recipe(dtype="fp16"),
    "int8 dynamic": fk.Recipe(dtype="int8", quantization="dynamic"),
    "int8 static": fk.Recipe(dtype="int8"),
    "int4": fk.Recipe(dtype="int4"),
    "int2": fk.Recipe(dtype="int2"),
    "half the channels, int8": fk.Recipe(prune="channel", prune_ratio=0.5, dtype="int8"),
}


def architectures() -> list[Row]:
    """One epoch of training on mnist_5k each (ResNet18: 640 pictures of 3x32x32), then seven files; one core."""
    return [row for name in (*BUILT_IN, *OWN) for row in fresh("benchmarks.architectures:files", name=name)]


def files(name: str) -> list[Row]:
    """Train one network and measure its files: bytes, agreement with torch, seconds, peak memory of the process."""
    torch.set_num_threads(1)
    data = pictures(name)
    torch.manual_seed(0)
    net = build(name, data.shape, 10, seed=1) if name in BUILT_IN else OWN[name]()
    _epoch(net, data)
    with torch.no_grad():
        expected = net.eval()(data.preprocess(data.validation.x[:500])).numpy()
    rows = [{"network": name, "recipe": recipe, **_file(net, RECIPES[recipe], data, expected)} for recipe in RECIPES]
    later = [row["seconds"] for row in rows[1:] if row["seconds"] != ""]
    typical = {"network": name, "recipe": "median after the first", "seconds": round(median(later), 2)}
    return [*rows, {**typical, "note": f"peak {peak_mb():.0f} MB"}]


def pictures(name: str) -> fk.Dataset:
    """mnist_5k, or what ResNet18 is asked about: 640 to train and 500 to validate, 3x32x32."""
    data = load("mnist_5k")
    if name != "ResNet18":
        return data

    def enlarged(split: fk.Split, samples: int) -> fk.Split:
        return fk.Split(F.pad(split.x[:samples], (2, 2, 2, 2)).expand(-1, 3, -1, -1).clone(), split.y[:samples])

    parts = (
        enlarged(data.train, 640),
        enlarged(data.validation, 500),
        enlarged(data.public, 100),
        enlarged(data.test, 500),
    )
    return fk.Dataset("mnist_5k_rgb", data.classes, *parts, data.preprocess)


def _epoch(net: nn.Module, data: fk.Dataset) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9)
    for index in torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0)).split(32):
        optimizer.zero_grad()
        F.cross_entropy(net(data.preprocess(data.train.x[index])), data.train.y[index]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


def _file(net: nn.Module, recipe: fk.Recipe, data: fk.Dataset, expected: np.ndarray) -> Row:
    began = time.perf_counter()
    try:
        artifact = fk.compress(net, recipe, dataset=data)
    except ValueError as error:
        return {"seconds": "", "note": str(error)}
    seconds = time.perf_counter() - began
    found = artifact.session.run(None, {"x": data.validation.x[:500].numpy()})[0]
    return {
        "bytes": artifact.bytes,
        "zstd": artifact.zstd_bytes,
        "accuracy": round(artifact.accuracy, 3),
        "equal answers": f"{(found.argmax(1) == expected.argmax(1)).mean():.1%}",
        "largest difference": f"{np.abs(found - expected).max():.2g}",
        "seconds": round(seconds, 2),
        "note": artifact.note,
    }


class _Rows(nn.Module):
    """A picture read row by row by what follows, and its last or mean answer classified."""

    def __init__(self, body: nn.Module, width: int, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.body, self.head = first or nn.Identity(), body, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Any = self.body(self.first(x[:, 0]))
        return self.head(found[0][:, -1] if isinstance(found, tuple) else found.mean(1))


class _Block(nn.Module):
    """A residual block of ResNet18 (He et al. 2016)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.short = (
            nn.Identity()
            if stride == 1 and inputs == width
            else nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


class _Dense(nn.Module):
    """A layer of DenseNet (Huang et al. 2017): what it finds is put beside what came in."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


def _normed(inputs: int, width: int, stride: int = 1, groups: int = 1, size: int = 3) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, width, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(width), nn.ReLU()]


def _pooled(*layers: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def _mobile() -> nn.Module:
    """Depthwise and pointwise convolutions in turns (MobileNet, Howard et al. 2017)."""
    layers = _normed(1, 16, 2)
    for inputs, width, stride in ((16, 32, 1), (32, 64, 2), (64, 64, 1)):
        layers += [*_normed(inputs, inputs, stride, groups=inputs), *_normed(inputs, width, size=1)]
    return _pooled(*layers, width=64)


def _resnet18() -> nn.Module:
    blocks: list[nn.Module] = []
    for inputs, width, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        blocks += [_Block(inputs, width, stride), _Block(width, width, 1)]
    return _pooled(*_normed(3, 64), *blocks, width=512)


OWN: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm CNN": lambda: _pooled(*_normed(1, 16, 2), *_normed(16, 32, 2), *_normed(32, 64), width=64),
    "MobileNet-like": _mobile,
    "DenseNet-like": lambda: _pooled(*_normed(1, 16, 2), *(_Dense(16 + 12 * i, 12) for i in range(4)), width=64),
    "LSTM": lambda: _Rows(nn.LSTM(28, 64, batch_first=True), 64),
    "GRU": lambda: _Rows(nn.GRU(28, 64, batch_first=True), 64),
    "transformer encoder": lambda: _Rows(
        nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 32, nn.Linear(28, 32)
    ),
    "ResNet18": _resnet18,
}
