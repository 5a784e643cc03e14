"""Static int8: which layers compute on integers, the ranges that clients measure for them, and the quantized graph.

Weights are symmetric codes with a scale for each output channel (`compression.quantize`), activations unsigned codes on
ranges that were measured beforehand; biases, logits and all the rest stay float. Clients answer with extremes and,
where a range is to be narrower, with counts in bins that all share, in narrower bins again if need be. Extremes of
extremes and sums of counts are those of all samples together, so calibration in a federation is exact.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedlab_kit.compression.quantize import grid_codes
from fedlab_kit.deployment.measure import open_session

Ranges = dict[str, tuple[np.float32, np.float32]]
Histograms = dict[str, np.ndarray]

CALIBRATION = 256  # samples that calibrate an artifact, all clients together
BINS = 2048  # of a histogram, equally wide from the smallest to the largest value of all clients
PERCENTILE = 99.5  # per cent of an activation's values inside a "percentile" range
LEVELS = 128  # into which "entropy" merges the bins inside a range before it compares
LAYERS = ("Conv", "Gemm", "MatMul")
NARROW = 4  # with fewer input channels the runtime's int8 convolution takes 1.3 to 2.8 times as long as its float one
FLOAT_OUTPUT = ("Gemm", "MatMul")  # the logits keep their resolution; a Relu behind a hidden layer joins it anyway
LIMITS = ("Relu", "Clip")  # become the ends of a range
MOVES = ("MaxPool", "Flatten")  # their outputs have the grid of what they take
FOLLOWS = (*LIMITS, *MOVES, "Add", "Concat")  # int8 where all that they take is
_ROWS = 8  # samples run at once in calibration, always: another batch size could round a sum differently
_DEAD = np.float32(2.0**-8)  # the width of a range for an activation that was zero on every sample
_COARSE = 1 / 8  # share of a range below which its bins are too wide for the rest
_PASSES = 4  # enough to find what lies 10^13 times as close as the wildest value
_NOTHING = 2.0**-40  # share of a range that is left after so many where nearly all values are zero: all of it counts
_GRID = ("QuantizeLinear", "DequantizeLinear")
_PLAIN = {"alpha": 1, "beta": 1, "transA": 0}  # a Gemm as a Linear layer becomes; onnxruntime forgets others
_TINY = 255 * float(np.finfo(np.float32).tiny)


def calibrate(
    graph: Any, clients: Sequence[Tensor], method: Literal["minmax", "percentile", "entropy"] = "minmax"
) -> Ranges:
    """Ranges for static int8, each client on an equal share of raw samples; of thousands of clients, some are asked.

    "minmax" holds every value, "percentile" the middle 99.5 % of them, "entropy" those whose 8-bit histogram is least
    surprising beside the float one (Migacz 2017). Raises ValueError without samples.
    """
    held = [samples for samples in clients if len(samples)]
    asked = held[:: max(1, len(held) // CALIBRATION)]
    shares = [samples[: max(1, CALIBRATION // len(asked))] for samples in asked]
    calibrator = Calibrator(graph)

    def count(within: Ranges) -> Histograms:
        return merge_histograms(calibrator.histograms(samples, within) for samples in shares)

    widest = merge_ranges(calibrator.ranges(samples) for samples in shares)
    if method == "minmax":
        return widest
    ranges, again = widest, True
    for _ in range(_PASSES):
        if again:
            ranges, again = percentile_ranges(count(ranges), ranges)
    ranges = {
        name: span if _width(span) > _NOTHING * _width(widest[name]) else widest[name] for name, span in ranges.items()
    }
    return entropy_ranges(count(within := around(ranges, widest)), within) if method == "entropy" else ranges


def client_ranges(graph: Any, samples: Tensor) -> Ranges:
    """What one client returns first: the smallest and largest value of each activation on its raw samples.

    Extremes of single samples leave the client with this. Raises ValueError without samples.
    """
    return Calibrator(graph).ranges(samples)


def merge_ranges(clients: Iterable[Ranges]) -> Ranges:
    """What the server does with them: the minimum of the minima, the maximum of the maxima."""
    answers, merged = list(clients), Ranges()
    if not answers:
        raise ValueError("calibration needs at least one client's ranges, got none")
    for ranges in answers:
        for name, (low, high) in ranges.items():
            known = merged.get(name, (low, high))
            merged[name] = (min(low, known[0]), max(high, known[1]))
    return merged


def client_histograms(graph: Any, samples: Tensor, ranges: Ranges) -> Histograms:
    """What one client returns then: how many values of each activation lie in each of 2048 bins of the merged range."""
    return Calibrator(graph).histograms(samples, ranges)


def merge_histograms(clients: Iterable[Histograms]) -> Histograms:
    """The sums of the clients' counts, which are the counts of all samples together."""
    merged: Histograms = {}
    for histograms in clients:
        for name, counts in histograms.items():
            merged[name] = merged.get(name, 0) + counts
    return merged


