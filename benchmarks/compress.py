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


def qat() -> list[Row]:
    """Post-training quantization beside quantization-aware training: test accuracy of the files, 3 seeds."""
    mnist()
    kinds = [(model, dtype) for model in ("mlp", "cnn") for dtype in ("int8", "int4")]
    jobs = [{"model": m, "dtype": d, "seed": s} for m, d in kinds for s in SEEDS]
    rows = parallel([("benchmarks.compress:quantized", job) for job in jobs])
    return [_compare(m, d, [r for r in rows if (r["model"], r["dtype"]) == (m, d)]) for m, d in kinds]


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


def quantized(model: str, dtype: str, seed: int) -> Row:
    """Test the file of a float run and that of the same run continued with fake quantization, and without it."""
    base = CNN.replace(model=model, seed=seed, rounds=40)
    recipe = fk.Recipe(dtype=dtype, quantization="static")
    runs = {
        "post-training": fk.train(base.replace(start=base, rounds=10)),
        "aware": fk.train(base.replace(start=base, rounds=10, qat=dtype)),
    }
    tests = {name: fk.compress(run, recipe).test()[0] for name, run in runs.items()}
    return {"model": model, "dtype": dtype, "float": runs["post-training"].test()[0], **tests}


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
    run = fk.train(fk.Experiment())
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


def _compare(model: str, dtype: str, rows: list[Row]) -> Row:
    gains = [100 * (row["aware"] - row["post-training"]) for row in rows]
    return {
        "model": model,
        "dtype": dtype,
        **{
            f"{name} %": round(100 * mean(row[name] for row in rows), 2) for name in ("float", "post-training", "aware")
        },
        "gain in points": f"{mean(gains):+.2f} ± {stdev(gains):.2f}",
    }
