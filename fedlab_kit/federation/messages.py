"""What a broadcast and a payload consist of, and how client and server pack and open them.

Both sides know the Experiment, so the frames follow each other in an agreed order and describe nothing. A broadcast
starts with one byte that says which optional parts follow. Everything that is sent is counted by its length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedlab_kit.compression.prune import prunable_mask
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.devices import view
from fedlab_kit.federation.masking import exchanged, first_mask, grows
from fedlab_kit.federation.task import OUTCOMES, Task, chance
from fedlab_kit.wire import Bits, Codec, NotFinite, PayloadError, compensate, make, pack, unpack_all, unpack_first

ClientState = dict[str, Tensor]

WHOLE, MASK, TEACHER = 1, 2, 4  # bits of a broadcast's first byte: the model itself, a new mask, the teacher


class Broadcast(NamedTuple):
    """What a client knows after it has opened a broadcast: all [P], None where the experiment has no such thing."""

    weights: Tensor
    control: Tensor | None
    mask: Tensor | None


class Answer(NamedTuple):
    """What the server reads from a payload: samples, the update [P], SCAFFOLD's change, the gradient to grow by."""

    samples: int
    update: Tensor
    control: Tensor | None
    growth: Tensor | None


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
    frames = []
    if tell_mask and parts.mask is not None:
        frames.append(pack(Bits(), parts.mask.float().cpu(), samples=0, rng=rng, zstd=zstd))
    codec = fp32 if whole else _downlink(job)
    known = torch.zeros_like(parts.weights) if whole else job.initial if copy is None else copy
    vector = _compact((parts.weights - known).cpu(), seen(job, client, parts.mask))
    frames.append(pack(codec, vector, samples=0, rng=rng, zstd=zstd))
    if parts.control is not None:
        frames.append(pack(fp32, parts.control.cpu(), samples=0, rng=rng, zstd=zstd))
    if tell_teacher and experiment.teacher is not None:
        frames.append(pack(fp32, OUTCOMES[experiment.teacher].cpu(), samples=0, rng=rng, zstd=zstd))
    contents = WHOLE * whole | MASK * tell_mask | TEACHER * tell_teacher
    return bytes([contents]) + b"".join(frames)


def open_broadcast(job: Task, client: int, message: bytes, memory: ClientState) -> Broadcast:
    """Open what `pack_broadcast` made; `memory` is what the client kept. Raises PayloadError when it is damaged."""
    experiment, size, device = job.experiment, job.model.layout.size, job.experiment.device
    if not message:
        raise PayloadError("an empty broadcast")
    contents, rest, fp32 = message[0], message[1:], make("fp32")
    mask = seen(job, client, memory.get("mask", first_mask(job)))
    tail = [(fp32, size)] * (experiment.strategy == "scaffold")
    if contents & TEACHER and experiment.teacher is not None:
        tail.append((fp32, len(OUTCOMES[experiment.teacher])))
    if contents & MASK:
        bits, rest = unpack_first(rest, Bits(), size=size)
        mask = bits.bool()
    kept = size if mask is None else int(mask.sum())
    codec = fp32 if contents & WHOLE else _downlink(job)
    _, vectors = unpack_all(rest, [(codec, kept), *tail])
    weights = _spread(vectors[0], mask, size).to(device)
    if not contents & WHOLE:
        known = memory.get("copy", job.initial).to(device)
        weights = weights + (known if mask is None else known * mask.to(device))
    control = vectors[1].to(device) if experiment.strategy == "scaffold" else None
    return Broadcast(weights, control, None if mask is None else mask.to(device))


def keep(experiment: Experiment, got: Broadcast, memory: ClientState) -> ClientState:
    """Return `memory` with what the client must still hold when its next broadcast comes."""
    memory = dict(memory)
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
    vector, samples, zstd, codec = _compact(answer.update.cpu(), mask), answer.samples, experiment.zstd, uplink(job)
    if experiment.error_feedback and not codec.unbiased:  # what is right on average leaves nothing worth keeping
        residual = _compact(memory.get("residual", torch.zeros(job.model.layout.size)), mask)
        frame, left = compensate(vector, residual, codec, rng, samples=samples, zstd=zstd)
        memory["residual"] = _spread(left, mask, job.model.layout.size)
    else:
        frame = pack(codec, vector, samples=samples, rng=rng, zstd=zstd)
    frames = [frame]
    if answer.control is not None:
        frames.append(pack(make("fp32"), answer.control.cpu(), samples=samples, rng=rng, zstd=zstd))
    if answer.growth is not None and mask is not None:
        where, growing = _growth(job, round, mask)
        frames.append(pack(growing, answer.growth.cpu()[where], samples=samples, rng=rng, zstd=zstd))
    return b"".join(frames), memory


def open_payload(job: Task, round: int, payload: bytes, mask: Tensor | None) -> Answer:
    """Open what `pack_payload` made. Raises PayloadError with the reason why it is refused."""
    size, scaffold = job.model.layout.size, job.experiment.strategy == "scaffold"
    if not payload:
        raise PayloadError("an empty payload: its training diverged")
    schema = [(uplink(job), size if mask is None else int(mask.sum()))] + [(make("fp32"), size)] * scaffold
    where = None
    if mask is not None and grows(job.experiment, round):
        where, growing = _growth(job, round, mask)
        schema.append((growing, int(where.sum())))
    samples, vectors = unpack_all(payload, schema)
    if not samples:
        raise PayloadError("an update made of no samples")
    device = job.experiment.device
    return Answer(
        samples=samples,
        update=_spread(vectors[0], mask, size).to(device),
        control=vectors[1].to(device) if scaffold else None,
        growth=None if where is None else _spread(vectors[-1], where, size).to(device),
    )


def seen(job: Task, client: int, mask: Tensor | None) -> Tensor | None:
    """Return the client's view, bool [P]: its slice, or else the `mask` that all share; None is the whole model."""
    narrow = view(job, client)
    return mask if narrow is None else narrow


def uplink(job: Task) -> Codec:
    """Return the codec of the clients' updates."""
    e = job.experiment
    return make(e.uplink, keep=e.uplink_keep, bucket=e.bucket, rounding=e.rounding)


def _downlink(job: Task) -> Codec:
    e = job.experiment
    return make(e.downlink, keep=e.downlink_keep, bucket=e.bucket, rounding=e.rounding)


def _growth(job: Task, round: int, mask: Tensor) -> tuple[Tensor, Codec]:
    """Return which pruned entries [P] compete to grow, and the codec that sends as many gradients as will grow."""
    candidates = prunable_mask(job.model.layout.shapes)
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
