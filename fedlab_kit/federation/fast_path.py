"""The fast path: several clients of a plain network of convolutions and linear layers, trained at once.

A small model keeps a processor busy with everything but arithmetic. Here the copies of a few clients are stacked
along a first axis, each layer is one batched matrix product for all of them, and the backward pass is written by
hand with the SGD step inside. The result is that of autograd and SGD on each client alone, up to rounding.

Letters: C clients, B samples in a batch, P weights. The batch is the last axis of every activation
([C, channels, height, width, B] or [C, features, B]), so that a layer is always `weight @ x` with the weight as
PyTorch stores it, flattening copies nothing, and a row of pixels is one contiguous run for the whole batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Saved = tuple[Any, ...]
LINE = 16  # float32 numbers in a cache line of 64 bytes
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
        if type(module) is not nn.Sequential:
            return False
        order = "(CR*(PR*)?)*F(LR*)*L" if len(shape) == 3 else "F?(LR*)*L" if len(shape) == 1 else "F(LR*)*L"
        parameters = list(module.parameters())
        return (
            re.fullmatch(order, "".join(map(_letter, module))) is not None
            and all(p.requires_grad and p.is_floating_point() for p in parameters)
            and len(parameters) == sum(len(list(layer.parameters())) for layer in module)
            and next(module.buffers(), None) is None
        )

    @torch.no_grad()
    def step(
        self, weights: Tensor, x: Tensor, gradient: Callable[[Tensor], Tensor], lr: float, at: Tensor | None = None
    ) -> None:
        """Take one SGD step of every client in place: `weights` [C, P] on the batches `x` [C, B, *shape].

        `gradient` maps logits [C, B, classes] to the gradient of the loss there; it divides by the batch size, and
        gives zero for a sample that is padding. `at` [C, P] are other weights to compute the gradient at, while the
        step is still applied to `weights` (the straight-through estimator, Bengio et al. 2013).
        """
        updated = self._parameters(weights)
        used = updated if at is None else self._parameters(at)
        x, saved = x.movedim(1, -1), []
        for layer, parameters in zip(self.layers, used, strict=True):
            x, kept = layer.forward(parameters, x)
            saved.append(kept)
        dy = gradient(x.transpose(1, 2).contiguous()).transpose(1, 2)
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


def _letter(layer: nn.Module) -> str:
    """Return the letter of a layer's kind, or "?" for a kind or an option that this file does not know."""
    known = True
    if type(layer) is nn.Conv2d:
        windows = (layer.stride, layer.padding, layer.dilation, layer.groups)
        known = windows == ((1, 1), (0, 0), (1, 1), 1) and _square(layer.kernel_size) > 0
    elif type(layer) is nn.MaxPool2d:
        side, dense = _square(layer.kernel_size), layer.padding in (0, (0, 0)) and layer.dilation in (1, (1, 1))
        options = layer.ceil_mode or layer.return_indices
        known = side in (2, 4) and _square(layer.stride) == side and dense and not options
    elif type(layer) is nn.Flatten:
        known = (layer.start_dim, layer.end_dim) == (1, -1)
    return _LETTERS.get(type(layer), "?") if known else "?"


def _square(size: int | tuple[int, ...]) -> int:
    """Return the side of a square kernel, 0 for any other."""
    sides = {size} if isinstance(size, int) else set(size)
    return sides.pop() if len(sides) == 1 else 0


def _layers(module: nn.Sequential, shape: tuple[int, ...]) -> Iterator[Linear | Conv]:
    """Build the layers, each with the pool and the ReLU that follow it; max and ReLU may change places."""
    size = shape[-2:]
    for found in re.finditer("[CL][PR]*", "".join(map(_letter, module))):
        first, *others = list(module)[found.start() : found.end()]
        relu = "R" in found.group()
        if isinstance(first, nn.Linear):
            yield Linear(first, relu)
        elif isinstance(first, nn.Conv2d):
            pool = next((_square(other.kernel_size) for other in others if isinstance(other, nn.MaxPool2d)), 1)
            conv = Conv(first, pool, relu, *size)
            size = (conv.rows, conv.cols)
            yield conv


