"""The arms of a study: what one is with tuned settings and a seed, and what its runs come to, failed ones included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isfinite, nan
from threading import Event
from typing import Any

from fedlab_kit.data import Dataset, Split, load
from fedlab_kit.deployment.artifact import Artifact
from fedlab_kit.deployment.measure import accuracy
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.run import Run
from fedlab_kit.runs import parts
from fedlab_kit.settings import complaint
from fedlab_kit.sweep import TRAFFIC, artifact_of, stored, train_all

SIZES = ("bytes", "zstd_bytes")
COSTS = ("loss", *TRAFFIC, *SIZES)
"""Measures of which less is better."""
RECALL = "recall of "
Arm = tuple[Experiment, Recipe | None]
Measure = str | Callable[[Any], float]
Progress = Callable[[int, int, str], None]


def arm_of(name: str, given: Any) -> Arm:
    """Return an experiment, or a pair of it and a recipe, as a pair. ValueError for anything else."""
    experiment, recipe = given if isinstance(given, tuple | list) and len(given) == 2 else (given, None)
    if not isinstance(experiment, Experiment) or not isinstance(recipe, Recipe | None):
        raise ValueError(f"arms must be an Experiment, or an Experiment and a Recipe, got {given!r} for {name!r}")
    return experiment, recipe


def with_settings(name: str, arm: Arm, values: dict[str, Any], seed: int) -> Arm:
    """Return an arm with tuned values and a seed. ValueError, naming the arm, where they do not go together."""
    experiment, recipe = arm
    after = {key: value for key, value in values.items() if key in Recipe.model_fields}
    before = {key: value for key, value in values.items() if key not in after}
    try:
        recipe = (recipe or Recipe()).replace(**after) if after else recipe
        return seeded(experiment.replace(**before), seed), recipe
    except ValueError as error:
        raise ValueError(f"{error} (arm {name!r})") from None


def seeded(experiment: Experiment, seed: int) -> Experiment:
    """Return the experiment with another seed, and with it those of its parents whose seed is their child's."""
    parents = {"teacher": experiment.teacher, "start": experiment.start}
    own = {name: seeded(one, seed) for name, one in parents.items() if one and one.seed == experiment.seed}
    return experiment.replace(seed=seed, **own)


def check_measure(measure: Measure) -> None:
    """Raise ValueError for what is neither a function nor a name that is known."""
    if not callable(measure) and measure not in ("accuracy", *COSTS) and not class_in(measure):
        names = ", ".join(("accuracy", f"{RECALL}<class>", *COSTS))
        raise ValueError(f"measure must be a function or one of {names}, got {measure!r}")


def class_in(measure: Measure) -> str:
    """Return the class whose recall is meant, "" for other measures."""
    return measure.removeprefix(RECALL) if isinstance(measure, str) and measure.startswith(RECALL) else ""


def measured(
    arms: Sequence[Arm], measure: Measure, stop: Event | None = None, progress: Progress | None = None
) -> Iterator[dict[str, Any]]:
    """Train what the store lacks, make the files, and yield what each pair of experiment and recipe comes to."""
    experiments = list(dict.fromkeys(experiment for experiment, _ in arms))
    for experiment in experiments:
        parts(experiment)
        if name := class_in(measure):
            _of_class(load(experiment.dataset), name)
            if experiment.normalization == "own":
                raise ValueError("normalization must be shared for the recall of a class: each client has a model")
    tell = progress or (lambda done, of, words: None)
    trained = train_all(experiments, stop, tell)
    for number, (experiment, recipe) in enumerate(arms, 1):
        run = trained.get(experiment) or stored(experiment)
        if run is None or (stop is not None and stop.is_set()):
            raise TimeoutError("the study was stopped before it was finished: run it again to go on")
        yield _outcome(run, recipe or (Recipe() if measure in SIZES else None), measure)
        tell(number, len(arms), "runs measured")


def _outcome(run: Run | Exception, recipe: Recipe | None, measure: Measure) -> dict[str, Any]:
    try:
        if isinstance(run, Exception):
            raise run
        row = {name: getattr(run, name) for name in TRAFFIC} | {"seconds": run.measured["seconds"]}
        if run.status == "diverged":
            return {"value": nan, "status": "diverged", "note": run.note, **row}
        file = artifact_of(run, recipe) if recipe else None
    except (OSError, MemoryError):  # the machine's fault is no outcome
        raise
    except Exception as error:
        return {"value": nan, "status": "failed", "note": complaint(error)}
    row |= {"accuracy": (file or run).accuracy, "loss": run.records[-1].loss}
    row |= {name: getattr(file, name, nan) for name in SIZES}
    value = _value(run, file, measure) if callable(measure) or class_in(measure) else row[measure]
    return {"value": value, **({} if isfinite(value) else {"status": "failed", "note": f"measured {value}"}), **row}


def _value(run: Run, file: Artifact | None, measure: Measure) -> float:
    if not callable(measure):
        held = _of_class(run.dataset, class_in(measure))
        return (
            accuracy(file.session, held)[0] if file else run.task.evaluate(run.weights, held, run.state).accuracy()[0]
        )
    value = measure(file or run)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"measure must return a number, got {value!r}") from None


def _of_class(dataset: Dataset, name: str) -> Split:
    """Return the validation samples of one class."""
    if name not in dataset.classes:
        raise ValueError(f"measure must name a class of {dataset.name} ({', '.join(dataset.classes)}), got {name!r}")
    held = dataset.filled("validation")
    mine = held.y == dataset.classes.index(name)
    if not mine.any():
        raise ValueError(f"measure must name a class with validation samples, {dataset.name} has none of {name!r}")
    return Split(held.x[mine], held.y[mine])
