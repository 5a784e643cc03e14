"""A trained module as an ONNX graph: raw values in, logits out, the same bytes on every machine.

torch's exporter takes about a second. It runs once per architecture; after that the weights of the cached graph are
swapped, those of a channel-pruned copy too where nothing but the tensors' sizes changed. Which initializer belongs to
which tensor is found by exporting a copy of the model filled with random numbers: every tensor is then its own
fingerprint, whatever the exporter's passes renamed or reshaped. Every graph is checked against torch before use.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedlab_kit.data import Preprocess
from fedlab_kit.deployment.measure import open_session

KEPT = 32  # graphs in the cache
_skeletons: dict[tuple[Any, ...], Skeleton] = {}
_SIZES = re.compile(r"(?<![\d.e-])\d+(?![\d.e])")  # whole numbers in a layer's description: channels, strides


class Skeleton(NamedTuple):
    """An exported graph whose weights are still missing, and which tensor each initializer is to carry."""

    graph: Any
    sources: dict[str, str]


class Deployed(nn.Module):
    """A model with its preprocessing in front: raw values as a site stores them -> logits [n, classes]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, preprocess: Preprocess, axes: int) -> None:
        super().__init__()
        self.model = model
        for name, values in zip(("mean", "std"), preprocess.constants(axes), strict=True):
            self.register_buffer(name, values)

    def forward(self, x: Tensor) -> Tensor:
        """Raw [n, ...] of any dtype -> logits [n, classes]."""
        return self.model((x.to(torch.float32) - self.mean) / self.std)


def export(model: nn.Module, preprocess: Preprocess, sample: Tensor) -> Any:
    """Export a model to an onnx.ModelProto with input "x" (raw, like `sample` [n, ...]) and output "logits".

    The batch size is free. The result is trusted only after onnxruntime has agreed with torch on `sample`.
    Raises ValueError for a model that cannot be exported.
    """
    deployed = Deployed(copy.deepcopy(model).cpu(), preprocess, sample.ndim).eval()
    with torch.no_grad():
        expected = deployed(sample).numpy()
    for key in (_structure(deployed, sample, sizes=True), _structure(deployed, sample, sizes=False)):
        if key in _skeletons:
            graph = _fill(_skeletons[key], deployed)
            if _agrees(graph, sample, expected):
                return graph
    skeleton = _skeleton(deployed, sample)
    graph = _fill(skeleton, deployed)
    if _agrees(graph, sample, expected):
        _remember(skeleton, deployed, sample)
        return graph
    # the exporter computed with the weights (folded them): this model pays for an export each time
    graph = clean(_torch_export(deployed, sample))
    if not _agrees(graph, sample, expected):
        raise ValueError(f"model {type(model).__name__} cannot be exported: its ONNX graph gives other outputs")
    return graph


def clean(graph: Any) -> Any:
    """Strip what differs between machines or serves nobody at run time: producer, paths, notes, value shapes.

    All tensors are stored as raw bytes, so that the file's size does not depend on their values.
    """
    from onnx import numpy_helper

    graph.producer_name = graph.producer_version = graph.domain = graph.doc_string = ""
    graph.model_version = 0
    graph.graph.name, graph.graph.doc_string = "model", ""
    parts = (graph.graph.node, graph.graph.initializer, graph.graph.input, graph.graph.output)
    for part in (graph, graph.graph, *(item for items in parts for item in items)):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.graph.value_info[:]
    for initializer in graph.graph.initializer:
        initializer.ClearField("data_location")  # set to its default by whatever has been in a file
        if not initializer.HasField("raw_data"):
            initializer.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(initializer), initializer.name))
    return graph


def _structure(deployed: Deployed, sample: Tensor, sizes: bool) -> tuple[Any, ...]:
    """What the graph depends on apart from the weights; without `sizes`, apart from the tensors' sizes too."""
    modules = tuple(
        (name, type(module), module.extra_repr() if sizes else _SIZES.sub("", module.extra_repr()))
        for name, module in deployed.named_modules()
    )
    tensors = tuple((name, tuple(t.shape) if sizes else t.ndim) for name, t in deployed.state_dict().items())
    return modules, tensors, tuple(sample.shape[1:]), sample.dtype


