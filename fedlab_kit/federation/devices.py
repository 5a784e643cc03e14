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

from fedlab_kit.federation.setup import Task, rng_for
from fedlab_kit.models import flops
from fedlab_kit.settings import FieldError
from fedlab_kit.wire.links import LINKS, Link

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


def width(task: Task, client: int) -> float:
    """Return the share of each hidden layer's units that the client trains: 1 unless devices are sliced.

    The widest of `WIDTHS` whose weights and gradients fit its memory, as float32; the narrowest if none does.
    """
    if task.experiment.devices != "sliced":
        return 1.0
    if task.model.stack is None:
        raise FieldError(
            "devices",
            "must be equal or unequal for a model that is not a plain chain of Flatten, Linear, ReLU, Conv2d "
            f"and MaxPool2d, as {task.experiment.model!r}, got 'sliced'",
        )
    shapes, memory = task.model.layout.shapes, device(client).memory
    return next((w for w in WIDTHS if 8 * int(slice_mask(shapes, w).sum()) <= memory), WIDTHS[-1])


def client_mask(task: Task, client: int, mask: Tensor | None) -> Tensor | None:
    """Return which weights the client trains, bool [P]: its slice, or else the `mask` that all share; None: all."""
    share = width(task, client)
    return mask if share == 1 else slice_mask(task.model.layout.shapes, share).to(task.experiment.device)


def seconds(task: Task, round: int, client: int, down: int, up: int) -> float:
    """How long the client takes from the first byte of the broadcast to the last of its payload; 0 for equal devices.

    `down` and `up` are their lengths in bytes. Other work on the machine makes it differ from round to round.
    """
    experiment, machine = task.experiment, device(client)
    if experiment.devices == "equal":
        return 0.0
    mask = client_mask(task, client, None)
    share = 1.0 if mask is None else float(mask.sum()) / len(mask)
    work = 3 * _flops(task) * share * task.samples(client) * experiment.local_epochs  # backward costs two forwards
    busy = exp(machine.load * rng_for(experiment, "load", round, client).standard_normal())
    return busy * work / machine.flops + machine.link.seconds(up, down)


def lateness(task: Task, round: int, client: int, down: int, up: int) -> str:
    """Say that a payload came after the deadline, or return ""."""
    limit = task.experiment.deadline
    if task.experiment.devices == "equal" or limit == 0:
        return ""
    took = seconds(task, round, client, down, up)
    return f"late: {took:.2f} s, the deadline is {limit:g} s" if took > limit else ""


@lru_cache(maxsize=64)
def slice_mask(shapes: tuple[tuple[int, ...], ...], share: float) -> Tensor:
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


@lru_cache(maxsize=16)
def _flops(task: Task) -> int:
    """Return the operations of one sample's forward pass through the whole model."""
    return flops(task.model.module, task.inputs(torch.zeros(1, dtype=torch.int64, device=task.x.device)))
