"""Many experiments and recipes at once: a table of measured points, and the front among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import product
from math import nan
from threading import Event
from typing import TYPE_CHECKING, Any

from fedlab_kit.deployment.artifact import compress
from fedlab_kit.deployment.fleet import pareto
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.run import Run
from fedlab_kit.runs import find
from fedlab_kit.training import train_all

if TYPE_CHECKING:
    import pandas

MEASURED = ("accuracy", "bytes", "zstd_bytes", "latency_ms", "throughput", "sparsity", "parameters", "note")
TRAFFIC = ("uplink_bytes", "downlink_bytes")


def sweep(
    experiment: Experiment,
    grid: Mapping[str, Iterable[Any]],
    recipe: Recipe | None = None,
    stop: Event | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> pandas.DataFrame:
    """Train and compress every combination of the fields in `grid` and return one row a point.

    Fields belong to Experiment or Recipe; what the grid does not name comes from `experiment` and `recipe`, which is
    the uncompressed fp32 file if none is given: a sweep over train fields alone has a row, and a file, for each run.
    Rows hold the grid's fields, what was measured on the artifact (accuracy on the validation split with `low` and
    `high`), `uplink_bytes` and `downlink_bytes` of the run, `seconds` of training, `path`, and `front`: whether no
    other point is both smaller (zstd) and as accurate. A point that cannot be had, because its run diverged or the
    model does not allow the recipe, has a `note` that says so and NaN for what was not measured.

    Every run is kept in the store, so a sweep that was ended, by `stop` or by interrupting the kernel, goes on where
    it was; `progress(done, of, words)` is called as it goes, `print` will do. Experiments that have to be trained use
    both cores. Raises ValueError for a field that does not exist or a value out of range, before anything is trained.
    """
    import pandas

    points = _points(experiment, recipe or Recipe(), grid)
    tell = progress or (lambda done, of, words: None)
    trained = train_all(list(dict.fromkeys(e for e, _, _ in points)), stop, tell)
    rows: list[dict[str, Any]] = []
    for each, how, values in points:
        run = trained.get(each) or find(each)
        if run is None or (stop is not None and stop.is_set()):
            break
        rows.append({**values, **measure_point(run, how)})
        tell(len(rows), len(points), "points measured")
    return _with_front(pandas.DataFrame(rows))


def measure_point(run: Run, recipe: Recipe) -> dict[str, Any]:
    """Compress a run and return the row of its point; what cannot be measured is NaN, and `note` says why."""
    traffic = {"uplink_bytes": run.uplink_bytes, "downlink_bytes": run.downlink_bytes}
    made = {**traffic, "seconds": run.measured["seconds"]}
    try:
        if run.status == "diverged":
            raise ValueError(run.note)
        artifact = compress(run, recipe)
    except ValueError as error:
        return {**dict.fromkeys((*MEASURED, "low", "high"), nan), **made, "path": None, "note": str(error)}
    measured = {name: getattr(artifact, name) for name in MEASURED}
    low, high = artifact.interval
    return {**measured, "low": low, "high": high, **made, "path": artifact.path}


def _with_front(table: pandas.DataFrame) -> pandas.DataFrame:
    """Return the table with the column `front`."""
    return table.assign(front=pareto(table["zstd_bytes"], table["accuracy"])) if len(table) else table


def spread(table: pandas.DataFrame, over: str = "seed") -> pandas.DataFrame:
    """Return what a table says on average over a column of the grid, usually the seed, and how far it spreads.

    Points that differ in that column alone become one row: the mean of `accuracy`, of sizes, latency, traffic and
    seconds; `accuracy_sd`, the standard deviation; `low` and `high`, the smallest and the largest accuracy, which
    plots draw as bars; `points`, how many there were; and `front` among the means. Points without an accuracy are left
    out. Raises ValueError when the table was not swept over that column.
    """
    if over not in table.columns:
        raise ValueError(f"over must be a column of the table ({', '.join(table.columns)}), got {over!r}")
    made = {*MEASURED, *TRAFFIC, "low", "high", "seconds", "path", "front", over}
    kept = [name for name in table.columns if name not in made]
    averaged = {name: (name, "mean") for name in ("bytes", "zstd_bytes", "latency_ms", *TRAFFIC, "seconds")}
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
    experiment: Experiment, recipe: Recipe, grid: Mapping[str, Iterable[Any]]
) -> list[tuple[Experiment, Recipe, dict[str, Any]]]:
    """Return every combination as (experiment, recipe, values); the recipe's fields vary fastest."""
    training, after = (set(type(settings).model_fields) for settings in (experiment, recipe))
    if unknown := [name for name in grid if name not in training | after]:
        raise ValueError(f"grid must name fields of Experiment or Recipe, got {unknown[0]!r}")
    values_of = {name: _values(name, grid[name]) for name in sorted(grid, key=lambda name: name in after)}
    points = []
    for combination in product(*values_of.values()):
        values = dict(zip(values_of, combination, strict=True))
        one = experiment.replace(**{name: v for name, v in values.items() if name in training})
        how = recipe.replace(**{name: v for name, v in values.items() if name in after})
        points.append((one, how, values))
    return points


def _values(name: str, given: Any) -> list[Any]:
    """Return a field's values as a list, numbers of numpy's, as `np.linspace` gives, as Python's."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"grid must give a list of values for {name}, got {given!r}")
    if not (values := [value.item() if hasattr(value, "item") else value for value in given]):
        raise ValueError(f"grid must give at least one value for {name}, got none")
    return values