class Linear:
    """Linear and an optional ReLU: x [C, ..., B], flattened to [C, in, B], to y [C, out, B]."""

    def __init__(self, module: nn.Linear, relu: bool) -> None:
        self.relu, self.shape = relu, module.weight.shape
        self.parameters, self.floats = len(list(module.parameters())), sum(module.weight.shape)

    def forward(self, parameters: list[Tensor], x: Tensor) -> tuple[Tensor, Saved]:
        """Return y, and what `backward` needs."""
        weight, x = parameters[0].view(-1, *self.shape), aligned(x.flatten(1, -2))
        y = empty_aligned(x, len(x), self.shape[0], x.size(2))
        if len(parameters) == 1:
            torch.bmm(weight, x, out=y)
        else:
            torch.baddbmm(parameters[1].unsqueeze(2), weight, x, out=y)
        return y.clamp_min_(0) if self.relu else y, (weight, x, y)

    def backward(self, saved: Saved, dy: Tensor, parameters: list[Tensor], lr: float, need_input: bool) -> Any:
        """Step `parameters` in place and return the gradient of x, or None if nobody needs it."""
        weight, x, y = saved
        if self.relu:
            dy = _where_positive(dy, y)
        dy, dx = aligned(dy), None
        if need_input:  # before the step changes the weight
            dx = torch.bmm(weight.transpose(1, 2), dy, out=empty_aligned(x, *x.shape))
        parameters[0].view(-1, *self.shape).baddbmm_(dy, x.transpose(1, 2), alpha=-lr)
        for bias in parameters[1:]:
            bias.sub_(dy.sum(2), alpha=lr)
        return dx


