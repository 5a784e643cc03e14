"""Score rows of patients with an artifact where only numpy and onnxruntime are installed; this file may be copied.

    python score.py model.onnx patients.csv

It needs the model card, `model.onnx.json`, beside the file. One line a patient comes out: the class, how sure the model
is, and what is wrong with the row, if anything: such a row is not scored and the others go on.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SILENT = "ORT_DISABLE_TELEMETRY"  # read once, when onnxruntime is imported; the package imports it after this file
if "onnxruntime" in sys.modules and os.environ.get(SILENT, "").lower() not in ("1", "true", "yes", "on"):
    warnings.warn(f"onnxruntime was imported first and reports to its maker: set {SILENT}=1 and restart", stacklevel=2)
os.environ[SILENT] = "1"

FAR = 20.0  # standard deviations from the training mean: a wrong unit, not a patient


class Model:
    """An artifact that was opened to score; `card` says what it is. Raises ValueError naming a damaged file."""

    def __init__(self, path: str | Path) -> None:
        import onnxruntime

        content, self.card = read(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def score(self, table: Any) -> list[dict[str, Any]]:
        """Return for each row its `class`, the model's `probability` of it, and a `problem` ("" if there is none).

        `table` is whatever `matrix` takes; it raises ValueError for wrong columns. A row with a value that is missing
        or out of range has no class.
        """
        rows = matrix(table, self.card["input"])
        problems = odd_rows(rows, self.card)
        good = [number for number in range(len(rows)) if number not in problems]
        answers: list[dict[str, Any]] = [
            {"class": None, "probability": None, "problem": problems.get(number, "")} for number in range(len(rows))
        ]
        shares = probabilities(self._session.run(None, {"x": rows[good]})[0]) if good else ()
        for number, share in zip(good, shares, strict=True):
            answers[number]["class"] = self.card["data"]["classes"][int(share.argmax())]
            answers[number]["probability"] = float(share.max())
        return answers


def read(path: str | Path) -> tuple[bytes, dict[str, Any]]:
    """Return an artifact's bytes and its card. Raises ValueError naming what is missing, cut or altered."""
    card_file = Path(f"{path}.json")
    try:
        content, card = Path(path).read_bytes(), json.loads(card_file.read_text())
        wanted = card["digest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be opened, it needs its model card {card_file.name} beside it: {error}"
        ) from error
    if (found := hashlib.sha256(content).hexdigest()) != wanted:
        raise ValueError(
            f"{path} is truncated or altered: its SHA-256 begins with {found[:12]}, "
            f"its card says {str(wanted)[:12]}; compress again"
        )
    return content, card


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
        raise ValueError(
            f"x must be raw {wanted['dtype']} [n, {', '.join(map(str, wanted['shape']))}] with n at least 1, "
            f"got {raw.dtype} {list(raw.shape)}"
        )
    return raw


def odd_rows(rows: np.ndarray, card: Mapping[str, Any]) -> dict[int, str]:
    """Say for each row that cannot be scored what is wrong: a missing value, or one that no patient has."""
    mean, std = (np.asarray(card["preprocess"][key], np.float64) for key in ("mean", "std"))
    mean, std = (value.reshape(-1, *[1] * (rows.ndim - 2)) if value.ndim else value for value in (mean, std))
    with np.errstate(invalid="ignore"):
        odd = ~(np.abs((rows - mean) / std) <= FAR)
    names = card["input"].get("features") or [str(number) for number in range(int(np.prod(rows.shape[1:])))]
    found = {}
    for row in np.flatnonzero(odd.reshape(len(rows), -1).any(axis=1)):
        column = int(odd[row].ravel().argmax())
        value = float(rows[row].ravel()[column])
        why = f"is {value:g}, more than {FAR:g} standard deviations from the training mean"
        found[int(row)] = f"{names[column]} {'is missing or no number' if value != value else why}"
    return found


def _from_columns(table: Any, names: Sequence[str]) -> np.ndarray:
    found = [str(name) for name in table]
    if not names:
        raise ValueError("this model names no columns: give an array")
    missing, unknown = [n for n in names if n not in found], [n for n in found if n not in names]
    twice = sorted({name for name in found if found.count(name) > 1})
    if missing or unknown or twice:
        words = {"missing": missing, "unknown": unknown, "twice": twice}
        raise ValueError(
            f"columns must be the model's {len(names)}: "
            + "; ".join(f"{word} {', '.join(map(repr, each))}" for word, each in words.items() if each)
        )
    return np.stack([np.array([_number(v) for v in table[n]], np.float32) for n in names], axis=1)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def main(arguments: Sequence[str]) -> int:
    """Score a CSV file with a header and print CSV; return 0, or 1 with one line on what is wrong with the files."""
    if len(arguments) != 2:
        print("usage: python score.py model.onnx patients.csv", file=sys.stderr)
        return 1
    try:
        model = Model(arguments[0])
        with open(arguments[1], newline="") as file:
            header, *lines = list(csv.reader(file)) or [[]]
        if len(set(header)) < len(header):
            raise ValueError(f"columns must have different names, got {', '.join(header)}")
        columns = {name: [line[i] if i < len(line) else "" for line in lines] for i, name in enumerate(header)}
        answers = model.score(columns) if lines else []
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    writer = csv.DictWriter(sys.stdout, ("class", "probability", "problem"), lineterminator="\n")
    writer.writeheader()
    writer.writerows(answers)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
