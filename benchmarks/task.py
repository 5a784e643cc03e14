"""Is the default task fit for its purpose: does capacity count, do seeds agree, does the temperature matter?

Learning rates are chosen for every model, and for every temperature, from the same grid and on another seed than those
that are reported. Every run is kept in the store, so a table that was interrupted goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean

from torch import nn

import fedlab_kit as fk
from benchmarks.harness import Row
from fedlab_kit.models import two_convolutions

TUNE, SEEDS = 11, (1, 2, 3, 4, 5)
RATES = (0.025, 0.05, 0.1)
MODELS = ("logistic", "half_mlp", "mlp", "2nn", "dense_2000", "student", "cnn", "resnet")
RECIPES = {"dtype": ["fp32", "int8", "int4"], "prune_ratio": [0.0, 0.5]}
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0)
TEACHER = fk.Experiment(rounds=100, lr=0.1)
MISSING = 3


def dense_2000(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The reference: a net of 2,202 parameters that is simply trained, 4 and 8 channels."""
    features, wide = two_convolutions(shape, 4, 8)
    return nn.Sequential(*features, nn.Linear(wide, classes))


def fitness() -> list[Row]:
    """Accuracy of each model on the default task (%), seeds 1 to 5, and the smallest files on the front.

    The learning rate is the best of 0.025, 0.05 and 0.1 on seed 11. `on the front` are this model's points that no file
    of any model beats in both mean accuracy and mean zstd bytes: fp32, int8 and int4, whole and half pruned.
    """
    import pandas

    fk.model(dense_2000)
    rows, tables = [], []
    for model in MODELS:
        experiment = tuned([fk.Experiment(model=model, seed=TUNE, lr=lr) for lr in RATES])
        runs = [fk.train(experiment.replace(seed=seed)) for seed in SEEDS]
        spent = sum(run.measured["seconds"] for run in runs) / len(runs)
        found = [100 * run.accuracy for run in runs]
        rows.append({
            "model": model, "lr": experiment.lr, **_summary(found), "worst client": _worst(runs),
            "seconds": round(spent, 1),
        })  # fmt: skip
        print(rows[-1], flush=True)
        tables.append(fk.sweep(experiment, {"seed": SEEDS, **RECIPES}).assign(model=model))
    points = fk.spread(pandas.concat(tables, ignore_index=True))
    for row in rows:
        best = points[(points["model"] == row["model"]) & points["front"]].sort_values("zstd_bytes")
        row["on the front"] = "; ".join(
            f"{p.zstd_bytes / 1000:.1f} kB {100 * p.accuracy:.1f} ({p.dtype}, {p.prune_ratio:g})"
            for p in best.itertuples()
        )
    return rows


def temperature() -> list[Row]:
    """Recall of a digit that no client of the student has (%), by temperature; seeds 1 to 5.

    The teacher is a cnn that was trained for 100 rounds by the same clients, who then still had the digit. The learning
    rate is the best by accuracy of 0.025, 0.05 and 0.1 on seed 11, for each temperature and for no teacher alike.
    """
    rows = []
    alone = fk.Experiment(model="student", missing=(MISSING,))
    taught = [(t, alone.replace(teacher=TEACHER, temperature=t)) for t in TEMPERATURES]
    for name, arm in [("no teacher", alone), *taught]:
        experiment = tuned([_with_seed(arm.replace(lr=lr), TUNE) for lr in RATES])
        runs = [fk.train(_with_seed(experiment, seed)) for seed in SEEDS]
        recall = [100 * (run.records[-1].recall[MISSING] or 0.0) for run in runs]
        found = _summary([100 * run.accuracy for run in runs])
        rows.append({"temperature": name, "lr": experiment.lr, "recall of the 3": round(mean(recall), 1),
                     "recalls": _each(recall), **found})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def _with_seed(arm: fk.Experiment, seed: int) -> fk.Experiment:
    return arm.replace(seed=seed, teacher=arm.teacher and arm.teacher.replace(seed=seed))


def tuned(arms: Iterable[fk.Experiment]) -> fk.Experiment:
    """Return the experiment with the best final accuracy; one that diverged has none."""
    return max(arms, key=lambda arm: (run := fk.train(arm)).status == "finished" and run.accuracy)


def _summary(found: list[float]) -> Row:
    return {"accuracy": round(mean(found), 1), "spread": round(max(found) - min(found), 1), "seeds": _each(found)}


def _each(found: Iterable[float]) -> str:
    return " ".join(f"{value:.1f}" for value in found)


def _worst(runs: list[fk.Run]) -> float:
    return round(mean(100 * float(run.client_accuracy()[0].min()) for run in runs), 1)
