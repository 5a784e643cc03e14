"""A float ONNX graph in another dtype, as onnxruntime runs it.

Every weight is stored as codes of `compression.quantize` (fp16: as half-precision numbers) and becomes a float again
by a Cast and a product with its scales, which the runtime computes once, when it opens the file: any layer runs that
way, exactly and as fast as in floats. int8 besides computes in whole numbers where that is faster: dynamic int8
measures the activations of Linear layers as it runs; static int8 is in `deployment.static`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedlab_kit.compression.quantize import DTYPES, bfloat16, grid_codes, quantized, weight_dtypes
from fedlab_kit.deployment.measure import WEIGHT_INPUTS, attributes
from fedlab_kit.deployment.onnx_export import clean, quiet
from fedlab_kit.deployment.static import Ranges, quantize

# tells onnxruntime's quantizers that shapes are there already, and that there is nothing to say about it
_INFERRED = {"onnx.infer": "onnxruntime.quant", "onnx.quant.pre_process": "onnxruntime.quant"}

OPSETS = {"int4": 21, "int2": 25}  # of ONNX, from which on there are tensors of these codes
_LINEAR, _RECURRENT = ("Gemm", "MatMul"), ("LSTM", "GRU", "RNN")
_BIASES = {**dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), 2), **dict.fromkeys(_RECURRENT, 3)}


def convert(graph: Any, dtype: str, ranges: Ranges | None = None, keep: str = "none") -> Any:
    """Return a float onnx.ModelProto in `dtype`; int8 is static where `ranges` are given, else dynamic.

    With `keep` "ends" the first and the last layer of an int4 or int2 graph are in int8. The given graph is not
    changed. Raises ValueError on an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "fp32":
        return clean(graph)
    converted = on_grid(graph, dtype, keep)
    if dtype == "int8":
        with quiet():
            converted = _int8_dynamic(converted) if ranges is None else quantize(converted, ranges)
    store_codes(converted, dtype, keep)
    return clean(converted)


class Weight(NamedTuple):
    """A float initializer, and the axes along which it has scales where layers multiply by it: those of outputs."""

    initializer: Any
    channels: tuple[int, ...] = ()

    @property
    def values(self) -> Tensor:
        """The float32 tensor."""
        from onnx import numpy_helper

        return torch.from_numpy(numpy_helper.to_array(self.initializer).copy())

    def fill(self, array: np.ndarray, name: str = "") -> None:
        """Put other values in its place, also of another type, and under another name."""
        from onnx import numpy_helper

        self.initializer.CopyFrom(numpy_helper.from_array(array, name or self.initializer.name))


def _floats(graph: Any) -> dict[str, Any]:
    from onnx import TensorProto

    return {item.name: item for item in graph.graph.initializer if item.data_type == TensorProto.FLOAT}


def float_weights(graph: Any) -> dict[str, Weight]:
    """Return the weights that are float initializers, by name, in the order of the nodes.

    One with an infinite entry is none: it masks. Along `channels` lies the first axis that the tensor has in torch.
    """
    stored = {name: item for name, item in _floats(graph).items() if len(item.dims) > 1}
    turned = {node.output[0]: node for node in graph.graph.node if node.op_type == "Transpose"}
    found: dict[str, Weight] = {}
    for node in graph.graph.node:
        for position in WEIGHT_INPUTS.get(node.op_type, ()):
            turn = turned.get(node.input[position])
            name = turn.input[0] if turn else node.input[position]
            if name in stored and name not in found:
                weight = Weight(stored[name], _channels(node, turn, len(stored[name].dims)))
                if weight.values.isfinite().all():
                    found[name] = weight
    return found


def _channels(node: Any, turn: Any, axes: int) -> tuple[int, ...]:
    """The axes of outputs of a node's weight, before it is turned; a transposed convolution's and a table's first."""
    channels: tuple[int, ...] = (0,)
    if node.op_type in _RECURRENT:
        channels = (0, 1)  # directions and gates
    elif node.op_type in _LINEAR and not attributes(node).get("transB"):
        channels = (*range(axes - 2), axes - 1)
    if turn is None:
        return channels
    order = attributes(turn).get("perm", range(axes)[::-1])
    return tuple(order[axis] for axis in channels)


def on_grid(graph: Any, dtype: str, keep: str = "none") -> Any:
    """Return a copy of a float graph, still in floats, whose weights have the values of their grid.

    Whoever quantizes these weights again, per channel and symmetrically, finds the same codes and scales. Biases are
    rounded to bfloat16; not for fp16, which rounds no more than it says.
    """
    rounded = copy.deepcopy(graph)
    weights = float_weights(rounded)
    for name, chosen in weight_dtypes(weights, dtype, keep).items():
        values = quantized(weights[name].values, chosen, weights[name].channels)
        if chosen != "fp16" or _half_is_enough(weights[name].values, values):
            weights[name].fill(values.numpy())
    if dtype != "fp16":
        for bias in _biases(rounded, weights):
            bias.fill(bfloat16(bias.values).numpy())
    return rounded


