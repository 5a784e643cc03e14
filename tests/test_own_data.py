"""Folders of pictures, tables and arrays as people bring them: read as PIL, pandas and numpy do, or refused."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import fedlab_kit as fk
from fedlab_kit import download, patients
from fedlab_kit.data import SPLITS
from fedlab_kit.download import DataError
from fedlab_kit.partition import partition

RNG = np.random.default_rng(0)


def grey(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (6, 8), dtype=np.uint8)


def save(folder: Path, picture: np.ndarray | Image.Image, name: str = "a.png", **how: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(folder / name, **how)
    return folder / name


def fill(root: Path, counts: dict[str, int], *shape: int) -> Path:
    """A folder for each class with so many random pictures, all different."""
    for number, (label, count) in enumerate(counts.items()):
        for n in range(count):
            save(root / label, grey(1000 * number + n, *shape), f"{n}.png")
    return root


def samples(dataset: fk.Dataset) -> list[tuple[str, bytes, str]]:
    """The split, the values and the class of every sample."""
    return [
        (name, x.numpy().tobytes(), dataset.classes[y])
        for name in SPLITS
        for x, y in zip(getattr(dataset, name).x, getattr(dataset, name).y.tolist(), strict=True)
    ]


def sizes(dataset: fk.Dataset) -> list[int]:
    return [len(getattr(dataset, name)) for name in SPLITS]


def at(dataset: fk.Dataset, label: str) -> np.ndarray:
    """The one sample of a class, wherever it is."""
    (found,) = [
        x for name in SPLITS for x in getattr(dataset, name).x[getattr(dataset, name).y == dataset.classes.index(label)]
    ]
    return found.numpy()


# folders


def test_a_folder_is_read_as_pil_reads_it_and_split_by_class(tmp_path: Path) -> None:
    root = fill(tmp_path, {"cat": 20, "dog": 10})
    data = fk.from_folder(root)
    assert data.classes == ("cat", "dog") and data.shape == (1, 6, 8) and data.train.x.dtype == torch.uint8
    assert sizes(data) == [18, 6, 0, 6] and torch.bincount(data.train.y).tolist() == [12, 6]
    assert torch.bincount(data.test.y).tolist() == [4, 2]
    expected = sorted((np.asarray(Image.open(file)).tobytes(), file.parent.name) for file in root.rglob("*.png"))
    assert sorted(sample[1:] for sample in samples(data)) == expected
    pixels = data.train.x.double()
    assert data.preprocess.mean == pytest.approx([float(pixels.mean())])
    assert data.preprocess.std == pytest.approx([float(pixels.std(correction=0))])


def test_only_what_pictures_show_counts_not_what_files_are_called_or_when_they_were_made(tmp_path: Path) -> None:
    fill(tmp_path / "one", {"a": 6, "b": 5})
    names = sorted((tmp_path / "one").rglob("*.png"), reverse=True)
    for number, file in enumerate(names):
        save(tmp_path / "two" / file.parent.name, Image.open(file), f"{number:03}.bmp")
    for folder in ("two", "two/a"):
        save(tmp_path / folder / ".ipynb_checkpoints", grey(99))
        (tmp_path / folder / ".DS_Store").write_text("x")
    (tmp_path / "two" / "README.txt").write_text("files beside the classes are no pictures")
    one, two = (fk.from_folder(tmp_path / name) for name in ("one", "two"))
    assert one.digest == two.digest
    assert fk.from_folder(tmp_path / "one", seed=1).digest != one.digest
    save(tmp_path / "two" / "a", grey(98), "new.png")
    assert fk.from_folder(tmp_path / "two").digest != one.digest


def test_the_digest_of_made_up_pictures_is_the_same_everywhere(tmp_path: Path) -> None:
    ramp = np.arange(48, dtype=np.uint8).reshape(6, 8)
    for n in range(10):
        save(tmp_path / ("low" if n < 5 else "high"), ramp + 20 * n, f"{n}.png")
    assert fk.from_folder(tmp_path, size=4).digest == "cd13a26b5d5606759aec67b719afc215061495df03c1cab7ae96ba2f152844bc"


def test_class_names_are_the_same_however_a_file_system_spells_them(tmp_path: Path) -> None:
    fill(tmp_path / "composed", {"F\u00fcchse": 3, "\u72d7": 3})
    fill(tmp_path / "apart", {"Fu\u0308chse": 3, "\u72d7": 3})
    composed, apart = (fk.from_folder(tmp_path / name) for name in ("composed", "apart"))
    assert composed.classes == ("F\u00fcchse", "\u72d7") and composed.digest == apart.digest


def test_given_splits_stay_as_they_are(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 4, "b": 4}, 5, 5)
    fill(tmp_path / "Val", {"a": 2, "b": 2}, 5, 5)
    for number, file in enumerate(sorted(tmp_path.glob("Val/*/*"))):
        save(file.parent, grey(50 + number, 5, 5), file.name)
    save(tmp_path / "test" / "a", grey(60, 5, 5))
    data = fk.from_folder(tmp_path)
    assert sizes(data) == [8, 4, 0, 1] and data.classes == ("a", "b")
    assert np.array_equal(data.test.x[0, 0], grey(60, 5, 5))


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert fk.from_folder(fill(tmp_path, {"train": 5, "plane": 5})).classes == ("plane", "train")


def test_pictures_of_all_kinds_are_as_pil_shows_them(tmp_path: Path) -> None:
    rgb = grey(1, 6, 8, 3)
    palette = Image.fromarray(grey(2, 6, 8, 3)).quantize(16)
    alpha = Image.fromarray(np.dstack([grey(3, 6, 8, 3), np.full((6, 8), 255, np.uint8)]))
    clear = Image.new("RGBA", (8, 6), (10, 20, 30, 0))
    for label, picture in {"rgb": rgb, "palette": palette, "alpha": alpha, "clear": clear, "grey": grey(4)}.items():
        save(tmp_path / label, picture)
    save(tmp_path / "bits", Image.fromarray(grey(5) > 127))
    with pytest.warns(UserWarning, match="train has no sample of"):
        data = fk.from_folder(tmp_path)
    assert data.shape == (3, 6, 8)
    for label, picture in {"rgb": Image.fromarray(rgb), "palette": palette, "alpha": alpha}.items():
        assert np.array_equal(at(data, label), np.asarray(picture.convert("RGB")).transpose(2, 0, 1))
    assert (at(data, "clear") == 255).all()
    assert np.array_equal(at(data, "grey"), np.stack([grey(4)] * 3))
    assert np.array_equal(at(data, "bits")[0], 255 * (grey(5) > 127))


def test_deep_pictures_keep_their_values(tmp_path: Path) -> None:
    for n in range(8):
        save(tmp_path / "ab"[n % 2], (np.arange(48) * 1300 + n).astype(np.uint16).reshape(6, 8), f"{n}.png")
    data = fk.from_folder(tmp_path)
    assert data.train.x.dtype == torch.float32 and float(data.train.x.max()) > 60_000
    assert {int(x.min()) for name in SPLITS for x in getattr(data, name).x} == set(range(8))
    save(tmp_path / "a", grey(1), "shallow.png")
    with pytest.raises(DataError, match=r"one type: 6x8 of float32, .*0\.png, 6x8 of uint8, .*shallow\.png$"):
        fk.from_folder(tmp_path)


def test_a_photograph_stands_the_right_way_up(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter, clockwise
    for n in range(4):
        save(tmp_path / "ab"[n % 2], grey(n), f"{n}.png", exif=exif)
    data = fk.from_folder(tmp_path, shares=(1, 0, 0))
    assert data.shape == (1, 8, 6)
    assert {x.numpy().tobytes() for x in data.train.x} == {np.rot90(grey(n), -1).tobytes() for n in range(4)}


def test_sizes_that_differ_are_named_or_scaled(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 3, "b": 3}, 10, 10)
    save(tmp_path / "b", np.full((8, 20), 77, np.uint8), "wide.png")
    with pytest.raises(DataError, match=r"of one size \(size= scales them\) .*10x10 .*a/0\.png, 8x20 .*b/wide\.png$"):
        fk.from_folder(tmp_path)
    data = fk.from_folder(tmp_path, size=5, shares=(1, 0, 0))
    assert data.shape == (1, 5, 5)
    found = {x.numpy().tobytes() for x in data.train.x}
    assert bytes([77] * 25) in found
    assert np.asarray(Image.fromarray(grey(0, 10, 10)).resize((5, 5), Image.Resampling.BILINEAR)).tobytes() in found
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        fk.from_folder(tmp_path, size=0)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "folder"])
def test_a_file_that_is_no_picture_is_named(tmp_path: Path, damage: str) -> None:
    root = fill(tmp_path, {"a": 3, "b": 3}, 40, 40)
    bad = root / "b" / "bad.png"
    content = (root / "a" / "0.png").read_bytes()
    if damage == "folder":
        bad.mkdir()
    else:
        bad.write_bytes({"empty": b"", "text": b"hello", "cut": content[: len(content) // 2]}[damage])
    with pytest.raises(DataError, match=r"bad\.png cannot be read as a picture: ") as error:
        fk.from_folder(root)
    assert "\n" not in str(error.value)


def test_folders_with_nothing_to_learn_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match="must be a folder with a folder of pictures for each class"):
            fk.from_folder(folder)
    fill(tmp_path, {"a": 3})
    with pytest.raises(DataError, match=r"there must be two classes and samples to learn from, got 3 of a$"):
        fk.from_folder(tmp_path)
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=r"b must hold pictures of a class, it is empty: remove it"):
        fk.from_folder(tmp_path)


def test_five_samples_and_a_class_of_one(tmp_path: Path) -> None:
    data = fk.from_folder(fill(tmp_path, {"a": 3, "b": 2}))
    assert sizes(data) == [3, 1, 0, 1] and set(data.train.y.tolist()) == {0, 1}
    fill(tmp_path, {"one": 1, "some": 0}, 3, 3)
    seen = Counter()
    for seed in range(20):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            data = fk.from_folder(tmp_path, size=3, seed=seed)
        told = any("train has no sample of" in str(one.message) and "one" in str(one.message) for one in said)
        assert told == (data.classes.index("one") not in data.train.y)
        seen[told] += 1
    assert len(seen) == 2


# copies


def test_no_sample_is_in_two_splits(tmp_path: Path) -> None:
    root = fill(tmp_path, {"a": 20, "b": 20})
    for n in range(10):
        save(root / "ab"[n % 2], grey(n), f"copy{n}.png")  # of ten pictures of class a
    with pytest.warns(
        UserWarning, match="^no sample may be in two splits: 10 equal another and go with it, 0 are left out"
    ):
        data = fk.from_folder(root)
    where: dict[bytes, set[str]] = {}
    for split, pixels, _ in samples(data):
        where.setdefault(pixels, set()).add(split)
    assert len(where) == 40 and all(len(splits) == 1 for splits in where.values())
    assert sum(sizes(data)) == 50


def test_what_is_given_twice_stays_in_the_later_split(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 4, "b": 4})
    save(tmp_path / "train" / "b", grey(0), "again.png")  # and a third time, under another label
    for split, seed in (("val", 0), ("val", 70), ("test", 71), ("test", 1)):
        save(tmp_path / split / "a", grey(seed), f"{seed}.png")
    with pytest.warns(UserWarning, match="0 equal another and go with it, 3 are left out of one split as they are in"):
        data = fk.from_folder(tmp_path)
    assert sizes(data) == [6, 2, 0, 2]
    train = {x.numpy().tobytes() for x in data.train.x}
    assert not train & {grey(seed).tobytes() for seed in (0, 1, 70, 71)}


@pytest.mark.parametrize("shares", [(0.0, 0.5, 0.5), (0.8, 0.3, 0.0), (0.5, -0.1, 0.2), (0.5, 0.5)])
def test_shares_that_cannot_be_dealt_are_refused(tmp_path: Path, shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="shares must be three, of train"):
        fk.from_folder(fill(tmp_path, {"a": 2, "b": 2}), shares=shares)  # type: ignore[arg-type]


def test_shares_are_those_of_each_class_and_the_rest_is_test(tmp_path: Path) -> None:
    data = fk.from_folder(fill(tmp_path, {"a": 30, "b": 10}), shares=(0.5, 0.2, 0.1))
    assert sizes(data) == [20, 8, 4, 8]
    assert [torch.bincount(getattr(data, name).y).tolist() for name in SPLITS] == [[15, 5], [6, 2], [3, 1], [6, 2]]


# arrays


def npz(path: Path, **arrays: object) -> Path:
    np.savez(path / "own.npz", **arrays)
    return path / "own.npz"


def test_arrays_are_split_by_class(tmp_path: Path) -> None:
    x, y = RNG.integers(0, 256, (30, 5, 7), dtype=np.uint8), np.arange(30) % 3
    data = fk.from_npz(npz(tmp_path, images=x, labels=y[:, None], note="not an array of samples"))
    assert data.shape == (1, 5, 7) and data.classes == ("0", "1", "2") and sizes(data) == [18, 6, 0, 6]
    assert sorted(sample[1:] for sample in samples(data)) == sorted(
        (one.tobytes(), str(k)) for one, k in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("names", ["{}_images {}_labels", "X_{} y_{}", "{}.data {}.target"])
def test_names_of_splits_as_people_write_them(tmp_path: Path, names: str) -> None:
    arrays = {}
    for seed, split in enumerate(("train", "val", "test")):
        x, y = names.format(split, split).split()
        arrays |= {x: grey(seed, 4 + seed, 3, 3), y: np.arange(4 + seed) % 2}
    data = fk.from_npz(npz(tmp_path, **arrays))
    assert sizes(data) == [4, 5, 0, 6] and np.array_equal(data.test.x[:, 0], grey(2, 6, 3, 3))
    assert data.validation.y.tolist() == [0, 1, 0, 1, 0]


def test_a_split_that_is_missing_comes_from_train(tmp_path: Path) -> None:
    """As of keras' mnist.npz, which has no validation: 0.2 of 0.6 and 0.2."""
    arrays = {
        "x_train": grey(0, 40, 4, 4),
        "y_train": np.arange(40) % 2,
        "x_test": grey(1, 9, 4, 4),
        "y_test": np.arange(9) % 2,
    }
    data = fk.from_npz(npz(tmp_path, **arrays))
    assert sizes(data) == [30, 10, 0, 9] and np.array_equal(data.test.x[:, 0], grey(1, 9, 4, 4))
    assert torch.bincount(data.validation.y).tolist() == [5, 5]
    assert sizes(fk.from_npz(npz(tmp_path, **arrays), shares=(0.6, 0.1, 0.3))) == [24, 4, 12, 9]


