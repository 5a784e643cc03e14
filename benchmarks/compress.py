"""How small and how fast a federated model gets, and what it costs in accuracy: every figure from a file."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

import fedlab_kit as fk
from benchmarks.harness import Row, fresh, mnist, parallel
from fedlab_kit.deployment import measure

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
    schedules = ("dense", "gradual", "one-shot", "dynamic", "fixed")
    rows = parallel([("benchmarks.compress:masked", {"schedule": k, "seed": s}) for k in schedules for s in SEEDS])
    return _spread(rows, "schedule", schedules)


def bits() -> list[Row]:
    """mnist_5k, cnn, 80 rounds in all, 8 seeds: test accuracy in 4 and 2 bits after training, and with QAT."""
    rows = parallel([("benchmarks.compress:few_bits", {"seed": seed}) for seed in range(1, 9)])
    return [_points_lost(way, [row[way] for row in rows], [row["float"] for row in rows]) for way in rows[0]]


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


def masked(schedule: str, seed: int) -> Row:
    """Train the cnn under one schedule and test it."""
    settings: dict[str, Any] = {} if schedule == "dense" else {"mask_ratio": 0.9, "mask_schedule": schedule}
    run = fk.train(CNN.replace(seed=seed, **settings))
    megabytes = (run.uplink_bytes + run.downlink_bytes) / 1e6
    return {"schedule": schedule, "seed": seed, "test": run.test()[0], "MB": megabytes}


FEW = fk.Experiment(dataset="mnist_5k", model="cnn", partition="iid", rounds=60, lr=0.1)
AWARE: dict[str, dict[str, Any]] = {
    "QAT in int4, 20 rounds, lr 0.05": {"qat": "int4", "lr": 0.05},
    "QAT in int2, 20 rounds, lr 0.1": {"qat": "int2", "lr": 0.1},
    "QAT in int2, 20 rounds, lr 0.05": {"qat": "int2", "lr": 0.05},
    "QAT in int2, 20 rounds, lr 0.02": {"qat": "int2", "lr": 0.02},
    "QAT in int2 with int8 ends, 20 rounds, lr 0.05": {"qat": "int2", "qat_keep": "ends", "lr": 0.05},
    "QAT in int2, all 80 rounds, lr 0.1": {"qat": "int2", "lr": 0.1, "start": None, "rounds": 80},
}


def few_bits(seed: int) -> dict[str, float]:
    """Test accuracy of one seed's files, by the way each was made; every model has had 80 rounds."""
    base = FEW.replace(seed=seed)
    more = base.replace(start=base, rounds=20, lr=0.05)
    plain, found = fk.train(more), {}
    for name, recipe in {
        "float": fk.Recipe(),
        "int8": INT8,
        "int4": fk.Recipe(dtype="int4"),
        "int2": fk.Recipe(dtype="int2"),
        "int2 with int8 ends": fk.Recipe(dtype="int2", keep="ends"),
    }.items():
        found[name] = fk.compress(plain, recipe).test()[0]
    best = fk.compress(_closest(plain.model), fk.Recipe(), dataset=plain.dataset)
    found["int2 on scales of least squared error"] = best.test()[0]
    for name, changes in AWARE.items():
        run = fk.train(more.replace(**changes))
        recipe = fk.Recipe(dtype=run.experiment.qat, keep=run.experiment.qat_keep)
        found[name] = fk.compress(run, recipe).test()[0]
    return found


def _closest(model: Any) -> Any:
    """Put each output channel on those two-bit values -2s, -s, 0, s that are closest to it in squared error."""
    import torch

    with torch.no_grad():
        for weight in (w for w in model.parameters() if w.ndim > 1):
            rows = weight.flatten(1)
            largest = rows.abs().amax(1, keepdim=True)
            tried = [sign * largest * part / 100 for part in range(20, 121) for sign in (1, -1)]
            values = torch.stack([(rows / s).round().clamp(-2, 1) * s for s in tried])
            best = (values - rows).square().sum(2).argmin(0)
            weight.copy_(values[best, torch.arange(len(rows))].view_as(weight))
    return model


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


def _spread(rows: list[Row], key: str, values: tuple[str, ...]) -> list[Row]:
    result = []
    for value in values:
        tests = [row["test"] for row in rows if row[key] == value]
        megabytes = mean(row["MB"] for row in rows if row[key] == value)
        spread = f"{100 * mean(tests):.2f} ± {100 * stdev(tests):.2f}"
        result.append({key: value, "test %": spread, "MB both ways": round(megabytes, 1)})
    return result


def _points_lost(way: str, tests: list[float], floats: list[float]) -> Row:
    """Mean test accuracy, and the points lost against the float file of the same seed, with Student's 95 % interval."""
    from scipy.stats import t

    lost = [100 * (b - a) for a, b in zip(tests, floats, strict=True)]
    half = t.ppf(0.975, len(lost) - 1) * stdev(lost) / len(lost) ** 0.5
    return {
        "way": way,
        "test %": round(100 * mean(tests), 2),
        "points lost": round(mean(lost), 2),
        "95 % interval": f"{mean(lost) - half:.2f} to {mean(lost) + half:.2f}",
    }
