"""A room's exports in one table: every file is measured again on this machine, and no number on a card is believed.

A file is opened in a process of its own, see `stranger`; one that hangs, crashes or takes all memory costs its team the
rank. The test rows come in an order drawn afresh, among copies in which every value has moved a little and rows of the
other splits: who knows the place of a row or its very values, or looks the test rows up, has no rank. Who has trained
on them, or knows a few by heart, is not found out: for that the room needs a data set whose test split nobody has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Timer
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlab_kit.clients import client_mix, mean_over
from fedlab_kit.data import Dataset
from fedlab_kit.deployment import stranger
from fedlab_kit.deployment.artifact import check_card, compress, squeeze
from fedlab_kit.deployment.score import read
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.federation.setup import strata, task
from fedlab_kit.files import at, is_number
from fedlab_kit.lab.style import percent
from fedlab_kit.run import Run
from fedlab_kit.runs import identify, train
from fedlab_kit.statistics import paired_loss, wilson

if TYPE_CHECKING:
    import pandas

RULES = {"size": ("zstd_bytes", True), "round": ("round_bytes", True), "worst client": ("worst_client", False)}
"""Rule -> the column that it ranks by, and whether less of it is better."""

MEASURED = ("accuracy", "low", "high", "bytes", "zstd_bytes", "latency_ms", "worst_client", "round_bytes")
LARGEST = 64 << 20  # bytes of a file that is opened
PATIENCE = 3600.0  # seconds for all that a card's settings train
CHECKED = 1000  # rows at most that are moved, and as many of the other splits
MOVE = 0.04  # standard deviations by which a value moves at most
LOST = 0.01  # share of right answers that may go when values move
SURE = 4.0  # standard errors by which test rows may be answered better than others
CLAIMED = "claimed: its settings make another file here, which is what is ranked, behind what was verified"


def leaderboard(
    folder: Path | str, rule: str = "size", accuracy: float = 0.0, experiment: Experiment | None = None
) -> pandas.DataFrame:
    """Measure every exported folder in `folder` and rank those that reach `accuracy` (0..1) on the test split.

    `rule` is "size" (smallest file after zstd), "round" (fewest bytes a round, both directions, all clients) or
    "worst client" (highest accuracy of the worst client). `experiment` is the room's task: its data set is what
    everybody is tested on, its clients those that are looked at; the default experiment if none is given. Rows, best
    first, hold `rank` (missing without one), `team` (the folder's name), `accuracy` with its 95 % interval `low` and
    `high`, `bytes`, `zstd_bytes`, `latency_ms` of one prediction, `worst_client`, `round_bytes` and `remark`: why a
    folder has no rank, or what its card claims wrongly. For "round" each card's settings, and those that they start or
    learn from, are run again here, which takes as long as training did; the dearest of them counts. They must be those
    of the card's run; where they give another file than the one handed in, as on another kind of processor, theirs is
    measured, and ranked behind. Raises ValueError for an unknown rule or a folder that is none.
    """
    import pandas

    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not at(folder).is_dir():
        raise ValueError(f"folder must be one that holds exported folders, got {str(folder)!r}")
    room = experiment or Experiment()
    teams = sorted(path for path in at(folder).iterdir() if path.is_dir() and not path.name.startswith("."))
    table = pandas.DataFrame([_measure(team, room, rule) for team in teams], columns=["team", *MEASURED, "remark"])
    table = table.astype({"bytes": "Int64", "zstd_bytes": "Int64"})
    return _ranked(table, rule, accuracy)


def _measure(team: Path, room: Experiment, rule: str) -> dict[str, Any]:
    """Return a team's row; without figures it says why."""
    try:
        content, card = _handed_in(team)
        row = _figures(content, room)
        row["remark"] = _false_claim(card, row)
        if rule == "round":
            row |= _round(content, card, row, room)
        return {"team": team.name, **row}
    except Exception as error:  # whatever a stranger's folder holds, the room's other folders still count
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__} "
        why = " ".join(f"{kind}{error}".split()) or type(error).__name__
        return {"team": team.name, "remark": f"not measured: {why}"}


def _handed_in(team: Path) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes of a team's only file and its card. Raises ValueError or TypeError for anything else there."""
    files = sorted(team.glob("*.onnx"))
    if len(files) != 1:
        raise ValueError(f"the folder must hold one artifact (.onnx), found {len(files)}")
    if links := [path.name for path in (team, files[0], Path(f"{files[0]}.json")) if path.is_symlink()]:
        raise ValueError(f"the folder must hold files of its own, {links[0]} is a link")
    content, card = read(files[0], LARGEST)
    try:
        check_card(card)
    except (TypeError, LookupError) as error:
        raise ValueError(f"its model card is damaged ({error})") from error
    return content, card


def _figures(content: bytes, room: Experiment) -> dict[str, Any]:
    """Measure a file: its sizes, and its answers on the room's test split."""
    right, seconds = _right(content, task(room).dataset)
    low, high = wilson(int(right.sum()), len(right))
    return {
        "accuracy": float(right.mean()),
        "low": low,
        "high": high,
        "bytes": len(content),
        "zstd_bytes": len(squeeze(content)[0]),
        "latency_ms": seconds * 1e3,
        "worst_client": worst_client(room, right),
    }


