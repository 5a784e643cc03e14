"""How soon drift is caught, and how often nothing is taken for drift, on the data set `hospitals`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fedlab_kit as fk
from benchmarks.harness import Row, parallel

EXPERIMENT = fk.Experiment(
    dataset="hospitals", model="logistic", partition="site", clients=4, clients_per_round=4, rounds=30, lr=0.05
)
STREAMS, PATIENTS, WITHIN = 100, 10_000, 200
KS_STREAMS, KS_LOOK = 10, 50
SEEDS = ("seed 1", "seed 2")
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
    mean, so that it moves nothing. Worst hospital of the four. KS, for comparison: one test a feature on the last 100
    patients, every 50, at 5 % over 30 features and 200 looks; ten streams.
    """
    jobs: list[tuple[str, dict[str, Any]]] = [
        (f"benchmarks.drift:{function}", {"seed": seed, "name": name})
        for function in ("streams", "ks_streams")
        for name in SHIFTS
        for seed in (1, 2)
    ]
    done = iter(parallel(jobs))
    tolerant = [_row(name, [next(done), next(done)]) for name in SHIFTS]
    ks = [_row(name, [next(done), next(done)]) for name in SHIFTS]
    return [{**row, **{f"{key}, KS": other[key] for key in SEEDS}} for row, other in zip(tolerant, ks, strict=True)]


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
        found[site] = []
        for rows in shifted(data, number, name, STREAMS, rng):
            monitor = Monitor(artifact, data.train)
            for start in range(0, len(rows), 100):
                monitor.watch(site, rows[start : start + 100])
            kinds = [alarm.kind for alarm in monitor.alarms]
            found[site].append(sum(kind in ("inputs", "confidence") for kind in kinds))
    return found


def ks_streams(seed: int, name: str) -> dict[str, Any]:
    """The same with Kolmogorov and Smirnov's test, feature by feature, on ten streams."""
    import numpy as np
    from scipy.stats import ks_2samp

    data, rng = fk.train(EXPERIMENT).dataset, np.random.default_rng(seed)
    found: dict[str, list[int]] = {}
    for number, site in enumerate(data.sites):
        known = data.train.x[data.train.site == number].numpy()
        level, found[site] = 0.05 / (known.shape[1] * PATIENTS / KS_LOOK), []
        for rows in shifted(data, number, name, KS_STREAMS, rng):
            looks, start = 0, 0
            for end in range(KS_LOOK, len(rows) + 1, KS_LOOK):
                recent = rows[max(start, end - 100) : end]
                if ks_2samp(recent, known, method="asymp").pvalue.min() <= level:
                    looks, start = looks + 1, end
            found[site].append(looks)
    return found


def shifted(data: fk.Dataset, site: int, name: str, count: int, rng: Any) -> Iterator[Any]:
    """Yield `count` streams of a site's resampled test patients, float32 [n, d], changed as `name` says."""
    from fedlab_kit.deployment.monitor import changed

    how = {"gain": 1.0, "offset": 0.0, "count": 10, "around": "zero", **SHIFTS[name]}
    about = data.preprocess.mean if how["around"] == "mean" else 0.0
    pool = data.test.x[data.test.site == site].numpy()
    for _ in range(count):
        rows = pool[rng.integers(len(pool), size=PATIENTS if name == "none" else WITHIN)]
        features = rng.permutation(rows.shape[1])[: how["count"]]
        yield changed(rows, features, data.preprocess, how["gain"], how["offset"], about)


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
            row[f"seed {number}"] = (
                f"{mean(each.values()):.0f} of {len(found[worst])} caught, worst {worst} {each[worst]}"
            )
    return row
