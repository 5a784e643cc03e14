"""Data of one's own as a `Dataset`: a folder of pictures by class, a table as CSV, or the arrays of an .npz file."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from unicodedata import normalize

import numpy as np

from fedlab_kit.data import SPLITS, Dataset
from fedlab_kit.download import DataError
from fedlab_kit.site_tables import MISSING, Column, Schema, admit, admit_all, check_columns, deal, joined, rows_of

Shares = tuple[float, float, float]
SHARES: Shares = (0.6, 0.2, 0.0)  # of train, validation and public, for samples that come unsplit; the rest is test
PARTS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "public": 2, "test": 3, "testing": 3}
ARRAYS = dict.fromkeys(("x", "image", "images", "data"), "x") | dict.fromkeys(("y", "label", "labels", "target"), "y")


def from_folder(folder: str | Path, size: int | None = None, shares: Shares = SHARES, seed: int = 0) -> Dataset:
    """Read pictures from one folder for each class, or from such folders inside `train`, `val`, `public` and `test`.

    x is uint8 [n, 1 or 3, h, w], or float32 [n, 1, h, w] of 16-bit and float pictures. Grey ones among coloured ones
    become RGB, transparent ones lie on white; `size` cuts out the middle square and scales it. Hidden files, names and
    order of files do not count. A split that is missing is dealt from train by `shares` and `seed`. Raises DataError.
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    found = list(_pictures(Path(folder).expanduser(), size))
    if not found:
        raise DataError(f"{folder} must be a folder with a folder of pictures for each class, it holds none")
    wanted, *others = (f"{'x'.join(map(str, x.shape[1:]))} of {x.dtype}, {file}" for _, _, x, file in found)
    for other in others:
        if other.partition(",")[0] != wanted.partition(",")[0]:
            raise DataError(f"pictures must be of one size (size= scales them) and one type: {wanted}, {other}")
    channels = max(len(x) for _, _, x, _ in found)
    rows = [(part, label, np.repeat(x, channels // len(x), 0)) for part, label, x, _ in found]
    rows.sort(key=lambda row: (*row[:2], row[2].tobytes()))  # by content, whatever the files are called
    parts, labels, x = map(np.stack, zip(*rows, strict=True))
    classes, y = np.unique(labels, return_inverse=True)
    return joined("own", tuple(classes.tolist()), x, y, deal(x, y, parts, shares, seed))


def from_npz(path: str | Path, shares: Shares = SHARES, seed: int = 0) -> Dataset:
    """Read the arrays x and y of an .npz file, or x_train, y_train, x_val, ...; `images` and `labels` will do as well.

    x: a table [n, d], grey pictures [n, h, w], or pictures with their 1 to 4 channels first or last; of pictures, whole
    numbers of 0 to 255 become uint8, all else float32 as it is. y: whole numbers, words or bool, [n] or [n, 1]. Splits
    are dealt as in `from_folder`. Raises DataError, also for objects, which are pickle.
    """
    try:
        with open(Path(path).expanduser(), "rb") as raw, np.load(raw, allow_pickle=False) as file:
            roles = {key: _role(key) for key in file}
            found = {role: file[key] for key, role in roles.items() if role}
    except Exception as error:  # damaged archives raise of all kinds
        raise DataError(f"{path} must be an .npz file of numbers and words, without objects: {error}") from None
    parts = sorted({part for part, _ in found})
    if sorted(filter(None, roles.values())) != [(part, array) for part in parts for array in "xy"] or 0 not in parts:
        raise DataError(f"{path} must hold x and y, or x_train, y_train, x_test, y_test, ..., got {', '.join(roles)}")
    xs, ys = ([found[part, array] for part in parts] for array in "xy")
    for part, x, y in zip(parts, xs, ys, strict=True):
        n, told = x.shape[:1] or (0,), f"{path}, {SPLITS[part]}: x is {x.dtype} {list(x.shape)}, y {list(y.shape)}"
        if (x.dtype, x.shape[1:]) != (xs[0].dtype, xs[0].shape[1:]) or y.shape not in (n, (*n, 1)):
            raise DataError(f"{told}: x must be as in train, {xs[0].dtype} {list(xs[0].shape)}, and y [n] or [n, 1]")
    classes, y = _named(np.concatenate([y.ravel() for y in ys]))
    x, given = _values(np.concatenate(xs)), np.repeat(parts, [len(x) for x in xs])
    return joined("own", classes, x, y, deal(x, y, given, shares, seed))


def from_csv(
    path: str | Path, label: str, site: str = "", drop: Sequence[str] = (), shares: Shares = SHARES, seed: int = 0
) -> Dataset:
    """Read a table with a header: numbers become features, a column of words an indicator for each word but the first.

    Separated by comma, tab or semicolon (then "1,5" is a number). `label` is the column of the class, whole numbers or
    words; `site` that of where a row is from: a client each with `partition="site"`, and split by itself; `drop` those
    that measure nothing, such as a number of patients. What cannot be used is left out with a warning, or a DataError.
    """
    import pandas

    try:
        with open(Path(path).expanduser(), encoding="utf-8-sig") as file, warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            separator = max(",;\t", key=file.readline().count)
            file.seek(0)
            table = pandas.read_csv(file, sep=separator, dtype=str, keep_default_na=False, index_col=False).fillna("")
    except (OSError, ValueError, pandas.errors.ParserWarning) as error:
        raise DataError(f"{path} cannot be read as a table in UTF-8: {str(error).strip()}") from None
    table = table.apply(lambda cells: cells.str.strip()).rename(columns=str.strip)
    check_columns(str(path), list(table.columns), others := [label, *drop, *filter(None, [site])])
    table = table.replace(r"^([-+]?\d*),(\d+)$", r"\1.\2", regex=True) if separator == ";" else table
    known = ~table[label].isin(MISSING)
    classes, numbers = _named(table.loc[known, label].to_numpy(str))
    table.loc[known, label] = [classes[number] for number in numbers]
    if site and table[site].isin(MISSING).any():
        raise DataError(f"{path}: column {site!r} must name a site in every row")
    columns = tuple(Column.of(name, cells) for name, cells in table.drop(columns=others).items())
    schema = Schema(columns, Column(label, 0, 0, kinds=classes))
    groups = admit_all(dict(iter(table.groupby(site))), schema) if site else [admit("own", table, schema)]
    x, y, place = rows_of(groups)
    if left_out := sum(sum(group.left_out.values()) for group in groups):
        warnings.warn(f"{path}: {left_out} of {len(table)} rows lack a value and are left out", stacklevel=2)
    part, sites = deal(x, y, np.zeros_like(y), shares, seed, place), tuple(group.name for group in groups)
    return joined("own", classes, x, y, part, schema.features, *((sites, place) if site else ()))


def _pictures(root: Path, size: int | None) -> Iterator[tuple[int, str, np.ndarray, Path]]:
    """Yield the split, the class, the pixels and the file of each picture, in the order of names."""
    parts = {place: PARTS.get(place.name.lower(), -1) for place in root.glob("[!.]*/")}
    for top, part in {root: 0}.items() if -1 in parts.values() else parts.items():
        for place in sorted(top.glob("[!.]*/")):
            if not (files := sorted(place.glob("[!.]*"))):
                raise DataError(f"{place} must hold pictures of a class, it is empty: remove it")
            yield from ((part, normalize("NFC", place.name), _picture(file, size), file) for file in files)


def _picture(file: Path, size: int | None) -> np.ndarray:
    """Return uint8 or float32 [channels, h, w], the right way up."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            shown = ImageOps.exif_transpose(opened)
            if shown.mode[0] in "IF":  # 16 or 32 bits
                shown = Image.fromarray(np.asarray(shown, np.float32))
            elif shown.mode in ("1", "L") and not shown.has_transparency_data:
                shown = shown.convert("L")
            else:
                shown = shown.convert("RGBA")
                shown = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
            if size is not None:
                shown = ImageOps.fit(shown, (size, size), Image.Resampling.BILINEAR)
            return np.atleast_3d(np.asarray(shown)).transpose(2, 0, 1)
    except Exception as error:  # each format raises its own
        raise DataError(f"{file} cannot be read as a picture: {error}") from None


def _role(key: str) -> tuple[int, str] | None:
    """Return the split and the array, x or y, that a name such as `train_images` stands for."""
    words = re.split(r"[^a-z]+", key.lower())
    parts = [PARTS[word] for word in words if word in PARTS]
    arrays = [ARRAYS[word] for word in words if word in ARRAYS]
    return (parts[0] if parts else 0, arrays[0]) if len(parts) < 2 and len(arrays) == 1 else None


def _values(x: np.ndarray) -> np.ndarray:
    """Return pictures as [n, channels, h, w], uint8 where that holds them, and tables [n, d] as float32."""
    channels = [axis for axis in (1, 3) if x.ndim == 4 and 1 <= x.shape[axis] <= 4]
    if x.dtype.kind not in "buif" or x.ndim not in (2, 3, 4) or not x.size or (x.ndim == 4) != (len(channels) == 1):
        raise DataError(f"x must be numbers [n, d], [n, h, w] or with 1 to 4 channels, got {x.dtype} {list(x.shape)}")
    x = x[:, None] if x.ndim == 3 else np.moveaxis(x, channels[0], 1) if channels else x
    if x.ndim == 4 and x.dtype.kind != "f" and x.min() >= 0 and x.max() <= 255:
        return x.astype(np.uint8)
    with np.errstate(over="ignore"):  # the data set refuses an infinity, and says where
        return x.astype(np.float32)


def _named(labels: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the classes in ascending order, and the number of each label's class."""
    with suppress(ValueError):
        if labels.dtype.kind in "iufU" and np.isfinite(numbers := labels.astype(np.float64)).all():
            labels = numbers.astype(np.int64) if (numbers == np.rint(numbers)).all() else numbers
    if labels.dtype.kind not in "biU":
        raise DataError(f"labels must be whole numbers, words or bool, got {labels.dtype} such as {labels[:1]}")
    classes, y = np.unique(labels, return_inverse=True)
    return tuple(map(str, classes.tolist())), y
