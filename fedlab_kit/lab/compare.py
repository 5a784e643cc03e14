"""Runs in words and tables: a list of them, and two side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlab_kit.clients import client_names
from fedlab_kit.experiment import Experiment
from fedlab_kit.lab.marks import Marks
from fedlab_kit.lab.style import html_table, human_bytes, percent, three
from fedlab_kit.lab.wording import difference, moment, origin
from fedlab_kit.run import StoredRun
from fedlab_kit.settings import Settings

LAST = 6  # runs in the table
MOST = 10_000  # clients among whom the worst is looked for: dealing out the samples takes seconds beyond


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