def _right(content: bytes, dataset: Dataset) -> tuple[np.ndarray, float]:
    """Return which test rows a file gets right, bool [n], and the seconds of one. ValueError if it looks them up."""
    draw = np.random.default_rng()  # of the system's entropy, which nobody knows
    test, *others = (dataset.filled(split) for split in ("test", "train", "validation"))
    (y, *labels), (x, *rows) = ([split.y.numpy() for split in (test, *others)], [s.x.numpy() for s in (test, *others)])
    again = draw.permutation(len(y))[:CHECKED]
    other = draw.permutation(sum(map(len, labels)))[:CHECKED]
    asked = np.concatenate([x, moved(x[again], dataset, draw), np.concatenate(rows)[other]])
    wanted = np.concatenate([y, y[again], np.concatenate(labels)[other]])
    order, found = draw.permutation(len(asked)), np.empty(len(asked), np.int64)
    found[order], seconds = stranger.answers(content, asked[order], len(dataset.classes))
    right, still, elsewhere = np.split(found == wanted, [len(y), len(y) + len(again)])
    mean = (right.sum() + elsewhere.sum()) / (len(right) + len(elsewhere))
    spread = (mean * (1 - mean) * (1 / len(right) + 1 / len(elsewhere))) ** 0.5
    told = f"it knows the test rows by heart: {percent(right.mean())} right,"
    if paired_loss(right[again], still)[1] > LOST:
        raise ValueError(f"{told} {percent(still.mean())} when every value moves a little")
    if right.mean() - elsewhere.mean() > SURE * spread:
        raise ValueError(f"{told} {percent(elsewhere.mean())} on other rows")
    return right, seconds


def moved(raw: np.ndarray, dataset: Dataset, draw: np.random.Generator) -> np.ndarray:
    """Return raw samples [n, ...] with every value moved by at most `MOVE` standard deviations, bytes by at least 1."""
    _, std = dataset.preprocess.constants(raw.ndim)
    if raw.dtype == np.uint8:
        by = draw.uniform(-1, 1, raw.shape) * np.maximum(std.numpy() * MOVE, 1)
        return np.clip(np.rint(raw + by), 0, 255).astype(np.uint8)
    return (raw + draw.uniform(-1, 1, raw.shape) * std.numpy() * MOVE).astype(raw.dtype)


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
    """Say so when the card's size or test accuracy is not what was measured, or no number at all."""
    if card["measured"]["bytes"] != row["bytes"]:
        return f"its card claims {card['measured']['bytes']:,} bytes"
    if "test" not in card:
        return ""
    claimed: Any = card["test"].get("accuracy") if isinstance(card["test"], dict) else None
    if not is_number(claimed):
        return "its card claims no number for test"
    return "" if row["low"] <= claimed <= row["high"] else f"its card claims {percent(claimed)} on test"


def _round(content: bytes, card: Mapping[str, Any], row: Mapping[str, Any], room: Experiment) -> dict[str, Any]:
    """Run the card's settings again: their bytes a round, and their own figures where they make another file.

    Raises ValueError when they are not the settings of the card's run, or no such file comes of them.
    """
    if card["experiment"] is None:
        raise ValueError("it comes from no federation, so there are no rounds to count: rank it by size")
    experiment = Experiment(**card["experiment"])
    if experiment.dataset != room.dataset:
        raise ValueError(f"its settings train on {experiment.dataset}, the room on {room.dataset}")
    if identify(experiment) != card["run"]:
        raise ValueError("its settings are not those of its run, or other versions made it: export it again here")
    runs = _run_again(experiment)
    cost = max((run.uplink_bytes + run.downlink_bytes) / len(run.records) for run in runs)
    with TemporaryDirectory() as folder:
        again = compress(runs[-1], Recipe(**card["recipe"]), folder, card.get("client")).path.read_bytes()
    if again == content:
        return {"round_bytes": cost}
    figures = _figures(again, room)
    if figures["low"] > row["high"] or figures["high"] < row["low"]:
        here, there = percent(figures["accuracy"]), percent(row["accuracy"])
        raise ValueError(f"its settings give {here} on test here, its file {there}")
    return {**figures, "round_bytes": cost, "remark": CLAIMED}


def _run_again(experiment: Experiment) -> list[Run]:
    """Train all that is trained for an experiment, itself last. ValueError when that takes too long."""
    stop, runs = Event(), []
    timer = Timer(PATIENCE, stop.set)
    timer.start()
    try:
        for each in experiment.lineage:
            runs.append(train(each, stop))
            if runs[-1].status == "stopped":
                raise ValueError(f"its settings take more than {PATIENCE:g} s to run again")
    finally:
        timer.cancel()
    return runs


def _ranked(table: pandas.DataFrame, rule: str, accuracy: float) -> pandas.DataFrame:
    """Put the table in order: by the rule, then by accuracy; those without a rank last."""
    column, less_is_better = RULES[rule]
    measured, reached = table[column].notna(), table["accuracy"] >= accuracy
    short = measured & ~reached
    table.loc[short, "remark"] = f"below {percent(accuracy)} on test. " + table.loc[short, "remark"]
    table.insert(0, "rank", float("nan"))
    for group in (table["remark"] != CLAIMED, table["remark"] == CLAIMED):
        places = table.loc[measured & reached & group, column].rank(method="min", ascending=less_is_better)
        table.loc[places.index, "rank"] = places + table["rank"].notna().sum()
    table["rank"] = table["rank"].astype("Int64")
    table["remark"] = table["remark"].str.strip()
    return table.sort_values(["rank", "accuracy"], ascending=[True, False], na_position="last", ignore_index=True)
