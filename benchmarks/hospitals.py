"""The case study: federated beside pooled on real hospitals, and small artifacts for the weakest device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import mean, stdev

import numpy as np
import torch

import fedlab_kit as fk
from benchmarks.harness import DataMissing, Row, parallel
from fedlab_kit.clinic import Moments, gather
from fedlab_kit.federation.rounds import play
from fedlab_kit.federation.server import start
from fedlab_kit.federation.task import task
from fedlab_kit.hospitals import CLINICS, clinics, heart_hospitals
from fedlab_kit.personal import pooled
from fedlab_kit.statistics import wilson

SEEDS = (0, 1, 2, 3, 4)
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
FOLDS = 5
JOB = fk.Experiment(dataset="heart", model="logistic", clients=4, clients_per_round=4, partition="site", rounds=50)
FLAMBY = JOB.replace(rounds=15, local_epochs=2, batch_size=4)
"""FLamby: 15 rounds of 100 local steps in batches of 4; two epochs are 100 steps in Cleveland, 16 in Switzerland."""


def heart() -> list[Row]:
    """Logistic regression on UCI Heart Disease, test accuracy; learning rates by 5-fold cross-validation, 5 seeds.

    Ours: 5 random splits, features normalized by merged moments, 50 rounds of one epoch (pooled: 50 epochs). FLamby's:
    its split, each hospital normalized by itself, 15 rounds; published: pooled .750, best federated strategy .741.
    """
    try:
        clinics(0, (0.66, 0.0, 0.0))
    except (OSError, ValueError) as error:
        raise DataMissing(f"It needs UCI Heart Disease: set FEDLAB_DATA. ({error})") from error
    jobs = [(way, seed) for way in WAYS for seed in SEEDS]
    measured = parallel([("benchmarks.hospitals:hearts", {"way": way, "seed": seed}) for way, seed in jobs])
    return [_summary(way, measured[k * len(SEEDS) : (k + 1) * len(SEEDS)]) for k, way in enumerate(WAYS)]


WAYS: dict[str, tuple[fk.Experiment, bool]] = {
    "pooled": (pooled(JOB), False),
    "fedavg": (JOB, False),
    "fedadam": (JOB.replace(strategy="fedadam"), False),
    "FLamby's protocol, pooled": (pooled(FLAMBY).replace(rounds=50), True),
    "FLamby's protocol, fedavg": (FLAMBY, True),
    "FLamby's protocol, fedadam": (FLAMBY.replace(strategy="fedadam"), True),
}
"""What is compared: an experiment, and whether it is played on FLamby's split with FLamby's normalization."""


def hearts(way: str, seed: int) -> Row:
    """Choose the learning rate by cross-validation on the training patients, train on all of them, open the test."""
    torch.set_num_threads(1)
    experiment, theirs = WAYS[way]
    whole = _flamby_split() if theirs else clinics(seed, (0.66, 0.0, 0.0))
    scores = {lr: [] for lr in RATES}
    for number, (train, check) in enumerate(_folds(whole, seed)):
        name = _register(f"fold {number}", whole, train, check, theirs)
        for lr in RATES:
            scores[lr].append(_play(experiment.replace(dataset=name, lr=lr, seed=seed), "validation"))
    lr = max(RATES, key=lambda rate: sum(sum(hits) for hits, _ in scores[rate]))
    name = _register("all", whole, whole.train, whole.train, theirs)
    hits, patients = _play(experiment.replace(dataset=name, lr=lr, seed=seed), "test")
    return {"lr": lr, "hits": hits, "patients": patients}


def _play(experiment: fk.Experiment, split: str) -> tuple[list[int], list[int]]:
    """Return hits and patients of each hospital after the last round."""
    *_, (state, _) = play(start(experiment), {})
    by_site = task(experiment.replace(partition="site", clients=4))
    result = by_site.evaluate(state.weights, getattr(by_site.dataset, split))
    return list(result.correct), list(result.total)


def _folds(whole: fk.Dataset, seed: int) -> Iterator[tuple[fk.Split, fk.Split]]:
    """Cut each hospital's training patients in five, and hold each fifth out once."""
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(len(whole.train)) % FOLDS)
    for number in range(FOLDS):
        yield _rows(whole.train, fold != number), _rows(whole.train, fold == number)


def _rows(split: fk.Split, where: torch.Tensor) -> fk.Split:
    return fk.Split(split.x[where], split.y[where], split.site[where])


def _register(name: str, whole: fk.Dataset, train: fk.Split, check: fk.Split, theirs: bool) -> str:
    """Register a data set of these patients, with normalization from its own training part."""
    built = replace(whole, train=train, validation=check, public=check)
    parts = [train.x[train.site == site].numpy() for site in range(len(whole.sites))]
    moments = [Moments.of(part) for part in parts]
    if theirs:
        recipes = [each.preprocess() for each in moments]
        splits = {key: _normalized(getattr(built, key), recipes) for key in ("train", "validation", "public", "test")}
        built = replace(built, **splits, preprocess=fk.Preprocess(0.0, 1.0))
    else:
        built = replace(built, preprocess=sum(moments[1:], moments[0]).preprocess())
    fk.dataset(name)(lambda: built)
    return name


def _normalized(split: fk.Split, recipes: list[fk.Preprocess]) -> fk.Split:
    x = split.x.clone()
    for site, recipe in enumerate(recipes):
        x[split.site == site] = recipe(split.x[split.site == site])
    return fk.Split(x, split.y, split.site)


def _flamby_split() -> fk.Dataset:
    """The split that FLamby's loader makes: scikit-learn's, random state 43, stratified where a class has three."""
    from sklearn.model_selection import train_test_split

    whole = clinics(0, (0.66, 0.0, 0.0))
    train = []
    for hospital in heart_hospitals():
        counts = np.bincount(hospital.y, minlength=2)
        rows, _ = train_test_split(
            np.arange(len(hospital.y)),
            test_size=1.0 - 0.66,
            train_size=0.66,
            random_state=43,
            stratify=hospital.y if counts.min() > 2 else None,
        )
        train.append(np.isin(np.arange(len(hospital.y)), rows))
    held_out = [~rows for rows in train]
    return replace(whole, train=gather(heart_hospitals(), train), test=gather(heart_hospitals(), held_out))


def _summary(way: str, seeds: list[Row]) -> Row:
    """Mean and standard deviation over seeds of all patients, and each hospital's mean with its Wilson interval."""
    shares = [sum(row["hits"]) / sum(row["patients"]) for row in seeds]
    row: Row = {
        "way": way,
        "rounds": WAYS[way][0].rounds,
        "lr": ", ".join(f"{row['lr']:g}" for row in seeds),
        "all patients": f"{mean(shares):.3f} ± {stdev(shares):.3f}",
        "mean of hospitals": f"{mean(np.mean(np.divide(row['hits'], row['patients'])) for row in seeds):.3f}",
    }
    for site, name in enumerate(CLINICS):
        patients = seeds[0]["patients"][site]
        hits = mean(row["hits"][site] for row in seeds)
        low, high = wilson(hits, patients)
        row[name] = f"{hits / patients:.3f} ({low:.2f} to {high:.2f})"
    return row
