"""Differential privacy for clients or for records, its price in epsilon, and secure aggregation in miniature.

Client level (McMahan et al. 2018): each client clips its update before the codec; the server clips what it decodes
once more (a lossy codec can lengthen a vector), adds the noise to the sum and divides by a fixed number. Whoever sees
the model afterwards learns little about any client; the server itself sees the updates and is trusted. It takes
populations of 1,000 clients and more.

Record level (Abadi et al. 2016): each client clips and noises the gradients of its own samples, so that nobody else
need be trusted with them. It suits a few large sites.

Epsilon counts only if cohorts (or batches) are drawn by Poisson sampling. Noise and draws follow from the experiment's
seed, so whoever knows it can take them back, and the noise is made of floating-point numbers (Mironov 2012): that is
right for teaching and not for a release.

Secure aggregation (Bonawitz et al. 2017): the server learns the sum of the updates and none of them. Here without key
agreement and drop-outs, and the masks come from a generator that is not a cryptographic one.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlab_kit.data import load
from fedlab_kit.experiment import Experiment, Recipe

NOISED, DERIVED, TRUSTED = "clipped and noised", "made of noised values alone", "seen by the trusted server alone"
REFUSED, OUTSIDE = "refused", "outside epsilon"


class Leaving(NamedTuple):
    """A kind of number that leaves a client: what becomes of it at client and at record level, when, its own frame?"""

    name: str
    client: str
    record: str
    when: Callable[[Experiment, Recipe], bool] = lambda experiment, recipe: True
    frame: bool = False


LEAVES: tuple[Leaving, ...] = (
    Leaving("update", NOISED, NOISED, frame=True),
    Leaving("control change", REFUSED, DERIVED, lambda e, r: e.strategy == "scaffold", frame=True),
    Leaving(
        "gradient to grow by", REFUSED, REFUSED, lambda e, r: e.mask_ratio > 0 and e.mask_schedule == "dynamic", True
    ),
    Leaving("running statistics", REFUSED, REFUSED, lambda e, r: e.privacy == "off"),
    Leaving("sample counts", TRUSTED, OUTSIDE),  # in the header of every frame
    Leaving("shard sizes", OUTSIDE, OUTSIDE),
    Leaving("label counts", OUTSIDE, OUTSIDE),
    Leaving("payload lengths", OUTSIDE, DERIVED),
    Leaving("who answered", OUTSIDE, OUTSIDE),
    Leaving("validation hits and losses", OUTSIDE, OUTSIDE),
    Leaving("normalization constants", OUTSIDE, OUTSIDE),
    Leaving("sites' sums and squares", OUTSIDE, OUTSIDE, lambda e, r: bool(load(e.dataset).sites)),
    Leaving("calibration ranges", OUTSIDE, OUTSIDE, lambda e, r: _static(r)),
    Leaving("calibration histograms", OUTSIDE, OUTSIDE, lambda e, r: _static(r) and r.calibration != "minmax"),
    Leaving("local baselines", OUTSIDE, OUTSIDE, lambda e, r: e.partition == "site"),
    Leaving("public samples", REFUSED, OUTSIDE, lambda e, r: e.strategy == "feddf"),
    Leaving("the choice among runs", OUTSIDE, OUTSIDE),
    Leaving("the seed of noise and cohorts", OUTSIDE, OUTSIDE),
)
"""Every number that leaves a client, or is made of its samples where all can see it, under some settings."""


def _static(recipe: Recipe) -> bool:
    return (recipe.dtype, recipe.quantization) == ("int8", "static")


def outside(experiment: Experiment, recipe: Recipe | None = None) -> tuple[str, ...]:
    """Name what comes from the same samples and is not in epsilon; () where privacy is off, for nothing is in it."""
    level, r = experiment.privacy, recipe or Recipe()
    return tuple(one.name for one in LEAVES if getattr(one, level, "") == OUTSIDE and one.when(experiment, r))


@dataclass(frozen=True)
class Privacy:
    """What a run's privacy is worth: `level` off, client or record, `epsilon` at `delta`; `outside` as in `outside`.

    `why` says why epsilon is infinite, "" where it is not.
    """

    level: str
    epsilon: float
    delta: float
    why: str
    outside: tuple[str, ...]

    def __str__(self) -> str:
        worth = f"infinite ({self.why})" if self.why else f"{self.epsilon:.1f} at delta {self.delta:g}"
        return f"{self.level}-level epsilon {worth}; outside it: {', '.join(self.outside)}"


def clip(update: Tensor, norm: float) -> Tensor:
    """The update [P], shortened to the L2 length `norm` if it is longer."""
    return update * min(1.0, norm / max(float(update.norm()), 1e-12))


def poisson_sample(population: int, rate: float, rng: Generator) -> NDArray[np.int64]:
    """Which of a population are drawn, each on its own with chance `rate`: between none and all of them."""
    return np.flatnonzero(rng.random(population) < rate)


def noisy_mean(
    updates: Sequence[Tensor], norm: float, noise_multiplier: float, expected: float, rng: Generator, size: int
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
    module: nn.Module, x: Tensor, y: Tensor, norm: float, noise_multiplier: float, expected: float, rng: Generator
) -> Tensor:
    """The gradient of DP-SGD [T], parameters in the module's order: clipped sample by sample, noised, over `expected`.

    T counts what is trained: a frozen parameter has no place, a shared one has one, an unused one gets noise alone.
    `x` [n, ...] and `y` [n] are a Poisson batch, n = 0 included; `expected` is the mean batch size. A layer that mixes
    the samples of a batch, such as BatchNorm, raises ValueError; a gradient that is not finite counts as zero. One
    sample at a time is slow and simple; nothing of `torch.func` is used: its first call imports the compiler, which
    takes seconds.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"record-level privacy needs a model without BatchNorm, got layer {name!r}: use GroupNorm")
    parameters = [p for p in module.parameters() if p.requires_grad]
    total = gaussian(sum(p.numel() for p in parameters), noise_multiplier * norm, rng)
    for sample, label in zip(x.split(1), y.split(1), strict=True):
        loss = F.cross_entropy(module(sample), label)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).to(total.device)
        total += clip(flat if flat.isfinite().all() else torch.zeros_like(flat), norm)
    return total / expected


