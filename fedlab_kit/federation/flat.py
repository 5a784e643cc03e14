"""A model as one vector: what is averaged, corrected, masked and sent is always a flat float32 tensor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors in a flat vector: first the parameters, then the floating buffers.

    `trainable` is how many leading entries are parameters; the rest (running statistics) travel too but have
    no gradient.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    trainable: int

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Where each tensor lies in the vector."""
        ends = [0]
        for shape in self.shapes:
            ends.append(ends[-1] + prod(shape))
        return tuple(slice(start, end) for start, end in pairwise(ends))

    @property
    def size(self) -> int:
        """Length P of the vector."""
        return self.slices[-1].stop

    def tensors(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the named tensors as views into `vector` [P]."""
        parts = zip(self.names, self.shapes, self.slices, strict=True)
        return {name: vector[where].view(shape) for name, shape, where in parts}


class FlatModel:
    """A module whose parameters and floating buffers are views into `weights` [P], gradients into `gradient` [P].

    Writing to `weights` changes the module and the other way round; nothing is copied. Integer buffers stay in
    the module: counting batches is no business of an average. Raises ValueError for a parameter that is not float32.
    """

    def __init__(self, module: nn.Module, device: str = "cpu") -> None:
        self.module = module.to(device)
        parameters = dict(module.named_parameters())
        buffers = {name: b for name, b in module.named_buffers() if b.is_floating_point()}
        tensors = {**parameters, **buffers}
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                raise ValueError(f"model tensor {name} must be float32, got {tensor.dtype}")
        self.layout = Layout(
            names=tuple(tensors),
            shapes=tuple(tuple(t.shape) for t in tensors.values()),
            trainable=sum(p.numel() for p in parameters.values()),
        )
        self.weights = torch.cat([t.detach().reshape(-1) for t in tensors.values()])
        self.gradient = torch.zeros_like(self.weights)
        slopes = self.layout.tensors(self.gradient)
        for name, view in self.layout.tensors(self.weights).items():
            tensors[name].data = view
            if name in parameters and parameters[name].requires_grad:
                tensors[name].grad = slopes[name]
