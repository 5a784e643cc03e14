"""`compress`: a trained run and a recipe in, a file on disk that the runtime has loaded back and measured out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from fedlab_kit import data
from fedlab_kit.compression.prune import TURN, plan_channels, prune_channels, prune_weights
from fedlab_kit.deployment import convert, measure
from fedlab_kit.deployment.export import export
from fedlab_kit.deployment.score import matrix, probabilities, read
from fedlab_kit.experiment import Recipe
from fedlab_kit.files import StoreError, at, file_name, is_number, sweep_up, write_bytes, write_json
from fedlab_kit.models import flops
from fedlab_kit.run import Run
from fedlab_kit.store import when_and_where
from fedlab_kit.wire.privacy import outside

LEVEL = 18  # of zstandard: as small as 19 on these files (within 0.3 %) in half the time


@dataclass(frozen=True, eq=False)
class Artifact:
    """A deployed file and what was measured on it.

    `bytes` is the file's size, `zstd_bytes` that of `<name>.onnx.zst` beside it. `accuracy` with its 95 % `interval` is
    the runtime's on the validation split. `latency_ms` is one raw sample's median and `latency_spread_ms` the distance
    between its quartiles, `throughput` samples per second in batches of 64, both with `threads` threads. `sparsity` is
    the share of zeros among the stored weights, `flops` those of the float graph on one sample. `note` says when a
    recipe did not do what its name promises; `card` is the model card that lies beside the file.
    """

    path: Path
    digest: str
    bytes: int
    zstd_bytes: int
    accuracy: float
    interval: tuple[float, float]
    latency_ms: float
    latency_spread_ms: float
    throughput: float
    threads: int
    sparsity: float
    parameters: int
    flops: int
    note: str
    card: dict[str, Any] = field(repr=False)
    session: Any = field(repr=False)

    def predict(self, x: Any) -> np.ndarray:
        """Class probabilities float32 [n, classes] for raw samples [n, ...], typed as the data set stores them.

        A DataFrame's columns are found by their names. Raises ValueError naming columns, type, shape or the sample
        that is wrong.
        """
        raw = matrix(x, self.card["input"])
        if raw.dtype.kind == "f" and not np.isfinite(raw).all():
            row = int(np.flatnonzero(~np.isfinite(raw).reshape(len(raw), -1).all(axis=1))[0])
            raise ValueError(f"x must have a number everywhere, sample {row} has a value that is missing or infinite")
        return probabilities(measure.logits(self.session, raw))

    def test(self) -> tuple[float, tuple[float, float]]:
        """Open the test split: measure the file's accuracy on it, with its interval, and write both on the card."""
        test = data.load(self.card["experiment"]["dataset"]).filled("test")
        accuracy, interval = measure.accuracy(self.session, test)
        self.card["test"] = {"accuracy": accuracy, "interval": list(interval)}
        _write_card(self.path, self.card)
        return accuracy, interval


def compress(run: Run, recipe: Recipe, folder: Path | str | None = None, client: int | None = None) -> Artifact:
    """Prune, export, quantize, write, load back and measure; the files go to `folder` or the run's `artifacts/`.

    The same run and recipe give the same bytes. Where clients keep their normalization to themselves, `client` says
    whose model it is; its accuracy is then that on this client's part of the validation samples. Raises ValueError
    when the recipe or the model makes it impossible, StoreError when a file cannot be written; nothing half-written
    stays behind. Threads take turns, and so nobody's latency is measured beside another's export.
    """
    with TURN:
        return _compress(run, recipe, folder, client)