def _half_is_enough(values: Tensor, halves: Tensor) -> bool:
    """Tell whether half precision holds a weight as well as its bits promise: not beyond 65,504, nor near 1e-7."""
    return bool((halves - values).abs().max() <= values.abs().max() / 2**10)


def _biases(graph: Any, weights: Container[str]) -> list[Weight]:
    """Return the float initializers that are added to what a layer makes of its weights."""
    products = {n.output[0] for n in graph.graph.node if n.op_type == "MatMul" and n.input[1] in weights}
    names: set[str] = set()
    for node in graph.graph.node:
        if node.op_type in _BIASES:
            names.update(node.input[_BIASES[node.op_type] :][:1])
        elif node.op_type == "Add" and products.intersection(node.input):
            names.update(node.input)
    return [Weight(item) for name, item in _floats(graph).items() if name in names]


def store_codes(graph: Any, dtype: str, keep: str = "none", only: Container[str] | None = None) -> None:
    """Turn a graph's float weights that are `on_grid` into codes, in place; with `only`, those of these names."""
    from onnx.helper import find_min_ir_version_for

    weights = {name: weight for name, weight in float_weights(graph).items() if only is None or name in only}
    decoding: list[Any] = []
    for name, chosen in weight_dtypes(weights, dtype, keep).items():
        decoding += _half(weights[name]) if chosen == "fp16" else _codes(graph, weights[name], chosen)
    nodes = [*decoding, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    for opset in graph.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = max(opset.version, OPSETS.get(dtype, 0))
    graph.ir_version = max(graph.ir_version, find_min_ir_version_for(graph.opset_import, ignore_unknown=True))


def _half(weight: Weight) -> list[Any]:
    """Store a weight whose values are halves as such, and return the node that gives them its name back."""
    from onnx import TensorProto, helper

    name, halves = weight.initializer.name, weight.values.half()
    if not torch.equal(halves.float(), weight.values):
        return []
    weight.fill(halves.numpy(), f"{name}_halves")
    return [helper.make_node("Cast", [f"{name}_halves"], [name], to=TensorProto.FLOAT)]


def _codes(graph: Any, weight: Weight, dtype: str) -> list[Any]:
    """Store a weight as codes and scales, and return the nodes that make of them what has its name."""
    from onnx import TensorProto, helper, numpy_helper

    name, (codes, scale) = weight.initializer.name, grid_codes(weight.values, dtype, weight.channels)
    kind = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, dtype.upper()))
    weight.fill(codes.numpy().astype(kind), f"{name}_codes")
    graph.graph.initializer.append(numpy_helper.from_array(scale.numpy(), f"{name}_scale"))
    return [
        helper.make_node("Cast", [f"{name}_codes"], [f"{name}_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}_float", f"{name}_scale"], [name]),
    ]


def _int8_dynamic(graph: Any) -> Any:
    """Let Linear layers and LSTMs compute in whole numbers; what other nodes need as well is stored once for all."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    used = [name for node in graph.graph.node for name in node.input]
    for node in graph.graph.node:
        if node.op_type == "LSTM" and all(used.count(name) == 1 for name in node.input[1:3]):
            _quantize_lstm(graph, node)
    store_codes(graph, "int8", only={name for n in graph.graph.node if n.op_type not in _LINEAR for name in n.input})
    if not float_weights(graph):
        return graph
    onnx.helper.set_model_props(graph, _INFERRED)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dynamic.onnx"
        options = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # behind an LSTM on int8 shapes are unknown
        quantize_dynamic(graph, path, op_types_to_quantize=["MatMul"], per_channel=True, extra_options=options)
        return onnx.load(path)


def _quantize_lstm(graph: Any, node: Any) -> None:
    """Put onnxruntime's LSTM on int8 there: its quantizer has a scale a direction, training one a row of weights."""
    from onnx import helper, numpy_helper

    known = float_weights(graph)
    weights = [known[name] for name in node.input[1:3] if name in known]
    if len(weights) < 2 or attributes(node).get("layout"):
        return
    node.input.extend([""] * (8 - len(node.input)))
    for weight in weights:
        codes, scale = grid_codes(weight.values, "int8", weight.channels)
        weight.fill(codes.transpose(1, 2).contiguous().numpy())
        name, scales = weight.initializer.name, scale.squeeze(2).numpy()
        for suffix, values in (("scale", scales), ("zero", np.zeros(scales.shape, np.int8))):
            node.input.append(f"{name}_{suffix}")
            graph.graph.initializer.append(numpy_helper.from_array(values, f"{name}_{suffix}"))
    node.op_type, node.domain = "DynamicQuantizeLSTM", "com.microsoft"
    for attribute in [attribute for attribute in node.attribute if attribute.name == "layout"]:
        node.attribute.remove(attribute)
    if not any(opset.domain == node.domain for opset in graph.opset_import):
        graph.opset_import.append(helper.make_opsetid(node.domain, 1))
