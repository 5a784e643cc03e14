"""A trained module as an ONNX graph: raw values in, logits out, the same bytes on every machine.

torch's exporter takes a second and more. It runs once for each computation, told by which functions of torch the model
calls, in which order, with which values; without the weights, so that no pass can see them. Every file then gets its
own, and what follows from weights alone (BatchNorm behind a convolution, say) is computed for that file.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from hashlib import sha256
from io import StringIO
from itertools import count, product
from string import ascii_letters
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedlab_kit.compression.channels import TURN, first_line
from fedlab_kit.data import Preprocess
from fedlab_kit.deployment.score import open_session
from fedlab_kit.deployment.subject import remedy

KEPT = 32  # graphs in the cache
CHECKED = 64  # samples on which torch and the exported graph must agree
AGREE = 0.9  # of them, for a graph made of this very model: where a model rounds, a last bit may turn an answer
_LAYERS = ("conv", "conv_transpose", "gemm")  # into which a BatchNorm behind them is folded
_skeletons: dict[tuple[Any, ...], Any] = {}
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_WINDOWS = dict.fromkeys(("Conv", "ConvTranspose", "MaxPool", "AveragePool"), ("strides", "dilations", "pads"))
_TALKERS = ("torch.onnx", "torch.export", "torch.fx", "torch._guards", "torch._dynamo", "onnx_ir", "onnxscript")
_VALUES = (type(None), bool, int, float, complex, str, slice, type(...))
_PLAIN = (*_VALUES, torch.dtype, torch.device, torch.layout, torch.memory_format)


class Deployed(nn.Module):
    """A model with its preprocessing in front: raw values as a site stores them -> logits [n, classes]."""

    raw: Any

    def __init__(self, model: nn.Module, preprocess: Preprocess, axes: int) -> None:
        super().__init__()
        self.model, self.raw = model, nn.Module()
        for name, values in zip(("mean", "std"), preprocess.constants(axes), strict=True):
            self.raw.register_buffer(name, values)

    def forward(self, x: Tensor) -> Tensor:
        """Raw [n, ...] of any dtype -> logits [n, classes]."""
        return self.model((x.to(torch.float32) - self.raw.mean) / self.raw.std)


class Trace(TorchFunctionMode):
    """Writes down every call of torch inside it: in `calls` function and arguments by value, in `sizes` the shapes."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.sizes: list[tuple[int, ...]] = [tuple(t.shape) for t in tensors.values()]
        self._known = {id(tensor): (name, tensor) for name, tensor in reversed(tensors.items())}  # tied: the first name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch and write it down."""
        told = self._tell(args), self._tell(kwargs)
        if func in _CONVOLUTIONS and len(args) == 7 and args[6] > 1 and args[1].shape[1] == 1:
            told = self._tell((*args[:6], f"depthwise {args[1].shape[0] // args[6]}")), told[1]  # whatever the width
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, *told, self._tell(found, f"call {len(self.calls)}")))
        return found

    def _tell(self, value: Any, result: str = "") -> Any:
        """Return a hashable that is equal only for what is the same; tensors of a `result` are known from now on."""
        if isinstance(value, Tensor):
            if result:
                self.sizes.append(tuple(value.shape))
                self._known.setdefault(id(value), (result, value))  # kept alive, or another could get its id
            elif id(value) not in self._known:
                values = value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
                self._known[id(value)] = f"{tuple(value.shape)} {sha256(values).hexdigest()}", value
            return self._known[id(value)][0], value.dtype
        if isinstance(value, tuple | list):
            return tuple(self._tell(one, result and f"{result}.{k}") for k, one in enumerate(value))
        if isinstance(value, dict):
            return tuple((key, self._tell(one, result and f"{result}.{key}")) for key, one in value.items())
        return repr(value) if isinstance(value, _PLAIN) else object()  # which is like no other


