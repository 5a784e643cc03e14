"""A room's exports in one table: every file is measured again on this machine, and no number on a card is believed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlab_kit.clients import client_mix, mean_over
from fedlab_kit.data import Split
from fedlab_kit.deployment import measure
from fedlab_kit.deployment.artifact import Artifact, compress, load, squeeze
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.federation.task import strata, task
from fedlab_kit.files import at
from fedlab_kit.lab.canvas import percent
from fedlab_kit.runs import train
from fedlab_kit.statistics import wilson

if TYPE_CHECKING:
    import pandas

RULES = {"size": ("zstd_bytes", True), "round": ("round_bytes", True), "worst client": ("worst_client", False)}
"""Rule -> the column that it ranks by, and whether less of it is better."""

MEASURED = ("accuracy", "low", "high", "bytes", "zstd_bytes", "latency_ms", "worst_client", "round_bytes")


def leaderboard(
    folder: Path | str, rule: str = "size", accuracy: float = 0.0, experiment: Experiment | None = None
) -> pandas.DataFrame:
    """Measure every exported folder in `folder` and rank those that reach `accuracy` (0..1) on the test split.

    `rule` is "size" (smallest file after zstd), "round" (fewest bytes a round, both directions, all clients) or
    "worst client" (highest accuracy of the worst client). `experiment` is the room's task: its data set is what
    everybody is tested on, its clients those that are looked at; the default experiment if none is given. Rows, best
    first, hold `rank` (missing without one), `team` (the folder's name), `accuracy` with its 95 % interval `low` and
    `high`, `bytes`, `zstd_bytes`, `latency_ms` of one prediction, `worst_client`, `round_bytes` and `remark`: why a
    folder has no rank, or what its card claims wrongly. For "round" each card's settings are run again here, which
    takes as long as training did, and must give an artifact as accurate as the file. Raises ValueError for an
    unknown rule or a folder that is none.
    """
    import pandas

    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not at(folder).is_dir():
        raise ValueError(f"folder must be one that holds exported folders, got {str(folder)!r}")
    room = experiment or Experiment()
    teams = sorted(path for path in at(folder).iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [_measure(team, room, rule) for team in teams]
    _add_latencies([(row, file) for row, file in found if file is not None], task(room).dataset.test)
    table = pandas.DataFrame([row for row, _ in found], columns=["team", *MEASURED, "remark"])
    table = table.astype({"bytes": "Int64", "zstd_bytes": "Int64"})
    return _ranked(table, rule, accuracy)


def _measure(team: Path, room: Experiment, rule: str) -> tuple[dict[str, Any], Artifact | None]:
    """Return a team's row and its artifact; without one the row says why."""
    row: dict[str, Any] = {"team": team.name, "remark": ""}
    try:
        artifact = load(_only_file(team))
        row |= _figures(artifact, room)
        row["remark"] = _false_claim(artifact.card, row)
        if rule == "round":
            row["round_bytes"] = _bytes_of_a_round(artifact.card, row, task(room).dataset.test)
        return row, artifact
    except Exception as error:  # whatever a stranger's folder holds, the room's other folders still count
        row["remark"] = f"not measured: {' '.join(str(error).split()) or type(error).__name__}"
        return row, None


def _only_file(team: Path) -> Path:
    files = sorted(team.glob("*.onnx"))
    if len(files) != 1:
        raise ValueError(f"the folder must hold one artifact (.onnx), found {len(files)}")
    return files[0]


def _figures(artifact: Artifact, room: Experiment) -> dict[str, Any]:
    """Measure a file: its sizes, and its answers on the room's test split."""
    content, test = artifact.path.read_bytes(), task(room).dataset.filled("test")
    right = measure.logits(artifact.session, test.x).argmax(1) == test.y.numpy()
    low, high = wilson(int(right.sum()), len(right))
    return {
        "accuracy": float(right.mean()),
        "low": low,
        "high": high,
        "bytes": len(content),
        "zstd_bytes": len(squeeze(content)[0]),
        "worst_client": worst_client(room, right),
    }


def worst_client(room: Experiment, right: np.ndarray) -> float:
    """Return the accuracy of the room's worst client from what was right [n] on the test split.

    A site is measured on its own samples; other clients by the accuracy per class, weighted by their own label mix.
    Who cannot be measured, see `client_accuracy`, is passed over; NaN when nobody can.
    """
    job = task(room)
    seen = strata(room, job.dataset.test).numpy()
    total = np.bincount(seen, minlength=1 + int(strata(room, job.dataset.train).max()))
    correct = np.bincount(seen, weights=right, minlength=len(total))
    each, _ = mean_over(client_mix(room, len(total)), correct, total)
    return float(np.fmin.reduce(each))


def _false_claim(card: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Say so when the card's size or test accuracy is not what was measured."""
    size, claimed = card["measured"]["bytes"], card.get("test", {}).get("accuracy", row["accuracy"])
    if size != row["bytes"]:
        return f"its card claims {size:,} bytes"
    return "" if row["low"] <= claimed <= row["high"] else f"its card claims {percent(claimed)} on test"


def _bytes_of_a_round(card: Mapping[str, Any], row: Mapping[str, Any], test: Split) -> float:
    """Run the card's settings again and return its mean bytes a round. ValueError when they make another artifact."""
    if card["experiment"] is None:
        raise ValueError("it comes from no federation, so there are no rounds to count: rank it by size")
    run = train(Experiment(**card["experiment"]))
    with TemporaryDirectory() as folder:
        again, (low, high) = measure.accuracy(compress(run, Recipe(**card["recipe"]), folder).session, test)
    if low > row["high"] or high < row["low"]:
        raise ValueError(f"its settings give {percent(again)} on test here, its file {percent(row['accuracy'])}")
    return (run.uplink_bytes + run.downlink_bytes) / len(run.records)


def _add_latencies(found: list[tuple[dict[str, Any], Artifact]], test: Split) -> None:
    """Time the files against each other, in turns."""
    timings = measure.latencies([artifact.session for _, artifact in found], test.x[:1]) if found else []
    for (row, _), timing in zip(found, timings, strict=True):
        row["latency_ms"] = timing.median * 1e3


def _ranked(table: pandas.DataFrame, rule: str, accuracy: float) -> pandas.DataFrame:
    """Put the table in order: by the rule, then by accuracy; those without a rank last."""
    column, less_is_better = RULES[rule]
    measured, reached = table[column].notna(), table["accuracy"] >= accuracy
    short = measured & ~reached
    table.loc[short, "remark"] = f"below {percent(accuracy)} on test. " + table.loc[short, "remark"]
    places = table.loc[measured & reached, column].rank(method="min", ascending=less_is_better)
    table.insert(0, "rank", places.reindex(table.index).astype("Int64"))
    table["remark"] = table["remark"].str.strip()
    return table.sort_values(["rank", "accuracy"], ascending=[True, False], na_position="last", ignore_index=True)
