"""A float ONNX graph in another dtype, as onnxruntime runs it.

fp16 halves the file and is computed in float32. int8 dynamic quantizes Linear weights and measures activations
as it runs; int8 static is in `deployment.static`. int4 packs Linear weights in blocks. Weight codes are those of
`compression.quantize`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedlab_kit.compression.quantize import BLOCK, DTYPES
from fedlab_kit.deployment.export import clean
from fedlab_kit.deployment.static import Ranges, quantize

STATIC = ("Conv", "Gemm", "MatMul", "Add", "Relu")
_INFERRED = ("onnx.infer", "onnxruntime.quant")  # tells onnxruntime's quantizers that shapes are there already


def convert(graph: Any, dtype: str, ranges: Ranges | None = None) -> Any:
    """Return a float onnx.ModelProto in `dtype`; int8 is static where `ranges` are given, else dynamic.

    The given graph is not changed. Raises ValueError on an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "fp32":
        return clean(graph)
    if dtype == "int8" and ranges is not None:
        return quantize(graph, ranges)
    inferred = _with_shapes(graph)
    if dtype == "fp16":
        converted = _fp16(inferred)
    elif dtype == "int4":
        converted = _int4(inferred)
    else:
        converted = _int8_dynamic(inferred)
    return clean(_sorted(converted))


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
