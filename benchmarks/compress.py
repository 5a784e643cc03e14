"""How small and how fast a federated model gets, and what it costs in accuracy: every figure from a file."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

import fedlab_kit as fk
from benchmarks.harness import Row, fresh, mnist, parallel
from fedlab_kit.arms import seeded
from fedlab_kit.deployment import measure
from fedlab_kit.statistics import mean_difference

SEEDS = (1, 2, 3)
RESNET = fk.Experiment(
    dataset="mnist_10000", model="resnet", partition="iid", clients=10, clients_per_round=10, rounds=16
)
CNN = fk.Experiment(dataset="mnist", model="cnn", partition="iid", clients=100, rounds=60, lr=0.1)
INT8 = fk.Recipe(dtype="int8", quantization="static")


def small() -> list[Row]:
    """Test accuracy and size of the fp32 file and of its small sibling, 3 seeds; losses are paired by seed."""
    mnist()
    jobs = [
        ("benchmarks.compress:shrink", {"model": m, "seed": s}) for m in ("resnet", "cnn", "student") for s in SEEDS
    ]
    rows = parallel(jobs)
    return [*rows, *(_mean(model, [r for r in rows if r["model"] == model]) for model in ("resnet", "cnn", "student"))]


def masks() -> list[Row]:
    """cnn on MNIST, 100 IID clients, 60 rounds, 90 % of the weights masked by each schedule; test accuracy, 3 seeds."""
    mnist()
    schedules = ("gradual", "one-shot", "dynamic", "fixed")
    arms = {"dense": CNN} | {name: CNN.replace(mask_ratio=0.9, mask_schedule=name) for name in schedules}
    finding = fk.Study(arms, judge=SEEDS, contrast=("gradual", "fixed"), measure=tested).run()
    rows = [
        {
            "schedule": name,
            "test %": f"{100 * rows.value.mean():.2f} ± {100 * rows.value.std():.2f}",
            "MB both ways": round(float((rows.uplink_bytes + rows.downlink_bytes).mean()) / 1e6, 1),
        }
        for name, rows in finding.table.groupby("arm", sort=False)
    ]
    return [*rows, {"schedule": str(finding)}]


def bits() -> list[Row]:
    """mnist_5k, cnn, 80 rounds in all, 8 seeds: test accuracy in 4 and 2 bits after training, and with QAT."""
    more = FEW.replace(start=FEW, rounds=20, lr=0.05)
    arms = {way: (more, recipe) for way, recipe in AFTER.items()}
    for way, changes in AWARE.items():
        aware = more.replace(**changes)
        arms[way] = aware, fk.Recipe(dtype=aware.qat, keep=aware.qat_keep)
    study = fk.Study(arms, judge=range(1, 9), contrast=("int4", "float"), margin=-0.01, measure=tested)
    finding = study.run()
    tests = {way: list(rows.value) for way, rows in finding.table.groupby("arm", sort=False)}
    tests["int2 on scales of least squared error"] = [_closest(fk.train(seeded(more, seed))) for seed in study.judge]
    return [*(_points_lost(way, found, tests["float"]) for way, found in tests.items()), {"way": str(finding)}]


def latency() -> list[Row]:
    """Latency of resnet files in onnxruntime on one thread against the fp32 file, timed in turns; medians."""
    mnist()
    return fresh("benchmarks.compress:latencies")


def answer() -> list[Row]:
    """Seconds from a recipe to its artifact for the default cnn on one thread: median of 20 after the first."""
    return fresh("benchmarks.compress:answers")


def register() -> None:
    """Register `mnist_10000`: the first 10,000 training images and everything else of MNIST."""

    @fk.dataset
    def mnist_10000() -> fk.Dataset:
        whole = mnist()
        train = fk.Split(whole.train.x[:10_000], whole.train.y[:10_000])
        rest = whole.validation, whole.public, whole.test
        return fk.Dataset("mnist_10000", whole.classes, train, *rest, whole.preprocess)


def shrink(model: str, seed: int) -> Row:
    """Train dense, go on with masks and int8 in mind (or distil), and compare the two files on the test split."""
    register()
    base = (CNN if model == "cnn" else RESNET).replace(seed=seed)
    before = fk.compress(fk.train(base), fk.Recipe())
    if model == "student":
        small = base.replace(model="cnn", teacher=base, rounds=30, qat="int8", mask_ratio=0.8)
    else:
        ratio = {"resnet": 0.96, "cnn": 0.9}[model]
        small = base.replace(start=base, mask_ratio=ratio, qat="int8", rounds=base.rounds)
    after = fk.compress(fk.train(small), INT8)
    (dense, _), (final, _) = before.test(), after.test()
    return {
        "model": model,
        "seed": seed,
        "fp32 test": dense,
        "small test": final,
        "loss in points": round(100 * (dense - final), 2),
        "fp32 file": before.bytes,
        "small file": after.bytes,
        "fp32 zstd": before.zstd_bytes,
        "small zstd": after.zstd_bytes,
        "times smaller (zstd)": round(before.zstd_bytes / after.zstd_bytes, 1),
    }


def tested(made: fk.Run | fk.Artifact) -> float:
    """Open the test split, as nothing but exports and these tables does."""
    return made.test()[0]


FEW = fk.Experiment(dataset="mnist_5k", model="cnn", partition="iid", rounds=60, lr=0.1)
AWARE: dict[str, dict[str, Any]] = {
    "QAT in int4, 20 rounds, lr 0.05": {"qat": "int4", "lr": 0.05},
    "QAT in int2, 20 rounds, lr 0.1": {"qat": "int2", "lr": 0.1},
    "QAT in int2, 20 rounds, lr 0.05": {"qat": "int2", "lr": 0.05},
    "QAT in int2, 20 rounds, lr 0.02": {"qat": "int2", "lr": 0.02},
    "QAT in int2 with int8 ends, 20 rounds, lr 0.05": {"qat": "int2", "qat_keep": "ends", "lr": 0.05},
    "QAT in int2, all 80 rounds, lr 0.1": {"qat": "int2", "lr": 0.1, "start": None, "rounds": 80},
}


AFTER = {
    "float": fk.Recipe(),
    "int8": INT8,
    "int4": fk.Recipe(dtype="int4"),
    "int2": fk.Recipe(dtype="int2"),
    "int2 with int8 ends": fk.Recipe(dtype="int2", keep="ends"),
}


def _closest(run: fk.Run) -> float:
    """Put each output channel on those two-bit values -2s, -s, 0, s that are closest in squared error, and test it."""
    import torch

    with torch.no_grad():
        for weight in (w for w in run.model.parameters() if w.ndim > 1):
            rows = weight.flatten(1)
            largest = rows.abs().amax(1, keepdim=True)
            tried = [sign * largest * part / 100 for part in range(20, 121) for sign in (1, -1)]
            values = torch.stack([(rows / s).round().clamp(-2, 1) * s for s in tried])
            best = (values - rows).square().sum(2).argmin(0)
            weight.copy_(values[best, torch.arange(len(rows))].view_as(weight))
    return tested(fk.compress(run.model, fk.Recipe(), dataset=run.dataset))


def latencies() -> list[Row]:
    """Time the fp32 file, int8, and half the channels with int8, in turns."""
    register()
    base = RESNET.replace(seed=1)
    half = fk.Recipe(prune="channel", prune_ratio=0.5)
    tuned = fk.train(base.replace(start=base, start_recipe=half, rounds=6))
    run = fk.train(base)
    artifacts = {
        "fp32": fk.compress(run, fk.Recipe()),
        "int8": fk.compress(run, INT8),
        "half the channels": fk.compress(tuned, fk.Recipe()),
        "half the channels, int8": fk.compress(tuned, INT8),
    }
    sessions = [artifact.session for artifact in artifacts.values()]
    x = run.dataset.validation.x
    one, many = (measure.latencies(sessions, x[:batch], seconds=0.5) for batch in (1, 64))
    return [
        {
            "file": name,
            "bytes": artifact.bytes,
            "test": round(artifact.test()[0], 4),
            "batch 1 ms": round(1e3 * a.median, 3),
            "ratio at 1": round(a.median / one[0].median, 2),
            "batch 64 ms": round(1e3 * b.median, 2),
            "ratio at 64": round(b.median / many[0].median, 2),
        }
        for (name, artifact), a, b in zip(artifacts.items(), one, many, strict=True)
    ]


def answers() -> list[Row]:
    """Time `fk.compress` on the default experiment's model."""
    import time
    from statistics import median

    import torch

    torch.set_num_threads(1)
    run = fk.train(fk.Experiment(dataset="digits", partition="dirichlet", rounds=20))
    recipes = {
        "fp32": fk.Recipe(),
        "weight 0.8": fk.Recipe(prune_ratio=0.8),
        "fp16": fk.Recipe(dtype="fp16"),
        "int8 dynamic": fk.Recipe(dtype="int8", quantization="dynamic"),
        "int8 static": INT8,
        "int4": fk.Recipe(dtype="int4"),
        "channel 0.5, a new shape": fk.Recipe(prune="channel", prune_ratio=0.5),
    }
    rows = []
    for name, recipe in recipes.items():
        times = []
        for _ in range(21):
            began = time.perf_counter()
            artifact = fk.compress(run, recipe)
            times.append(time.perf_counter() - began)
        first, typical = round(times[0], 3), round(median(times[1:]), 3)
        rows.append({"recipe": name, "first s": first, "median s": typical, "bytes": artifact.bytes})
    return rows


def _mean(model: str, rows: list[Row]) -> Row:
    losses = [row["loss in points"] for row in rows]
    sizes = [row["times smaller (zstd)"] for row in rows]
    return {
        "model": f"{model}, mean",
        "fp32 test": round(mean(row["fp32 test"] for row in rows), 4),
        "small test": round(mean(row["small test"] for row in rows), 4),
        "loss in points": f"{mean(losses):.2f} ± {stdev(losses):.2f}",
        "times smaller (zstd)": round(mean(sizes), 1),
    }


def _points_lost(way: str, tests: list[float], floats: list[float]) -> Row:
    """Mean test accuracy, and the points lost against the float file of the same seed, with Student's 95 % interval."""
    lost, low, high = (100 * share for share in mean_difference(floats, tests))
    return {
        "way": way,
        "test %": round(100 * mean(tests), 2),
        "points lost": round(lost, 2),
        "95 % interval": f"{low:.2f} to {high:.2f}",
    }
