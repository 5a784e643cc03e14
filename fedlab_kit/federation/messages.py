"""What a broadcast and a payload consist of, and how client and server pack and open them.

Both sides know the Experiment, so the frames follow each other in an agreed order and describe nothing: one list of
parts for each kind of message serves both ends. A broadcast starts with one byte that says which optional parts
follow. Everything that is sent is counted by its length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedlab_kit.federation.devices import client_mask
from fedlab_kit.federation.masking import exchanged, first_mask, grows
from fedlab_kit.federation.setup import Task, rng_for
from fedlab_kit.wire import (
    Bits,
    Codec,
    Exact,
    NotFinite,
    PayloadError,
    compensate,
    make,
    pack,
    unpack_all,
    unpack_first,
)

ClientState = dict[str, Tensor]

WHOLE, MASK, TEACHER = 1, 2, 4  # bits of a broadcast's first byte: the model itself, a new mask, the teacher


class Broadcast(NamedTuple):
    """What a client knows after it has opened a broadcast: `state` [S], the others [P], None where there is no such."""

    weights: Tensor
    state: Tensor
    control: Tensor | None = None
    mask: Tensor | None = None


class ClientUpdate(NamedTuple):
    """What the server reads from a payload: samples, the update [P], the client's state [S] (None where it stays),
    SCAFFOLD's change and the gradient to grow by [P].
    """

    samples: int
    update: Tensor
    state: Tensor | None = None
    control: Tensor | None = None
    growth: Tensor | None = None


class Part(NamedTuple):
    """One frame of a message: its name, its codec, and which of its `size` entries travel (None: all of them)."""

    name: str
    codec: Codec
    size: int
    where: Tensor | None = None

    @property
    def length(self) -> int:
        """How many entries travel."""
        return self.size if self.where is None else int(self.where.sum())

    def chosen(self, vector: Tensor) -> Tensor:
        """Return what travels of a vector [size], on the CPU."""
        return vector.cpu() if self.where is None else vector.cpu()[self.where.cpu()]

    def spread(self, values: Tensor) -> Tensor:
        """Return the vector [size] of which `values` travelled, zero elsewhere."""
        if self.where is None:
            return values
        vector = torch.zeros(self.size)
        vector[self.where.cpu()] = values
        return vector


def payload_parts(task: Task, round: int, mask: Tensor | None) -> list[Part]:
    """Return what a client sends that trains the weights of `mask` [P]: all that leaves it, see `privacy.LEAVES`."""
    e = task.experiment
    parts = _parts(task, "update", _codec(task, e.uplink, e.uplink_keep), mask)
    if mask is not None and grows(e, round):
        # Pruned entries compete to grow, and as many gradients are sent as will grow.
        candidates = task.model.prunable.cpu()
        where, wanted = candidates & ~mask.cpu(), exchanged(e, round) * int((candidates & mask.cpu()).sum())
        keep = min(1.0, max(1.0, wanted) / max(1, int(where.sum())))
        parts.append(Part("growth", make("topk", keep=keep), len(where), where))
    return parts


def broadcast_parts(task: Task, contents: int, mask: Tensor | None) -> list[Part]:
    """Return what a broadcast of these contents holds behind the mask, which says what of the weights travels."""
    e, teacher = task.experiment, task.parents.teacher
    codec = make("fp32") if contents & WHOLE else _codec(task, e.downlink, e.downlink_keep)
    parts = _parts(task, "weights", codec, mask)
    if contents & TEACHER and teacher is not None:
        parts.append(Part("teacher", make("fp32"), teacher.layout.size))
        if teacher.state_layout.size:
            parts.append(Part("teacher's state", Exact(teacher.whole), teacher.state_layout.size))
    return parts


def _parts(task: Task, name: str, codec: Codec, mask: Tensor | None) -> list[Part]:
    """Return what goes both ways: weights or their update, the state exactly, and SCAFFOLD's control as fp32.

    Layers that clients keep to themselves (those outside `task.shared`) stay where they are, and so does their state.
    """
    size, state, own = task.model.layout.size, task.model.state_layout.size, task.shared
    parts = [Part(name, codec, size, mask if own is None else own if mask is None else mask.cpu() & own)]
    if state and own is None:
        parts.append(Part("state", Exact(task.model.whole), state))
    if task.experiment.strategy == "scaffold":
        parts.append(Part("control", make("fp32"), size, own))
    return parts


def _codec(task: Task, name: str, keep: float) -> Codec:
    return make(name, keep=keep, bucket=task.experiment.bucket, rounding=task.experiment.rounding)


def pack_broadcast(
    task: Task, round: int, client: int, news: Broadcast, copy: Tensor | None, tell_mask: bool, tell_teacher: bool
) -> bytes:
    """Return what one client is sent.

    Every downlink but fp32 sends the difference to `copy` [P], what this client holds already: what a lossy codec
    leaves out stays in the next difference, which is the server's own error feedback. A client that comes for the
    first time holds the weights that the seed gives, or, after a `start`, nothing: it is sent the whole model.
    """
    e, rng, teacher = task.experiment, rng_for(task.experiment, "broadcast", round, client), task.parents.teacher
    whole = e.downlink == "fp32" or (copy is None and e.start is not None)
    known = torch.zeros_like(news.weights) if whole else task.initial if copy is None else copy
    vectors = news._asdict() | {"weights": news.weights - known}
    if teacher is not None:
        vectors |= {"teacher": teacher.weights, "teacher's state": teacher.state}
    contents = WHOLE * whole | MASK * tell_mask | TEACHER * tell_teacher
    parts = broadcast_parts(task, contents, client_mask(task, client, news.mask))
    if tell_mask and news.mask is not None:
        parts.insert(0, Part("mask", Bits(), len(news.mask)))
        vectors["mask"] = news.mask.float()
    frames = [pack(p.codec, p.chosen(vectors[p.name]), samples=0, rng=rng, zstd=e.zstd) for p in parts]
    return bytes([contents]) + b"".join(frames)


def open_broadcast(task: Task, client: int, message: bytes, memory: ClientState) -> Broadcast:
    """Open what `pack_broadcast` made; `memory` is what the client kept. Raises PayloadError when it is damaged."""
    size, device = task.model.layout.size, task.experiment.device
    if not message:
        raise PayloadError("an empty broadcast")
    contents, rest = message[0], message[1:]
    mask = client_mask(task, client, memory["mask"] if "mask" in memory else first_mask(task))
    if contents & MASK:
        bits, rest = unpack_first(rest, Bits(), size=size)
        mask = bits.bool()
    _, got = _unpack(rest, broadcast_parts(task, contents, mask))
    weights, control = got["weights"].to(device), got.get("control")
    if not contents & WHOLE:
        known = memory.get("copy", task.initial).to(device)
        weights = weights + (known if mask is None else known * mask.to(device))
    if task.shared is not None:
        weights[~task.shared] = memory.get("own", task.initial[~task.shared]).to(device)
    return Broadcast(
        weights=weights,
        state=got.get("state", memory.get("state", task.initial_state)),
        control=None if control is None else control.to(device),
        mask=None if mask is None else mask.to(device),
    )


def remember(task: Task, got: Broadcast, memory: ClientState) -> ClientState:
    """Return `memory` with what the client must still hold when its next broadcast comes."""
    memory, experiment = dict(memory), task.experiment
    if experiment.downlink != "fp32":
        memory["copy"] = got.weights.cpu()
    if got.mask is not None and experiment.mask_schedule != "fixed" and experiment.devices != "sliced":
        memory["mask"] = got.mask.cpu()
    return memory


def pack_payload(
    task: Task, round: int, client: int, update: ClientUpdate, mask: Tensor | None, memory: ClientState
) -> tuple[bytes, ClientState]:
    """Return the payload and what the client keeps: `memory`, with its new residual if it has one.

    An empty payload says that training diverged and there is nothing to send. What is right on average leaves no
    residual worth keeping.
    """
    e, rng, after, frames = task.experiment, rng_for(task.experiment, "encode", round, client), dict(memory), []
    try:
        for part in payload_parts(task, round, mask):
            vector = part.chosen(getattr(update, part.name))
            if part.name == "update" and e.error_feedback and not part.codec.unbiased:
                owed = part.chosen(memory.get("residual", torch.zeros(part.size)))
                frame, left = compensate(vector, owed, part.codec, rng, samples=update.samples, zstd=e.zstd)
                after["residual"] = part.spread(left)
            else:
                frame = pack(part.codec, vector, samples=update.samples, rng=rng, zstd=e.zstd)
            frames.append(frame)
    except NotFinite:
        return b"", dict(memory)
    return b"".join(frames), after


def open_payload(task: Task, round: int, payload: bytes, mask: Tensor | None) -> ClientUpdate:
    """Open what `pack_payload` made of a client whose view is `mask`. Raises PayloadError saying why it is refused."""
    if not payload:
        raise PayloadError("an empty payload: its training diverged")
    samples, got = _unpack(payload, payload_parts(task, round, mask))
    if not samples:
        raise PayloadError("an update made of no samples")
    if "state" in got and bool((got["state"][task.model.variances] < 0).any()):
        raise PayloadError("a running variance below zero")
    device = task.experiment.device
    return ClientUpdate(samples, **{name: v if name == "state" else v.to(device) for name, v in got.items()})


def _unpack(message: bytes, parts: list[Part]) -> tuple[int, Mapping[str, Tensor]]:
    samples, vectors = unpack_all(message, [(part.codec, part.length) for part in parts])
    return samples, {part.name: part.spread(vector) for part, vector in zip(parts, vectors, strict=True)}