class Conv:
    """Conv2d, an optional max pool and an optional ReLU: x [C, in, H, W, B] to y [C, out, rows, cols, B].

    One output pixel of a p x p pool over a k x k kernel sees a patch k + p - 1 wide, so the patches are gathered
    once per pooled pixel instead of p * p times. The product with the kernel at each of its p * p offsets in the
    patch (`spread`, zero elsewhere) gives the p * p values as separate blocks, and the pool is their maximum. Side
    lengths are rounded up to `tiles` * p.
    """

    def __init__(self, module: nn.Conv2d, pool: int, relu: bool, height: int, width: int) -> None:
        self.out, self.inputs, self.kernel, _ = module.weight.shape
        self.pool, self.relu, self.parameters = pool, relu, len(list(module.parameters()))
        self.height, self.width = height, width
        self.rows, self.cols = (height - self.kernel + 1) // pool, (width - self.kernel + 1) // pool
        self.tiles = -(-(self.kernel + pool - 1) // pool)
        self.side = self.tiles * pool
        self.floats = self.rows * self.cols * (self.inputs * self.side**2 + self.out * pool**2)

    def forward(self, parameters: list[Tensor], x: Tensor) -> tuple[Tensor, Saved]:
        """Return y, and what `backward` needs."""
        offsets, clients = self.pool**2, x.size(0)
        spread = empty_aligned(x, clients, offsets * self.out, self.inputs * self.side**2).zero_()
        kernel = parameters[0].view(clients, 1, 1, self.out, self.inputs, self.kernel, self.kernel)
        self._kernels(spread).copy_(kernel)
        patches = aligned(self._windows(self._phases(x)).reshape(clients, spread.size(2), -1))
        blocks = empty_aligned(x, clients, spread.size(1), patches.size(2))
        levels = [torch.bmm(spread, patches, out=blocks).view(clients, offsets, -1)]
        while levels[-1].size(1) > 1:
            pairs = levels[-1].unflatten(1, (-1, 2))
            levels.append(torch.maximum(pairs[:, :, 0], pairs[:, :, 1]))
        y = levels[-1].view(clients, self.out, -1)
        for bias in parameters[1:]:  # it and ReLU keep the order of values: after the pool there are fewer
            y.add_(bias.unsqueeze(2))
        if self.relu:
            y.clamp_min_(0)
        return y.view(clients, self.out, self.rows, self.cols, -1), (spread, patches, levels, y)

    def backward(self, saved: Saved, dy: Tensor, parameters: list[Tensor], lr: float, need_input: bool) -> Any:
        """Step `parameters` in place and return the gradient of x, or None if nobody needs it."""
        spread, patches, levels, y = saved
        dy = dy.reshape(y.shape)
        if self.relu:
            dy = _where_positive(dy, y)
        for bias in parameters[1:]:
            bias.sub_(dy.sum(2), alpha=lr)
        dy = aligned(_unpool(dy.view(levels[-1].shape), levels).view(len(y), -1, y.size(2)))
        dkernels = self._kernels(torch.bmm(dy, patches.transpose(1, 2), out=empty_aligned(spread, *spread.shape)))
        parameters[0].sub_(dkernels.reshape(len(y), self.pool**2, -1).sum(1), alpha=lr)
        return self._fold(torch.bmm(spread.transpose(1, 2), dy, out=patches)) if need_input else None

    def _kernels(self, spread: Tensor) -> Tensor:
        """View spread kernels as [C, p, p, out, in, k, k]: the block of each offset, moved by that offset."""
        s, p, k, block = self.side, self.pool, self.kernel, self.out * self.inputs * self.side**2
        size = (len(spread), p, p, self.out, self.inputs, k, k)
        stride = (spread.stride(0), p * block + s, block + 1, self.inputs * s * s, s * s, s, 1)
        return spread.as_strided(size, stride)

    def _phases(self, x: Tensor) -> Tensor:
        """Copy x to [C, in, p, p, H/p, W/p, B], every p-th row and column together: windows become long runs."""
        p, height, width = self.pool, *self._used()
        x = _fit(x, height, width).unflatten(3, (-1, p)).unflatten(2, (-1, p))
        return x.permute(0, 1, 3, 5, 2, 4, 6).contiguous()

    def _windows(self, phases: Tensor) -> Tensor:
        """View phases as overlapping patches [C, in, tiles, p, tiles, p, rows, cols, B]."""
        windows = phases.unfold(4, self.tiles, 1).unfold(5, self.tiles, 1)
        return windows.permute(0, 1, 7, 2, 8, 3, 4, 5, 6)

    def _fold(self, dpatches: Tensor) -> Tensor:
        """Add the gradients of all patches up to that of x, the reverse of gathering them."""
        p, t, height, width = self.pool, self.tiles, *self._used()
        d = dpatches.view(len(dpatches), self.inputs, t, p, t, p, self.rows, self.cols, -1)
        dphases = d.new_zeros(len(d), self.inputs, p, p, height // p, width // p, d.size(-1))
        for into, row in zip(self._windows(dphases).unbind(2), d.unbind(2), strict=True):
            for window, part in zip(into.unbind(3), row.unbind(3), strict=True):  # no overlap within one tile
                window.add_(part)
        dx = dphases.permute(0, 1, 4, 2, 5, 3, 6).reshape(len(d), self.inputs, height, width, -1)
        return _fit(dx, self.height, self.width)

    def _used(self) -> tuple[int, int]:
        """Return how many rows and columns of x the patches cover (short of x by a remainder, or beyond it)."""
        return (self.rows + self.tiles - 1) * self.pool, (self.cols + self.tiles - 1) * self.pool


def empty_aligned(like: Tensor, *shape: int) -> Tensor:
    """Return an empty tensor [C, ...] each of whose rows begins at a cache line.

    On some processors a matrix product rounds by where its numbers lie, so that a client's weights would depend on
    how many others are trained with it.
    """
    size = prod(shape[1:])
    return like.new_empty(shape[0], -(-size // LINE) * LINE)[:, :size].view(shape)


def aligned(x: Tensor) -> Tensor:
    """Return x [C, a, b], copied to where each matrix begins at a cache line unless it is so laid out already."""
    if x.stride(0) % LINE == 0 and (x[0].is_contiguous() or x[0].t().is_contiguous()):
        return x
    return empty_aligned(x, *x.shape).copy_(x)


def _unpool(dy: Tensor, levels: list[Tensor]) -> Tensor:
    """Turn the gradient of the last level into that of the first; levels are overwritten, each by its gradient.

    A level holds the larger of each pair in the level before. Of two equal values the first gets the gradient.
    """
    for level in reversed(levels[:-1]):
        first, second = level.unflatten(1, (-1, 2)).unbind(2)
        _where_positive(dy, second.sub_(first), out=second)
        torch.sub(dy, second, out=first)
        dy = level
    return dy


def _where_positive(dy: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Return dy where y > 0, else 0, in one pass: the gradient of ReLU."""
    if out is None:
        return torch.ops.aten.threshold_backward(dy, y, 0)
    return torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=out)


def _fit(x: Tensor, height: int, width: int) -> Tensor:
    """Crop x [C, channels, H, W, B] at the bottom and the right, or pad it with zeros there."""
    missing = (0, 0, 0, width - x.size(3), 0, height - x.size(2))
    return F.pad(x, missing) if any(missing) else x