def _compress(run: Run, recipe: Recipe, folder: Path | str | None, client: int | None) -> Artifact:
    original, held = _whose(run, client)
    model = prune(original, run.dataset.shape, recipe)
    converted = _converted(run, recipe, model, run.shards if client is None else [run.shards[client]])
    whose = "" if client is None else f"client{client}-"
    name = f"{file_name(run.experiment.model)}-{run.key[:8]}-{whose}{slug(recipe)}.onnx"
    path = at(folder or run.path / "artifacts") / name
    sweep_up(path.parent, "*.onnx*")
    try:
        write_bytes(path, converted.SerializeToString(deterministic=True))
        session = measure.open_session(path.read_bytes())
        before, after = (sum(p.numel() for p in m.parameters()) for m in (original, model))
        card = {
            **_origin(run, recipe),
            "client": client,
            "parameters_before": before,
            "digest": hashlib.sha256(path.read_bytes()).hexdigest(),
            "measured": {
                **_sizes(path),
                **_behaviour(session, held),
                "sparsity": measure.sparsity(converted),
                "parameters": after,
                "flops": flops(model, run.dataset.shape),
                "note": _note(recipe, before, after, converted),
            },
            **when_and_where(),
        }
        _write_card(path, card)
    except BaseException:
        for file in (path, *_beside(path)):
            file.unlink(missing_ok=True)
        raise
    return _artifact(path, card, session)


def load(path: Path | str) -> Artifact:
    """Open an artifact again. Raises StoreError, naming the file, when it or its card is missing, cut or altered."""
    try:
        content, card = read(at(path))
        check_card(card)
    except ValueError as error:
        raise StoreError(str(error)) from error
    except (TypeError, LookupError) as error:
        raise StoreError(f"the model card of {path} is damaged ({error}): compress again") from error
    return _artifact(at(path), card, measure.open_session(content))


def check_card(card: dict[str, Any]) -> None:
    """Raise TypeError or LookupError for a card that lacks a figure or a word, or has another type in its place."""
    measured = card["measured"]
    low, high = measured["interval"]
    numbers = [low, high, *(measured[one.name] for one in fields(Artifact) if one.type in ("int", "float"))]
    words = [card["when"], card["machine"], card["digest"], measured["note"]]
    if not all(is_number(number) for number in numbers):
        raise TypeError(f"numbers are expected, got {numbers!r:.200}")
    if not all(isinstance(word, str) for word in words):
        raise TypeError(f"text is expected, got {words!r:.200}")


def prune(model: nn.Module, shape: tuple[int, ...], recipe: Recipe) -> nn.Module:
    """Return the model as the recipe prunes it: a copy, or the model itself at ratio 0."""
    if recipe.prune_ratio == 0:
        return model
    if recipe.prune == "weight":
        return prune_weights(model, recipe.prune_ratio)
    return prune_channels(model, shape, plan_channels(model, shape, recipe.prune_ratio))


def slug(recipe: Recipe) -> str:
    """A recipe as a part of a file's name, e.g. "channel-0.5-int8-static"."""
    pruning = [recipe.prune, f"{recipe.prune_ratio}"] if recipe.prune_ratio else []
    return "-".join([*pruning, recipe.dtype, *([recipe.quantization] if recipe.dtype == "int8" else [])])


def _whose(run: Run, client: int | None) -> tuple[nn.Module, data.Split]:
    """Return the model that is meant and the samples it is measured on."""
    held, own = run.dataset.validation, run.experiment.normalization == "own"
    if own != (client is not None):
        raise ValueError(
            f"client must be 0 to {run.experiment.clients - 1} where each has a model of its own, got None"
            if own
            else f"client must be None where normalization is shared, got {client}"
        )
    if client is None:
        return run.model, held
    assert run.task.owner is not None  # where normalization is the clients' own
    model, mine = run.client_model(client), run.task.owner == client
    if not mine.any():
        raise ValueError(f"client {client} has no validation samples to measure a file on")
    return model, data.Split(held.x[mine], held.y[mine])


def _converted(run: Run, recipe: Recipe, model: nn.Module, shards: Sequence[Tensor]) -> Any:
    """Export a pruned model and convert it, for static int8 with the ranges that the clients of `shards` measured."""
    dataset, ranges = run.dataset, None
    graph = export(model, dataset.preprocess, dataset.validation.x)
    if (recipe.dtype, recipe.quantization) == ("int8", "static"):
        ranges = convert.calibrate(graph, [dataset.train.x[shard] for shard in shards])
    return convert.convert(graph, recipe.dtype, ranges)


