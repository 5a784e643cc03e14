"""Where an experiment runs: the one function `train` of the public face."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from threading import Event

from fedlab_kit import runs
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.server import RoundRecord
from fedlab_kit.run import Run

ENGINES = ("process", "flower")


def train(
    experiment: Experiment,
    stop: Event | None = None,
    progress: Callable[[RoundRecord], None] | None = None,
    store: Path | None = None,
    engine: str = "process",
) -> Run:
    """Run an experiment, or answer it from the store, or go on where it stopped.

    `progress` is called with every record, stored ones at once. Setting `stop` ends the run before its next batch;
    the rounds so far are kept, and the same call later goes on to the same final weights. Another notebook that
    trains the same experiment at this moment is waited for. `store` is another folder to keep runs in than
    `runs_folder()`. `engine` is "process", all in this one, or "flower", every client a virtual node of Flower's
    simulation on Ray: the same numbers, for populations that outgrow one process. What a user wrote and the store could
    not tell from a later version is run every time, with a warning, and kept as long as this process. Raises ValueError
    for an impossible experiment or an unknown engine, OSError when the store is unreadable or full, and
    ModuleNotFoundError with the remedy when Flower is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "process":
        run = runs.train(experiment, stop, progress, store)
    else:
        need_flower()
        from fedlab_kit.scale.flower import simulate

        run = simulate(experiment, stop, progress, store)
    run.warn()
    return run


def need_flower() -> None:
    """Raise ModuleNotFoundError with the remedy when Flower or Ray is not installed."""
    for name in ("flwr", "ray"):
        if find_spec(name) is None:
            raise ModuleNotFoundError('this needs Flower: pip install -c constraints.txt -e ".[scale]"', name=name)
