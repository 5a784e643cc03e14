"""Differential privacy for clients or for records, and its price in epsilon.

Client level (McMahan et al. 2018): each client clips its update before the codec; the server clips what it decodes
once more (a lossy codec can lengthen a vector), adds the noise to the sum and divides by a fixed number. Whoever sees
the model afterwards learns little about any client; the server itself sees the updates and is trusted. It takes
populations of 1,000 clients and more.

Record level (Abadi et al. 2016): each client clips and noises the gradients of its own samples, so that nobody else
need be trusted with them. It suits a few large sites.

Epsilon counts only if cohorts (or batches) are drawn by Poisson sampling. The noise is made of floating-point numbers,
which is right for teaching and not for a release (Mironov 2012).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn


def clip(update: Tensor, norm: float) -> Tensor:
    """The update [P], shortened to the L2 length `norm` if it is longer."""
    return update * min(1.0, norm / max(float(update.norm()), 1e-12))


def poisson_sample(population: int, rate: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Which of a population are drawn, each on its own with chance `rate`: between none and all of them."""
    return np.flatnonzero(rng.random(population) < rate)


def noisy_mean(
    updates: Sequence[Tensor],
    norm: float,
    noise_multiplier: float,
    expected: float,
    rng: np.random.Generator,
    size: int,
) -> Tensor:
    """The server's step for client-level privacy: sum of the clipped updates plus noise, over `expected`.

    The noise has the standard deviation `noise_multiplier` * `norm` in each of the `size` entries. The divisor is the
    expected cohort, rate * clients, whoever came: the true number is private, and so are weights by samples.
    """
    total = gaussian(size, noise_multiplier * norm, rng)
    for update in updates:
        total += clip(update, norm)
    return total / expected


def private_gradient(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: float,
    noise_multiplier: float,
    expected: float,
    rng: np.random.Generator,
) -> Tensor:
    """The gradient of DP-SGD [T], parameters in the module's order: clipped sample by sample, noised, over `expected`.

    `x` [n, ...] and `y` [n] are a Poisson batch, n = 0 included; `expected` is the mean batch size. A layer that mixes
    the samples of a batch, such as BatchNorm, raises ValueError. One sample at a time is slow and simple; nothing of
    `torch.func` is used because its first call imports the compiler, which takes seconds.
    """
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules()):
        raise ValueError("record-level privacy needs a model without BatchNorm, which mixes samples: use GroupNorm")
    parameters = [p for p in module.parameters() if p.requires_grad]
    total = gaussian(sum(p.numel() for p in parameters), noise_multiplier * norm, rng)
    for sample, label in zip(x.split(1), y.split(1), strict=True):
        slopes = torch.autograd.grad(F.cross_entropy(module(sample), label), parameters)
        total += clip(torch.cat([slope.reshape(-1) for slope in slopes]), norm)
    return total / expected


def gaussian(size: int, deviation: float, rng: np.random.Generator) -> Tensor:
    """Independent normal noise [size]."""
    return torch.from_numpy(rng.standard_normal(size, np.float32)) * deviation


def epsilon(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """What `steps` noisy sums cost when each client (or record) is in each with chance `rate`, by opacus's accountant.

    The smaller, the more private; infinite without noise. `delta` should be well below 1 / population.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate must be above 0 and at most 1, got {rate}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be above 0 and below 1, got {delta}")
    if noise_multiplier <= 0 or not steps:
        return 0.0 if not steps else float("inf")
    from opacus.accountants.analysis import rdp

    orders = [1 + x / 10 for x in range(1, 100)] + [float(2**k) for k in range(4, 13)]
    spent = rdp.compute_rdp(q=rate, noise_multiplier=noise_multiplier, steps=steps, orders=orders)
    return float(rdp.get_privacy_spent(orders=orders, rdp=spent, delta=delta)[0])
