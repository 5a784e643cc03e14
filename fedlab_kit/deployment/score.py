"""Score rows of patients with an artifact where only numpy and onnxruntime are installed; this file may be copied.

    python score.py model.onnx patients.csv

It needs the model card, `model.onnx.json`, beside the file. One line a patient comes out: the class, how sure the model
is, and what is wrong with the row, which then is not scored.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SILENT = "ORT_DISABLE_TELEMETRY"  # read once, when onnxruntime is imported; the package imports it after this file
if "onnxruntime" in sys.modules and os.environ.get(SILENT, "").lower() not in ("1", "true", "yes", "on"):
    warnings.warn(f"onnxruntime was imported first and reports to its maker: set {SILENT}=1 and restart", stacklevel=2)
os.environ[SILENT] = "1"

THREADS = 1  # of the runtime
FAR = 20.0  # standard deviations from the training mean: a wrong unit, not a patient
LARGEST = 2 << 30  # bytes: no ONNX file is larger
TYPES = {"float32": "tensor(float)", "uint8": "tensor(uint8)"}


class Model:
    """An artifact that was opened to score; `card` says what it is. Raises ValueError naming a damaged file."""

    def __init__(self, path: str | Path) -> None:
        content, self.card = read(path)
        if not _is_whole(self.card):
            raise ValueError(f"the model card of {path} is damaged: compress again")
        try:
            self._session = open_session(content)
        except Exception as error:  # onnxruntime's own are no class of Python's
            here = sys.modules["onnxruntime"].__version__
            raise ValueError(f"{path} is nothing that onnxruntime {here} opens: {error}") from error
        wanted = self.card["input"]
        expected = [(wanted["name"], TYPES.get(wanted["dtype"]), wanted["shape"])]
        found = [(each.name, each.type, list(each.shape[1:])) for each in self._session.get_inputs()]
        if found != expected:
            raise ValueError(f"{path} takes {found}, its model card says {expected}: compress again")

    def score(self, table: Any) -> list[dict[str, Any]]:
        """Return each row's `class`, its `probability` and a `problem` ("" if none); `table` is what `matrix` takes."""
        rows = matrix(table, self.card["input"])
        problems = odd_rows(rows, self.card)
        good = [number for number in range(len(rows)) if number not in problems]
        nothing: dict[str, Any] = {"class": None, "probability": None}
        answers = [{**nothing, "problem": problems.get(number, "")} for number in range(len(rows))]
        for number, share in zip(good, self._shares(rows[good]) if good else (), strict=True):
            if np.isfinite(share).all():
                answers[number]["class"] = self.card["data"]["classes"][int(share.argmax())]
                answers[number]["probability"] = float(share.max())
            else:
                answers[number]["problem"] = "the model's answer is no number"
        return answers

    def _shares(self, rows: np.ndarray) -> np.ndarray:
        wanted = (len(rows), len(self.card["data"]["classes"]))
        try:
            logits = self._session.run(None, {self.card["input"]["name"]: rows})[0]
        except Exception as error:
            raise ValueError(f"the model fails on {len(rows)} rows: {error}") from error
        if np.shape(logits) != wanted or logits.dtype.kind != "f":
            raise ValueError(f"the model must answer numbers {list(wanted)}, got {list(np.shape(logits))}")
        return probabilities(logits)


