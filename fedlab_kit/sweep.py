"""Many experiments and recipes at once: a table of measured points, and the front among them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import product
from math import nan
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from fedlab_kit import catalog
from fedlab_kit.data import Dataset
from fedlab_kit.deployment.artifact import Artifact, compress, load, recall, slug
from fedlab_kit.deployment.selection import front_share, pareto
from fedlab_kit.deployment.subject import Subject, subject_of
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.files import ROOT, StoreError
from fedlab_kit.run import Run
from fedlab_kit.runs import execute as train  # whose warning is given here
from fedlab_kit.runs import find, parts
from fedlab_kit.settings import Clash, complaint
from fedlab_kit.statistics import FEWEST_SEEDS, crossed_loss

if TYPE_CHECKING:
    import pandas


PATIENCE = 2.0  # seconds of training before a second process is started: it needs as long to import torch
Tell = Callable[[int, int, str], None]


def stored(experiment: Experiment) -> Run | Exception | None:
    """Return what the store has of an experiment: its run, none, or the error that says why nobody can tell."""
    try:
        return find(experiment)
    except Exception as error:
        return error


def train_all(experiments: Sequence[Experiment], stop: Event | None, tell: Tell) -> dict[Experiment, Run | Exception]:
    """Train what the store lacks, from the first to the last; a second process comes from the last to the first.

    The store's locks keep the two apart: what the other has done is there, what it is doing is waited for. `tell`
    gets how many are done, of how many. Returns what was trained here, which the store may be unable to keep, or the
    error that it ended in. Returns early when `stop` is set; every round that was finished is kept.
    """
    missing = [experiment for experiment in experiments if stored(experiment) is None]
    second, trained = SecondProcess(missing[:1:-1]), dict[Experiment, Run | Exception]()
    try:
        for done, experiment in enumerate(missing, 1):
            try:
                trained[experiment] = run = train(experiment, stop, lambda record: second.start_if_it_pays())
                run.warn()
            except Exception as error:
                trained[experiment] = error
            if stop is not None and stop.is_set():  # in the middle of it, or while a teacher was trained
                del trained[experiment]
                break
            tell(min(done + second.done, len(missing)), len(missing), "experiments trained")
    finally:
        second.end()
    return trained


class SecondProcess:
    """Trains experiments on another core, as long as its parent lives; `done` counts those that it has finished."""

    def __init__(self, experiments: Sequence[Experiment]) -> None:
        self.done = 0
        able = (os.cpu_count() or 1) > 1 and all(map(built_in, experiments))
        self._experiments = list(experiments) if able else []
        self._begin = monotonic() + PATIENCE
        self._process: subprocess.Popen[str] | None = None

    def start_if_it_pays(self) -> None:
        """Start once training has gone on for a while and there is something to do."""
        if self._process is not None or not self._experiments or monotonic() < self._begin:
            return
        command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            start_new_session=True,  # interrupting a kernel meets the parent alone, which then ends this one
        )
        assert self._process.stdin
        self._process.stdin.write(json.dumps([experiment.changes() for experiment in self._experiments]) + "\n")
        self._process.stdin.flush()
        self._counter = Thread(target=self._count, args=(self._process,), daemon=True)
        self._counter.start()

    def end(self) -> None:
        """Stop it before its next batch; while it still starts up, at once."""
        if self._process is None:
            return
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()  # what it has written is whole: see files.py
            self._process.wait()
        self._counter.join()

    def _count(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        with process.stdout as lines:
            for _ in lines:
                self.done += 1


def serve() -> None:
    """Train the experiments in the first line of standard input, and say so for each, until that input ends.

    What goes wrong with one is left to the parent, which comes to the same experiment and says it to a person.
    """
    stop, experiments = Event(), json.loads(sys.stdin.readline())
    Thread(target=_set_at_the_end, args=(stop,), daemon=True).start()
    for changes in experiments:
        with suppress(Exception):
            train(Experiment(**changes), stop)
        if stop.is_set():
            return
        print("done", flush=True)


def _set_at_the_end(stop: Event) -> None:
    sys.stdin.read()
    stop.set()


def built_in(experiment: Experiment) -> bool:
    """Say whether another process knows all that the experiment names: nothing was registered in a notebook."""
    return all(map(catalog.is_built_in, parts(experiment))) and all(map(built_in, experiment.parents))


MEASURED = (
    "accuracy",
    "missing_recall",
    "lost",
    "changed",
    "bytes",
    "zstd_bytes",
    "latency_ms",
    "throughput",
    "sparsity",
    "parameters",
    "note",
)
ENDS = ("low", "high", "lost_low", "lost_high")
TRAFFIC = ("uplink_bytes", "downlink_bytes")


def sweep(
    experiment: Experiment | nn.Module,
    grid: Mapping[str, Iterable[Any]],
    recipe: Recipe | None = None,
    stop: Event | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    dataset: Dataset | str | None = None,
) -> pandas.DataFrame:
    """Train and compress every combination of the fields in `grid` and return one row a point.

    Fields belong to Experiment or Recipe; what the grid does not name comes from `experiment` and `recipe`, which is
    the uncompressed fp32 file if none is given: a sweep over train fields alone has a row, and a file, for each run.
    Rows hold the grid's fields, what was measured on the artifact (accuracy on the validation split with `low` and
    `high`, and `missing_recall` of the classes that no client holds, NaN where all are held), `uplink_bytes` and
    `downlink_bytes` of the run, `seconds` of training, `path`, and `front`: whether no other point is both smaller
    (zstd) and as accurate. A point that cannot be had, because its run failed or diverged or its model does not allow
    the recipe, has a `note` that says so and NaN for what was not measured.

    In the place of an experiment may stand a trained module of one's own, with its `dataset`, see `compress`: the grid
    then names fields of Recipe alone, and what training took is NaN.

    Every run and every point is kept in the store, so a sweep that was ended, by `stop` or by interrupting the kernel,
    goes on where it was; `progress(done, of, words)` is called as it goes, `print` will do. Experiments that have to be
    trained use both cores. Raises ValueError for a field that does not exist or a value out of range, before anything
    is trained.
    """
    import pandas

    points = _points(experiment, recipe or Recipe(), grid, dataset)
    tell = progress or (lambda done, of, words: None)
    trained = train_all(list(dict.fromkeys(what for what, _, _ in points if isinstance(what, Experiment))), stop, tell)

    @lru_cache(maxsize=1)  # points of one run follow each other
    def made(what: Experiment | Subject | Exception) -> Run | Subject | Exception | None:
        return trained.get(what) or stored(what) if isinstance(what, Experiment) else what

    model = experiment.model if isinstance(experiment, Experiment) else type(experiment).__name__
    rows: list[dict[str, Any]] = []
    right: list[np.ndarray | None] = []
    for what, how, values in points:
        if (stop is not None and stop.is_set()) or (ready := made(what)) is None:
            break
        artifact, figures = measure_point(ready, how, str(values.get("model", model)))
        right.append(None if artifact is None else artifact.answers == artifact.dataset.filled("validation").y.numpy())
        rows.append({**values, **figures})
        tell(len(rows), len(points), "points measured")
    table = _with_front(pandas.DataFrame(rows))
    return table.assign(front_share=front_share(table["zstd_bytes"], right)) if len(table) else table


def measure_point(
    what: Run | Subject | Exception, recipe: Recipe, model: str
) -> tuple[Artifact | None, dict[str, Any]]:
    """Return a point's file and row, measured now or before; what cannot be is NaN, and `note` says why."""
    run = what if isinstance(what, Run) else None
    training = {name: getattr(run, name, nan) for name in TRAFFIC} | {
        "seconds": run.measured["seconds"] if run else nan
    }
    try:
        if isinstance(what, Exception):
            raise what
        if run and run.status == "diverged":
            raise ValueError(run.note)
        artifact = artifact_of(what, recipe)
    except Exception as error:  # whatever it was, the other points are worth their measurement
        why = f"{model} as {slug(recipe).replace('-', ' ')}: {complaint(error)}"
        return None, {**dict.fromkeys((*MEASURED, *ENDS), nan), **training, "path": None, "note": why}
    measured = {name: nan if (value := getattr(artifact, name)) is None else value for name in MEASURED}
    ends = dict(zip(ENDS, artifact.interval + artifact.lost_interval, strict=True))
    return artifact, {**measured, **ends, **training, "path": artifact.path}


