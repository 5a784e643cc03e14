"""Runs in words: how one ended, when and where, what it is to the one asked for, what sets its settings apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlab_kit.experiment import Experiment
from fedlab_kit.lab.style import with_interval
from fedlab_kit.run import Run
from fedlab_kit.settings import Settings


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