def open_session(content: bytes | Path, optimize: bool = True) -> Any:
    """Open a file or its bytes in onnxruntime, on the CPU, with one thread; without `optimize` as its nodes say."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = THREADS
    options.log_severity_level = 4  # what is wrong is raised, and need not be printed as well
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def read(path: str | Path, largest: int = LARGEST) -> tuple[bytes, dict[str, Any]]:
    """Return an artifact's bytes and its card. Raises ValueError naming what is missing, too large, cut or altered."""
    card_file = Path(f"{path}.json")
    try:
        content, card = _content(Path(path), largest), json.loads(_content(card_file, min(largest, 1 << 24)))
        wanted = card["digest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        needed = f"it needs its model card {card_file.name} beside it"
        raise ValueError(f"{path} cannot be opened, {needed}: {error}") from error
    if (found := hashlib.sha256(content).hexdigest()) != wanted:
        told = f"its SHA-256 begins with {found[:12]}, its card says {str(wanted)[:12]}"
        raise ValueError(f"{path} is truncated or altered: {told}; compress again")
    return content, card


def _content(path: Path, largest: int) -> bytes:
    """Return the bytes of a file, waiting for nobody. ValueError for what is too large, a pipe, a device, a folder."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path.name} is no regular file")
    if found.st_size > largest:
        raise ValueError(f"{path.name} is larger than {largest:,} bytes")
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
        return file.read(found.st_size)  # should it be another one since, its digest tells


def _is_whole(card: Mapping[str, Any]) -> bool:
    """Say whether a card has all that scoring needs, each of its own type: a word is no number, nor is true."""
    try:
        wanted, classes = card["input"], card["data"]["classes"]
        features, shape = wanted.get("features", []), wanted["shape"]
        mean, std = (v if isinstance(v, list) else [v] for v in (card["preprocess"][key] for key in ("mean", "std")))
        words = [wanted["name"], wanted["dtype"], *classes, *features]
        return (
            all(isinstance(each, list) for each in (classes, features, shape))
            and all(isinstance(word, str) and word.encode() is not None for word in words)
            and all(type(number) is int and number > 0 for number in (*shape, len(classes)))
            and all(type(v) in (int, float) and abs(v) < 1e18 for v in (*mean, *std))
            and all(v > 0 for v in std)
            and all(len(v) in (1, shape[0]) for v in (mean, std))
            and (not features or shape == [len(features)])
        )
    except (KeyError, TypeError, AttributeError, IndexError, UnicodeError):
        return False


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the softmax of logits [n, classes]."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def matrix(table: Any, wanted: Mapping[str, Any]) -> np.ndarray:
    """Return rows [n, ...] as the model takes them; `wanted` is the card's "input".

    An array must have its dtype and shape. Columns by name (a mapping of columns, a DataFrame) may come in any order
    and hold text; what is no number becomes NaN. Raises ValueError naming the columns, dtype or shape that is wrong.
    """
    if hasattr(table, "keys"):
        return _from_columns(table, tuple(wanted.get("features", ())))
    raw = np.asarray(table)
    if str(raw.dtype) != wanted["dtype"] or list(raw.shape[1:]) != wanted["shape"] or not len(raw):
        shape = ", ".join(map(str, ["n", *wanted["shape"]]))
        found = f"{raw.dtype} {list(raw.shape)}"
        raise ValueError(f"x must be raw {wanted['dtype']} [{shape}] with n at least 1, got {found}")
    return raw


def odd_rows(rows: np.ndarray, card: Mapping[str, Any]) -> dict[int, str]:
    """Say for each row that cannot be scored what is wrong: a missing value, or one that no patient has."""
    mean, std = (np.asarray(card["preprocess"][key], np.float64) for key in ("mean", "std"))
    mean, std = (value.reshape(-1, *[1] * (rows.ndim - 2)) if value.ndim else value for value in (mean, std))
    with np.errstate(invalid="ignore"):
        odd = ~(np.abs((rows - mean) / std) <= FAR)
    names = card["input"].get("features") or [str(number) for number in range(int(np.prod(rows.shape[1:])))]
    found = {}
    for row in np.flatnonzero(odd.any(axis=tuple(range(1, odd.ndim)))):
        column = int(odd[row].ravel().argmax())
        value = float(rows[row].ravel()[column])
        why = f"is {value:g}, more than {FAR:g} standard deviations from the training mean"
        found[int(row)] = f"{names[column]} {'is missing or no number' if value != value else why}"
    return found


def _from_columns(table: Any, names: Sequence[str]) -> np.ndarray:
    if not names:
        raise ValueError("this model names no columns: give an array")
    found, known = Counter(map(str, table)), set(names)
    missing, unknown = [n for n in names if n not in found], [n for n in found if n not in known]
    twice = sorted(name for name, times in found.items() if times > 1)
    if missing or unknown or twice:
        words = {"missing": missing, "unknown": unknown, "twice": twice}
        wrong = "; ".join(f"{word} {_some(each)}" for word, each in words.items() if each)
        raise ValueError(f"columns must be the model's {len(names)}: {wrong}")
    return np.stack([np.array([_number(v) for v in table[n]], np.float32) for n in names], axis=1)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"{name!r:.80}" for name in names[:5]) + more


def _number(value: Any) -> float:
    try:
        return float("nan") if "_" in str(value) else float(value)  # Python would read 1_5 as 15
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def harmless(value: Any) -> Any:
    """Return a value for a CSV file so that no spreadsheet takes text for a formula; what is a number stays as it is.

    An apostrophe goes before whatever begins a formula, or is one itself, at the start of the text and behind each
    separator. `re.sub(r"(^|[;,\\t\\r\\n])'", r"\\1", text)` takes them away again.
    """
    if not isinstance(value, str) or _number(value) == _number(value):
        return value
    return re.sub(r"(^|[;,\t\r\n])(?=[=+\-@'\t\r\n＝＋－＠])", r"\1'", value)


def _table(path: str) -> tuple[dict[str, Sequence[str]], dict[int, str]]:
    """Return the columns of a CSV file as text, and what is wrong with each row (from 0) whose cells do not fit.

    Cells are separated by commas; by semicolons where the header has those alone, as Excel writes in countries with
    decimal commas, which then are read as such. Raises ValueError, naming the file, for what is no such text.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path} is no text in UTF-8: save it as CSV UTF-8")
    first = text.partition("\n")[0]
    local = ";" in first and "," not in first
    lines = [line for line in csv.reader(io.StringIO(text, ""), delimiter=";" if local else ",") if line]
    header, *lines = lines or [[]]
    if len(set(header)) < len(header):
        raise ValueError(f"columns must have different names, got {', '.join(header):.200}")
    fits = f"cells where the header has {len(header)}"
    ragged = {row: f"{len(line)} {fits}" for row, line in enumerate(lines) if len(line) != len(header)}
    cells = [[""] * len(header) if row in ragged else line for row, line in enumerate(lines)]
    if local:
        cells = [[cell if "." in cell else cell.replace(",", ".") for cell in line] for line in cells]
    return dict(zip(header, zip(*cells, strict=True) if cells else [()] * len(header), strict=True)), ragged


def main(arguments: Sequence[str]) -> int:
    """Score a CSV file with a header and print CSV; return 0, or 1 with one line on what is wrong with the files."""
    if len(arguments) != 2:
        print("usage: python score.py model.onnx patients.csv", file=sys.stderr)
        return 1
    printed = io.StringIO()
    writer = csv.DictWriter(printed, ("class", "probability", "problem"), lineterminator="\n")
    writer.writeheader()
    try:
        model = Model(arguments[0])
        columns, ragged = _table(arguments[1])
        for row, answer in enumerate(model.score(columns)):
            if row in ragged:
                answer["problem"] = ragged[row]
            writer.writerow({name: harmless(value) for name, value in answer.items()})
        print(printed.getvalue(), end="")
    except (OSError, ValueError, csv.Error) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
