"""The layers of the fast path, for several clients at once: forwards, and backwards with the SGD step inside.

Letters: C clients, B samples in a batch, N pixels times B. The batch is the last axis of every activation
([C, channels, height, width, B] or [C, features, B]), so that a layer is always `weight @ x` with the weight as
PyTorch stores it, flattening copies nothing, and a row of pixels is one contiguous run for the whole batch.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Saved = tuple[Any, ...]
LINE = 16  # float32 numbers in a cache line of 64 bytes


class Linear:
    """Linear and an optional ReLU: x [C, ..., B], flattened to [C, in, B], to y [C, out, B]."""

    def __init__(self, module: nn.Linear, relu: bool) -> None:
        self.relu, self.shape = relu, module.weight.shape
        self.parameters, self.floats = len(list(module.parameters())), sum(module.weight.shape)

    def forward(self, parameters: list[Tensor], x: Tensor) -> tuple[Tensor, Saved]:
        """Return y, and what `backward` needs."""
        weight, x = parameters[0].view(-1, *self.shape), on_lines(x.flatten(1, -2))
        y = room(x, len(x), self.shape[0], x.size(2))
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
        dy, dx = on_lines(dy), None
        if need_input:  # before the step changes the weight
            dx = torch.bmm(weight.transpose(1, 2), dy, out=room(x, *x.shape))
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
        spread = room(x, clients, offsets * self.out, self.inputs * self.side**2).zero_()
        kernel = parameters[0].view(clients, 1, 1, self.out, self.inputs, self.kernel, self.kernel)
        self._kernels(spread).copy_(kernel)
        patches = on_lines(self._windows(self._phases(x)).reshape(clients, spread.size(2), -1))
        blocks = room(x, clients, spread.size(1), patches.size(2))
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
        dy = on_lines(_unpool(dy.view(levels[-1].shape), levels).view(len(y), -1, y.size(2)))
        dkernels = self._kernels(torch.bmm(dy, patches.transpose(1, 2), out=room(spread, *spread.shape)))
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


def room(like: Tensor, *shape: int) -> Tensor:
    """Return an empty tensor [C, ...] each of whose rows begins at a cache line.

    On some processors a matrix product rounds by where its numbers lie, so that a client's weights would depend on
    how many others are trained with it.
    """
    size = prod(shape[1:])
    return like.new_empty(shape[0], -(-size // LINE) * LINE)[:, :size].view(shape)


def on_lines(x: Tensor) -> Tensor:
    """Return x [C, a, b], copied to where each matrix begins at a cache line unless it is so laid out already."""
    if x.stride(0) % LINE == 0 and (x[0].is_contiguous() or x[0].t().is_contiguous()):
        return x
    return room(x, *x.shape).copy_(x)


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
