"""The same experiment on Flower: the apps that `flwr run .` starts, and the simulation behind engine="flower"."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Event

# Nobody phones home; the first is read once, when flwr is imported.
os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", RAY_USAGE_STATS_ENABLED="0")

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.server import RoundRecord
from fedlab_kit.run import Run
from fedlab_kit.runs import execute
from fedlab_kit.scale.client import client
from fedlab_kit.scale.exchange import GridExchange
from fedlab_kit.scale.settings import line, modules_of, read

__all__ = ["client", "server", "simulate"]

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run's settings describe; the run lands in this machine's store."""
    settings = dict(context.run_config)
    patience, modules = float(settings.pop("patience")), str(settings.pop("modules")).split()
    for module in modules:
        import_module(module)
    execute(
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
    """Do `fedlab_kit.runs.execute` with every client as a virtual node of Flower's simulation on Ray.

    Ray starts one worker per core and is gone when this returns. Raises ValueError when the experiment uses a model,
    data set or codec that is defined in a notebook: workers import what they need from files.
    """
    app, ended = ServerApp(), stop or Event()
    outcome: list[Run] = []
    modules = modules_of(experiment)

    @app.main()
    def _(grid: Grid, context: Context) -> None:
        exchange = GridExchange(grid, patience=3600.0, modules=modules)
        outcome.append(execute(experiment, ended, progress, store, exchange))

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


def _start_ray(folder: str) -> None:
    """Start Ray on this machine; on a busy one its own limit of 30 s is too short, so it is tried again."""
    import ray

    for left in (2, 1, 0):
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