def artifact_of(what: Run | Subject, recipe: Recipe) -> Artifact:
    """Return the artifact that was made before, if it is whole, else make it. Raises what `compress` raises."""
    try:
        known = recall(what, recipe)
    except StoreError as error:
        warnings.warn(f"{error}; it is made again", stacklevel=4)
        known = None
    return known or compress(what, recipe)


def _with_front(table: pandas.DataFrame) -> pandas.DataFrame:
    """Return the table with the column `front`."""
    return table.assign(front=pareto(table["zstd_bytes"], table["accuracy"])) if len(table) else table


def spread(table: pandas.DataFrame, over: str = "seed") -> pandas.DataFrame:
    """Return what a table says on average over a column of the grid, usually the seed, and how far it spreads.

    Points that differ in that column alone become one row: the mean of `accuracy`, recall, sizes, latency, traffic and
    seconds; `accuracy_sd`, the standard deviation; `low` and `high`, the smallest and the largest accuracy, which
    plots draw as bars; `points`, how many there were; and `front` among the means. `lost` has the 95 % interval
    `lost_low` to `lost_high` over other seeds and other samples (`statistics.crossed_loss`), NaN below eight points:
    fewer cannot say what holds for others. Points without an accuracy are left out. Raises ValueError when the table
    was not swept over that column.
    """
    if over not in table.columns:
        raise ValueError(f"over must be a column of the table ({', '.join(table.columns)}), got {over!r}")
    made = {*MEASURED, *TRAFFIC, *ENDS, "seconds", "path", "front", "front_share", over}
    kept = [name for name in table.columns if name not in made]
    averaged = {
        name: (name, "mean")
        for name in ("missing_recall", "lost", "bytes", "zstd_bytes", "latency_ms", *TRAFFIC, "seconds")
    }
    grouped = table.dropna(subset="accuracy").assign(_all=0).groupby([*kept, "_all"], sort=False, dropna=False)
    seeds = [_lost_over(paths) for _, paths in grouped["path"]]
    means = grouped.agg(
        accuracy=("accuracy", "mean"),
        accuracy_sd=("accuracy", "std"),
        low=("accuracy", "min"),
        high=("accuracy", "max"),
        points=("accuracy", "size"),
        **averaged,
    )
    means["lost_low"], means["lost_high"] = zip(*seeds, strict=True) if seeds else ((), ())
    return _with_front(means.reset_index().drop(columns="_all"))


