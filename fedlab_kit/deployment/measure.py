"""What is measured on a deployed file: accuracy, latency, size, and the zeros among its weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from statistics import fmean, quantiles
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from fedlab_kit.data import Split
from fedlab_kit.deployment.score import THREADS
from fedlab_kit.deployment.score import open_session as open_session
from fedlab_kit.statistics import paired_loss, recall, wilson

if TYPE_CHECKING:
    pass

BATCH = 64  # samples at once where throughput counts
WHOLE = 100  # samples at once where accuracy counts: more are no quicker, and a large network's would fill the memory
LEVEL = 18  # of zstandard: as small as 19 on these files (within 0.3 %) in half the time
LARGE, QUICK = 4_000_000, 3  # bytes above which level 18 takes seconds, and the level there: a quarter second for 44 MB
SMALL, SHORT = 500_000, {"chain_log": 16, "hash_log": 16, "search_log": 4}  # above: within 0.3 % in half the time
RUNTIMES = (("1.17", 20, 9), ("1.18", 21, 10), ("1.21", 22, 10), ("1.23", 23, 11), ("1.24", 25, 13))
"""Releases of onnxruntime, and the newest opset and IR version that each opens: published (onnxruntime.ai, reference,
compatibility), and tried here from 1.17.3 to 1.24.1."""
SINCE = {"INT4": "1.19", "UINT4": "1.19", "8 bits": "1.23", "INT2": "1.24", "UINT2": "1.24", "2 bits": "1.24"}
"""Kinds of stored codes, and of MatMulNBits, that need a later release than their opset; tried likewise."""


Figures = dict[str, Any]


class Timing(NamedTuple):
    """Seconds of one call: the median, and the distance between the quartiles."""

    median: float
    spread: float


def oldest_runtime(graph: Any) -> str:
    """Return the oldest onnxruntime that opens an onnx.ModelProto, as far back as was tried, see `RUNTIMES`."""
    from onnx import TensorProto
    from onnxruntime import __version__ as here

    opset = max(one.version for one in graph.opset_import if one.domain in ("", "ai.onnx"))
    opens = [release for release, newest, ir in RUNTIMES if opset <= newest and graph.ir_version <= ir]
    kinds = [TensorProto.DataType.Name(tensor.data_type) for tensor in graph.graph.initializer]
    kinds += [f"{attributes(node)['bits']} bits" for node in graph.graph.node if node.op_type == "MatMulNBits"]
    releases = [*(opens or [here])[:1], *(SINCE[kind] for kind in kinds if kind in SINCE)]
    return max(releases, key=lambda release: [int(number) for number in release.split(".")[:2]])


def logits(session: Any, x: Tensor | np.ndarray, batch: int = WHOLE) -> np.ndarray:
    """Run raw samples [n, ...] through a session in batches; float32 logits [n, classes].

    Dynamic int8 takes its ranges from each batch, so its answers depend a little on the batch; others' do not.
    """
    raw = np.asarray(x)
    return np.concatenate([session.run(None, {"x": raw[i : i + batch]})[0] for i in range(0, len(raw), batch)])


def answers(session: Any, split: Split) -> np.ndarray:
    """Return the class that a session gives each sample, int64 [n]. ValueError without samples, or without numbers."""
    if len(split) == 0:
        raise ValueError("accuracy needs at least one sample, got none")
    found = logits(session, split.x)
    if broken := int(np.isnan(found).any(axis=1).sum()):
        raise ValueError(f"logits must be numbers, they are NaN for {broken} of {len(split)} samples: train again")
    return found.argmax(1)


def accuracy(session: Any, split: Split) -> tuple[float, tuple[float, float]]:
    """Return a session's accuracy on a split, with its 95 % interval. ValueError as `answers`."""
    correct = int((answers(session, split) == split.y.numpy()).sum())
    return correct / len(split), wilson(correct, len(split))


def judged(answers: np.ndarray, baseline: np.ndarray, split: Split, classes: int, missing: Sequence[int]) -> Figures:
    """Return what answers [n] are worth, and beside those of the fp32 file, as it stands on the card."""
    truth = split.y.numpy()
    right = answers == truth
    hits, each = int(right.sum()), recall(right, truth, classes)
    unheld = [share for label in missing if (share := each[label]) is not None]
    lost, low, high, _ = paired_loss(baseline == truth, right)
    return {
        "accuracy": hits / len(truth),
        "interval": list(wilson(hits, len(truth))),
        "recall": list(each),
        "missing_recall": fmean(unheld) if unheld else None,
        "lost": 100 * lost,
        "lost_interval": [100 * low, 100 * high],
        "changed": int((baseline != answers).sum()),
    }


