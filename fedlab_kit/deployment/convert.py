"""A float ONNX graph in another dtype, as onnxruntime runs it, and the calibration that static int8 needs.

fp16 halves the file and is computed in float32. int8 dynamic quantizes Linear weights and measures activations
as it runs; int8 static quantizes convolutions, Linear layers and residual additions, with ranges that the
clients measured: the Relu behind one becomes the lower end of its range and leaves the graph. int4 packs Linear
weights in blocks. Weight codes are those of `compression.quantize`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlab_kit.compression.quantize import BLOCK, DTYPES, applies
from fedlab_kit.deployment.export import clean
from fedlab_kit.deployment.measure import open_session

Ranges = dict[str, tuple[np.float32, np.float32]]

STATIC = ("Conv", "Gemm", "MatMul", "Add", "Relu")
# Outputs of Linear layers stay float: the logits keep their resolution, and one sample takes 0.3 instead of 0.39 of
# the float file's time on a channel-pruned resnet.
STATIC_OPTIONS = {"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]}
CALIBRATION = 256  # samples that calibrate an artifact, all clients together
_ROWS = 8  # samples run at once in calibration, always: another batch size could round a sum differently
_INFERRED = ("onnx.infer", "onnxruntime.quant")  # tells onnxruntime's quantizers that shapes are there already


def convert(graph: Any, dtype: str, ranges: Ranges | None = None) -> Any:
    """Return a float onnx.ModelProto in `dtype`; int8 is static where `ranges` are given, else dynamic.

    The given graph is not changed. Raises ValueError on an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "fp32":
        return clean(graph)
    inferred = _with_shapes(graph)
    if dtype == "fp16":
        converted = _fp16(inferred)
    elif dtype == "int4":
        converted = _int4(inferred)
    else:
        converted = _int8_dynamic(inferred) if ranges is None else _int8_static(inferred, ranges)
    return clean(_sorted(converted))


def client_ranges(graph: Any, samples: Tensor) -> Ranges:
    """What one client returns for calibration: the smallest and largest value of each activation on its raw samples.

    Extremes of single samples leave the client with this. Raises ValueError without samples.
    """
    return Calibrator(graph).ranges(samples)


def merge_ranges(clients: Iterable[Ranges]) -> Ranges:
    """What the server does with them: the minimum of the minima, the maximum of the maxima."""
    merged: Ranges = {}
    for ranges in clients:
        for name, (low, high) in ranges.items():
            known = merged.get(name, (low, high))
            merged[name] = (min(low, known[0]), max(high, known[1]))
    if not merged:
        raise ValueError("calibration needs at least one client's ranges, got none")
    return merged