def _lost_over(paths: Iterable[Path]) -> tuple[float, float]:
    """Return the interval of what got lost, in points, over seeds and samples; the files are one for each seed."""
    if len(files := list(paths)) < FEWEST_SEEDS:
        return nan, nan
    found = [load(path) for path in files]
    truth = found[0].dataset.filled("validation").y.numpy()
    before, after = (np.stack([getattr(one, whose) == truth for one in found]) for whose in ("baseline", "answers"))
    _, low, high = crossed_loss(before, after)
    return 100 * low, 100 * high


def _points(
    start: Experiment | nn.Module, recipe: Recipe, grid: Mapping[str, Iterable[Any]], dataset: Dataset | str | None
) -> list[tuple[Experiment | Subject | Exception, Recipe, dict[str, Any]]]:
    """Return every combination as (what is compressed, recipe, values); the recipe's fields vary fastest.

    Fields that do not go together are an exception in the place of what is compressed.
    """
    known, after = isinstance(start, Experiment), set(Recipe.model_fields)
    if known and dataset is not None:
        raise ValueError("dataset must be None for an experiment, which names its own: it is for a module of one's own")
    allowed = after | (set(Experiment.model_fields) if known else set())
    if unknown := [name for name in grid if name not in allowed]:
        owners = "Experiment or Recipe" if known else "Recipe alone for a module of one's own"
        raise ValueError(f"grid must name fields of {owners}, got {unknown[0]!r}")
    values_of = {name: listed("grid", name, grid[name]) for name in sorted(grid, key=lambda name: name in after)}
    base = start if isinstance(start, Experiment) else subject_of(start, dataset=dataset)
    points: list[tuple[Experiment | Subject | Exception, Recipe, dict[str, Any]]] = []
    for combination in product(*values_of.values()):
        values = dict(zip(values_of, combination, strict=True))
        training = {name: value for name, value in values.items() if name not in after}
        try:
            how = recipe.replace(**{name: value for name, value in values.items() if name in after})
            points.append((base.replace(**training) if isinstance(base, Experiment) else base, how, values))
        except Clash as error:
            points.append((error, recipe, values))
    return points


def listed(owner: str, name: str, given: Any) -> list[Any]:
    """Return a field's values as a list, numbers of numpy's, as `np.linspace` gives, as Python's.

    ValueError, on behalf of the `owner` argument, where they are no list or none.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"{owner} must give a list of values for {name}, got {given!r}")
    if not (values := [value.item() if hasattr(value, "item") else value for value in given]):
        raise ValueError(f"{owner} must give at least one value for {name}, got none")
    return values