@pytest.mark.parametrize(
    ("y", "classes"),
    [
        (np.array([-1, 1] * 5), ("-1", "1")),
        (np.array([True, False] * 5), ("False", "True")),
        (np.array(["no", "yes"] * 5), ("no", "yes")),
        (np.array(["10", "9"] * 5), ("9", "10")),
        (np.array([[2.0], [7.0]] * 5), ("2", "7")),
        (np.array([0, 255] * 5, np.uint8), ("0", "255")),
    ],
)
def test_labels_of_all_kinds(tmp_path: Path, y: np.ndarray, classes: tuple[str, str]) -> None:
    x = np.arange(20.0).reshape(10, 2)
    data = fk.from_npz(npz(tmp_path, x=x, y=y), shares=(1, 0, 0))
    order = {name: number for number, name in enumerate(classes)}
    numbers = [order[f"{label:g}" if y.dtype.kind in "iuf" else str(label)] for label in y.ravel()]
    assert data.classes == classes and data.train.y.tolist() == numbers
    assert data.train.y.dtype == torch.int64 and data.train.x.tolist() == x.tolist()


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (grey(0, 10, 6, 6, 3), np.moveaxis(grey(0, 10, 6, 6, 3), 3, 1)),
        (grey(0, 10, 3, 6, 6), grey(0, 10, 3, 6, 6)),
        (grey(0, 10, 6, 6).astype(np.int64), grey(0, 10, 1, 6, 6)),
        (grey(0, 10, 6, 6) > 127, (grey(0, 10, 1, 6, 6) > 127).astype(np.uint8)),
        (grey(0, 10, 6, 6) / np.float64(255), (grey(0, 10, 1, 6, 6) / np.float64(255)).astype(np.float32)),
        (grey(0, 10, 6, 6).astype(np.float32), grey(0, 10, 1, 6, 6).astype(np.float32)),
        (grey(0, 10, 6, 6).astype(np.uint16) * 257, grey(0, 10, 1, 6, 6).astype(np.float32) * 257),
        (grey(0, 10, 6, 6).astype(np.int16) - 9, grey(0, 10, 1, 6, 6).astype(np.float32) - 9),
        (grey(0, 10, 6), grey(0, 10, 6).astype(np.float32)),
    ],
)
def test_values_of_all_kinds(tmp_path: Path, x: np.ndarray, expected: np.ndarray) -> None:
    data = fk.from_npz(npz(tmp_path, x=x, y=np.arange(10) % 2), shares=(1, 0, 0))
    found = data.train.x.numpy()
    assert found.dtype == expected.dtype and np.array_equal(found, expected)
    rows = np.moveaxis(expected, 1, -1).reshape(-1, expected.shape[1]).astype(np.float64)
    assert data.preprocess.mean == pytest.approx(rows.mean(0).tolist()) and data.preprocess.std == pytest.approx(
        rows.std(0)
    )