def percentile_ranges(counts: Histograms, ranges: Ranges) -> tuple[Ranges, bool]:
    """What the server does with counts: ranges that hold the middle 99.5 % of all values.

    And whether a range has so few of the bins left that clients should count again, in bins of the new ranges.
    """
    found = {name: _percentile(counts[name], *span) for name, span in ranges.items()}
    return found, any(_width(found[name]) < _COARSE * _width(span) for name, span in ranges.items())


def around(ranges: Ranges, widest: Ranges) -> Ranges:
    """Where "entropy" looks: four times as wide as what holds the middle 99.5 %, but no wider than what holds all."""
    return {
        name: (max(4 * low, widest[name][0]), min(4 * high, widest[name][1])) for name, (low, high) in ranges.items()
    }


def entropy_ranges(counts: Histograms, ranges: Ranges) -> Ranges:
    """The part of each range whose histogram changes least, by Kullback and Leibler, when its bins become 128 levels.

    Parts of every 8th number of bins are tried, shrunk towards zero on both sides alike (Migacz 2017). Square roots of
    the counts are compared: a value that comes again and again, as zero does behind a Relu, would outweigh the rest.
    """
    return {name: _entropy(np.sqrt(counts[name]), *span) for name, span in ranges.items()}


class Calibrator:
    """The float graph opened with every activation that gets a grid as an output."""

    def __init__(self, graph: Any) -> None:
        import onnx

        plan = _plan(graph)
        known = {value.name for value in (*graph.graph.input, *graph.graph.output)}
        self._names = list(dict.fromkeys(plan.source.values()))
        plan.graph.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in self._names
            if name not in known
        )
        self._session = open_session(plan.graph.SerializeToString(), optimize=False)

    def ranges(self, samples: Tensor) -> Ranges:
        """The extremes on raw samples [n, ...]."""
        return merge_ranges(
            {name: (values.min(), values.max()) for name, values in batch.items()} for batch in self._run(samples)
        )

    def histograms(self, samples: Tensor, ranges: Ranges) -> Histograms:
        """Counts int64 [2048] on raw samples [n, ...] in bins of equal width over each range, zero included."""
        return merge_histograms(
            {name: _counts(values, *ranges[name]) for name, values in batch.items()} for batch in self._run(samples)
        )

    def _run(self, samples: Tensor) -> Iterator[dict[str, np.ndarray]]:
        raw = samples.numpy()
        if len(raw) == 0:
            raise ValueError("calibration needs at least one sample, got none")
        for start in range(0, len(raw), _ROWS):
            part = raw[start : start + _ROWS]
            filled = part[np.arange(_ROWS) % len(part)]
            wanted = [name for name in self._names if name != "x"]  # which is no output
            values = self._session.run(wanted, {"x": filled}) if wanted else []
            found = {"x": filled, **dict(zip(wanted, values, strict=True))}
            yield {name: found[name][: len(part)] for name in self._names}


