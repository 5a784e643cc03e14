"""Static int8: which layers compute on integers, and the quantized graph.

Weights are symmetric codes with a scale for each output channel (`compression.quantize`), activations unsigned codes on
ranges that clients have measured (`deployment.calibration`); biases, logits and all the rest stay float.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedlab_kit.compression.quantize import grid_codes
from fedlab_kit.deployment.measure import attributes

Ranges = dict[str, tuple[np.float32, np.float32]]

LAYERS = ("Conv", "Gemm", "MatMul")
NARROW = 4  # with fewer input channels the runtime's int8 convolution takes 1.3 to 2.8 times as long as its float one
FLOAT_OUTPUT = ("Gemm", "MatMul")  # the logits keep their resolution; a Relu behind a hidden layer joins it anyway
LIMITS = ("Relu", "Clip")  # become the ends of a range
MOVES = ("MaxPool", "Flatten")  # their outputs have the grid of what they take
FOLLOWS = (*LIMITS, *MOVES, "Add", "Concat")  # int8 where all that they take is
_DEAD = np.float32(2.0**-8)  # the width of a range for an activation that was zero on every sample
_GRID = ("QuantizeLinear", "DequantizeLinear")
_PLAIN = {"alpha": 1, "beta": 1, "transA": 0}  # a Gemm as a Linear layer becomes; onnxruntime forgets others
TINY = 255 * float(np.finfo(np.float32).tiny)


def quantize(graph: Any, ranges: Ranges) -> Any:
    """Return a float onnx.ModelProto in static int8 with these ranges of its activations; the graph is not changed.

    A layer whose weights have no int8 grid, or whose activations have no finite range, stays float.
    """
    import onnx
    from onnxruntime import quantization as ort

    plan = _finite_plan(graph, ranges)
    if not plan.nodes:
        return plan.graph
    known = {name: _span(*ranges[source]) for name, source in plan.source.items()}
    onnx.helper.set_model_props(plan.graph, {"onnx.quant.pre_process": "onnxruntime.quant"})  # keeps it quiet
    with tempfile.TemporaryDirectory() as folder:
        cache, quantized = Path(folder) / "ranges.json", Path(folder) / "int8.onnx"
        ort.save_tensors_data(ort.TensorsData(ort.CalibrationMethod.MinMax, known), cache)
        ort.quantize_static(
            plan.graph,
            quantized,
            None,
            calibration_cache_path=cache,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
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
    finite = {name for name, span in ranges.items() if np.isfinite(span).all()}
    banned: set[str] = set()
    while True:
        plan = plan_int8(graph, banned)
        endless = {name for name, source in plan.source.items() if source not in finite}
        if not endless:
            return plan
        banned |= endless


def plan_int8(graph: Any, banned: Container[str] = ()) -> Plan:
    """Choose what becomes int8: layers whose weights have a grid, and what takes int8 convolutions' outputs alone.

    A pool of uint8 is quick behind int8 convolutions, whose channels lie last, and thirty times as slow elsewhere. So a
    Relu comes before the pool there, where it costs nothing, and after it elsewhere: then the pool stays float.
    """
    ordered = copy.deepcopy(graph)
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


def _exchange(first: Any, second: Any) -> None:
    """Let two operations of one input and one output change places."""
    places = [(node.input[0], node.output[0]) for node in (first, second)]
    one = copy.deepcopy(first)
    first.CopyFrom(second)
    second.CopyFrom(one)
    for node, (given, made) in zip((first, second), places, strict=True):
        node.input[0], node.output[0] = given, made


def _has_grid(node: Any, constants: dict[str, Any]) -> bool:
    """Whether a layer multiplies an activation by weights with an int8 grid, and adds a constant or nothing."""
    if node.input[0] in constants or not all(name in constants for name in node.input[1:]):
        return False
    settings, shape = attributes(node), list(constants[node.input[1]].dims)
    if node.op_type == "Conv":
        return shape[1] * settings.get("group", 1) >= NARROW
    odd = node.op_type == "Gemm" and any(settings.get(name, usual) != usual for name, usual in _PLAIN.items())
    return len(shape) == 2 and not odd


def _joins(node: Any, taken: Sequence[str], constants: dict[str, Any]) -> bool:
    """Whether an addition or concatenation takes activations alone, and whether a limit leaves zero as it is."""
    from onnx import numpy_helper

    if node.op_type in ("Add", "Concat"):
        return len(taken) == len(node.input)
    if node.op_type == "Clip":
        ends = zip((-1, 1), node.input[1:], strict=False)
        return all(n in constants and sign * numpy_helper.to_array(constants[n]) >= 0 for sign, n in ends if n)
    return len(node.output) == 1


def _with_floats(graph: Any, quantized: Container[str]) -> Any:
    """Let what stays float take floats that come from such nodes as they are, not as they come back from a grid."""
    given = {node.output[0]: node.input[0] for node in graph.graph.node if node.op_type in _GRID}
    integer = {name for node in graph.graph.node if node.name in quantized for name in node.output}
    for node in graph.graph.node:
        if node.name not in quantized and node.op_type not in _GRID:
            floats = [given.get(given.get(name, ""), name) for name in node.input]
            node.input[:] = [name if new in integer else new for name, new in zip(node.input, floats, strict=True)]
    return graph


def _span(low: Any, high: Any) -> tuple[np.ndarray, np.ndarray]:
    """A range as onnxruntime takes it: with zero inside, and wider than nothing."""
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    return np.array(low), np.array(high if float(high) - float(low) > TINY else _DEAD)


def _weights(plan: Plan, known: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The scales of all weights, channel by channel; where layers share a weight, the largest."""
    from onnx import numpy_helper

    stored = {item.name: numpy_helper.to_array(item) for item in plan.graph.graph.initializer}
    scales: dict[str, tuple[int, np.ndarray]] = {}
    for node in (node for node in plan.nodes if node.op_type in LAYERS):
        name, weight, *bias = node.input[1], *(stored[name] for name in node.input[1:])
        axis = 0 if node.op_type == "Conv" or attributes(node).get("transB") else 1
        low, high = known[node.input[0]]
        scale = _scales(weight.T if axis else weight, bias[0] if bias else np.zeros(1), (high - low) / 255.0)
        scales[name] = axis, np.maximum(scale, scales.get(name, (axis, scale))[1])
    return {
        name: [{"axis": axis, "scale": one, "zero_point": np.int8(0)} for one in scale]
        for name, (axis, scale) in scales.items()
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