def test_a_column_that_never_varies_is_kept_at_its_unit(tmp_path: Path) -> None:
    x = np.stack([np.arange(10.0), np.full(10, 3.0)], 1)
    assert fk.from_npz(npz(tmp_path, x=x, y=np.arange(10) % 2), shares=(1, 0, 0)).preprocess.std[1] == 1.0


X, Y = np.arange(8.0).reshape(4, 2), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.array([{}] * 4), "y": Y}, "without objects: Object arrays cannot be loaded when allow_pickle=False"),
        ({"x": X, "y": np.array(["a", 1, None, 2], object)}, "without objects: Object arrays"),
        ({"pictures": X, "diagnoses": Y}, "must hold x and y, or x_train, .*, got pictures, diagnoses$"),
        ({"x": X, "images": X, "y": Y}, "must hold x and y, .*, got x, images, y$"),
        ({"x_train": X}, "must hold x and y, .*, got x_train$"),
        ({"x_test": X, "y_test": Y}, "must hold x and y, .*, got x_test, y_test$"),
        ({}, "must hold x and y, or x_train"),
        ({"x": X, "y": Y[:3]}, r"train: x is float64 \[4, 2\], y \[3\]: x must be .* and y \[n\] or \[n, 1\]$"),
        ({"x": X, "y": np.eye(4)}, r"y \[4, 4\]: x must be .* and y \[n\] or \[n, 1\]$"),
        ({"x": X, "y": np.zeros((4, 1, 3))}, r"y \[4, 1, 3\]: x must be"),
        ({"x": np.float64(3), "y": np.float64(3)}, r"x is float64 \[\], y \[\]: x must be"),
        (
            {"x_train": X, "y_train": Y, "x_val": X[:, :1], "y_val": Y},
            r"validation: x is float64 \[4, 1\], .* as in train, float64 \[4, 2\], and",
        ),
        (
            {"x_train": X, "y_train": Y, "x_test": X.astype(np.uint8), "y_test": Y},
            "test: x is uint8 .* must be as in train, float64",
        ),
        ({"x": X, "y": Y + 0.5}, "labels must be whole numbers, words or bool, got float64"),
        ({"x": X, "y": np.array([0, 1, np.nan, 1])}, "labels must be whole numbers, words or bool, got float64"),
        ({"x": X, "y": np.array([0, 1, np.inf, 1])}, "labels must be whole numbers, words or bool, got float64"),
        ({"x": X, "y": Y + 0j}, "labels must be whole numbers, words or bool, got complex128"),
        ({"x": X, "y": 0 * Y}, "there must be two classes and samples to learn from, got 4 of 0$"),
        ({"x": X.astype(str), "y": Y}, "x must be numbers .*, got <U32"),
        (
            {"x": np.zeros((4, 4, 4, 4)), "y": Y},
            r"x must be numbers .* with 1 to 4 channels, got float64 \[4, 4, 4, 4\]$",
        ),
        ({"x": np.zeros((4, 9, 9, 9)), "y": Y}, r"got float64 \[4, 9, 9, 9\]$"),
        ({"x": np.zeros((0, 2)), "y": Y[:0]}, r"x must be numbers .*, got float64 \[0, 2\]$"),
        ({"x": np.array([[0, 1], [1e300, 2], [3, 4], [5, 6]]), "y": Y}, "x must be finite, row 1, column 0 is inf"),
        ({"x": np.array([[0, 1], [2, np.nan], [3, 4], [5, 6]]), "y": Y}, "x must be finite, row .*, column 1 is nan"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_in_a_line(tmp_path: Path, arrays: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        fk.from_npz(npz(tmp_path, **arrays), shares=(1, 0, 0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "bent", "npy", "pickle"])
def test_a_file_that_is_no_npz_is_named(tmp_path: Path, damage: str) -> None:
    path = npz(tmp_path, x=RNG.random((99, 9)), y=np.arange(99) % 2)
    content = path.read_bytes()
    if damage == "npy":
        with path.open("wb") as file:
            np.save(file, X)
    elif damage == "missing":
        path.unlink()
    else:
        bent = content[:999] + bytes(99) + content[1098:]
        path.write_bytes({"text": b"hello", "bent": bent, "cut": content[:-400], "pickle": b"\x80\x04]\x94."}[damage])
    with pytest.raises(
        DataError, match=r"own\.npz must be an \.npz file of numbers and words, without objects: "
    ) as error:
        fk.from_npz(path)
    assert "\n" not in str(error.value)


# tables

ROWS = 30


def rows(**changes: object) -> pd.DataFrame:
    n = np.arange(ROWS)
    columns = {"age": 40 + n, "dose": 0.5 + n / 4, "smokes": np.array(["no", "yes", "past"])[n % 3], "sick": n % 2}
    return pd.DataFrame({**columns, **changes})


def csv(path: Path, table: pd.DataFrame, **how: object) -> Path:
    table.to_csv(path / "own.csv", index=False, **how)
    return path / "own.csv"


def test_a_table_is_encoded_as_pandas_does_it(tmp_path: Path) -> None:
    data = fk.from_csv(csv(tmp_path, rows()), "sick", shares=(1, 0, 0))
    assert data.features == ("age", "dose", "smokes=past", "smokes=yes") and data.classes == ("0", "1")
    expected = pd.get_dummies(rows()[["age", "dose", "smokes"]], drop_first=True).to_numpy(np.float32)
    assert np.array_equal(data.train.x, expected) and data.train.y.tolist() == rows().sick.tolist()
    assert data.preprocess.mean == pytest.approx(expected.mean(0).tolist()) and data.preprocess.std == pytest.approx(
        expected.std(0)
    )
    assert data.sites == () and data.train.site is None
    assert sizes(fk.from_csv(tmp_path / "own.csv", "sick")) == [18, 6, 0, 6]


@pytest.mark.parametrize(
    "how",
    [{"encoding": "utf-8-sig"}, {"sep": ";"}, {"sep": ";", "decimal": ","}, {"sep": "\t"}, {"quoting": 1}],
)
def test_spreadsheets_write_the_same_table_in_many_ways(tmp_path: Path, how: dict[str, object]) -> None:
    plain, other = tmp_path / "plain", tmp_path / "other"
    plain.mkdir()
    other.mkdir()
    table = rows(town=np.array(["Łódź", "New York"])[np.arange(ROWS) % 2]).rename(columns={"age": "age in years"})
    wanted = fk.from_csv(csv(plain, table), "sick")
    assert fk.from_csv(csv(other, table, **how), "sick").digest == wanted.digest
    assert wanted.features[2:] == ("smokes=past", "smokes=yes", "town=Łódź")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["well", "sick", "très malade"] * 10, ("sick", "très malade", "well")),
        ([-1, 1] * 15, ("-1", "1")),
        (["1.0", "10", " 2"] * 10, ("1", "2", "10")),
        ([True, False] * 15, ("False", "True")),
    ],
)
def test_labels_of_a_table(tmp_path: Path, labels: list[object], classes: tuple[str, ...]) -> None:
    data = fk.from_csv(csv(tmp_path, rows(sick=labels)), "sick", shares=(1, 0, 0))
    assert data.classes == classes
    if labels[0] != "1.0":
        assert [data.classes[y] for y in data.train.y] == [str(label) for label in labels]
    else:
        assert data.train.y.tolist() == [0, 2, 1] * 10


