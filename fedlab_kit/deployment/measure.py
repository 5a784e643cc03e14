"""What is measured on a deployed file: accuracy, latency, and the zeros among its weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fedlab_kit.data import Split
from fedlab_kit.statistics import wilson

THREADS = 1  # of the runtime, in every measurement
BATCH = 64  # samples at once where throughput counts
WHOLE = 100  # samples at once where accuracy counts: more are no quicker, and a large network's would fill the memory
RUNTIMES = (("1.17", 20, 9), ("1.18", 21, 10), ("1.21", 22, 10), ("1.23", 23, 11), ("1.24", 25, 13))
"""Releases of onnxruntime, and the newest opset and IR version that each opens: published (onnxruntime.ai, reference,
compatibility), and tried here from 1.17.3 to 1.24.1."""
SINCE = (
    dict.fromkeys(("INT4", "UINT4"), "1.19") | {"8 bits": "1.23"} | dict.fromkeys(("INT2", "UINT2", "2 bits"), "1.24")
)
"""Kinds of stored codes, and of MatMulNBits, that need a later release than their opset; tried likewise."""


class Timing(NamedTuple):
    """Seconds of one call: the median, and the distance between the quartiles."""

    median: float
    spread: float


def open_session(content: bytes | Path, optimize: bool = True) -> Any:
    """Open a file or its bytes in onnxruntime, on the CPU, with one thread; without `optimize` as its nodes say."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = THREADS
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def oldest_runtime(graph: Any) -> str:
    """Return the oldest onnxruntime that opens an onnx.ModelProto, as far back as was tried, see `RUNTIMES`."""
    from onnx import TensorProto
    from onnxruntime import __version__ as here

    opset = max(one.version for one in graph.opset_import if one.domain in ("", "ai.onnx"))
    opens = [release for release, newest, ir in RUNTIMES if opset <= newest and graph.ir_version <= ir]
    kinds = [TensorProto.DataType.Name(tensor.data_type) for tensor in graph.graph.initializer]
    packed = [node for node in graph.graph.node if node.op_type == "MatMulNBits"]
    kinds += [f"{a.i} bits" for node in packed for a in node.attribute if a.name == "bits"]
    releases = [*(opens or [here])[:1], *(SINCE[kind] for kind in kinds if kind in SINCE)]
    return max(releases, key=lambda release: [int(number) for number in release.split(".")[:2]])


def logits(session: Any, x: Tensor | np.ndarray, batch: int = WHOLE) -> np.ndarray:
    """Run raw samples [n, ...] through a session in batches; float32 logits [n, classes].

    Dynamic int8 takes its ranges from each batch, so its answers depend a little on the batch; others' do not.
    """
    raw = np.asarray(x)
    return np.concatenate([session.run(None, {"x": raw[i : i + batch]})[0] for i in range(0, len(raw), batch)])


def answers(session: Any, split: Split) -> np.ndarray:
    """Return the class that a session gives each sample of a split, int64 [n].

    Raises ValueError on an empty split, and when an answer is no number.
    """
    if len(split) == 0:
        raise ValueError("accuracy needs at least one sample, got none")
    found = logits(session, split.x)
    if broken := int(np.isnan(found).any(axis=1).sum()):
        raise ValueError(f"logits must be numbers, they are NaN for {broken} of {len(split)} samples: train again")
    return found.argmax(1)


def accuracy(session: Any, split: Split) -> tuple[float, tuple[float, float]]:
    """Return the accuracy of a session on a split, and its 95 % interval. Raises ValueError as `answers` does."""
    correct = int((answers(session, split) == split.y.numpy()).sum())
    return correct / len(split), wilson(correct, len(split))


def timings(
    calls: Sequence[Callable[[], Any]], seconds: float = 0.03, least: int = 5, most: float = inf
) -> list[Timing]:
    """Time several calls in turns, so that a disturbance of the machine meets them all alike.

    Each runs once untimed, then in turns until `seconds` per call have passed and each ran `least` times, or `most`
    seconds per call have. A turn begins untimed: the call before has filled the cache with weights of its own, as it
    would not in service.
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


# Where a node takes weights in; the rest of its inputs are activations, biases and settings.
WEIGHT_INPUTS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger"), (1,)),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), (1, 2)),
    "Gather": (0,),
}
_DECODING = ("Cast", "Mul", "DequantizeLinear", "Transpose")  # what stored weights pass through on their way to a node


def sparsity(graph: Any) -> float:
    """Return the share of zeros among all weights of an onnx.ModelProto, float or quantized (code zero).

    Shared weights count once.
    """
    weights = stored_weights(graph).values()
    return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.size for w in weights))


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
