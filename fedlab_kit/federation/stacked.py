"""Several clients trained at once: the fast path for plain networks of convolutions and linear layers.

A small model keeps a processor busy with everything but arithmetic. Here the copies of a few clients are stacked
along a first axis, each layer is one batched matrix product for all of them, and the backward pass is written by
hand with the SGD step inside (`layers`). The result is that of autograd and SGD on each client alone, up to rounding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fedlab_kit.federation.layers import Conv, Linear

_LETTERS: dict[type, str] = {nn.Conv2d: "C", nn.MaxPool2d: "P", nn.ReLU: "R", nn.Flatten: "F", nn.Linear: "L"}
_WORKING_SET = 2_500_000  # floats that one stack or one chunk may touch; a few megabytes of cache, by measurement
_USUAL_BATCH = 10


class Stack:
    """Several clients' copies of one `nn.Sequential`, trained with batched matrix products.

    `module` (which `supports` must have accepted) gives the architecture only; weights are always passed in, flat,
    in the order of `module.parameters()`. `shape` is that of one sample. `stack_size` is how many clients are
    best stacked at once: as many as the processor's cache holds.
    """

    def __init__(self, module: nn.Sequential, shape: tuple[int, ...]) -> None:
        self.layers = list(_layers(module, shape))
        self.sizes = [parameter.numel() for parameter in module.parameters()]
        per_sample = sum(layer.floats for layer in self.layers)
        self.stack_size = max(1, _WORKING_SET // (sum(self.sizes) + _USUAL_BATCH * per_sample))
        self._chunk = max(1, _WORKING_SET // per_sample)

    @staticmethod
    def supports(module: nn.Module, shape: tuple[int, ...]) -> bool:
        """Tell whether `module`, which takes samples of that shape, is made of what this file knows.

        That is an `nn.Sequential` of (Conv2d, MaxPool2d)*, Flatten, Linear*, with ReLU anywhere between the first
        layer and the last, which is a Linear. Convolutions are square, without stride, padding, groups or dilation;
        pools are square, 2 or 4 wide, and do not overlap. All parameters are trained, none is shared; no buffers.
        """
        if type(module) is not nn.Sequential or not all(_plain(layer) for layer in module):
            return False
        order = "(CR*(PR*)?)*F(LR*)*L" if len(shape) == 3 else "F?(LR*)*L" if len(shape) == 1 else "F(LR*)*L"
        parameters = list(module.parameters())
        return (
            re.fullmatch(order, _letters(module)) is not None
            and all(p.requires_grad and p.is_floating_point() for p in parameters)
            and len(parameters) == sum(len(list(layer.parameters())) for layer in module)
            and next(module.buffers(), None) is None
        )

    @torch.no_grad()
    def step(
        self,
        weights: Tensor,
        x: Tensor,
        seed: Callable[[Tensor], Tensor],
        lr: float,
        forward: Tensor | None = None,
    ) -> None:
        """Take one SGD step of every client in place: `weights` [C, P] on the batches `x` [C, B, *shape].

        `seed` maps logits [C, B, classes] to the gradient of the loss there; it divides by the batch size, and gives
        zero for a sample that is padding. `forward` [C, P] are other weights to compute the gradient at, while the
        step is still applied to `weights` (the straight-through estimator, Bengio et al. 2013).
        """
        updated = self._parameters(weights)
        used = updated if forward is None else self._parameters(forward)
        x, saved = x.movedim(1, -1), []
        for layer, parameters in zip(self.layers, used, strict=True):
            x, kept = layer.forward(parameters, x)
            saved.append(kept)
        dy = seed(x.transpose(1, 2).contiguous()).transpose(1, 2)
        for i in reversed(range(len(self.layers))):
            dy = self.layers[i].backward(saved.pop(), dy, updated[i], lr, need_input=i > 0)

    @torch.no_grad()
    def logits(self, weights: Tensor, x: Tensor) -> Tensor:
        """Return what one model with `weights` [P] answers to the samples `x` [n, *shape]: [n, classes]."""
        used, answers = self._parameters(weights.unsqueeze(0)), []
        for part in x.split(self._chunk):
            y = part.unsqueeze(0).movedim(1, -1)
            for layer, parameters in zip(self.layers, used, strict=True):
                y = layer.forward(parameters, y)[0]
            answers.append(y[0].t())
        return torch.cat(answers)

    def _parameters(self, weights: Tensor) -> list[list[Tensor]]:
        """Return each layer's parameters as flat views [C, size] into `weights` [C, P]."""
        views = iter(weights.split(self.sizes, dim=1))
        return [[next(views) for _ in range(layer.parameters)] for layer in self.layers]


def _letters(module: nn.Sequential) -> str:
    return "".join(_LETTERS.get(type(layer), "?") for layer in module)


def _square(size: int | tuple[int, ...]) -> int:
    """Return the side of a square kernel, 0 for any other."""
    sides = {size} if isinstance(size, int) else set(size)
    return sides.pop() if len(sides) == 1 else 0


def _plain(layer: nn.Module) -> bool:
    """Tell whether a layer of a kind that we know has no option that we do not."""
    if type(layer) is nn.Conv2d:
        windows = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return windows == ((1, 1), (0, 0), (1, 1), 1) and _square(layer.kernel_size) > 0
    if type(layer) is nn.MaxPool2d:
        side, dense = _square(layer.kernel_size), layer.padding in (0, (0, 0)) and layer.dilation in (1, (1, 1))
        options = layer.ceil_mode or layer.return_indices
        return side in (2, 4) and _square(layer.stride) == side and dense and not options
    if type(layer) is nn.Flatten:
        return (layer.start_dim, layer.end_dim) == (1, -1)
    return type(layer) in _LETTERS


def _layers(module: nn.Sequential, shape: tuple[int, ...]) -> Iterator[Linear | Conv]:
    """Build the layers, each with the pool and the ReLU that follow it; max and ReLU may change places."""
    size = shape[-2:]
    for found in re.finditer("[CL][PR]*", _letters(module)):
        first, *others = list(module)[found.start() : found.end()]
        relu = "R" in found.group()
        if isinstance(first, nn.Linear):
            yield Linear(first, relu)
        elif isinstance(first, nn.Conv2d):
            pool = next((_square(other.kernel_size) for other in others if isinstance(other, nn.MaxPool2d)), 1)
            conv = Conv(first, pool, relu, *size)
            size = (conv.rows, conv.cols)
            yield conv
