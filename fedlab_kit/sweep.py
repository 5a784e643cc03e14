"""Many experiments and recipes at once: a table of measured points, and the front among them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from itertools import product
from math import nan
from threading import Event
from typing import TYPE_CHECKING, Any

from torch import nn

from fedlab_kit.data import Dataset
from fedlab_kit.deployment.artifact import Artifact, compress, recall, slug
from fedlab_kit.deployment.fleet import pareto
from fedlab_kit.deployment.subject import Subject, subject_of
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.files import StoreError
from fedlab_kit.run import Run
from fedlab_kit.settings import Clash, complaint
from fedlab_kit.training import stored, train_all

if TYPE_CHECKING:
    import pandas

MEASURED = (
    "accuracy", "missing_recall", "bytes", "zstd_bytes", "latency_ms", "throughput", "sparsity", "parameters", "note",
)  # fmt: skip
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
    for what, how, values in points:
        if (stop is not None and stop.is_set()) or (ready := made(what)) is None:
            break
        rows.append({**values, **measure_point(ready, how, str(values.get("model", model)))})
        tell(len(rows), len(points), "points measured")
    return _with_front(pandas.DataFrame(rows))


def measure_point(what: Run | Subject | Exception, recipe: Recipe, model: str) -> dict[str, Any]:
    """Return the row of a point, measured now or before; what cannot be measured is NaN, and `note` says why."""
    run = what if isinstance(what, Run) else None
    training = {name: getattr(run, name, nan) for name in TRAFFIC} | {
        "seconds": run.measured["seconds"] if run else nan
    }
    try:
        if isinstance(what, Exception):
            raise what
        if run and run.status == "diverged":
            raise ValueError(run.note)
        artifact = _known(what, recipe) or compress(what, recipe)
    except Exception as error:  # whatever it was, the other points are worth their measurement
        why = f"{model} as {slug(recipe).replace('-', ' ')}: {complaint(error)}"
        return {**dict.fromkeys((*MEASURED, "low", "high"), nan), **training, "path": None, "note": why}
    measured = {name: nan if (value := getattr(artifact, name)) is None else value for name in MEASURED}
    low, high = artifact.interval
    return {**measured, "low": low, "high": high, **training, "path": artifact.path}


def _known(what: Run | Subject, recipe: Recipe) -> Artifact | None:
    """Return the artifact that was made before, if it is whole."""
    try:
        return recall(what, recipe)
    except StoreError as error:
        warnings.warn(f"{error}; it is made again", stacklevel=4)
        return None


def _with_front(table: pandas.DataFrame) -> pandas.DataFrame:
    """Return the table with the column `front`."""
    return table.assign(front=pareto(table["zstd_bytes"], table["accuracy"])) if len(table) else table


def spread(table: pandas.DataFrame, over: str = "seed") -> pandas.DataFrame:
    """Return what a table says on average over a column of the grid, usually the seed, and how far it spreads.

    Points that differ in that column alone become one row: the mean of `accuracy`, of `missing_recall`, sizes, latency,
    traffic and seconds; `accuracy_sd`, the standard deviation; `low` and `high`, the smallest and the largest accuracy,
    which plots draw as bars; `points`, how many there were; and `front` among the means. Points without an accuracy are
    left out. Raises ValueError when the table was not swept over that column.
    """
    if over not in table.columns:
        raise ValueError(f"over must be a column of the table ({', '.join(table.columns)}), got {over!r}")
    made = {*MEASURED, *TRAFFIC, "low", "high", "seconds", "path", "front", over}
    kept = [name for name in table.columns if name not in made]
    means_of = ("missing_recall", "bytes", "zstd_bytes", "latency_ms", *TRAFFIC, "seconds")
    averaged = {name: (name, "mean") for name in means_of}
    grouped = table.dropna(subset="accuracy").assign(_all=0).groupby([*kept, "_all"], sort=False, dropna=False)
    means = grouped.agg(
        accuracy=("accuracy", "mean"),
        accuracy_sd=("accuracy", "std"),
        low=("accuracy", "min"),
        high=("accuracy", "max"),
        points=("accuracy", "size"),
        **averaged,
    )
    return _with_front(means.reset_index().drop(columns="_all"))


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
    values_of = {name: _values(name, grid[name]) for name in sorted(grid, key=lambda name: name in after)}
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


def _values(name: str, given: Any) -> list[Any]:
    """Return a field's values as a list, numbers of numpy's, as `np.linspace` gives, as Python's."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"grid must give a list of values for {name}, got {given!r}")
    if not (values := [value.item() if hasattr(value, "item") else value for value in given]):
        raise ValueError(f"grid must give at least one value for {name}, got none")
    return values