def quantize(graph: Any, ranges: Ranges) -> Any:
    """Return a float onnx.ModelProto in static int8 with these ranges of its activations; the graph is not changed.

    A layer whose weights have no int8 grid, or whose activations have no finite range, stays float.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantType,
        TensorsData,
        quantize_static,
        save_tensors_data,
    )

    plan = _finite_plan(graph, ranges)
    if not plan.nodes:
        return plan.graph
    known = {name: _span(*ranges[source]) for name, source in plan.source.items()}
    onnx.helper.set_model_props(plan.graph, {"onnx.quant.pre_process": "onnxruntime.quant"})  # keeps it quiet
    with tempfile.TemporaryDirectory() as folder:
        cache, quantized = Path(folder) / "ranges.json", Path(folder) / "int8.onnx"
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, known), cache)
        quantize_static(
            plan.graph,
            quantized,
            None,
            calibration_cache_path=cache,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=[*LAYERS, *FOLLOWS],
            nodes_to_quantize=[node.name for node in plan.nodes],
            extra_options={
                "OpTypesToExcludeOutputQuantization": list(FLOAT_OUTPUT),
                "QuantizeBias": False,
                "TensorQuantOverrides": _weights(plan, known),
            },
        )
        return _with_floats(onnx.load(quantized), {node.name for node in plan.nodes})


class Plan(NamedTuple):
    """A graph in the order that suits int8, its nodes that become int8, and whose range each of their tensors takes."""

    graph: Any
    nodes: list[Any]
    source: dict[str, str]


def _finite_plan(graph: Any, ranges: Ranges) -> Plan:
    """The plan without the nodes that touch a tensor without a finite range."""
    banned: set[str] = set()
    while True:
        plan = _plan(graph, banned)
        endless = {
            n for n, source in plan.source.items() if source not in ranges or not np.isfinite(ranges[source]).all()
        }
        if not endless:
            return plan
        banned |= endless


def _plan(graph: Any, banned: Container[str] = ()) -> Plan:
    """Choose what becomes int8: layers whose weights have a grid, and what takes int8 convolutions' outputs alone.

    A pool of uint8 is quick behind int8 convolutions, whose channels lie last, and thirty times as slow elsewhere. So a
    Relu comes before the pool there, where it costs nothing, and after it elsewhere: then the pool stays float.
    """
    ordered = type(graph)()
    ordered.CopyFrom(graph)
    constants = {item.name: item for item in ordered.graph.initializer}
    users = Counter([*(end.name for end in graph.graph.output), *(n for node in graph.graph.node for n in node.input)])
    plan, born, producer = Plan(ordered, [], {}), set[str](), dict[str, Any]()
    for node in ordered.graph.node:
        before = producer.get(node.input[0]) if node.input else None
        inside = before is not None and before.input[0] in born
        if before is not None and users[node.input[0]] == 1 and _misplaced(before, node, inside, constants):
            _exchange(before, node)
            if inside:
                _share(before, plan.source, users)
        producer |= dict.fromkeys(node.output, node)
        taken = [name for name in node.input if name and name not in constants]
        if any(name in banned for name in (*taken, *node.output)):
            continue
        if node.op_type in LAYERS and _has_grid(node, constants):
            plan.nodes.append(node)
            plan.source.setdefault(taken[0], taken[0])
        elif node.op_type in FOLLOWS and taken and born.issuperset(taken) and _joins(node, taken, constants):
            plan.nodes.append(node)
        else:
            continue
        if node.op_type not in FLOAT_OUTPUT:
            born |= set(node.output)
            _share(node, plan.source, users)
    return plan


def _share(node: Any, source: dict[str, str], users: Counter[str]) -> None:
    """Say whose range the output of a node takes, and, if it is a limit, that what it alone takes has its range."""
    given, made = node.input[0], node.output[0]
    source[made] = source[given] if node.op_type in MOVES else made
    if node.op_type in LIMITS and users[given] == 1 and source[given] == given:
        source[given] = made


def _misplaced(first: Any, second: Any, born: bool, constants: dict[str, Any]) -> bool:
    pool, limit = (first, second) if born else (second, first)
    moves = pool.op_type == "MaxPool" and limit.op_type in LIMITS and len(pool.output) == 1
    return moves and _joins(limit, limit.input[:1], constants)


def _with_floats(graph: Any, quantized: Container[str]) -> Any:
    """Let what stays float take floats that come from such nodes as they are, not as they come back from a grid."""
    given = {node.output[0]: node.input[0] for node in graph.graph.node if node.op_type in _GRID}
    integer = {name for node in graph.graph.node if node.name in quantized for name in node.output}
    for node in graph.graph.node:
        if node.name not in quantized and node.op_type not in _GRID:
            floats = [given.get(given.get(name, ""), name) for name in node.input]
            node.input[:] = [name if new in integer else new for name, new in zip(node.input, floats, strict=True)]
    return graph


def _exchange(first: Any, second: Any) -> None:
    """Let two operations of one input and one output change places."""
    one, other = type(first)(), type(second)()
    one.CopyFrom(first)
    other.CopyFrom(second)
    first.CopyFrom(other)
    second.CopyFrom(one)
    first.input[0], first.output[0] = one.input[0], one.output[0]
    second.input[0], second.output[0] = other.input[0], other.output[0]


def _has_grid(node: Any, constants: dict[str, Any]) -> bool:
    """Whether a layer multiplies an activation by weights with an int8 grid, and adds a constant or nothing."""
    if node.input[0] in constants or not all(name in constants for name in node.input[1:]):
        return False
    settings = {item.name: item.f if item.type == item.FLOAT else item.i for item in node.attribute}
    if node.op_type == "Gemm" and any(settings.get(name, usual) != usual for name, usual in _PLAIN.items()):
        return False
    shape = list(constants[node.input[1]].dims)
    if node.op_type == "Conv":
        return shape[1] * settings.get("group", 1) >= NARROW
    return len(shape) == 2


def _joins(node: Any, taken: Sequence[str], constants: dict[str, Any]) -> bool:
    """Whether an addition or concatenation takes activations alone, and whether a limit leaves zero as it is."""
    from onnx import numpy_helper

    if node.op_type in ("Add", "Concat"):
        return len(taken) == len(node.input)
    if node.op_type == "Clip":
        ends = zip((-1, 1), node.input[1:], strict=False)
        return all(n in constants and sign * numpy_helper.to_array(constants[n]) >= 0 for sign, n in ends if n)
    return len(node.output) == 1


def _span(low: Any, high: Any) -> tuple[np.ndarray, np.ndarray]:
    """A range as onnxruntime takes it: with zero inside, and wider than nothing."""
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    return np.array(low), np.array(high if float(high) - float(low) > _TINY else _DEAD)


def _weights(plan: Plan, known: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The scales of all weights, channel by channel."""
    from onnx import numpy_helper

    stored = {item.name: item for item in plan.graph.graph.initializer}
    scales: dict[str, Any] = {}
    axes = {}
    for node in plan.nodes:
        if node.op_type not in LAYERS:
            continue
        weight, *bias = (numpy_helper.to_array(stored[name]) for name in node.input[1:])
        rows = node.op_type == "Conv" or any(item.name == "transB" and item.i for item in node.attribute)
        low, high = known[node.input[0]]
        scale = _scales(weight if rows else weight.T, bias[0] if bias else np.zeros(1), (high - low) / 255.0)
        scales[node.input[1]] = np.maximum(scale, scales.get(node.input[1], scale))  # where two layers share it
        axes[node.input[1]] = 0 if rows else 1
    return {
        name: [{"axis": axis, "scale": scale, "zero_point": np.int8(0)} for scale in scales[name]]
        for name, axis in axes.items()
    }