def calibrate(graph: Any, clients: Sequence[Tensor]) -> Ranges:
    """Ranges merged over the clients, each on an equal share of raw samples; of thousands, some are asked."""
    calibrator = Calibrator(graph)
    asked = clients[:: max(1, len(clients) // CALIBRATION)]
    share = max(1, CALIBRATION // max(1, len(asked)))
    return merge_ranges(calibrator.ranges(samples[:share]) for samples in asked)


class Calibrator:
    """The float graph opened with every activation that gets quantized as an output."""

    def __init__(self, graph: Any) -> None:
        observed = _with_shapes(graph)
        constants = {item.name for item in observed.graph.initializer}
        nodes = [node for node in observed.graph.node if node.name in _static_nodes(observed)]
        names = dict.fromkeys(name for n in nodes for name in (*n.input, *n.output) if name not in constants)
        shapes = {value.name: value for value in observed.graph.value_info}
        observed.graph.output.extend(shapes[name] for name in names if name in shapes)
        self._session = open_session(observed.SerializeToString(), optimize=False)
        self._names = [output.name for output in self._session.get_outputs()]

    def ranges(self, samples: Tensor) -> Ranges:
        """The extremes on raw samples [n, ...]."""
        raw = samples.numpy()
        if len(raw) == 0:
            raise ValueError("calibration needs at least one sample, got none")
        rows = np.arange(-(-len(raw) // _ROWS) * _ROWS) % len(raw)  # filled up with repetitions, which change no range
        return merge_ranges(self._batch(raw[part]) for part in rows.reshape(-1, _ROWS))

    def _batch(self, raw: np.ndarray) -> Ranges:
        values = self._session.run(self._names, {"x": raw})
        return {name: (v.min(), v.max()) for name, v in zip(self._names, values, strict=True)}


def _sorted(graph: Any) -> Any:
    """Put every node after those it needs, as the format demands; the quantizers append as they go."""
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = ONNXModel(graph)
    model.topological_sort()
    return model.model


def _with_shapes(graph: Any) -> Any:
    import onnx

    inferred = onnx.shape_inference.infer_shapes(graph)
    onnx.helper.set_model_props(inferred, dict([_INFERRED]))
    return inferred


def _static_nodes(graph: Any) -> list[str]:
    """The nodes that static int8 quantizes: those of STATIC but additions of constants and weights without a grid."""
    shapes = {item.name: tuple(item.dims) for item in graph.graph.initializer}

    def quantizes(node: Any) -> bool:
        constants = [torch.empty(shapes[name], device="meta") for name in node.input[:2] if name in shapes]
        return all(node.op_type != "Add" and applies(constant, "int8") for constant in constants)

    return [node.name for node in graph.graph.node if node.op_type in STATIC and quantizes(node)]


def _fp16(graph: Any) -> Any:
    """Convert from the first layer on: raw values may not fit in half precision, so preprocessing stays float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    nodes = list(graph.graph.node)
    first = next((i for i, node in enumerate(nodes) if node.op_type in STATIC), len(nodes))
    entry = nodes[first - 1].output[0]
    shapes = {value.name: value for value in graph.graph.value_info}
    raw = graph.graph.input.pop()
    graph.graph.input.append(shapes.get(entry, raw))
    del graph.graph.node[:first]
    half = convert_float_to_float16(graph, keep_io_types=True)
    converted = list(half.graph.node)
    del half.graph.node[:], half.graph.input[:]
    half.graph.node.extend([*nodes[:first], *converted])
    half.graph.input.append(raw)
    return half


def _int8_dynamic(graph: Any) -> Any:
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode

    options: dict[str, Any] = {"op_types_to_quantize": ["MatMul"], "extra_options": {"MatMulConstBOnly": True}}
    mode: dict[str, Any] = {"mode": QuantizationMode.IntegerOps, "static": False, "tensors_range": None}
    return _int8(ONNXQuantizer, graph, nodes_to_quantize=[], **mode, **options)


def _int8_static(graph: Any, ranges: Ranges) -> Any:
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    known = {name: (np.array(low), np.array(high)) for name, (low, high) in ranges.items()}
    options: dict[str, Any] = {"op_types_to_quantize": list(STATIC), "extra_options": dict(STATIC_OPTIONS)}
    limits = TensorsData(CalibrationMethod.MinMax, known)
    return _int8(QDQQuantizer, graph, nodes_to_quantize=_static_nodes(graph), tensors_range=limits, **options)


def _int8(quantizer: Any, graph: Any, **options: Any) -> Any:
    """Quantize weights to signed codes, each output channel on a scale of its own, and activations to unsigned ones."""
    from onnxruntime.quantization import QuantType

    types = {"weight_qType": QuantType.QInt8, "activation_qType": QuantType.QUInt8}
    return quantizer(
        graph, per_channel=True, reduce_range=False, nodes_to_exclude=[], **types, **options
    ).quantize_model()


@contextmanager
def _logging_as_it_was() -> Iterator[None]:
    """Undo what an import does to everybody's logging: the int4 quantizer's turns on INFO for the whole process."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def _int4(graph: Any) -> Any:
    with _logging_as_it_was():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
        from onnxruntime.quantization.onnx_model import ONNXModel

    model = ONNXModel(graph)
    model.replace_gemm_with_matmul()  # the quantizer passes over Gemm, which is what every Linear becomes
    quantizer = MatMulNBitsQuantizer(model.model, bits=4, block_size=BLOCK, is_symmetric=True)
    quantizer.process()
    return quantizer.model.model
