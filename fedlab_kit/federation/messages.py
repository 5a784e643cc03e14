"""What a broadcast and a payload consist of, and how client and server pack and open them.

Both sides know the Experiment, so the frames follow each other in an agreed order and describe nothing. A broadcast
starts with one byte that says which optional parts follow. Everything that is sent is counted by its length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedlab_kit.federation.devices import view
from fedlab_kit.federation.flat import variances
from fedlab_kit.federation.masking import exchanged, first_mask, grows
from fedlab_kit.federation.task import Task, chance
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


class Answer(NamedTuple):
    """What the server reads from a payload: samples, the update [P], the client's state [S] (None where it stays),
    SCAFFOLD's change and the gradient to grow by [P].
    """

    samples: int
    update: Tensor
    state: Tensor | None = None
    control: Tensor | None = None
    growth: Tensor | None = None


def pack_broadcast(
    job: Task, round: int, client: int, parts: Broadcast, copy: Tensor | None, tell_mask: bool, tell_teacher: bool
) -> bytes:
    """Return what one client is sent.

    Every downlink but fp32 sends the difference to `copy` [P], what this client holds already: what a lossy codec
    leaves out stays in the next difference, which is the server's own error feedback. A client that comes for the
    first time holds the weights that the seed gives, or, after a `start`, nothing: it is sent the whole model.
    """
    experiment, rng = job.experiment, chance(job.experiment, "broadcast", round, client)
    fp32, zstd = make("fp32"), experiment.zstd
    whole = experiment.downlink == "fp32" or (copy is None and experiment.start is not None)
    known = torch.zeros_like(parts.weights) if whole else job.initial if copy is None else copy
    vector = _compact((parts.weights - known).cpu(), travelling(job, seen(job, client, parts.mask)))
    frames: list[tuple[Codec, Tensor]] = [(fp32 if whole else _downlink(job), vector)]
    if tell_mask and parts.mask is not None:
        frames.insert(0, (Bits(), parts.mask.float().cpu()))
    if exact := _state_codec(job):
        frames.append((exact, parts.state))
    if parts.control is not None:
        frames.append((fp32, _compact(parts.control.cpu(), job.shared)))
    teacher = job.parents.teacher
    if tell_teacher and teacher is not None:
        frames.append((fp32, teacher.weights.cpu()))
        frames.extend([(Exact(teacher.whole), teacher.state)] * bool(teacher.state_layout.size))
    contents = WHOLE * whole | MASK * tell_mask | TEACHER * tell_teacher
    return bytes([contents]) + b"".join(pack(codec, x, samples=0, rng=rng, zstd=zstd) for codec, x in frames)


def open_broadcast(job: Task, client: int, message: bytes, memory: ClientState) -> Broadcast:
    """Open what `pack_broadcast` made; `memory` is what the client kept. Raises PayloadError when it is damaged."""
    experiment, size, device = job.experiment, job.model.layout.size, job.experiment.device
    if not message:
        raise PayloadError("an empty broadcast")
    contents, rest, fp32 = message[0], message[1:], make("fp32")
    mask = seen(job, client, memory.get("mask", first_mask(job)))
    if contents & MASK:
        bits, rest = unpack_first(rest, Bits(), size=size)
        mask = bits.bool()
    where = travelling(job, mask)
    schema = [(fp32 if contents & WHOLE else _downlink(job), _length(job, where))]
    if exact := _state_codec(job):
        schema.append((exact, job.model.state_layout.size))
    if experiment.strategy == "scaffold":
        schema.append((fp32, _length(job, job.shared)))
    teacher = job.parents.teacher
    if contents & TEACHER and teacher is not None:
        schema.append((fp32, teacher.layout.size))
        schema.extend([(Exact(teacher.whole), teacher.state_layout.size)] * bool(teacher.state_layout.size))
    _, vectors = unpack_all(rest, schema)
    weights = _spread(vectors[0], where, size).to(device)
    if not contents & WHOLE:
        known = memory.get("copy", job.initial).to(device)
        weights = weights + (known if mask is None else known * mask.to(device))
    state = vectors[1] if exact else memory.get("state", job.initial_state)
    if job.shared is not None:
        weights[~job.shared] = memory.get("own", job.initial[~job.shared]).to(device)
    control = (
        _spread(vectors[1 + bool(exact)], job.shared, size).to(device) if experiment.strategy == "scaffold" else None
    )
    return Broadcast(weights, state, control, None if mask is None else mask.to(device))


def keep(job: Task, got: Broadcast, memory: ClientState) -> ClientState:
    """Return `memory` with what the client must still hold when its next broadcast comes."""
    memory, experiment = dict(memory), job.experiment
    if experiment.downlink != "fp32":
        memory["copy"] = got.weights.cpu()
    if got.mask is not None and experiment.mask_schedule != "fixed" and experiment.devices != "sliced":
        memory["mask"] = got.mask.cpu()
    return memory


def pack_payload(
    job: Task, round: int, client: int, answer: Answer, mask: Tensor | None, memory: ClientState
) -> tuple[bytes, ClientState]:
    """Return the payload and the client's new residual, if it keeps one.

    An empty payload says that training diverged and there is nothing to send. Control variates travel as fp32.
    """
    try:
        return _pack_payload(job, round, client, answer, mask, dict(memory))
    except NotFinite:
        return b"", dict(memory)


def _pack_payload(
    job: Task, round: int, client: int, answer: Answer, mask: Tensor | None, memory: ClientState
) -> tuple[bytes, ClientState]:
    experiment, rng = job.experiment, chance(job.experiment, "encode", round, client)
    where, samples, zstd, codec = travelling(job, mask), answer.samples, experiment.zstd, uplink(job)
    vector = _compact(answer.update.cpu(), where)
    if experiment.error_feedback and not codec.unbiased:  # what is right on average leaves nothing worth keeping
        residual = _compact(memory.get("residual", torch.zeros(job.model.layout.size)), where)
        payload, left = compensate(vector, residual, codec, rng, samples=samples, zstd=zstd)
        memory["residual"] = _spread(left, where, job.model.layout.size)
    else:
        payload = pack(codec, vector, samples=samples, rng=rng, zstd=zstd)
    frames: list[tuple[Codec, Tensor]] = []
    if answer.state is not None and (exact := _state_codec(job)):
        frames.append((exact, answer.state))
    if answer.control is not None:
        frames.append((make("fp32"), _compact(answer.control.cpu(), job.shared)))
    if answer.growth is not None and mask is not None:
        candidates, growing = _growth(job, round, mask)
        frames.append((growing, answer.growth.cpu()[candidates]))
    return payload + b"".join(pack(c, x, samples=samples, rng=rng, zstd=zstd) for c, x in frames), memory


def open_payload(job: Task, round: int, payload: bytes, mask: Tensor | None) -> Answer:
    """Open what `pack_payload` made of a client whose view is `mask`. Raises PayloadError saying why it is refused."""
    size, device = job.model.layout.size, job.experiment.device
    if not payload:
        raise PayloadError("an empty payload: its training diverged")
    where = travelling(job, mask)
    schema = [(uplink(job), _length(job, where))]
    if exact := _state_codec(job):
        schema.append((exact, job.model.state_layout.size))
    if scaffold := job.experiment.strategy == "scaffold":
        schema.append((make("fp32"), _length(job, job.shared)))
    candidates = None
    if mask is not None and grows(job.experiment, round):
        candidates, growing = _growth(job, round, mask)
        schema.append((growing, int(candidates.sum())))
    samples, vectors = unpack_all(payload, schema)
    if not samples:
        raise PayloadError("an update made of no samples")
    state = vectors[1] if exact else None
    if state is not None and bool((state[variances(job.model.state_layout)] < 0).any()):
        raise PayloadError("a running variance below zero")
    return Answer(
        samples=samples,
        update=_spread(vectors[0], where, size).to(device),
        state=state,
        control=_spread(vectors[1 + bool(exact)], job.shared, size).to(device) if scaffold else None,
        growth=None if candidates is None else _spread(vectors[-1], candidates, size).to(device),
    )


def seen(job: Task, client: int, mask: Tensor | None) -> Tensor | None:
    """Return the client's view, bool [P]: its slice, or else the `mask` that all share; None is the whole model."""
    narrow = view(job, client)
    return mask if narrow is None else narrow