def _scales(weight: np.ndarray, bias: np.ndarray, unit: float) -> np.ndarray:
    """The scale of each output channel of a weight [out, ...], float32 [out], when a step of its input is `unit`.

    The runtime rounds the bias to a multiple of scale * unit, in 32 bits. So a channel without weights has a scale that
    its bias chooses, and one whose weights are next to nothing beside its bias a coarser one than they would have.
    """
    scale = grid_codes(torch.from_numpy(weight.copy()), "int8").scale.flatten().numpy()
    steps = np.maximum(np.abs(bias).astype(np.float64), 1e-30) / unit
    empty = ~weight.reshape(len(weight), -1).any(axis=1)
    return np.where(empty, steps * 2.0**-20, np.maximum(scale, steps * 2.0**-30)).astype(np.float32)


def _width(span: tuple[Any, Any]) -> float:
    return max(float(span[1]), 0.0) - min(float(span[0]), 0.0)


def _edges(low: Any, high: Any) -> np.ndarray:
    return np.linspace(min(float(low), 0.0), max(float(high), 0.0), BINS + 1)


def _counts(values: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """How many values lie in each bin, int64 [2048], those outside in the outermost; none without a finite width."""
    ends = min(float(low), 0.0), max(float(high), 0.0)
    if not _TINY < ends[1] - ends[0] < np.inf:
        return np.zeros(BINS, np.int64)
    return torch.histc(torch.from_numpy(values.ravel()).clamp(*ends), BINS, *ends).numpy().astype(np.int64)


def _percentile(counts: np.ndarray, low: Any, high: Any) -> tuple[np.float32, np.float32]:
    """The range between the outer edges of the bins that the lower and the upper percentile fall in."""
    if not counts.any():
        return low, high
    outside = (100 - PERCENTILE) / 200
    first, last = np.searchsorted(np.cumsum(counts) / counts.sum(), (outside, 1 - outside))
    edges = _edges(low, high)
    return np.float32(max(low, edges[first])), np.float32(min(high, edges[last + 1]))


def _entropy(counts: np.ndarray, low: Any, high: Any) -> tuple[np.float32, np.float32]:
    if not counts.any():
        return low, high
    edges = _edges(low, high)
    widths = np.arange(LEVELS, BINS + 1, 8)
    zero = BINS * -edges[0] / (edges[-1] - edges[0])
    starts = np.rint(zero * (1 - widths / BINS)).astype(int)
    best = int(
        np.argmin([_divergence(counts, first, first + width) for first, width in zip(starts, widths, strict=True)])
    )
    first, last = starts[best], starts[best] + widths[best]
    return np.float32(max(low, edges[first])), np.float32(min(high, edges[last]))


def _divergence(counts: np.ndarray, first: int, last: int) -> float:
    """How much the counts of the bins [first, last) tell beyond their levels, in nats.

    What lies outside counts in the outermost bins, as clipping has it; a level's count is spread over those of its bins
    that hold anything, and a level that holds nothing has next to nothing instead.
    """
    inside = counts[first:last]
    real = inside.copy()
    real[0] += counts[:first].sum()
    real[-1] += counts[last:].sum()
    begins = len(inside) * np.arange(LEVELS) // LEVELS
    sizes = np.diff(begins, append=len(inside))
    held = np.maximum(np.add.reduceat(real > 0, begins, dtype=np.float64), 1)
    merged = np.repeat(np.maximum(np.add.reduceat(inside, begins) / held, 1e-4), sizes)[real > 0]
    real = real[real > 0]
    return float((real * np.log(real / merged)).sum() / real.sum() - np.log(real.sum() / merged.sum()))