def gaussian(size: int, deviation: float, rng: Generator) -> Tensor:
    """Independent normal noise [size]."""
    return torch.from_numpy(rng.standard_normal(size, np.float32)) * deviation


Releases = tuple[float, float, int]
"""So many noisy sums of one kind: (noise multiplier, chance to be in one, how many)."""


def epsilon(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """What `steps` noisy sums cost when each client (or record) is in each with chance `rate`: see `spent`."""
    return spent([(noise_multiplier, rate, steps)], delta)


def spent(ledger: Sequence[Releases], delta: float) -> float:
    """Return the epsilon of all the releases together, by opacus's accountant: Rényi costs add up, converted once.

    The smaller, the more private; infinite without noise. `delta` should be well below 1 / population.
    """
    for _, rate, _ in ledger:
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, got {rate}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be above 0 and below 1, got {delta}")
    real = [(noise, rate, steps) for noise, rate, steps in ledger if steps]
    if not real or min(real)[0] <= 0:
        return float("inf") if real else 0.0
    from opacus.accountants.analysis import rdp

    costs = sum(steps * _renyi(noise, rate) for noise, rate, steps in real)
    return max(0.0, float(rdp.get_privacy_spent(orders=_ORDERS, rdp=costs, delta=delta)[0]))


_ORDERS = [1 + x / 10 for x in range(1, 100)] + [float(x) for x in (*range(11, 64), *(2**k for k in range(6, 13)))]


@lru_cache(maxsize=1024)
def _renyi(noise_multiplier: float, rate: float) -> NDArray[np.float64]:
    """The cost of one noisy sum at each order."""
    from opacus.accountants.analysis import rdp

    return np.array(rdp.compute_rdp(q=rate, noise_multiplier=noise_multiplier, steps=1, orders=_ORDERS))


Words = NDArray[np.uint32]


def to_grid(update: Tensor, step: float, rng: Generator) -> Words:
    """The update [P] as whole numbers of a `step` that all clients share, stochastically rounded, modulo 2**32."""
    scaled = update.double().numpy() / step
    return np.floor(scaled + rng.random(len(scaled))).astype(np.int64).astype(np.uint32)


def from_grid(total: Words, step: float) -> Tensor:
    """A sum of grid numbers as float32 [P]; right as long as the sum stays within 2**31 steps."""
    return torch.from_numpy(total.view(np.int32) * step).float()


def mask(words: Words, client: int, cohort: Sequence[int], round: int, secret: bytes) -> Words:
    """What `client` sends: its words plus a random word for each pair it is in, with opposite signs for the two.

    Modulo 2**32 the masked words are uniformly random, and in the sum over the whole cohort all masks cancel. `secret`
    stands for the keys that each pair would agree on; somebody who drops out leaves a sum that is noise. Each `round`
    has masks of its own: two messages under one mask tell their difference to anybody who subtracts them.
    """
    masked = words.copy()
    for other in cohort:
        if other != client:
            pair = f"{round},{min(client, other)},{max(client, other)}".encode()
            seed = int.from_bytes(hmac.digest(secret, pair, "sha256"), "little")
            noise = np.random.default_rng(seed).integers(2**32, size=len(words), dtype=np.uint32)
            masked = masked + noise if client < other else masked - noise
    return masked


class Compatible(NamedTuple):
    """Whether a payload can be summed under masks, and why."""

    works: bool
    why: str


_FLOATS = "masks cancel exactly in whole numbers only: a float mask large enough to hide rounds the update away"
_SCALES = "every client has scales of its own, and codes on different scales do not add up; agree on one grid"
_PLACES = "every client sends other positions, so slots do not match, and the positions tell what its data moved"
_RANDOM = "masked words are uniformly random: there is nothing left to compress"
_ONE_GRID = "whole numbers on one grid add up, masks and all; each takes room for the sum, so little is saved"

COMPATIBLE: dict[str, Compatible] = {
    "fp32": Compatible(False, _FLOATS),
    "fp16": Compatible(False, "as fp32, and sooner"),
    **dict.fromkeys(("int8", "int4", "ternary", "sign"), Compatible(False, _SCALES)),
    **dict.fromkeys(("topk", "stc"), Compatible(False, _PLACES)),
    "zstd": Compatible(False, _RANDOM),
    "shared grid": Compatible(True, _ONE_GRID),
}
"""Codec or step -> whether it works together with secure aggregation."""
