"""Which layers lose channels together: torch-pruning's graph (Fang et al. 2023), and what it has to be told to see."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch_pruning import BasePruningFunc, DependencyGraph

from fedlab_kit.models import Draws

CONV, LAST_AXIS = nn.modules.conv._ConvNd, (nn.LayerNorm, nn.RMSNorm)


def dependencies(model: nn.Module, sample: Tensor) -> tuple[Any, nn.Module, dict[Any, str]]:
    """Return torch-pruning's graph of a copy, the layer its inputs [n, ...] come from, and its parts' names."""
    # the graph sees no inputs, and miscounts what is joined to them or joined and flattened: let layers stand there
    numbers = sample.is_floating_point() and sample.ndim > 1
    entry = nn.SyncBatchNorm(sample.shape[1], eps=0.0) if numbers else nn.Identity()
    whole = nn.ModuleDict({"entry": entry, "model": copy.deepcopy(model)}).requires_grad_(True).eval().to(sample.device)
    ends: list[Tensor] = []
    for layer in whole.modules():
        if not type(layer).__module__.startswith("torch.nn.modules."):
            for name, table in list(layer.named_buffers(recurse=False)):
                if table.is_floating_point() and table.ndim > 1:  # of positions: the graph sees it as a parameter
                    delattr(layer, name)
                    layer.register_parameter(name, nn.Parameter(table))
        if isinstance(layer, nn.RNNBase):
            layer.register_forward_hook(_as_one)
        if isinstance(layer, nn.Linear | CONV):
            layer.register_forward_hook(lambda layer, args, output: ends.append(output))
    own = dict.fromkeys((nn.LSTM, nn.GRU, nn.RNN), RecurrentPruner()) | dict.fromkeys(LAST_AXIS, LastAxisPruner())
    with torch.enable_grad(), Draws(0).inside():
        with _Joints() as joints:
            whole["model"](sample.clone())  # a network may write on its inputs
        layers = nn.ModuleList(nn.SyncBatchNorm(width) for width in joints.widths).eval().to(sample.device)
        whole["joints"] = layers

        def forward(whole: nn.ModuleDict, sample: Tensor) -> list[Tensor]:
            """The outputs, and what nobody reads."""
            ends.clear()
            with _Joints(iter(layers)):
                return [whole["model"](whole["entry"](sample).clone()), *ends]

        graph = DependencyGraph().build_dependency(whole, sample, forward, customized_pruners=own, verbose=False)
    parts = (*whole["model"].named_modules(), *whole["model"].named_parameters())
    return graph, entry, {part: name for name, part in parts}


class _Joints(TorchFunctionMode):
    """Notes the widths of what is joined channel by channel inside the block, and sends it through the next layer."""

    def __init__(self, layers: Iterator[nn.Module] | None = None) -> None:
        super().__init__()
        self.layers = layers
        self.widths: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func not in (torch.cat, torch.concat, torch.concatenate) or output.ndim not in (2, 4, 5):
            return output
        joined = args[0] if args else kwargs["tensors"]
        if joined[0].shape[1] == output.shape[1]:  # along another axis
            return output
        self.widths.append(output.shape[1])
        return next(self.layers)(output) if self.layers else output


class LastAxisPruner(BasePruningFunc):
    """LayerNorm, whose kept channels the library leaves in the order of a set, and RMSNorm, which it does not know."""

    def prune_out_channels(self, layer: nn.LayerNorm | nn.RMSNorm, idxs: Sequence[int]) -> nn.Module:
        """Remove the channels `idxs` of the last axis."""
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, without(parameter, idxs, -1))
        layer.normalized_shape = (*layer.normalized_shape[:-1], layer.normalized_shape[-1] - len(idxs))
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.LayerNorm | nn.RMSNorm) -> int:
        """Return the length of the last axis."""
        return layer.normalized_shape[-1]

    get_in_channels = get_out_channels


class RecurrentPruner(BasePruningFunc):
    """LSTM, which the library prunes to shapes that do not run, GRU and RNN: inputs, and hidden units of one way."""

    def prune_in_channels(self, layer: nn.RNNBase, idxs: Sequence[int]) -> nn.Module:
        """Remove the inputs `idxs`."""
        for name in [name for name, _ in layer.named_parameters() if name.startswith("weight_ih_l0")]:
            setattr(layer, name, without(layer.get_parameter(name), idxs, 1))
        layer.input_size -= len(idxs)
        return layer

    def prune_out_channels(self, layer: nn.RNNBase, idxs: Sequence[int]) -> nn.Module:
        """Remove the hidden units `idxs`, the same of every layer, from all gates."""
        for name, parameter in list(layer.named_parameters()):
            gates = range(0, len(parameter), layer.hidden_size)
            smaller = without(parameter, [gate + i for gate in gates for i in idxs], 0)
            reads_hidden = name.startswith("weight") and not name.startswith("weight_ih_l0")
            setattr(layer, name, without(smaller, idxs, 1) if reads_hidden else smaller)
        layer.hidden_size -= len(idxs)
        return layer

    def get_out_channels(self, layer: nn.RNNBase) -> int | None:
        """Return the hidden units, or None where the outputs are others than these."""
        return None if layer.bidirectional or layer.proj_size else layer.hidden_size

    def get_in_channels(self, layer: nn.RNNBase) -> int:
        """Return the number of inputs."""
        return layer.input_size


def _as_one(layer: nn.RNNBase, args: Any, outputs: Any) -> Any:
    """Let the graph see a recurrent layer as one operation, whose final state is its last output."""
    output, state = outputs
    if not isinstance(output, Tensor):
        return outputs
    output = output.detach() + 0 * (args[0].mean(-1, keepdim=True) + layer.get_parameter("weight_hh_l0").mean())
    final = state[0] if isinstance(state, tuple) else state
    hidden = output.select(-2 if layer.batch_first else 0, -1)[..., : final.shape[-1]].expand_as(final)
    return output, (hidden, hidden) if isinstance(state, tuple) else hidden


def squares(layer: nn.Module) -> Tensor:
    """Return each channel's sum of squared weights [width] for the layers that the library does not rate."""
    if isinstance(layer, nn.Embedding):
        return layer.weight.detach().square().sum(0)
    if isinstance(layer, nn.RNNBase):
        weights = [p.detach() for name, p in layer.named_parameters() if name.startswith("weight")]
        return torch.cat([w.view(-1, layer.hidden_size, w.shape[1]).square().sum(0) for w in weights], 1).sum(1)
    name = "out_proj.weight" if isinstance(layer, nn.MultiheadAttention) else "weight"
    return layer.get_parameter(name).detach().square().flatten(1).sum(1)


def parts_of(layer: Any) -> int:
    """Into how many parts, which lose equally many, a layer or an operation of the graph divides its channels."""
    if isinstance(layer, CONV):
        return 1 if layer.groups == layer.out_channels else layer.groups  # depthwise ones follow their inputs
    if sizes := getattr(layer, "split_sizes", None):
        return len(sizes)
    return getattr(layer, "num_groups", getattr(layer, "num_heads", 1))


def without(tensor: Tensor, gone: Sequence[int], axis: int) -> Tensor:
    """Return a parameter or a buffer without the entries `gone` along an axis."""
    kept = torch.ones(tensor.shape[axis], dtype=torch.bool, device=tensor.device)
    kept[list(gone)] = False
    left = tensor.detach().index_select(axis, kept.nonzero().flatten())
    return nn.Parameter(left) if isinstance(tensor, nn.Parameter) else left
