"""What a client does in a round: open the broadcast, train on its own samples, pack its update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Event

import numpy as np
import torch
from torch import Tensor, nn

from fedlab_kit.compression.distill import distillation_gradient, hard_gradient
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation import messages, setup
from fedlab_kit.federation.devices import width
from fedlab_kit.federation.fast_path import empty_aligned
from fedlab_kit.federation.masking import dense_gradient, grows
from fedlab_kit.federation.messages import Broadcast, ClientState, ClientUpdate
from fedlab_kit.federation.setup import Task, rng_for
from fedlab_kit.models import Draws
from fedlab_kit.wire.privacy import clip, poisson_sample, private_gradient

States = Mapping[int, ClientState]


class Stopped(Exception):
    """Raised between two batches when somebody asked to stop; the round leaves no trace."""


_stop: ContextVar[Event | None] = ContextVar("stop", default=None)


@contextmanager
def stoppable(stop: Event | None) -> Iterator[None]:
    """Have every `pause` inside the block look at `stop`, which nobody hands down."""
    token = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(token)


def pause(seconds: float = 0.0) -> None:
    """Wait so long, or between two batches not at all; raise `Stopped` as soon as somebody asks the round to stop."""
    stop = _stop.get() or Event()
    if stop.wait(seconds) if seconds else stop.is_set():
        raise Stopped


def client_step(
    experiment: Experiment | Task, round: int, client_id: int, broadcast: bytes, client_state: ClientState
) -> tuple[bytes, ClientState]:
    """Train one client and return its payload and its new state.

    `broadcast` is what the server sent it, `client_state` what it kept from earlier rounds ({} at first). An experiment
    with a `start` or a `teacher` comes as a task, which has their models. Raises
    `PayloadError` when the broadcast is damaged.
    """
    payloads, states = cohort_step(experiment, round, {client_id: broadcast}, {client_id: client_state})
    return payloads[client_id], states[client_id]


def cohort_step(
    experiment: Experiment | Task, round: int, broadcasts: Mapping[int, bytes], states: States
) -> tuple[dict[int, bytes], dict[int, ClientState]]:
    """Do `client_step` for several clients at once; raises `Stopped` before the next batch if asked, see `pause`."""
    task = setup.task(experiment)
    ids = sorted(broadcasts, key=lambda client: (-task.samples(client), client))
    received, payloads, after = _open(task, broadcasts, states), {}, {}
    task.fill_soft(ids)
    stack = task.model.stack if task.experiment.privacy != "record" else None
    size = stack.stack_size if stack else 1
    for first in range(0, len(ids), size):
        cohort = _cohort(task, round, ids[first : first + size], received, states)
        cohort.train()
        for k, client in enumerate(cohort.ids):
            trained, got, growth = cohort.weights[k], received[client], None
            if got.mask is not None and grows(task.experiment, round):  # pruned weights grow back by their gradient
                growth = dense_gradient(task, trained, cohort.state[k], client, got.mask)
            change = trained.sub_(cohort.start[k])  # in place: these are the largest tensors of a round
            update = ClientUpdate(task.samples(client), change, cohort.state[k], growth=growth)
            update, memory = _finish(task, update, got, len(cohort.plans[k]), states[client])
            payloads[client], after[client] = messages.pack_payload(task, round, client, update, got.mask, memory)
    task.model.check_constants()
    return payloads, after


def _open(task: Task, broadcasts: Mapping[int, bytes], states: States) -> dict[int, Broadcast]:
    """Open the broadcasts; one that goes to several clients who hold no weights or mask is opened once."""
    opened: dict[object, Broadcast] = {}
    received = {}
    for client, message in broadcasts.items():
        held = states[client].keys() & {"copy", "mask", "own", "state"}
        alike = client if held else (message, width(task, client))
        if alike not in opened:
            opened[alike] = messages.open_broadcast(task, client, message, states[client])
        received[client] = opened[alike]
    return received


def _finish(
    task: Task, update: ClientUpdate, got: Broadcast, steps: int, state: ClientState
) -> tuple[ClientUpdate, ClientState]:
    """Return what the client has to say of what it learned, and what it keeps until it is next asked."""
    e, memory, change, control = task.experiment, messages.remember(task, got, state), update.update, None
    if task.shared is not None and update.state is not None:
        memory["own"], memory["state"] = (got.weights + change).cpu()[~task.shared], update.state
        change = change * task.shared.to(change.device)
    if e.privacy == "client":
        change = clip(change, e.clip_norm)
    if got.control is not None:
        # Option II of Karimireddy et al. 2020: the mean gradient that was really used becomes the control.
        own = state.get("control", torch.zeros_like(change)).to(change.device)
        new = own - got.control - change / (steps * e.lr)
        if got.mask is not None:
            own, new = own * got.mask, new * got.mask
        control, memory["control"] = new - own, new.cpu()
    return update._replace(update=change, control=control), memory


def plan(task: Task, round: int, client: int) -> np.ndarray:
    """Return the client's batches as sample indices [steps, batch]; -1 fills the last batch of an epoch."""
    experiment, shard = task.experiment, task.shards[client].numpy()
    rng = rng_for(experiment, "batches", round, client)
    steps = -(-len(shard) // experiment.batch_size)
    batches = np.full((experiment.local_epochs, steps * experiment.batch_size), -1)
    for epoch in batches:
        epoch[: len(shard)] = rng.permutation(shard)
    return batches.reshape(-1, experiment.batch_size)


@dataclass(frozen=True)
class Cohort:
    """Clients that train together, as many as a stack takes, those with more samples first; row k is `ids[k]`.

    `plans` are their batches; `weights` [C, P] and `state` [C, S] are trained in place, `start` [C, P] is where they
    began, `shift` [C, P] what SCAFFOLD adds to the gradients (Karimireddy et al. 2020); `mask`, [P] or [C, P], marks
    the weights that may differ from zero.
    """

    task: Task
    round: int
    ids: list[int]
    plans: list[np.ndarray]
    start: Tensor
    weights: Tensor
    state: Tensor
    shift: Tensor | None
    mask: Tensor | None

    def train(self) -> None:
        """Train all: stacked where the model is on the fast path, else the one that there is, by autograd."""
        if self.task.experiment.privacy == "record":
            self._train_privately()
        elif self.task.model.stack:
            self._train_stacked()
        else:
            self._train_alone()

    def _train_stacked(self) -> None:
        """Train a few clients at once; a client that has done its batches leaves the stack."""
        task, e, stack = self.task, self.task.experiment, self.task.model.stack
        assert stack
        for step in range(len(self.plans[0])):
            pause()
            rows = torch.from_numpy(np.stack([plan[step] for plan in self.plans if step < len(plan)])).to(e.device)
            valid, index = rows >= 0, rows.clamp(min=0)
            scale = (valid / valid.sum(1, keepdim=True))[..., None]
            x = task.inputs(index.view(-1)).view(*rows.shape, *task.dataset.shape)
            now = self.weights[: len(rows)]
            correction = self._correction(now)

            def gradient(logits: Tensor, index: Tensor = index, scale: Tensor = scale) -> Tensor:
                return self._loss_gradient(logits, index).mul_(scale)

            stack.step(now, x, gradient, e.lr, at=None if e.qat == "off" else task.on_grid(now))
            if correction is not None:
                now.sub_(correction, alpha=e.lr)
            self._apply_mask(now)

    def _train_alone(self) -> None:
        """Train one client of any model by autograd."""
        task, e, model, weights = self.task, self.task.experiment, self.task.model, self.weights[0]
        norms = [m for m in model.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        draws = self._begin()
        for batch in self.plans[0]:
            pause()
            index = torch.from_numpy(batch[batch >= 0]).to(e.device)
            for norm in norms:  # a batch of one sample has no statistics of its own: BatchNorm uses the running ones
                norm.train(len(index) > 1)
            correction = self._correction(self.weights)
            model.weights.copy_(task.on_grid(weights))
            model.gradient.zero_()
            with draws.inside():
                logits = model.module(task.inputs(index))
                logits.backward(self._loss_gradient(logits.detach(), index).div_(len(index)))
            if correction is not None:
                model.gradient.add_(correction[0])
            weights.sub_(model.gradient, alpha=e.lr)
            self._apply_mask(self.weights)
        self.state[0] = model.state

    def _train_privately(self) -> None:
        """Train one client by DP-SGD (Abadi et al. 2016) on Poisson batches of its samples."""
        task, e, model, weights = self.task, self.task.experiment, self.task.model, self.weights[0]
        shard, rng = task.shards[self.ids[0]], rng_for(e, "private", self.round, self.ids[0])
        expected, draws = min(e.batch_size, len(shard)), self._begin()
        for _ in self.plans[0]:
            pause()
            index = shard[poisson_sample(len(shard), expected / len(shard), rng)].to(e.device)
            correction = self._correction(self.weights)
            model.weights.copy_(weights)
            with draws.inside():
                x, y, noise = task.inputs(index), task.y[index], e.noise_multiplier
                gradient = private_gradient(model.module, x, y, e.clip_norm, noise, expected, rng)
            weights.sub_(gradient.to(weights.device), alpha=e.lr)
            if correction is not None:
                weights.sub_(correction[0], alpha=e.lr)
            self._apply_mask(self.weights)
        self.state[0] = model.state

    def _begin(self) -> Draws:
        """Give the model the first client's state; return the stream of its own randomness, such as dropout."""
        self.task.model.state = self.state[0]
        self.task.model.module.train()
        rng = rng_for(self.task.experiment, "module", self.round, self.ids[0])
        return Draws(int(rng.integers(2**63)))

    def _loss_gradient(self, logits: Tensor, index: Tensor) -> Tensor:
        """Return each sample's gradient of the loss by its logits; both [..., classes], `index` [...] the samples."""
        task, labels = self.task, self.task.y[index]
        if task.soft is None:
            return hard_gradient(logits, labels)
        e = task.experiment
        return distillation_gradient(logits, task.soft[index], labels, e.temperature, e.distill_weight)

    def _correction(self, weights: Tensor) -> Tensor | None:
        """Return what the strategy adds to the gradients of the first clients, now at `weights` [rows, P]."""
        e, count = self.task.experiment, len(weights)
        if e.strategy == "fedprox":  # back towards where they began (Li et al. 2020)
            return e.proximal_mu * (weights - self.start[:count])
        return None if self.shift is None else self.shift[:count]

    def _apply_mask(self, weights: Tensor) -> None:
        """Put the masked weights of the first clients back to zero: `weights` [rows, P], in place."""
        if self.mask is not None:
            weights.mul_(self.mask if self.mask.ndim == 1 else self.mask[: len(weights)])


def _cohort(task: Task, round: int, ids: list[int], received: Mapping[int, Broadcast], states: States) -> Cohort:
    """Return some clients as they begin to train, from what each received and kept."""
    e, got = task.experiment, [received[client] for client in ids]
    first, shift, mask = got[0].weights, None, got[0].mask
    if all(one.weights is first for one in got):
        start = first.expand(len(ids), -1)  # everybody was sent the same: one copy in memory will do
    else:
        start = torch.stack([one.weights for one in got])
    if e.strategy == "scaffold":
        own = [states[client].get("control", torch.zeros_like(first)).to(first.device) for client in ids]
        shift = torch.stack([one.control - c for one, c in zip(got, own, strict=True) if one.control is not None])
    if e.devices == "sliced":
        mask = torch.stack([torch.ones_like(first) if one.mask is None else one.mask.float() for one in got])
    plans, state = [plan(task, round, client) for client in ids], torch.stack([one.state for one in got])
    weights = empty_aligned(start, *start.shape).copy_(start)
    return Cohort(task, round, ids, plans, start, weights, state, shift, mask)
