"""A model as two vectors: what is trained, which rounds average, compress, mask and noise, and its state.

Three kinds of tensors are told apart here and nowhere else. *Parameters* are trained: they may be sent with loss,
clipped, noised, masked. *State* is what training changes besides, running statistics and counters: it travels exactly
and is averaged as its kind asks. Everything else, frozen weights and constants, neither moves nor travels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from fedlab_kit.compression.prune import NORMS, prunable
from fedlab_kit.federation.fast_path import Stack
from fedlab_kit.models import Draws


class Layout:
    """How named tensors lie end to end in a vector [P]: `names`, `shapes` and `sizes` in their order, P is `size`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.names, self.shapes = tuple(tensors), tuple(tuple(tensor.shape) for tensor in tensors.values())
        self.sizes = [prod(shape) for shape in self.shapes]
        self.size = sum(self.sizes)

    def tensors(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the named tensors as views into `vector` [P]."""
        parts = zip(self.names, self.shapes, vector.split(self.sizes), strict=True)
        return {name: part.view(shape) for name, shape, part in parts}

    def marked(self, names: set[str]) -> Tensor:
        """Return which entries belong to the tensors of these names, bool [P]."""
        marks = [torch.full((size,), name in names) for name, size in zip(self.names, self.sizes, strict=True)]
        return torch.cat([torch.zeros(0, dtype=torch.bool), *marks])


class FlatModel:
    """A module whose trained parameters are views into `weights` [P], their gradients into `gradient` [P].

    Writing to `weights` changes the module and the other way round; nothing is copied. `state` reads and writes what
    else training changes, float64 [S], in which whole numbers are exact; `whole` [S] marks those, `variances` [S] what
    never falls below zero. `sample` [n, ...] is a preprocessed batch by which state is told from constants. Raises
    ValueError for a trained parameter that is not float32, for a model without any, and for one that remembers
    something which is not a tensor of its own.
    """

    def __init__(self, module: nn.Module, sample: Tensor, device: str = "cpu") -> None:
        self.module = module.to(device)
        shape = tuple(sample.shape[1:])
        self.stack = Stack(module, shape) if Stack.supports(module, shape) else None  # type: ignore[arg-type]
        parameters: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
        for name, tensor in parameters.items():
            if tensor.dtype != torch.float32:
                raise ValueError(f"model tensor {name} must be float32, got {tensor.dtype}")
        if not parameters:
            raise ValueError(f"model {type(module).__name__} must have a parameter to train, all are frozen")
        self.layout = Layout(parameters)
        self.weights = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
        self.gradient = torch.zeros_like(self.weights)
        gradients = self.layout.tensors(self.gradient)
        for name, view in self.layout.tensors(self.weights).items():
            parameters[name].data, parameters[name].grad = view, gradients[name]
        self._state = _state(module, sample.to(device))
        for name, tensor in self._state.items():
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise ValueError(f"model buffer {name} must be float32 or whole numbers, got {tensor.dtype}")
        self.state_layout = Layout(self._state)
        self.whole = self.state_layout.marked({n for n, t in self._state.items() if not t.is_floating_point()})
        self.variances = self.state_layout.marked({n for n in self._state if n.endswith("running_var")})
        self._constants = {n: (b, b.clone()) for n, b in module.named_buffers() if n not in self._state}

    @property
    def state(self) -> Tensor:
        """The state now, a copy, float64 [S]."""
        parts = [tensor.detach().cpu().double().reshape(-1) for tensor in self._state.values()]
        return torch.cat([torch.zeros(0, dtype=torch.float64), *parts])

    @state.setter
    def state(self, values: Tensor) -> None:
        for name, value in self.state_layout.tensors(values).items():
            self._state[name].copy_(value)

    def load(self, weights: Tensor, state: Tensor) -> None:
        """Make the module the one with `weights` [P] and `state` [S]."""
        self.weights.copy_(weights)
        self.state = state

    @torch.no_grad()
    def logits(self, chunks: Iterable[Tensor]) -> Tensor:
        """Return what the model answers to preprocessed inputs that come in chunks [k, *shape]: [n, classes]."""
        self.module.eval()
        return torch.cat([self.stack.logits(self.weights, x) if self.stack else self.module(x) for x in chunks])

    @cached_property
    def prunable(self) -> Tensor:
        """Which weights masks may remove, bool [P] on the model's device: those that a recipe prunes as well."""
        return self.layout.marked(set(prunable(self.module))).to(self.weights.device)

    @property
    def norms(self) -> set[str]:
        """The names of the trained parameters that belong to normalization layers."""
        owned = {id(p) for m in self.module.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
        return {name for name, p in self.module.named_parameters() if id(p) in owned and p.requires_grad}

    def check_constants(self) -> None:
        """Raise ValueError naming a buffer that training changed although it did not look like state."""
        for name, (now, before) in self._constants.items():
            if not torch.equal(now, before):
                raise ValueError(
                    f"model buffer {name} must change in every training step or never, it changed in some: it is "
                    "neither a constant nor state that could be averaged"
                )


def _state(module: nn.Module, sample: Tensor) -> dict[str, Tensor]:
    """Return the buffers that are state: running statistics, and what two steps of training on a copy change."""
    buffers, layers = dict(module.named_buffers()), dict(module.named_modules())
    if not buffers and all(type(layer).__module__.startswith("torch.nn.") for layer in layers.values()):
        return {}
    norms = [name for name, layer in layers.items() if isinstance(layer, nn.modules.batchnorm._NormBase)]
    tried, seen = deepcopy(module).train(), []
    for _ in range(2):  # what is filled once and then stays is a cache, and decides nothing
        with torch.no_grad(), Draws(0).inside():
            tried(sample if len(sample) > 1 else torch.cat([sample, sample]))
        seen.append(_attributes(tried))
    if changed := [name for name, value in seen[1].items() if seen[0].get(name, value) != value]:
        raise ValueError(f"model attribute {changed[0]} changes while training and would not travel: make it a buffer")
    after = dict(tried.named_buffers())
    return {n: b for n, b in buffers.items() if n.rpartition(".")[0] in norms or not torch.equal(b, after[n])}


def _attributes(module: nn.Module) -> dict[str, str | bytes]:
    """Return the plain values that layers hold in attributes of their own, and the bytes of tensors that they do."""
    found: dict[str, str | bytes] = {}
    for name, layer in module.named_modules():
        for key, value in vars(layer).items():
            parts = value if isinstance(value, list | tuple) else [value]
            if isinstance(value, Tensor):
                found[f"{name}.{key}".removeprefix(".")] = value.detach().cpu().numpy().tobytes()
            elif isinstance(value, str) or all(isinstance(one, int | float) for one in parts):
                found[f"{name}.{key}".removeprefix(".")] = repr(value)
    return found
