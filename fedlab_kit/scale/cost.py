"""What a round costs as the cohort grows: measured in a fresh process, and a straight line through the measurements."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Self

import numpy as np
import psutil

from fedlab_kit.experiment import Experiment
from fedlab_kit.runs import rounds


class Cost(NamedTuple):
    """One round: clients that took part, MB up and down (10^6 bytes), MB of memory it added, seconds."""

    clients: int
    up: float
    down: float
    memory: float
    seconds: float


class Line(NamedTuple):
    """A fixed cost and a cost per client for each quantity, by least squares; `at` tells what a cohort would cost."""

    fixed: Cost
    each: Cost

    @classmethod
    def through(cls, costs: Sequence[Cost]) -> Self:
        """Fit two or more measurements of different cohorts."""
        each, fixed = np.polyfit([cost.clients for cost in costs], np.array([cost[1:] for cost in costs]), 1)
        return cls(Cost(0, *map(float, fixed)), Cost(1, *map(float, each)))

    def at(self, clients: int) -> Cost:
        """Return the cost of a round with so many clients, if the line goes on."""
        return Cost(clients, *(f + clients * e for f, e in zip(self.fixed[1:], self.each[1:], strict=True)))


def measure(experiment: Experiment) -> Cost:
    """Run two rounds in a process of its own and return the cost of the second; clients are computed here as well.

    Raises RuntimeError with what the process wrote when it fails.
    """
    settings = json.dumps(experiment.replace(rounds=2).changes())
    done = subprocess.run([sys.executable, "-m", __name__, settings], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the measurement failed:\n{done.stderr[-2000:]}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def _main(settings: str) -> None:
    experiment = Experiment(**json.loads(settings))
    list(rounds(experiment.replace(clients_per_round=1, rounds=1)))  # what every size of cohort needs alike
    with _memory() as peak:
        last = list(rounds(experiment))[-1]
    cost = Cost(len(last.answered), last.uplink_bytes / 1e6, last.downlink_bytes / 1e6, peak[0] / 1e6, last.seconds)
    print(json.dumps(cost._asdict()))


@contextmanager
def _memory() -> Iterator[list[float]]:
    """Yield a list whose one entry becomes the largest memory that the block added to this process, in bytes."""
    own, over = psutil.Process(), threading.Event()
    before, peak = own.memory_info().rss, [0.0]

    def look() -> None:
        while not over.wait(0.002):
            peak[0] = max(peak[0], float(own.memory_info().rss - before))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


if __name__ == "__main__":
    _main(sys.argv[1])
