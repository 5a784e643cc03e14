"""Exercises of notebooks/06_trade_offs.ipynb: what is handed in is measured again, no stated number is believed."""

from __future__ import annotations

from statistics import mean
from typing import Any

import numpy as np

from fedlab_kit import data
from fedlab_kit.deployment import measure
from fedlab_kit.deployment.artifact import Artifact, compress, load, squeeze
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.files import StoreError
from fedlab_kit.lab.exercises import COURSE, Hint, exercise
from fedlab_kit.lab.style import percent
from fedlab_kit.run import Run
from fedlab_kit.runs import train

SMALL, ABOVE = 6_000, 0.85  # bytes of the download in 06-1; validation accuracy in 06-1 and 06-2
CHEAP = 60_000  # bytes of a round in 06-2, both directions, all clients
WORST, BUDGET, SEEDS = 0.60, 30_000_000, (7, 8, 9)  # of 06-3: accuracy, bytes of a whole run, and the seeds it is over
GIVEN = ("dataset", "clients", "clients_per_round", "partition", "alpha", "dropout")  # the task, not a knob


@exercise("06-1")
def smallest_model(answer: Any) -> str:
    """An artifact of at most `SMALL` bytes after zstd whose validation accuracy is at least `ABOVE`."""
    if not isinstance(answer, Artifact):
        raise Hint("Hand in an artifact: `bench.artifact`, or what fk.compress(run, recipe) returned.")
    try:
        artifact = load(answer.path)
    except StoreError as error:
        raise Hint(f"The file cannot be measured again: {error}.") from None
    if artifact.card["data"]["name"] != "digits":
        raise Hint("The model must read the digits.")
    digits, size = data.load("digits"), _zstd_bytes(artifact)
    right, _ = measure.accuracy(artifact.session, digits.validation)
    if right < ABOVE:
        raise Hint(f"{size:,} bytes, but {percent(right)} on validation; {percent(ABOVE)} are asked for.")
    if size > SMALL:
        raise Hint(f"{percent(right)}, but {size:,} bytes after zstd; at most {SMALL:,}. {_smaller(artifact)}")
    test, (low, high) = measure.accuracy(artifact.session, digits.test)
    opened = f"On the test split, opened now, {percent(test)} ({percent(low)} to {percent(high)})"
    return f"{size:,} bytes after zstd, {percent(right)} on validation. {opened}."


def _zstd_bytes(artifact: Artifact) -> int:
    return len(squeeze(artifact.path.read_bytes())[0])


def _smaller(artifact: Artifact) -> str:
    """Say what to turn next."""
    recipe = Recipe(**artifact.card["recipe"])
    if recipe.dtype in ("fp32", "fp16"):
        return "Fewer bits for each weight come first: dtype."
    if artifact.parameters > 10_000:
        return "A small network with all its weights may beat a large one with few: try every Model."
    return "Now the prune ratio, or fewer bits still."


@exercise("06-2")
def cheapest_round(answer: Any) -> str:
    """A run on the default clients, at most `CHEAP` bytes a round in both directions, accuracy at least `ABOVE`."""
    run = train(_settings(answer, COURSE))
    up, down = (total / len(run.records) for total in (run.uplink_bytes, run.downlink_bytes))
    right = _accuracy(run)
    sent = f"{up + down:,.0f} bytes a round ({up:,.0f} up, {down:,.0f} down)"
    if up + down > CHEAP:
        way = "uplink" if up > down else "downlink"
        raise Hint(f"{sent}; at most {CHEAP:,}. Most of it is the {way}: another {way} codec, or a smaller Model.")
    if right < ABOVE:
        raise Hint(f"{sent}, but {percent(right)} on validation; {percent(ABOVE)} are asked for.")
    return f"{sent}, {percent(right)} on validation."


def _accuracy(run: Run) -> float:
    """The accuracy of the run's file; 0 when the run diverged."""
    return 0.0 if run.status == "diverged" else compress(run, Recipe()).accuracy


@exercise("06-3")
def best_worst_client(answer: Any) -> str:
    """Settings whose worst client, at alpha 0.1 and on average over `SEEDS`, has an accuracy of at least `WORST`."""
    settings = _settings(answer, COURSE.replace(alpha=0.1))
    worst = []
    for seed in SEEDS:
        run = train(settings.replace(seed=seed))
        if (sent := run.uplink_bytes + run.downlink_bytes) > BUDGET:
            raise Hint(f"{sent / 1e6:.1f} MB in both directions; the budget is {BUDGET / 1e6:.0f} MB for the run.")
        worst.append(float(np.fmin.reduce(run.client_accuracy()[0])))
    each = ", ".join(percent(value) for value in worst)
    found = f"With seeds {', '.join(map(str, SEEDS))} the worst client has {each}: on average {percent(mean(worst))}"
    if mean(worst) < WORST:
        lucky = " One good seed is luck." if max(worst) >= WORST else ""
        raise Hint(f"{found}; {percent(WORST)} are asked for.{lucky}")
    return f"{found}."


def _settings(answer: Any, task: Experiment) -> Experiment:
    """The experiment that is handed in, by itself or as a run, if it keeps the task as it is."""
    settings = answer.experiment if isinstance(answer, Run) else answer
    if not isinstance(settings, Experiment):
        raise Hint("Hand in a run or an experiment: `bench.runs[-1]`, `bench.experiment`, or fk.Experiment(...).")
    for name in GIVEN:
        if (found := getattr(settings, name)) != (given := getattr(task, name)):
            raise Hint(f"Leave the clients and their data as they are: {name} is {given!r} here, not {found!r}.")
    if settings.start is not None:
        raise Hint("Begin with an untrained model: what the experiment in `start` has sent would not be counted.")
    return settings
