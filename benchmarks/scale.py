"""What scaling out costs: many clients in one process and on Ray, and a few as processes of their own over TLS."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import psutil

import fedlab_kit as fk
from benchmarks.harness import DataMissing, Row, fresh, peak_mb

JOB = fk.Experiment(dataset="many", model="mlp", partition="iid", clients=1000, clients_per_round=100, rounds=5)
"""Clients of 8 samples each, 100 per round, topk up with error feedback: every client keeps a residual."""


@fk.dataset
def many() -> fk.Dataset:
    """The digits, tiled until 10,000 clients have 8 samples each."""
    from fedlab_kit.data import load

    digits = load("digits")
    times = -(-80_000 // len(digits.train))
    train = fk.Split(digits.train.x.repeat(times, 1, 1, 1)[:80_000], digits.train.y.repeat(times)[:80_000])
    return fk.Dataset("many", digits.classes, train, digits.validation, digits.public, digits.test, digits.preprocess)


def scale() -> list[Row]:
    """Seconds per round (median after the first), peak memory above torch's own, bytes on disk: 100 clients a round."""
    rows = [fresh("benchmarks.scale:measure", clients=n, engine="process") for n in (1000, 10_000)]
    try:
        import flwr  # noqa: F401
    except ModuleNotFoundError:
        raise DataMissing('The rest needs Flower: pip install -c constraints.txt -e ".[scale]".') from None
    return rows + [fresh("benchmarks.scale:measure", clients=n, engine="flower") for n in (1000, 10_000)]


def measure(clients: int, engine: str) -> Row:
    """Train one population in an empty store; Ray's processes are counted apart from this one."""
    experiment = JOB.replace(clients=clients, uplink="topk", uplink_keep=0.01)
    idle, workers, over = peak_mb(), [0.0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(workers, over))
    watcher.start()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run = fk.train(experiment, store=Path(folder), engine=engine)
        seconds = time.perf_counter() - began
        kept = run.client_bytes
    over.set()
    watcher.join()
    return {
        "engine": engine,
        "clients": clients,
        "rounds": len(run.records),
        "s per round": round(median(record.seconds for record in run.records[1:]), 2),
        "s in all": round(seconds, 1),
        "peak MB above torch": round(peak_mb() - idle),
        "MB in other processes": round(workers[0]),
        "MB of client state on disk": round(kept / 2**20, 1),
        "MB up": round(run.uplink_bytes / 2**20, 2),
        "MB down": round(run.downlink_bytes / 2**20, 2),
        "answered": sum(len(record.answered) for record in run.records),
    }


def _watch(peak: list[float], over: threading.Event) -> None:
    """Note the largest sum of memory that this process's children have had to themselves."""
    own = psutil.Process(os.getpid())
    while not over.wait(0.5):
        total = 0.0
        for child in own.children(recursive=True):
            try:
                total += child.memory_full_info().uss / 2**20
            except psutil.Error:
                continue
        peak[0] = max(peak[0], total)