def _remember(skeleton: Skeleton, deployed: Deployed, sample: Tensor) -> None:
    for sizes in (True, False):
        _skeletons.setdefault(_structure(deployed, sample, sizes), skeleton)
    while len(_skeletons) > KEPT:
        del _skeletons[next(iter(_skeletons))]


def _skeleton(deployed: Deployed, sample: Tensor) -> Skeleton:
    """Export with random numbers for weights and find out which initializer copies which tensor."""
    from onnx import numpy_helper

    marked = copy.deepcopy(deployed)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: t for name, t in marked.state_dict().items() if t.is_floating_point()}
    for tensor in tensors.values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    graph = clean(_torch_export(marked, sample))
    names = {tensor.numpy().tobytes(): name for name, tensor in tensors.items()}
    sources = {}
    for initializer in graph.graph.initializer:
        source = names.get(numpy_helper.to_array(initializer).tobytes())
        if source is not None:
            sources[initializer.name] = source
    _flatten(graph.graph)
    renamed = _rename(graph.graph, sources)
    return Skeleton(graph, {renamed[name]: source for name, source in sources.items()})


def _flatten(graph: Any) -> None:
    """Turn reshapes to [-1, features] into Flatten, which says the same for any number of features."""
    from onnx import helper, numpy_helper

    constants = {item.name: item for item in graph.initializer}
    for node in graph.node:
        target = constants.get(node.input[1]) if node.op_type == "Reshape" else None
        if target is not None and list(target.dims) == [2] and numpy_helper.to_array(target)[0] == -1:
            node.CopyFrom(helper.make_node("Flatten", node.input[:1], node.output, axis=1))
    used = {name for node in graph.node for name in node.input}
    for name in constants.keys() - used:
        graph.initializer.remove(constants[name])


def _rename(graph: Any, sources: dict[str, str]) -> dict[str, str]:
    """Give nodes, values and initializers names that follow from the graph alone; return old name -> new name."""
    renamed: dict[str, str] = {value.name: value.name for value in (*graph.input, *graph.output)}
    for number, initializer in enumerate(graph.initializer):
        source = sources.get(initializer.name, f"constant_{number}").removeprefix("model.")
        renamed[initializer.name] = source if source not in renamed.values() else f"{source}_{number}"
        initializer.name = renamed[initializer.name]
    for number, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{number}"
        for position, name in enumerate(node.output):
            renamed.setdefault(name, f"{node.name}_{position}" if name else "")
        node.input[:] = [renamed[name] if name else "" for name in node.input]
        node.output[:] = [renamed[name] for name in node.output]
    return renamed


def _fill(skeleton: Skeleton, deployed: Deployed) -> Any:
    """Return a copy of the skeleton's graph that carries the weights of `deployed`."""
    graph = type(skeleton.graph)()
    graph.CopyFrom(skeleton.graph)
    tensors = deployed.state_dict()
    for initializer in graph.graph.initializer:
        if initializer.name in skeleton.sources:
            tensor = tensors[skeleton.sources[initializer.name]].contiguous()
            initializer.raw_data = tensor.numpy().tobytes()
            if len(initializer.dims) == tensor.ndim:
                initializer.dims[:] = tensor.shape
    return graph


def _torch_export(deployed: Deployed, sample: Tensor) -> Any:
    """Call torch's exporter quietly. Raises ValueError with its first line of complaint."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # it warns that torchvision is missing, which nobody asked for
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                deployed,
                (torch.zeros(2, *sample.shape[1:], dtype=sample.dtype),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["x"],
                output_names=["logits"],
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        cause = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        name = type(deployed.model).__name__
        raise ValueError(f"model {name} cannot be exported to ONNX: {cause[0]}") from error
    finally:
        registration.setLevel(level)
    return program.model_proto  # type: ignore[union-attr]


def _agrees(graph: Any, sample: Tensor, expected: np.ndarray) -> bool:
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, RuntimeException

    try:
        found = open_session(graph.SerializeToString()).run(None, {"x": sample.numpy()})[0]
    except (Fail, InvalidArgument, InvalidGraph, RuntimeException):
        return False  # tensors of other sizes may not fit the cached graph
    tolerance = 1e-4 * max(1.0, float(np.abs(expected).max()))
    return found.shape == expected.shape and np.allclose(found, expected, rtol=1e-4, atol=tolerance)