def travelling(job: Task, view: Tensor | None) -> Tensor | None:
    """Return which weights of a client's `view` [P] travel: all but those of the layers that it keeps to itself."""
    return view if job.shared is None else job.shared if view is None else view.cpu() & job.shared


def uplink(job: Task) -> Codec:
    """Return the codec of the clients' updates."""
    e = job.experiment
    return make(e.uplink, keep=e.uplink_keep, bucket=e.bucket, rounding=e.rounding)


def _downlink(job: Task) -> Codec:
    e = job.experiment
    return make(e.downlink, keep=e.downlink_keep, bucket=e.bucket, rounding=e.rounding)


def _state_codec(job: Task) -> Exact | None:
    """Return how a model's state travels; None where it has none or every client keeps its own."""
    stays = job.shared is not None or not job.model.state_layout.size
    return None if stays else Exact(job.model.whole)


def _length(job: Task, mask: Tensor | None) -> int:
    return job.model.layout.size if mask is None else int(mask.sum())


def _growth(job: Task, round: int, mask: Tensor) -> tuple[Tensor, Codec]:
    """Return which pruned entries [P] compete to grow, and the codec that sends as many gradients as will grow."""
    candidates = job.model.prunable.cpu()
    where = candidates & ~mask.cpu()
    wanted = exchanged(job.experiment, round) * int((candidates & mask.cpu()).sum())
    return where, make("topk", keep=min(1.0, max(1.0, wanted) / max(1, int(where.sum()))))


def _compact(vector: Tensor, mask: Tensor | None) -> Tensor:
    return vector if mask is None else vector[mask.cpu()]


def _spread(vector: Tensor, mask: Tensor | None, size: int) -> Tensor:
    if mask is None:
        return vector
    whole = torch.zeros(size)
    whole[mask.cpu()] = vector
    return whole
