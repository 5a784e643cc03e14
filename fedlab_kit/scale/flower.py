"""The same experiment on Flower: the apps that `flwr run .` starts, and the simulation behind engine="flower"."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read once, when flwr is imported
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedlab_kit import catalog
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.record import RoundRecord
from fedlab_kit.runs import Run, train
from fedlab_kit.scale.client import client
from fedlab_kit.scale.exchange import GridExchange
from fedlab_kit.wire import make

__all__ = ["client", "modules_of", "read", "server", "simulate", "write"]

NESTED = ("teacher", "start", "start_recipe")  # travel as JSON text, "" for none: Flower's settings are flat

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run's settings describe; the run lands in this machine's store."""
    settings = dict(context.run_config)
    patience, modules = float(settings.pop("patience")), str(settings.pop("modules")).split()
    for module in modules:
        import_module(module)
    train(
        read(settings),
        progress=lambda record: print(line(record), flush=True),
        exchange=GridExchange(grid, patience, modules),
    )


def simulate(
    experiment: Experiment,
    stop: Event | None = None,
    progress: Callable[[RoundRecord], None] | None = None,
    store: Path | None = None,
) -> Run:
    """Do `fedlab_kit.runs.train` with every client as a virtual node of Flower's simulation on Ray.

    Ray starts one worker per core and is gone when this returns. Raises ValueError when the experiment uses a model,
    data set or codec that is defined in a notebook: workers import what they need from files.
    """
    app, ended = ServerApp(), stop or Event()
    outcome: list[Run] = []
    modules = modules_of(experiment)

    @app.main()
    def _(grid: Grid, context: Context) -> None:
        exchange = GridExchange(grid, patience=3600.0, modules=modules)
        outcome.append(train(experiment, ended, progress, store, exchange))

    # Flower prefers `flwr run`, which leaves a server behind; this starts nothing that outlives the call.
    with _ray():
        try:
            run_simulation(app, client, experiment.clients, backend_config={"client_resources": {"num_cpus": 1}})
        except BaseException:
            ended.set()
            raise
    return outcome[0]


@contextmanager
def _ray() -> Iterator[None]:
    """Ray with a worker per core, its files in a temporary folder; Flower's log is kept to errors meanwhile."""
    import ray

    logger, path = logging.getLogger("flwr"), os.environ.get("PYTHONPATH")
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # workers find what this process finds
    with tempfile.TemporaryDirectory(prefix="fedlab-", ignore_cleanup_errors=True) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _start_ray(folder)
            yield
        finally:
            ray.shutdown()
            logger.setLevel(level)
            os.environ.pop("PYTHONPATH")
            if path is not None:
                os.environ["PYTHONPATH"] = path


def _start_ray(folder: str, tries: int = 3) -> None:
    """Start Ray on this machine; on a busy one its own limit of 30 s is too short, so it is tried again."""
    import ray

    for left in reversed(range(tries)):
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                object_store_memory=200 * 2**20,
                _temp_dir=folder,
                _node_ip_address="127.0.0.1",
            )
            return
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


def write(experiment: Experiment) -> dict[str, Any]:
    """Return the experiment as the flat settings of a Flower run."""
    settings = experiment.changes()
    return {name: json.dumps(value) if name in NESTED else value for name, value in settings.items()}


def read(settings: Mapping[str, Any]) -> Experiment:
    """Return the experiment that a run's settings describe. Raises ValueError naming a field that is wrong."""
    values = dict(settings)
    for name in NESTED:
        text = values.pop(name, "")
        if text:
            values[name] = json.loads(text)
    return Experiment(**values)


def line(record: RoundRecord) -> str:
    """Return one round in one line."""
    parts = [
        f"round {record.round:3}",
        f"accuracy {record.accuracy:6.1%}",
        f"answered {len(record.answered)} of {len(record.cohort)}",
        f"up {record.uplink_bytes:,} B",
        f"down {record.downlink_bytes:,} B",
        f"{record.seconds:.1f} s",
        *(f"client {client}: {why}" for client, why in record.refused),
        *([record.note] if record.note else []),
    ]
    return " | ".join(parts)


def modules_of(experiment: Experiment) -> list[str]:
    """Return the modules, beside the package, that hold what the experiment uses. ValueError if one is no module."""
    used = [catalog.lookup("model", experiment.model), catalog.lookup("dataset", experiment.dataset)]
    used += [type(make(experiment.uplink)), type(make(experiment.downlink))]
    found = {thing.__module__ for thing in used if thing.__module__.split(".")[0] != "fedlab_kit"}
    if "__main__" in found:
        name = next(thing.__qualname__ for thing in used if thing.__module__ == "__main__")
        raise ValueError(
            f"{name} is defined in a notebook or script: Flower's processes need it in a module of its own"
        )
    return sorted(found.union(*map(modules_of, experiment.parents)))
