"""How fast rounds are, beside the loop that everybody writes, and how they grow."""

from __future__ import annotations

import copy
import os
import tempfile
import time
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import fedlab_kit as fk
from benchmarks.harness import Row, fresh, mnist, peak_mb
from fedlab_kit.federation.rounds import play
from fedlab_kit.federation.server import select, start
from fedlab_kit.federation.setup import task

JOB = fk.Experiment(dataset="mnist_6000", partition="iid", clients=100, rounds=20, lr=0.05)
"""100 clients of 60 samples, 10 per round, batch 10, one epoch, evaluation of 1,000 samples each round."""


def speed() -> list[Row]:
    """ms per round of the job in JOB, one thread, plain PyTorch loop and fk.rounds in turns; medians of 15 rounds."""
    mnist()
    return [fresh("benchmarks.rounds:compare", model=model) for model in ("mlp", "cnn")]


def default() -> list[Row]:
    """The default experiment from an empty store on one core: seconds with training, evaluation and writing."""
    return [fresh("benchmarks.rounds:time_default", model=model) for model in ("mlp", "cnn")]


def growth() -> list[Row]:
    """ms per round (median of 5) and peak memory of the mlp job as the cohort and the population grow."""
    mnist()
    sizes = [(100, 10), (100, 100), (1000, 10), (1000, 100), (10_000, 10), (10_000, 100)]
    return [fresh("benchmarks.rounds:grow", clients=n, cohort=k) for n, k in sizes]


def mcmahan() -> list[Row]:
    """2NN on MNIST, 100 IID clients, C = 0.1, E = 1, B = 10, lr 0.1: rounds to 97 % test accuracy, 3 seeds."""
    mnist()
    rows = [fresh("benchmarks.rounds:rounds_to_target", seed=seed) for seed in (1, 2, 3)]
    return [*rows, {"seed": "McMahan et al. 2017, table 1", "rounds": 87}]


def import_time() -> list[Row]:
    """Seconds that importing fedlab_kit adds to importing torch, median of 5 fresh processes."""
    return [{"seconds": round(median(fresh("benchmarks.clock:importing") for _ in range(5)), 3), "bar": 0.3}]


def register(copies: int = 1) -> None:
    """Register `mnist_6000`: 6,000 training images (tiled `copies` times) and 1,000 to validate."""

    @fk.dataset
    def mnist_6000() -> fk.Dataset:
        whole = mnist()
        train = fk.Split(whole.train.x[:6000].repeat(copies, 1, 1, 1), whole.train.y[:6000].repeat(copies))
        check = fk.Split(whole.validation.x[:1000], whole.validation.y[:1000])
        return fk.Dataset("mnist_6000", whole.classes, train, check, whole.public, whole.test, whole.preprocess)


def compare(model: str) -> Row:
    """Time the two loops in turns in this process; both start from the same weights and cohorts."""
    torch.set_num_threads(1)
    register()
    experiment = JOB.replace(model=model)
    loops = {"plain": plain_rounds(experiment), "kit": (r.accuracy for r in fk.rounds(experiment))}
    times: dict[str, list[float]] = {name: [] for name in loops}
    accuracy = {}
    for _ in range(JOB.rounds):
        for name, loop in loops.items():
            began = time.perf_counter()
            accuracy[name] = next(loop)
            times[name].append(1000 * (time.perf_counter() - began))
    ms = {name: median(values[5:]) for name, values in times.items()}
    return {
        "model": model,
        "plain loop ms": round(ms["plain"], 1),
        "fk.rounds ms": round(ms["kit"], 1),
        "ratio": round(ms["kit"] / ms["plain"], 3),
        "bar": {"mlp": 0.25, "cnn": 0.5}[model],
        "plain accuracy": round(accuracy["plain"], 3),
        "fk.rounds accuracy": round(accuracy["kit"], 3),
    }


def plain_rounds(experiment: fk.Experiment) -> Any:
    """The loop of most tutorials: deepcopy, DataLoader, torch.optim.SGD, a weighted mean of state dicts."""
    job = task(experiment)
    data = job.dataset
    model = copy.deepcopy(job.model.module)
    torch.nn.utils.vector_to_parameters(job.initial.clone(), model.parameters())
    x, check = data.preprocess(data.train.x), data.preprocess(data.validation.x)
    for number in range(1, experiment.rounds + 1):
        cohort = select(experiment, number)
        total, mean = sum(map(job.samples, cohort)), {}
        for client in cohort:
            local = copy.deepcopy(model).train()
            optimizer = torch.optim.SGD(local.parameters(), lr=experiment.lr)
            own = TensorDataset(x[job.shards[client]], data.train.y[job.shards[client]])
            for inputs, labels in DataLoader(own, experiment.batch_size, shuffle=True):
                optimizer.zero_grad()
                F.cross_entropy(local(inputs), labels).backward()
                optimizer.step()
            for name, value in local.state_dict().items():
                mean[name] = mean.get(name, 0) + value * (job.samples(client) / total)
        model.load_state_dict(mean)
        model.eval()
        with torch.no_grad():
            hits = [
                (model(a).argmax(1) == b).sum()
                for a, b in DataLoader(TensorDataset(check, data.validation.y), batch_size=100)
            ]
        yield float(sum(hits)) / len(check)


def time_default(model: str) -> Row:
    """Train the default experiment in an empty store, after one round that warms the libraries."""
    experiment = fk.Experiment(dataset="digits", partition="dirichlet", rounds=20, model=model)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDLAB_RUNS"] = folder
        fk.train(experiment.replace(rounds=1))
        began = time.perf_counter()
        run = fk.train(experiment)
        seconds = time.perf_counter() - began
    bar = {"mlp": 0.6, "cnn": 3.0}[model]
    return {"model": model, "seconds": round(seconds, 2), "bar": bar, "validation accuracy": round(run.accuracy, 3)}


def grow(clients: int, cohort: int) -> Row:
    """Time rounds of the mlp with 60 samples a client; the tiled images are counted apart."""
    register(copies=clients // 100)
    experiment = JOB.replace(model="mlp", clients=clients, clients_per_round=cohort, rounds=6)
    base = task(experiment).x.nbytes / 2**20
    idle = peak_mb()
    records = list(fk.rounds(experiment))
    return {
        "clients": clients,
        "per round": cohort,
        "ms per round": round(1000 * median(r.seconds for r in records[1:]), 1),
        "peak MB that rounds add": round(peak_mb() - idle),
        "images MB": round(base),
    }


def rounds_to_target(seed: int, target: float = 0.97) -> Row:
    """Count rounds until the test accuracy of 2nn reaches the target, testing every round."""
    experiment = fk.Experiment(dataset="mnist", model="2nn", clients=100, partition="iid", lr=0.1, rounds=87, seed=seed)
    job, accuracy = task(experiment), 0.0
    began = time.perf_counter()
    for state, _ in play(start(experiment), {}):
        result = job.evaluate(state.weights, job.dataset.test)
        accuracy, *_ = result.accuracy()
        if accuracy >= target:
            break
    seconds = time.perf_counter() - began
    row = {"seed": seed, "lr": experiment.lr, "rounds": state.round, "test accuracy": round(accuracy, 4)}
    return {**row, "seconds": round(seconds, 1)}