def _artifact(path: Path, card: dict[str, Any], session: Any) -> Artifact:
    measured = {**card["measured"], "interval": tuple(card["measured"]["interval"])}
    return Artifact(path=path, digest=card["digest"], card=card, session=session, **measured)


def _origin(run: Run, recipe: Recipe) -> dict[str, Any]:
    """The part of the card that says what the file is and what to feed it."""
    return {
        "experiment": run.experiment.model_dump(mode="json"),
        "run": run.key,
        "recipe": recipe.model_dump(mode="json"),
        "data": {
            "name": run.dataset.name,
            "digest": run.dataset.digest,
            "classes": list(run.dataset.classes),
            "sites": list(run.dataset.sites),
        },
        "training": {
            "rounds": len(run.records),
            "seconds": sum(record.seconds for record in run.records),
            "uplink_bytes": run.uplink_bytes,
            "downlink_bytes": run.downlink_bytes,
        },
        "privacy": _privacy(run, recipe),
        "preprocess": run.dataset.preprocess.to_dict(),
        "input": {
            "name": "x",
            "dtype": str(run.dataset.train.x.dtype).removeprefix("torch."),
            "shape": list(run.dataset.shape),
            "features": list(run.dataset.features),
            "meaning": "a batch of raw values as stored; the graph preprocesses them",
        },
        "accuracy_batch": measure.WHOLE,
        "output": {"name": "logits", "shape": [len(run.dataset.classes)]},
    }


def _privacy(run: Run, recipe: Recipe) -> dict[str, Any]:
    """What the privacy of its training is worth, and what is outside it; an infinite epsilon is None, with why."""
    worth = run.privacy()
    epsilon = None if worth.why else worth.epsilon
    return {**asdict(worth), "epsilon": epsilon, "outside": list(outside(run.experiment, recipe))}


def _sizes(path: Path) -> dict[str, int]:
    """Write the compressed form beside the file; both sizes are those of the files."""
    import zstandard

    _, compressed = _beside(path)
    write_bytes(compressed, zstandard.ZstdCompressor(level=LEVEL).compress(path.read_bytes()))
    return {"bytes": path.stat().st_size, "zstd_bytes": compressed.stat().st_size}


def _behaviour(session: Any, validation: data.Split) -> dict[str, Any]:
    accuracy, interval = measure.accuracy(session, validation)
    rows = np.arange(measure.BATCH) % len(validation)
    [one] = measure.latencies([session], validation.x[:1])
    [many] = measure.latencies([session], validation.x[rows])
    return {
        "accuracy": accuracy,
        "interval": list(interval),
        "latency_ms": one.median * 1e3,
        "latency_spread_ms": one.spread * 1e3,
        "throughput": measure.BATCH / many.median,
        "threads": measure.THREADS,
    }


def _note(recipe: Recipe, before: int, after: int, converted: Any) -> str:
    """Say so when the pruning removed nothing, or the dtype reached few of the weights or none."""
    notes = []
    if recipe.prune == "channel" and recipe.prune_ratio and after == before:
        notes.append("channel pruning removed nothing: too few channels outside the class outputs")
    weights = list(measure.stored_weights(converted).values())
    total = sum(w.size for w in weights)
    reached = sum(w.size for w in weights if w.dtype != np.float32)
    if recipe.dtype != "fp32" and 2 * reached < total:
        name = f"{recipe.dtype} {recipe.quantization}" if recipe.dtype == "int8" else recipe.dtype
        reach = f"reaches only {reached / total:.1%} of the weights" if reached else "does nothing"
        notes.append(f"{name} {reach} here: it is for Linear weights, the convolutions stay fp32")
    return "; ".join(notes)


def _beside(path: Path) -> tuple[Path, Path]:
    """The model card and the compressed form that belong to an artifact's file."""
    return path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.zst")


def _write_card(path: Path, card: dict[str, Any]) -> None:
    write_json(_beside(path)[0], card)