def export(model: nn.Module, preprocess: Preprocess, sample: Tensor) -> Any:
    """Export a model to an onnx.ModelProto with input "x" (raw, like `sample` [n, ...], n free) and output "logits".

    It is trusted only after onnxruntime has agreed with torch on `CHECKED` of the samples and on two made of their
    extreme values. Names are readable; `clean` shortens them. Raises ValueError for a model that cannot be exported.
    """
    deployed = Deployed(copy.deepcopy(model).cpu(), preprocess, sample.ndim).eval()
    probes = torch.cat([sample[:: -(-len(sample) // CHECKED)], sample.amin(0)[None], sample.amax(0)[None]])
    x = torch.zeros(2, *sample.shape[1:], dtype=sample.dtype)
    with TURN, torch.no_grad():
        expected = deployed(probes).numpy()
        tensors = {name: t for name, t in deployed.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        with Trace({"x": x, **tensors}) as trace:
            deployed(x)
        code = [type(module).forward for module in deployed.modules()]
        calls = (tuple(x.shape), x.dtype, *code, *trace.calls)
        keys = (*calls, *trace.sizes), calls  # the weights aside, the graph depends on these; the second fits any size
        for known in [_skeletons[key] for key in keys if key in _skeletons]:
            with suppress(Exception):  # tensors of other sizes may not fit, which passes and runtime say in many ways
                graph = _fill(known, tensors)
                if _agreement(graph, probes, expected) == 1:
                    return graph
        try:
            skeleton = _skeleton(deployed, tensors, x)
            graph = _fill(skeleton, tensors)
            if _agreement(graph, probes, expected) < AGREE:
                raise ValueError("its graph gives other outputs")
        except Exception as error:  # of exporter, passes or runtime, and of any type
            cause: BaseException = error
            while cause.__cause__:
                cause = cause.__cause__
            why = f"{first_line(cause)}{remedy(model)}"
            raise ValueError(f"model {type(model).__name__} cannot be exported to ONNX: {why}") from error
        _skeletons[keys[0]] = skeleton
        _skeletons.setdefault(keys[1], skeleton)
        while len(_skeletons) > KEPT:
            del _skeletons[next(iter(_skeletons))]
    return graph


def clean(graph: Any) -> Any:
    """Return a graph under the shortest names, without what differs between machines or serves nobody at run time.

    Names of nodes, value shapes and attributes that say what holds anyway go too. All tensors are stored as raw bytes,
    so that the size does not depend on their values.
    """
    import onnx_ir
    from onnx import defs

    cleaned = _finish(onnx_ir.from_proto(graph), short=True)
    version = {one.domain: one.version for one in cleaned.opset_import}[""]
    for node in (node for node in cleaned.graph.node if not node.domain):
        known, windows = defs.get_schema(node.op_type, version).attributes, _WINDOWS.get(node.op_type, ())
        for attribute in list(node.attribute):
            usual = {0 if attribute.name == "pads" else 1}
            by_default = attribute.name in windows and set(attribute.ints) <= usual
            if by_default or attribute == known[attribute.name].default_value:
                node.attribute.remove(attribute)
    return cleaned


def _skeleton(deployed: Deployed, tensors: dict[str, Tensor], x: Tensor) -> Any:
    """Export without weights: an onnx_ir.Model in which the initializers of these names have no value yet."""
    import onnx_ir
    from onnx_ir.passes.common import ShapeInferencePass
    from onnxscript import optimizer

    with quiet():
        model = _torch_export(deployed, x)
        for name in tensors.keys() & model.graph.initializers.keys():
            model.graph.initializers[name].const_value = None
        ShapeInferencePass(data_prop=True)(model)
        optimizer.optimize(model)
    _flatten(model.graph)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.shape = None  # it is that of this model's sizes
    for value, shape in ((model.graph.inputs[0], x.shape), (model.graph.outputs[0], deployed(x).shape)):
        value.shape = onnx_ir.Shape(["batch", *shape[1:]])
    return model


def _flatten(graph: Any) -> None:
    """Turn reshapes [batch, ...] -> [batch, features] into Flatten, which says the same for any number of features."""
    for node in graph:
        before, after = node.inputs[0] and node.inputs[0].shape, node.outputs[0].shape
        if node.op_type == "Reshape" and before and after and len(after) == 2 and before[0] == after[0]:
            node.op_type = "Flatten"
            node.attributes.clear()
            node.resize_inputs(1)


def _fill(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the skeleton's graph with these weights, and with what follows from weights alone worked out."""
    from onnx_ir import AttrInt64
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common

    model = skeleton.clone()
    stored = model.graph.initializers
    torch.onnx.ONNXProgram(model, None).apply_weights({name: t for name, t in tensors.items() if name in stored})
    for node in model.graph.all_nodes():
        group = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
        if group > 1 and node.inputs[1].const_value is not None and node.inputs[1].shape[1] == 1:  # depthwise
            per_channel = node.inputs[1].shape[0] // group
            node.attributes.add(AttrInt64("group", node.inputs[1].const_value.shape[0] // per_channel))
    for value in stored.values():
        value.shape = value.const_value.shape
    limits = dict.fromkeys(("input_size_limit", "output_size_limit"), 1 << 62)

    def fold(node: Any) -> bool | None:
        """Whether to compute a node of constants: no second, turned copy of weights that are used elsewhere too."""
        return False if node.op_type == "Transpose" and len(node.inputs[0].uses()) > 1 else None

    with quiet():
        optimizer.fold_constants(model, onnx_shape_inference=False, should_fold=fold, **limits)
        rewriter.rewrite(model, [getattr(common, f"fuse_batchnorm_into_{layer}_rule") for layer in _LAYERS])
    return _finish(model)


def _torch_export(deployed: Deployed, x: Tensor) -> Any:
    """Export, with a free batch, to an onnx_ir.Model. Raises whatever torch raises."""
    free, failures = ({0: torch.export.Dim("batch")},), []
    for strict in (False, True):  # the second reads bytecode, which takes longer and understands more
        try:
            program: Any = torch.export.export(deployed, (x,), dynamic_shapes=free, strict=strict)
            names: Any = {"input_names": ["x"], "output_names": ["logits"]}
            program = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False, **names)
            return program.model
        except Exception as error:
            failures.append(error)
    raise failures[0]


def _finish(model: Any, short: bool = False) -> Any:
    """Return an onnx_ir.Model as an onnx.ModelProto: cleaned, sorted, and with names that follow from it alone."""
    import onnx_ir
    from onnx_ir.passes import common

    common.ClearMetadataAndDocStringPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.TopologicalSortPass()(model)
    model.producer_name = model.producer_version = model.domain = model.model_version = None
    model.graph.name = "model"
    for value in model.graph.initializers.values():
        value.const_value = onnx_ir.Tensor(value.const_value.numpy(), dtype=value.const_value.dtype)
    _rename(model.graph, short)
    proto = onnx_ir.to_proto(model)
    del proto.graph.value_info[:], proto.metadata_props[:]
    for value in (*proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]
    return proto


def _rename(graph: Any, short: bool) -> None:
    """Name nodes and values by number, and constants that are no tensors of the model; or all values by letters."""
    letters = ("".join(name) for length in count(1) for name in product(ascii_letters, repeat=length))
    free = (name for name in letters if name != "x")
    constants = (f"constant_{number}" for number in count())
    graphs, names = [graph, *graph.subgraphs()], {}
    for value in [v for one in graphs for v in (*one.initializers.values(), *(one.inputs if one is not graph else ()))]:
        names[value] = value.name if "." in value.name else next(constants)
    for number, node in enumerate(graph.all_nodes()):
        node.name = "" if short else f"{node.op_type}_{number}"
        names |= {value: f"{node.op_type}_{number}_{position}" for position, value in enumerate(node.outputs)}
    chosen = {v: next(free) if short else name for v, name in names.items() if v.name and v not in graph.outputs}
    for number, value in enumerate(chosen):
        value.name = f"_{number}"  # which is no name of either kind
    for value, name in chosen.items():
        value.name = name


@contextmanager
def quiet() -> Iterator[None]:
    """Keep exporter, optimizer and quantizers from printing (errors are raised), and the process's logging as it is."""
    root, talkers = logging.getLogger(), [logging.getLogger(name) for name in _TALKERS]
    handlers, levels = root.handlers[:], {logger: logger.level for logger in (root, *talkers)}
    for logger in talkers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers[:] = handlers
        for logger, level in levels.items():
            logger.setLevel(level)


def _agreement(graph: Any, raw: Tensor, expected: np.ndarray) -> float:
    """Return the share of raw samples for which onnxruntime gives torch's logits."""
    found = open_session(graph.SerializeToString()).run(None, {"x": raw.numpy()})[0]
    if found.shape != expected.shape:
        return 0.0
    scale = np.abs(expected).max(axis=1, initial=1.0, keepdims=True)
    return float(np.isclose(found / scale, expected / scale, rtol=0, atol=2e-4, equal_nan=True).all(axis=1).mean())
