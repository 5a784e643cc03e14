"""Secure aggregation in miniature: masks that cancel in the sum, without key agreement and drop-outs.

The server learns the sum of the updates and none of them (Bonawitz et al. 2017). Here the masks come from a generator
that is not a cryptographic one: right for teaching, not for a release.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint32]


def to_grid(update: Tensor, step: float, rng: np.random.Generator) -> Words:
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


@dataclass(frozen=True)
class Compatible:
    """Whether a payload can be summed under masks, and why."""

    works: bool
    why: str


_SCALES = "every client has scales of its own, and codes on different scales do not add up; agree on one grid"
_PLACES = "every client sends other positions, so slots do not match, and the positions tell what its data moved"

COMPATIBLE: dict[str, Compatible] = {
    "fp32": Compatible(
        False, "masks cancel exactly in whole numbers only: a float mask large enough to hide rounds the update away"
    ),
    "fp16": Compatible(False, "as fp32, and sooner"),
    "int8": Compatible(False, _SCALES),
    "int4": Compatible(False, _SCALES),
    "ternary": Compatible(False, _SCALES),
    "sign": Compatible(False, _SCALES),
    "topk": Compatible(False, _PLACES),
    "stc": Compatible(False, _PLACES),
    "zstd": Compatible(False, "masked words are uniformly random: there is nothing left to compress"),
    "shared grid": Compatible(
        True, "whole numbers on one grid add up, masks and all; each takes room for the sum, so little is saved"
    ),
}
"""Codec or step -> whether it works together with secure aggregation."""