def timings(
    calls: Sequence[Callable[[], Any]], seconds: float = 0.03, least: int = 5, most: float = inf
) -> list[Timing]:
    """Time several calls in turns, so that a disturbance of the machine meets them all alike.

    Each runs once untimed, then in turns until `seconds` per call have passed and each ran `least` times, or `most`
    seconds per call have. A turn begins untimed: the call before has filled the cache with weights of its own.
    """
    for call in calls:
        call()
    taken: list[list[float]] = [[] for _ in calls]
    begin, passed = time.perf_counter(), 0.0
    while not taken[0] or passed < seconds * len(calls) or (len(taken[0]) < least and passed < most * len(calls)):
        for call, samples in zip(calls, taken, strict=True):
            if len(calls) > 1:
                call()
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        passed = time.perf_counter() - begin
    return [_summary(samples) for samples in taken]


def _summary(samples: list[float]) -> Timing:
    low, middle, high = quantiles(samples * 2 if len(samples) == 1 else samples, n=4, method="inclusive")
    return Timing(middle, high - low)


def latencies(sessions: Sequence[Any], x: Tensor | np.ndarray, seconds: float = 0.03) -> list[Timing]:
    """Time sessions against each other on the same batch of raw samples [n, ...]; large networks have fewer turns."""
    raw = np.asarray(x)
    return timings([partial(session.run, None, {"x": raw}) for session in sessions], seconds, most=10 * seconds)


def speed(session: Any, held: Split) -> Figures:
    """Return a session's latency on one sample and its throughput on many, as they stand on the card."""
    [one] = latencies([session], held.x[:1])
    [many] = latencies([session], held.x[np.arange(BATCH) % len(held)])
    return {
        "latency_ms": one.median * 1e3,
        "latency_spread_ms": one.spread * 1e3,
        "throughput": BATCH / many.median,
        "threads": THREADS,
    }


def squeeze(content: bytes) -> tuple[bytes, int]:
    """Return a file's bytes as zstandard packs them, and its level: the best would take seconds for a large file."""
    import zstandard

    level = LEVEL if len(content) <= LARGE else QUICK
    tables = SHORT if SMALL < len(content) <= LARGE else {}
    settings = zstandard.ZstdCompressionParameters.from_level(level, source_size=len(content), **tables)
    return zstandard.ZstdCompressor(compression_params=settings).compress(content), level


# Where a node takes weights in; the rest of its inputs are activations, biases and settings.
WEIGHT_INPUTS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger"), (1,)),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), (1, 2)),
    "Gather": (0,),
}
_DECODING = ("Cast", "Mul", "DequantizeLinear", "Transpose")  # what stored weights pass through on their way to a node


def attributes(node: Any) -> dict[str, Any]:
    """Return the attributes of an ONNX node by name, as values of Python."""
    from onnx.helper import get_attribute_value

    return {attribute.name: get_attribute_value(attribute) for attribute in node.attribute}


def stored_weights(graph: Any) -> dict[str, np.ndarray]:
    """Return the stored values or codes of each weight, by the name of its initializer, in the order of the nodes.

    Weights are what layers multiply activations by or look up: matrices and kernels, recurrent ones and tables.
    """
    from onnx import numpy_helper

    stored = {item.name: item for item in graph.graph.initializer}
    through = {node.output[0]: node.input[0] for node in graph.graph.node if node.op_type in _DECODING}
    weights = {}
    for node in graph.graph.node:
        for position in WEIGHT_INPUTS.get(node.op_type, ()):
            name = node.input[position]
            while name in through:
                name = through[name]
            if name in stored and len(stored[name].dims) > 1 and name not in weights:
                weights[name] = numpy_helper.to_array(stored[name])
    return weights


def sparsity(graph: Any) -> float:
    """Return the share of zeros among all weights of an onnx.ModelProto, float or code zero; shared ones count once."""
    weights = stored_weights(graph).values()
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.size for w in weights))
