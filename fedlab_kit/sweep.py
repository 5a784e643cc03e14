"""Many experiments and recipes at once: a table of measured points, and the front among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from itertools import product
from multiprocessing import get_context
from threading import Event
from typing import TYPE_CHECKING, Any

from fedlab_kit import catalog
from fedlab_kit.deployment.artifact import compress
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.runs import Run, find, train
from fedlab_kit.wire import CODECS

if TYPE_CHECKING:
    import pandas

MEASURED = ("accuracy", "bytes", "zstd_bytes", "latency_ms", "throughput", "sparsity", "parameters", "note")


def sweep(
    experiment: Experiment,
    grid: Mapping[str, Iterable[Any]],
    recipe: Recipe | None = None,
    stop: Event | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> pandas.DataFrame:
    """Train and compress every combination of the fields in `grid` and return one row a point.

    Fields belong to Experiment or Recipe; what the grid does not name comes from `experiment` and `recipe`. Rows
    hold the grid's fields, what was measured on the artifact (accuracy on the validation split with `low` and
    `high`), `uplink_bytes` and `downlink_bytes` of the run, `seconds` of training, `path`, and `front`: whether no
    other point is both smaller (zstd) and as accurate. Every run is kept in the store, so a sweep that was stopped
    goes on where it was; `progress(done, of, words)` is called as it goes. Experiments that have to be trained use
    both cores. Raises ValueError for a field that does not exist or a value out of range, before anything is trained.
    """
    points = _points(experiment, recipe or Recipe(), grid)
    tell = progress or (lambda done, of, words: None)
    _train_all(list(dict.fromkeys(e for e, _, _ in points)), stop, tell)
    rows: list[dict[str, Any]] = []
    for each, how, values in points:
        run = find(each)
        if run is None or (stop is not None and stop.is_set()):
            break
        rows.append({**values, **measure_point(run, how)})
        tell(len(rows), len(points), "points measured")
    return with_front(rows)


def measure_point(run: Run, recipe: Recipe) -> dict[str, Any]:
    """Compress a run and return the row of its point."""
    artifact = compress(run, recipe)
    measured = {name: getattr(artifact, name) for name in MEASURED}
    low, high = artifact.interval
    traffic = {"uplink_bytes": run.uplink_bytes, "downlink_bytes": run.downlink_bytes}
    return {**measured, "low": low, "high": high, **traffic, "seconds": run.measured["seconds"], "path": artifact.path}


def with_front(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """Return the rows as a DataFrame with the column `front`."""
    import pandas

    table = pandas.DataFrame(rows)
    if len(table):
        table["front"] = pareto(table["zstd_bytes"], table["accuracy"])
    return table


def pareto(cost: Iterable[float], gain: Iterable[float]) -> list[bool]:
    """Say for each point whether no other costs at most as much and gains at least as much, one of them strictly."""
    points = list(zip(cost, gain, strict=True))
    return [not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points) for cost, gain in points]


def spread(table: pandas.DataFrame, over: str = "seed") -> pandas.DataFrame:
    """Return mean and standard deviation of accuracy and sizes over a column of the grid, usually the seed.

    Points that differ in that column alone become one row; the columns are `accuracy`, `accuracy_sd`, `bytes`,
    `zstd_bytes` and `points` (how many). Raises ValueError when the table was not swept over that column.
    """
    if over not in table.columns:
        raise ValueError(f"over must be a column of the table ({', '.join(table.columns)}), got {over!r}")
    made = {*MEASURED, "low", "high", "uplink_bytes", "downlink_bytes", "seconds", "path", "front", over}
    grouped = table.groupby([name for name in table.columns if name not in made], sort=False)
    return grouped.agg(
        accuracy=("accuracy", "mean"),
        accuracy_sd=("accuracy", "std"),
        bytes=("bytes", "mean"),
        zstd_bytes=("zstd_bytes", "mean"),
        points=("accuracy", "size"),
    ).reset_index()


def _points(
    experiment: Experiment, recipe: Recipe, grid: Mapping[str, Iterable[Any]]
) -> list[tuple[Experiment, Recipe, dict[str, Any]]]:
    """Return every combination as (experiment, recipe, values); the recipe's fields vary fastest."""
    training, after = (set(type(settings).model_fields) for settings in (experiment, recipe))
    if unknown := [name for name in grid if name not in training | after]:
        raise ValueError(f"grid must name fields of Experiment or Recipe, got {unknown[0]!r}")
    names = sorted(grid, key=lambda name: name in after)
    points = []
    for combination in product(*(list(grid[name]) for name in names)):
        values = {name: _plain(value) for name, value in zip(names, combination, strict=True)}
        one = experiment.replace(**{name: v for name, v in values.items() if name in training})
        how = recipe.replace(**{name: v for name, v in values.items() if name in after})
        points.append((one, how, values))
    return points


def _plain(value: Any) -> Any:
    """Turn a number of numpy's, as `np.linspace` gives, into Python's."""
    return value.item() if hasattr(value, "item") else value


def _train_all(experiments: list[Experiment], stop: Event | None, tell: Callable[[int, int, str], None]) -> None:
    """Train what the store lacks: on both cores when there are several and all that they name is built in."""
    missing = [experiment for experiment in experiments if find(experiment) is None]
    if len(missing) > 2 and all(map(_built_in, missing)):
        _train_in_processes(missing, stop, tell)
        return
    for done, experiment in enumerate(missing):
        if stop is not None and stop.is_set():
            return
        train(experiment, stop)
        tell(done + 1, len(missing), "experiments trained")


def _train_in_processes(
    experiments: list[Experiment], stop: Event | None, tell: Callable[[int, int, str], None]
) -> None:
    context = get_context("spawn")
    halt = context.Event()
    with ProcessPoolExecutor(2, context, initializer=_adopt, initargs=(halt,)) as pool:
        waiting = {pool.submit(_work, experiment.changes()) for experiment in experiments}
        while waiting:
            done, waiting = wait(waiting, timeout=0.2)
            for future in done:
                future.result()
            if done:
                tell(len(experiments) - len(waiting), len(experiments), "experiments trained")
            if stop is not None and stop.is_set():
                halt.set()
                pool.shutdown(cancel_futures=True)
                return


_halt: Any = None  # the event by which the parent stops this process, in a process that `_adopt` has prepared


def _adopt(halt: Any) -> None:
    global _halt
    _halt = halt


def _work(changes: dict[str, Any]) -> None:
    train(Experiment(**changes), _halt)


def _built_in(experiment: Experiment) -> bool:
    used = [catalog.lookup("model", experiment.model), catalog.lookup("dataset", experiment.dataset)]
    used += [CODECS[name] for name in (experiment.uplink, experiment.downlink) if name in CODECS]
    mine = all(thing.__module__.startswith("fedlab_kit.") for thing in used)
    return mine and all(map(_built_in, experiment.parents))
