"""Clients of unequal strength: what a device can hold, how long a round takes it, and the slice that it trains.

A device that cannot hold the whole model trains its narrow corner, the first units of every hidden layer (HeteroFL,
Diao, Ding and Tarokh 2021; without their rescaling of activations). Seconds are worked out from operations, from the
lengths of what was sent and from the device's figures; nothing here is timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, exp

import torch
from torch import Tensor

from fedlab_kit.federation.task import Task, chance
from fedlab_kit.models import flops
from fedlab_kit.wire.ledger import LINKS, Link

WIDTHS = (1.0, 0.5, 0.25, 0.125)
"""The shares of each hidden layer's units that a slice may have."""


@dataclass(frozen=True)
class Device:
    """A client's machine: `flops` per second while training, `memory` in bytes for weights and gradients, its `link`.

    `load` is how unsteady it is: the standard deviation of the logarithm of its computing time.
    """

    name: str
    flops: float
    memory: float
    link: Link
    load: float


DEVICES: tuple[Device, ...] = (
    Device("workstation", 20e9, 8e9, LINKS["hospital fibre"], 0.1),
    Device("office PC", 5e9, 2e9, LINKS["hospital fibre"], 0.3),
    Device("tablet", 1e9, 256e6, LINKS["4G"], 0.5),
    Device("bedside monitor", 20e6, 64e3, LINKS["rural ADSL"], 0.5),
)
"""Orders of magnitude, dealt out in turn: client 0 has the first. The last is a microcontroller with 64 KB to spare."""


def device(client: int) -> Device:
    """Return the client's device."""
    return DEVICES[client % len(DEVICES)]


def width(job: Task, client: int) -> float:
    """Return the share of each hidden layer's units that the client trains: 1 unless devices are sliced.

    The widest of `WIDTHS` whose weights and gradients fit its memory, as float32; the narrowest if none does.
    """
    if job.experiment.devices != "sliced":
        return 1.0
    fitting = (w for w in WIDTHS if 8 * int(_slice(job, w).sum()) <= device(client).memory)
    return next(fitting, WIDTHS[-1])


def view(job: Task, client: int) -> Tensor | None:
    """Return which weights the client trains, bool [P], or None for all of them."""
    share = width(job, client)
    return None if share == 1 else _slice(job, share)


def seconds(job: Task, round: int, client: int, down: int, up: int) -> float:
    """How long the client takes from the first byte of the broadcast to the last of its payload; 0 for equal devices.

    `down` and `up` are their lengths in bytes. Other work on the machine makes it differ from round to round.
    """
    experiment, machine = job.experiment, device(client)
    if experiment.devices == "equal":
        return 0.0
    mask = view(job, client)
    share = 1.0 if mask is None else float(mask.sum()) / len(mask)
    work = 3 * _flops(job) * share * job.samples(client) * experiment.local_epochs  # backward costs two forwards
    busy = exp(machine.load * chance(experiment, "load", round, client).standard_normal())
    return busy * work / machine.flops + machine.link.seconds(up, down)


def lateness(job: Task, round: int, client: int, down: int, up: int) -> str:
    """Say that a payload came after the deadline, or return ""."""
    limit = job.experiment.deadline
    if job.experiment.devices == "equal" or limit == 0:
        return ""
    took = seconds(job, round, client, down, up)
    return f"late: {took:.2f} s, the deadline is {limit:g} s" if took > limit else ""


def slice_of(shapes: tuple[tuple[int, ...], ...], share: float) -> Tensor:
    """Return which entries of a flat chain of layers a narrow model has, bool [P].

    `shapes` alternate between weights [out, in, ...] and biases [out]. Of each layer the first `share` of the units
    stay (rounded up), with what they read of the units before them; inputs and class outputs stay whole.
    """
    last = max(number for number, shape in enumerate(shapes) if len(shape) > 1)
    parts, rows, before = [], torch.ones(0, dtype=torch.bool), torch.ones(shapes[0][1], dtype=torch.bool)
    for number, shape in enumerate(shapes):
        if len(shape) == 1:
            parts.append(rows)
            continue
        rows = torch.arange(shape[0]) < (shape[0] if number == last else ceil(share * shape[0]))
        columns = before.repeat_interleave(shape[1] // len(before))  # a flattened channel is a run of columns
        block = rows[:, None] & columns
        parts.append(block.reshape(*block.shape, *(1,) * (len(shape) - 2)).expand(shape).reshape(-1))
        before = rows
    return torch.cat(parts)


def _slice(job: Task, share: float) -> Tensor:
    if job.model.stack is None:
        raise ValueError(
            "devices must be equal or unequal for a model that is not a plain chain of Flatten, Linear, ReLU, Conv2d "
            f"and MaxPool2d, as {job.experiment.model!r}, got 'sliced'"
        )
    return _cached_slice(job.model.layout.shapes, share).to(job.experiment.device)


_cached_slice = lru_cache(maxsize=64)(slice_of)


@lru_cache(maxsize=16)
def _flops(job: Task) -> int:
    """Return the operations of one sample's forward pass through the whole model."""
    return flops(job.model.module, job.inputs(torch.zeros(1, dtype=torch.int64, device=job.x.device)))