def test_rows_that_miss_a_value_are_left_out_and_counted(tmp_path: Path) -> None:
    table = rows().astype(object)
    for row, (column, value) in enumerate([("age", ""), ("dose", "NA"), ("smokes", "?"), ("sick", ""), ("age", None)]):
        table.loc[row, column] = value
    with pytest.warns(UserWarning, match=r"own\.csv: 5 of 30 rows lack a value and are left out$"):
        data = fk.from_csv(csv(tmp_path, table), "sick", shares=(1, 0, 0))
    assert data.train.x[:, 0].tolist() == list(range(45, 70)) and data.classes == ("0", "1")


def test_sites_are_a_column_and_become_clients(tmp_path: Path) -> None:
    places = np.array(["nord", "süd", "west"])[np.arange(ROWS) // 10]
    data = fk.from_csv(csv(tmp_path, rows(clinic=places, id=np.arange(ROWS))), "sick", site="clinic", drop=["id"])
    assert data.sites == ("nord", "süd", "west") and "clinic" not in data.features and "id" not in data.features
    assert [torch.bincount(getattr(data, name).site).tolist() for name in ("train", "validation", "test")] == [
        [6] * 3, [2] * 3, [2] * 3
    ]  # fmt: skip
    for name in SPLITS:
        split = getattr(data, name)
        assert (split.x[:, 0] - 40).div(10, rounding_mode="floor").tolist() == split.site.tolist()
    assert [len(shard) for shard in partition(data, "site", 3, 1.0, 0)] == [6, 6, 6]


def test_a_site_that_is_too_small_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    places = ["big"] * 25 + ["small"] * 5
    with pytest.warns(UserWarning, match="left out: site 'small' must have at least 8 usable rows, got 5"):
        data = fk.from_csv(csv(tmp_path, rows(clinic=places)), "sick", site="clinic")
    assert data.sites == ("big",) and sum(sizes(data)) == 25


def test_equal_rows_go_together_also_across_sites(tmp_path: Path) -> None:
    table = rows(clinic=["a", "b"] * 15)
    table.loc[1, ["age", "dose", "smokes"]] = table.loc[0, ["age", "dose", "smokes"]]
    with pytest.warns(UserWarning, match="no sample may be in two splits: 1 equal another and go with it"):
        data = fk.from_csv(csv(tmp_path, table), "sick", site="clinic")
    assert len([1 for name in SPLITS if (getattr(data, name).x[:, 0] == 40).any()]) == 1


@pytest.mark.parametrize(
    ("changes", "how", "message"),
    [
        ({}, {"label": "Sick"}, r"own\.csv lacks the column 'Sick'; is 'sick' it, renamed\?"),
        ({}, {"site": "hospital"}, r"own\.csv lacks the column 'hospital'; it has age, dose, smokes, sick"),
        ({}, {"drop": ["ID"]}, "lacks the column 'ID'"),
        (
            {"id": [f"P{n}" for n in range(ROWS)]},
            {},
            "column 'id' must hold numbers or few words, .* 30 different ones such as 'P0'",
        ),
        (
            {"age": ["forty", *range(29)]},
            {},
            "column 'age' must hold .* 30 different ones such as 'forty': mend or drop it",
        ),
        ({"sick": np.arange(ROWS) / 2}, {}, "labels must be whole numbers, words or bool"),
        ({"sick": 1}, {}, "there must be two classes and samples to learn from, got 30 of 1$"),
        ({"dose": ""}, {}, r"site 'own' must have at least 8 usable rows, got 0 \(30 missing value"),
        ({"clinic": ["", *"ab" * 14, "b"]}, {"site": "clinic"}, "column 'clinic' must name a site in every row"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path: Path, changes: dict, how: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        fk.from_csv(csv(tmp_path, rows(**changes)), **{"label": "sick", **how})
    assert "\n" not in str(error.value)


def test_five_rows_are_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="site 'own' must have at least 8 usable rows, got 5"):
        fk.from_csv(csv(tmp_path, rows().head(5)), "sick", drop=["smokes"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "No columns to parse"),
        (b"a,b\n1,2\n1,2,3\n", "Expected 2 fields in line 3, saw 3$"),
        (b"a,b\n1,2,3\n1,2,3\n", "loss of data"),
        ("a,b\nß,2\n".encode("latin-1"), "can't decode byte"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "own.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"own\.csv cannot be read as a table in UTF-8: .*{message}") as error:
        fk.from_csv(path, "a")
    assert "\n" not in str(error.value)


# one's own data in an experiment


def test_it_is_trained_and_compressed_like_any_other(tmp_path: Path) -> None:
    places = np.array(["nord", "west"])[np.arange(ROWS) % 2]
    path = csv(tmp_path, rows(clinic=places, sick=np.arange(ROWS) > 14))
    fk.dataset("mine")(lambda: fk.from_csv(path, "sick", site="clinic"))
    experiment = fk.Experiment(
        dataset="mine",
        model="logistic",
        clients=2,
        clients_per_round=2,
        partition="site",
        rounds=20,
        lr=0.5,
        batch_size=4,
    )
    artifact = fk.compress(fk.train(experiment), fk.Recipe())
    assert artifact.accuracy > 0.7


# pneumonia


def made_up(path: Path, counts: tuple[int, int, int] = (100, 20, 30)) -> Path:
    """A file in the published format: pictures uint8 [n, 28, 28], labels uint8 [n, 1], three of four with pneumonia."""
    arrays = {}
    for seed, (split, count) in enumerate(zip(("train", "val", "test"), counts, strict=True)):
        arrays[f"{split}_images"] = grey(seed, count, 28, 28)
        arrays[f"{split}_labels"] = (np.arange(count) % 4 > 0).astype(np.uint8)[:, None]
    (path / "pneumonia").mkdir()
    np.savez(path / "pneumonia" / "pneumoniamnist.npz", **arrays)
    return path / "pneumonia" / "pneumoniamnist.npz"


def test_pneumonia_reads_the_published_format_and_deals_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published file itself has never been read by this test, nor downloaded."""
    file = made_up(tmp_path)
    monkeypatch.setenv("FEDLAB_DATA", str(tmp_path))
    md5 = {file.name: hashlib.md5(file.read_bytes()).hexdigest()}
    monkeypatch.setattr(patients, "PNEUMONIA", download.Source("pneumonia", (), md5))
    data = patients.pneumonia()
    assert data.shape == (1, 28, 28) and data.train.x.dtype == torch.uint8 and data.classes == ("normal", "pneumonia")
    assert sizes(data) == [100, 20, 0, 30] and all(site.startswith("simulated") for site in data.sites)
    assert np.array_equal(data.test.x[:, 0], grey(2, 30, 28, 28))
    assert data.train.y.tolist() == [int(n % 4 > 0) for n in range(100)]
    counts = [torch.bincount(data.train.site[data.train.y == kind], minlength=4).tolist() for kind in (0, 1)]
    assert np.abs(np.subtract(counts, [[10, 7.5, 5, 2.5], [7.5, 15, 22.5, 30]])).max() <= 0.5
    assert data.digest == patients.pneumonia().digest
    assert data.digest == "5f4b00e0d2adf8e7f3b7063e2df48d26f73e4b5a5e870a31f556ba4003eb5574"


def test_another_file_than_the_published_pneumonia_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = made_up(tmp_path)
    monkeypatch.setenv("FEDLAB_DATA", str(tmp_path))
    with pytest.raises(
        DataError, match=r"pneumoniamnist\.npz must have the MD5 28209eda62fecd6e6a2d98b1501bb15f, found"
    ):
        patients.pneumonia()
    np.savez(file, x=grey(0, 9, 28, 28), y=np.arange(9) % 3)
    with pytest.raises(DataError, match=r"must hold pictures \[n, 28, 28\] labelled 0 and 1, got \(1, 28, 28\) of"):
        patients.radiology(file)
