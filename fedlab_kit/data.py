"""Data sets: their splits, and the one preprocessing recipe that every client shares and a deployed model carries."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlab_kit.catalog import dataset, lookup
from fedlab_kit.download import FASHION_MNIST, MNIST, Source, fetch, read_idx

DIGITS = tuple("0123456789")
GARMENTS = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SPLITS = ("train", "validation", "public", "test")


@dataclass(frozen=True)
class Split:
    """Samples as they are stored, and their labels.

    `x`: uint8 images [n, 1, 28, 28] or float32 features [n, d]; `y`: int64 labels [n]; `site`: int64 [n], which of
    the data set's sites (hospitals, say) each sample comes from, or None.
    """

    x: Tensor
    y: Tensor
    site: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Preprocess:
    """Raw values -> float32 `(raw - mean) / std`; scalars for images, one number per feature [d] for tables.

    Constants of the training split, the same on every client; stored with a run and baked into its exported graph.
    """

    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]

    def __call__(self, raw: Tensor) -> Tensor:
        mean, std = (
            torch.as_tensor(value, dtype=torch.float32, device=raw.device) for value in (self.mean, self.std)
        )
        return raw.to(torch.float32, copy=True).sub_(mean).div_(std)

    def to_dict(self) -> dict[str, Any]:
        """The constants as JSON values."""
        return json.loads(json.dumps({"mean": self.mean, "std": self.std}))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        """The inverse of `to_dict`."""
        return cls(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        )


@dataclass(frozen=True)
class Dataset:
    """A classification task: four splits, what the labels and sites are called, and how raw values are prepared.

    `train` is what the clients share out, `validation` feeds every curve and plot, `public` is unlabelled data that
    the server may use, `test` is opened by exports and benchmark tables only. Raises ValueError when the tensors do not fit
    together.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    public: Split
    test: Split
    preprocess: Preprocess
    sites: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in SPLITS:
            self._check(name, getattr(self, name))

    def _check(self, name: str, split: Split) -> None:
        where = f"dataset {self.name!r}, split {name}"
        if split.x.dtype not in (torch.uint8, torch.float32) or split.y.dtype != torch.int64:
            raise ValueError(
                f"{where}: x must be uint8 or float32 and y int64, got {split.x.dtype} and {split.y.dtype}"
            )
        if len(split.x) != len(split.y) or split.x.shape[1:] != self.train.x.shape[1:]:
            raise ValueError(
                f"{where}: x must be [{len(split.y)}, {', '.join(map(str, self.shape))}], got {list(split.x.shape)}"
            )
        if len(split) and not 0 <= int(split.y.min()) <= int(split.y.max()) < len(self.classes):
            raise ValueError(
                f"{where}: labels must be 0 to {len(self.classes) - 1}, got {int(split.y.min())} to {int(split.y.max())}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.train.x.shape[1:])

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything: names, preprocessing, and each tensor's type, shape and bytes."""
        digest = hashlib.sha256(repr((self.name, self.classes, self.sites, self.preprocess)).encode())
        for name in SPLITS:
            split: Split = getattr(self, name)
            for tensor in (split.x, split.y, split.site):
                if tensor is not None:
                    digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
                    digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()


def load(name: str) -> Dataset:
    """The registered data set of that name, built once per process. ValueError lists the names that exist."""
    return _build(lookup("dataset", name))


@lru_cache(maxsize=4)
def _build(function: Callable[[], Dataset]) -> Dataset:
    """Cached by function, not by name: what a notebook registers again is built again."""
    built = function()
    if not isinstance(built, Dataset):
        raise ValueError(f"dataset {function.__name__!r} must return a Dataset, got {type(built).__name__}")
    return built


@dataset
def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits (8x8), each drawn at a random place in 28x28 pixels with light noise.

    Split by original image: train 1,000 (two views each), validation 197, public 100, test 500 (one view each).
    Offline, and the same bytes on every machine: all arithmetic is in integers.
    """
    small, labels = _bundled_digits()
    rng = np.random.default_rng(1797)
    order = rng.permutation(len(labels))
    parts = np.split(order, [1000, 1197, 1297])
    parts[0] = np.tile(parts[0], 2)
    train, validation, public, test = (
        Split(torch.from_numpy(_views(small[part], rng)), torch.from_numpy(labels[part])) for part in parts
    )
    return Dataset("digits", DIGITS, train, validation, public, test, Preprocess(mean=40.0, std=75.0))


@dataset
def mnist() -> Dataset:
    """MNIST (LeCun, Cortes and Burges): 70,000 handwritten digits, 28x28."""
    return images(MNIST, DIGITS, Preprocess(mean=33.3184, std=78.5675))


@dataset
def fashion_mnist() -> Dataset:
    """Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017): 70,000 pictures of clothes, 28x28, harder than MNIST."""
    return images(FASHION_MNIST, GARMENTS, Preprocess(mean=72.9404, std=90.0212))


def images(
    source: Source,
    classes: tuple[str, ...],
    preprocess: Preprocess,
    validation: int = 5000,
    public: int = 1000,
) -> Dataset:
    """A published set of four idx files; validation and public samples are drawn from its training split."""
    x, labels, test_x, test_labels = (
        torch.from_numpy(read_idx(fetch(source, file), dimensions))
        for file, dimensions in zip(source.md5, (3, 1, 3, 1), strict=True)
    )
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    x, y = x.unsqueeze(1), labels.long()
    parts = order.split([len(order) - validation - public, validation, public])
    splits = [Split(x[part], y[part]) for part in parts]
    return Dataset(source.name, classes, *splits, Split(test_x.unsqueeze(1), test_labels.long()), preprocess)


def _bundled_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [1797, 8, 8] of values 0 to 16 and labels int64 [1797], from the file inside scikit-learn.

    Read without importing scikit-learn, which takes a second.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise ValueError("dataset 'digits' needs scikit-learn: pip install scikit-learn")
    with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return table[:, :64].reshape(-1, 8, 8), table[:, 64].astype(np.int64)


def _views(small: np.ndarray, rng: np.random.Generator, size: int = 20, noise: int = 40) -> np.ndarray:
    """uint8 [n, 1, 28, 28]: each image enlarged to size x size, at a random offset, with triangular noise."""
    weights = _bilinear(8, size)
    large = weights @ small.astype(np.int64) @ weights.T * 255 // (16 * (2 * size) ** 2)
    canvas = np.zeros((len(small), 28, 28), np.int64)
    rows, columns = rng.integers(0, 28 - size + 1, (2, len(small)))
    for image, digit, row, column in zip(canvas, large, rows, columns, strict=True):
        image[row : row + size, column : column + size] = digit
    canvas += rng.integers(-noise, noise + 1, (2, *canvas.shape)).sum(0)
    return canvas.clip(0, 255).astype(np.uint8)[:, None]


def _bilinear(small: int, large: int) -> np.ndarray:
    """Weights int64 [large, small] of bilinear interpolation; each row sums to 2 * large, so that all are whole."""
    position = ((2 * np.arange(large) + 1) * small - large).clip(0, 2 * large * (small - 1))
    left, share = np.divmod(position, 2 * large)
    weights = np.zeros((large, small + 1), np.int64)
    weights[np.arange(large), left] = 2 * large - share
    weights[np.arange(large), left + 1] = share
    return weights[:, :small]
