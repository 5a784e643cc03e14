"""How soon drift is caught, and how often nothing is taken for drift, on the data set `hospitals`."""

from __future__ import annotations

from typing import Any

import fedlab_kit as fk
from benchmarks.harness import Row, parallel

EXPERIMENT = fk.Experiment(
    dataset="hospitals", model="logistic", partition="site", clients=4, clients_per_round=4, rounds=30, lr=0.05
)
STREAMS, PATIENTS, WITHIN = 100, 10_000, 200
SHIFTS: dict[str, dict[str, Any]] = {
    "none": {},
    "gain 1.1 and offset 0.5": {"gain": 1.1, "offset": 0.5},
    "the same, around the mean": {"gain": 1.1, "offset": 0.5, "around": "mean"},
    "gain 1.1": {"gain": 1.1},
    "offset 0.5": {"offset": 0.5},
    "offset 0.25": {"offset": 0.25},
    "offset 0.5 on one feature": {"offset": 0.5, "count": 1},
    "gain 1.1 around the mean": {"gain": 1.1, "around": "mean"},
    "offset 0.5 on all features": {"offset": 0.5, "count": 30},
}
"""What happens to ten features, drawn anew for each stream: `gain` times the value, `offset` in standard deviations."""


def drift() -> list[Row]:
    """Streams of resampled test patients, 100 for each line: caught within 200 patients, and false alarms in 10,000.

    Reference: the training patients of the same hospital. "around the mean": the gain stretches the feature about its
    mean, so that it moves nothing. Worst hospital of the four; the others lie between it and the mean.
    """
    jobs: list[tuple[str, dict[str, Any]]] = [
        ("benchmarks.drift:streams", {"seed": seed, "name": name}) for name in SHIFTS for seed in (1, 2)
    ]
    done = iter(parallel(jobs))
    return [_row(name, [next(done), next(done)]) for name in SHIFTS]


def streams(seed: int, name: str) -> dict[str, Any]:
    """Return, by hospital, alarms of each of 100 streams (shift "none") or the share that was caught in time."""
    import numpy as np
    import torch

    from fedlab_kit.deployment.monitor import Monitor

    torch.set_num_threads(1)
    run = fk.train(EXPERIMENT)
    artifact, data, rng = fk.compress(run, fk.Recipe()), run.dataset, np.random.default_rng(seed)
    found: dict[str, list[int]] = {}
    for number, site in enumerate(data.sites):
        pool = data.test.x[data.test.site == number].numpy()
        found[site] = []
        for _ in range(STREAMS):
            rows = pool[rng.integers(len(pool), size=PATIENTS if name == "none" else WITHIN)]
            monitor = Monitor(artifact, data.train)
            shifted = shift(rows, data.preprocess, rng, **SHIFTS[name])
            for start in range(0, len(rows), 100):
                monitor.watch(site, shifted[start : start + 100])
            kinds = [alarm.kind for alarm in monitor.alarms]
            found[site].append(sum(kind in ("inputs", "confidence") for kind in kinds))
    return found


def shift(
    rows: Any, preprocess: Any, rng: Any, gain: float = 1.0, offset: float = 0.0, count: int = 10, around: str = "zero"
) -> Any:
    """Return a copy of raw rows float32 [n, d] with `count` features, drawn by `rng`, changed."""
    import numpy as np

    shifted, chosen = rows.copy(), rng.permutation(rows.shape[1])[:count]
    mean, std = (np.float32(value)[chosen] for value in (preprocess.mean, preprocess.std))
    pivot = mean if around == "mean" else np.float32(0)
    shifted[:, chosen] = pivot + np.float32(gain) * (rows[:, chosen] - pivot) + np.float32(offset) * std
    return shifted


def _row(name: str, seeds: list[dict[str, list[int]]]) -> Row:
    from statistics import mean

    row: Row = {"shift of ten features": name}
    for number, found in enumerate(seeds, start=1):
        if name == "none":
            each = {site: mean(counts) for site, counts in found.items()}
            worst = max(each, key=lambda site: each[site])
            row[f"seed {number}"] = f"{mean(each.values()):.2f} alarms a stream, worst {worst} {each[worst]:.2f}"
        else:
            each = {site: sum(map(bool, counts)) for site, counts in found.items()}
            worst = min(each, key=lambda site: each[site])
            row[f"seed {number}"] = f"{mean(each.values()):.0f} of {STREAMS} caught, worst {worst} {each[worst]}"
    return row
