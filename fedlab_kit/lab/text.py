"""Runs and points in words and tables: how one ended, what sets it apart, a list of them, and two side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedlab_kit.clients import client_names
from fedlab_kit.deployment.artifact import slug
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.lab.history import Marks, Row
from fedlab_kit.lab.style import html_table, human_bytes, human_ms, percent, three, with_interval
from fedlab_kit.run import Run, StoredRun
from fedlab_kit.settings import Settings

LAST = 6  # runs or points in a table
MOST = 10_000  # clients among whom the worst is looked for: dealing out the samples takes seconds beyond


def outcome(run: Run) -> str:
    """Say how a run ended, what it reached, when and where that was measured, and what its privacy is worth."""
    rounds, asked = len(run.records), run.experiment.rounds
    if not rounds:
        return "Stopped before the first round ended. Run starts again."
    reached = with_interval(run.accuracy, *run.interval)
    seconds = f"{run.measured['seconds']:.1f} s"
    worth = "" if run.experiment.privacy == "off" else f" Privacy: {run.privacy()}."
    if run.status == "diverged":
        reason = run.note or "the loss is no longer a number"
        said = f"Diverged in round {rounds} of {asked}: {reason}. Try a smaller learning rate."
    elif run.status == "stopped":
        again = "starts again" if run.unstored else "goes on from there"
        return f"Stopped after round {rounds} of {asked} at {reached}.{worth} Run {again}."
    else:
        said = f"Finished: {reached} after {rounds} rounds in {seconds}."
        said += f" {run.note[0].upper()}{run.note[1:]}." if run.note else ""
    if run.from_store:
        said += (
            f" Answered from the store, {origin(True, run.measured)}. New seed repeats it with other random choices."
        )
    return said + worth


def role(experiment: Experiment, asked: Experiment | None) -> str:
    """Say what an experiment is to the one that was asked for: "teacher", "start", or "" if neither."""
    roles = {"teacher": asked.teacher, "start": asked.start} if asked else {}
    return next((role for role, one in roles.items() if one == experiment), "")


def difference(settings: Settings, other: Settings | None) -> str:
    """Name the fields, with their values in `settings`, that set it apart from `other`, e.g. "alpha 0.1, lr 0.03"."""
    if other is None:
        return ""
    pairs = [(name, value, getattr(other, name)) for name, value in settings]
    return ", ".join(_short(name, value) for name, value, there in pairs if value != there)


def _short(name: str, value: object) -> str:
    if value is None:
        return f"no {name}"
    return f"{name} {value.model}" if isinstance(value, Experiment) else f"{name} {value}"


def origin(earlier: bool, about: Mapping[str, Any]) -> str:
    """Say when and where a figure was measured; `about` has `when` and `machine`."""
    return f"measured {moment(about)} on {about['machine']}" if earlier else "measured now"


def moment(about: Mapping[str, Any]) -> str:
    """Return `when` to the minute, e.g. "2026-11-22 15:46 UTC"."""
    return f"{about['when'][:16].replace('T', ' ')} UTC"


def run_words(run: StoredRun, marks: Marks) -> str:
    """Say which run it is: its name, else what sets it apart from the default settings."""
    return marks[run.key].name or difference(run.experiment, Experiment()) or "default settings"


def told_apart(run: StoredRun, other: StoredRun, marks: Marks) -> str:
    """Say which of two runs it is, in few words: its name, else what sets it apart from the other."""
    return marks[run.key].name or difference(run.experiment, other.experiment) or run_words(run, marks)


def run_option(run: StoredRun, marks: Marks) -> str:
    """Return a run as one line of a list to choose from."""
    hidden = " (hidden)" if marks[run.key].hidden else ""
    return f"{run_words(run, marks)}: {percent(run.accuracy)}, {_measured(run)}{hidden}"


def runs_table(runs: Sequence[StoredRun], marks: Marks) -> str:
    """Return the last runs, newest first, as an HTML table."""
    if not runs:
        return "<p>No run yet.</p>"
    seen = [run for run in runs if not marks[run.key].hidden]
    heads = ("Run", "Accuracy", "Rounds", "Uplink", "Measured")
    rows = [
        [
            run_words(run, marks),
            percent(run.accuracy),
            f"{len(run.records)} of {run.experiment.rounds}",
            human_bytes(run.uplink_bytes),
            _measured(run) if run.from_store else "now",
        ]
        for run in reversed(seen[-LAST:])
    ]
    hidden = f", {len(runs) - len(seen)} hidden" if len(seen) < len(runs) else ""
    return html_table(f"The last {len(rows)} of {len(runs)} runs{hidden}", heads, rows)


def _measured(run: StoredRun) -> str:
    return moment(run.measured) + (", made by older code" if run.older else "")


def comparison(one: StoredRun, other: StoredRun, names: tuple[str, str]) -> str:
    """Return two runs side by side as an HTML table: the settings that differ, then what was measured."""
    fields = Experiment.model_fields
    differ = [
        [str(fields[name].title), _value(mine), _value(getattr(other.experiment, name))]
        for name, mine in one.experiment
        if mine != getattr(other.experiment, name)
    ]
    figures = zip(("Accuracy", "", "Rounds", "Uplink", "Downlink", "Time", "Worst client", "Measured"),
                  _figures(one), _figures(other), strict=True)  # fmt: skip
    rows = [*(differ or [["Settings", "the same", "the same"]]), *map(list, figures)]
    return html_table("Settings that differ, and what was measured", ("", *names), rows, "fedlab-compared")


def _figures(run: StoredRun) -> list[str]:
    low, high = run.interval
    return [
        percent(run.accuracy),
        f"95 % interval {percent(low)} to {percent(high)}",
        f"{len(run.records)} of {run.experiment.rounds}, {run.status}",
        human_bytes(run.uplink_bytes),
        human_bytes(run.downlink_bytes),
        f"{three(run.measured['seconds'])} s",
        _worst(run),
        origin(run.from_store, run.measured).removeprefix("measured ") + (", by older code" if run.older else ""),
    ]


def _worst(run: StoredRun) -> str:
    experiment = run.experiment
    if experiment.clients > MOST:
        return f"not looked for among more than {MOST:,} clients"
    try:
        (accuracy, low, high), names = run.client_accuracy(), client_names(experiment)
    except (ValueError, OSError):
        return "unknown: the data are not at hand"
    missing = int(np.isnan(accuracy).sum())
    if missing == len(accuracy):
        return "not estimable: none of their classes was held out"
    worst = int(np.nanargmin(accuracy))
    interval = f"{percent(low[worst])} to {percent(high[worst])}"
    others = f", {missing} not estimable" if missing else ""
    return f"{names[worst] if names else worst}: {percent(accuracy[worst])} ({interval}){others}"


def _value(value: object) -> str:
    if isinstance(value, Settings):
        return difference(value, type(value)()) or "default settings"
    return "none" if value is None else str(value)


def words(row: Row) -> str:
    """Say which recipe a point is, e.g. "3: cnn, channel 0.5 int8 static"; names come in front."""
    recipe = Recipe(**{field: row[field] for field in Recipe.model_fields})
    name = f"{row['name']}, " if row["name"] else ""
    return f"{row['point']}: {name}{row['run_name'] or row['model']}, {slug(recipe).replace('-', ' ')}"


def said(row: Row) -> str:
    """Say what was measured on a point, and when."""
    ends = row["latency_low"], row["latency_ms"], row["latency_high"]
    timed = f", {latency(*ends)}, {row['latency_ratio']:.2f} of fp32" if row["latency_ratio"] else ""
    text = (
        f"{words(row)}: {with_interval(row['accuracy'], row['low'], row['high'])}, "
        f"{human_bytes(row['bytes'])}, {human_bytes(row['zstd_bytes'])} with zstd{timed}; "
        f"{origin(row['earlier'], row)}."
    )
    return f"{text} Note: {row['note']}." if row["note"] else text


def latency(low: float, middle: float, high: float) -> str:
    """Say how long one prediction takes, with its interval, in milliseconds."""
    return f"{human_ms(middle)} ({human_ms(low)} to {human_ms(high)})"


def table(rows: Sequence[Row], current: int | None) -> str:
    """Return the last points, newest first, as an HTML table; the current one is bold."""
    if not rows:
        return ""
    last = rows[: -LAST - 1 : -1]
    where = ", ".join(sorted({row["machine"] for row in last}))
    some = f"The last {LAST} of {len(rows)} points" if len(rows) > LAST else "All points"
    heads = ("Point", "Accuracy", "File", "zstd", "Latency", "of fp32", "Measured")
    place = next((index for index, row in enumerate(last) if row["point"] == current), None)
    return html_table(f"{some}, measured on {where}", heads, map(_line, last), current=place)


def _line(row: Row) -> tuple[str, ...]:
    cells = [words(row), percent(row["accuracy"]), human_bytes(row["bytes"]), human_bytes(row["zstd_bytes"])]
    timed = row["latency_ratio"] is not None  # in the same turn as the fp32 file, while nothing else was under way
    cells += [human_ms(row["latency_ms"]), f"{row['latency_ratio']:.2f}"] if timed else ["not yet", ""]
    return *cells, moment(row) if row["earlier"] else "now"
