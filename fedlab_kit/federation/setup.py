"""An experiment made concrete: its data, its clients' shards, its model, and how a model is evaluated on them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlab_kit import identity
from fedlab_kit.compression.prune import prune
from fedlab_kit.compression.quantize import parameter_dtypes, quantized
from fedlab_kit.data import Dataset, Split, check, load
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.flat_model import FlatModel
from fedlab_kit.models import build
from fedlab_kit.partition import OWN, data_of, held_out, shards_of
from fedlab_kit.statistics import recall, wilson


class Parents(NamedTuple):
    """The finished models that an experiment begins from and learns from, where it asks for them."""

    start: FlatModel | None = None
    teacher: FlatModel | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """What the rounds of one experiment work on; tensors live on the experiment's device.

    `x` [n, *shape] holds raw training values (preprocessed batch by batch, so that memory follows the cohort),
    `y` [n] their labels, `shards` each client's indices into them, `initial` [P] and `initial_state` [S] the model
    before the first round, `shared` [P] which weights travel (None: all), `soft` [n, classes] the teacher's logits
    (None without a teacher; see `fill_soft`), `owner` [m] whose part each validation sample is, where clients have
    models of their own. The model is scratch: a task serves one thread, or several in turns, see `apart`.
    """

    experiment: Experiment
    parents: Parents
    dataset: Dataset
    shards: list[Tensor]
    model: FlatModel
    x: Tensor
    y: Tensor
    initial: Tensor
    initial_state: Tensor
    shared: Tensor | None
    soft: Tensor | None
    owner: Tensor | None
    filled: set[int] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def apart(self) -> Task:
        """Return the same task with a model of its own, which threads may use in turns under its `lock`."""
        sample = self.dataset.preprocess(self.dataset.train.x[:8])
        model = FlatModel(deepcopy(self.model.module), sample, self.experiment.device)
        return replace(self, model=model, lock=threading.RLock())

    def fill_soft(self, clients: list[int]) -> None:
        """Fill in the teacher's logits for the samples of these clients, once each."""
        teacher = self.parents.teacher
        if teacher is None or self.soft is None:
            return
        for client in set(clients) - self.filled:
            shard = self.shards[client].to(self.soft.device)
            self.soft[shard] = teacher.logits(self._chunks(self.x[shard]))
            self.filled.add(client)

    def inputs(self, index: Tensor) -> Tensor:
        """Return the preprocessed training inputs at `index` [k] as float32 [k, *shape]."""
        return self.dataset.preprocess(self.x.index_select(0, index))

    def samples(self, client: int) -> int:
        """How many training samples the client holds."""
        return len(self.shards[client])

    @cached_property
    def _validation(self) -> list[Tensor]:
        """The validation inputs, which every round needs, preprocessed once."""
        return list(self._chunks(self.dataset.validation.x))

    def _chunks(self, x: Tensor, chunk: int = 500) -> Iterable[Tensor]:
        return (self.dataset.preprocess(raw) for raw in x.to(self.experiment.device).split(chunk))

    def logits(self, weights: Tensor, split: Split, state: Tensor | None = None) -> Tensor:
        """Return what the model with `weights` [P] and `state` [S] answers on a whole split, as logits [n, classes].

        Raises ValueError when the model has a state and none is given.
        """
        if state is None and self.model.state_layout.size:
            raise ValueError(f"state must be given: the model has {', '.join(self.model.state_layout.names)}")
        with self.lock:
            self.model.load(weights, self.initial_state if state is None else state)
            return self.model.logits(self._validation if split is self.dataset.validation else self._chunks(split.x))

    def on_grid(self, weights: Tensor) -> Tensor:
        """Return `weights` [P] or [clients, P] rounded to the grid of `qat`; the same tensor when that is off."""
        if self.experiment.qat == "off":
            return weights
        layout, channels, rounded = self.model.layout, tuple(range(weights.ndim)), []  # of each client by itself
        parts = weights.split(layout.sizes, dim=-1)
        for name, shape, part in zip(layout.names, layout.shapes, parts, strict=True):
            if dtype := self._dtypes.get(name):
                part = quantized(part.unflatten(-1, shape), dtype, channels).flatten(weights.ndim - 1)
            rounded.append(part)
        return torch.cat(rounded, dim=-1)

    @cached_property
    def _dtypes(self) -> dict[str, str]:
        return _dtypes(self.model, self.experiment)

    def evaluate(self, weights: Tensor, split: Split, state: Tensor | None = None) -> Evaluation:
        """Count the hits of the model with `weights` [P] and `state` [S] on a split, stratum by stratum.

        After quantization-aware training that is the model on its grid, as it will be deployed.
        """
        logits, y = self.logits(self.on_grid(weights), split, state), split.y.to(self.experiment.device)
        count = len(self.dataset.sites if self.experiment.partition in OWN else self.dataset.classes)
        return Evaluation.of(logits, y, strata(self.experiment, split), count)

    def own_model(self, weights: Tensor, memory: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return a client's own model: the global `weights` [P] with the layers that it kept, and its state [S]."""
        weights = weights.clone()
        if self.shared is not None and "own" in memory:
            weights[~self.shared] = memory["own"].to(weights.device)
        return weights, memory.get("state", self.initial_state)

    def evaluate_own(self, weights: Tensor, kept: Mapping[int, Mapping[str, Tensor]]) -> Evaluation:
        """Count the hits of each client's `own_model` on its part of the validation split; the strata are the clients.

        `kept` is what clients keep, by id.
        """
        assert self.owner is not None
        held, device = self.dataset.validation, self.experiment.device
        logits = torch.zeros(len(held), len(self.dataset.classes), device=device)
        for client in range(len(self.shards)):
            mine = self.owner == client
            if mine.any():
                own, state = self.own_model(weights, kept.get(client, {}))
                logits[mine.to(device)] = self.logits(self.on_grid(own), Split(held.x[mine], held.y[mine]), state)
        return Evaluation.of(logits, held.y.to(device), self.owner, len(self.shards))


@dataclass(frozen=True)
class Evaluation:
    """Hits and samples per stratum, the mean cross entropy in nats, and the recall of each class, see `recall`."""

    correct: tuple[int, ...]
    total: tuple[int, ...]
    loss: float
    recall: tuple[float | None, ...]

    @classmethod
    def of(cls, logits: Tensor, y: Tensor, where: Tensor, strata: int) -> Evaluation:
        """Judge `logits` [n, classes] by the labels `y` [n]; `where` [n] is each sample's stratum."""
        hit, where = logits.argmax(1) == y, where.to(y.device)
        correct, total = (torch.bincount(found, minlength=strata).tolist() for found in (where[hit], where))
        each = recall(hit.cpu().numpy(), y.cpu().numpy(), logits.shape[1])
        return cls(tuple(correct), tuple(total), float(F.cross_entropy(logits, y)), each)

    def accuracy(self) -> tuple[float, float, float]:
        """Return the share of hits in 0..1 and its 95 % interval: (accuracy, low, high)."""
        hits, total = sum(self.correct), sum(self.total)
        return hits / total, *wilson(hits, total)


def strata(experiment: Experiment, split: Split) -> Tensor:
    """Return the stratum [n] of each sample: its site if clients are sites or hands, else its label.

    Clients that differ only in their label mix are told apart by weighing the classes; see `Run.client_accuracy`.
    """
    return split.site if experiment.partition in OWN and split.site is not None else split.y


def rng_for(experiment: Experiment, purpose: str, *where: int) -> np.random.Generator:
    """Return the generator for one purpose in one place (round, client): order and process do not matter."""
    return np.random.default_rng([experiment.seed, crc32(purpose.encode()), *where])


def task(experiment: Experiment | Task, parents: Parents | None = None) -> Task:
    """Return the experiment's task, kept for the next call of the same thread; a task is its own.

    Raises ValueError for an unknown data set or model, a partition that is impossible, and a parent that is missing.
    """
    if isinstance(experiment, Task):
        return experiment
    makers = identity.stamp("model", experiment.model), identity.stamp("dataset", experiment.dataset)
    return _task(experiment, parents or Parents(), makers, threading.get_ident())


@lru_cache(maxsize=8)
def _task(experiment: Experiment, parents: Parents, makers: object, thread: int) -> Task:
    check(experiment)
    e, dataset = experiment, data_of(experiment)
    model = FlatModel(_module(e, parents, dataset), dataset.preprocess(dataset.train.x[:8]), e.device)
    if model.state_layout.size and e.privacy != "off" and e.normalization == "shared":
        raise ValueError(
            f"privacy must be off for model {e.model!r}, got {e.privacy!r}: what BatchNorm "
            f"and its like keep of samples ({model.state_layout.names[0]}) would leave the client bare; use GroupNorm, "
            "or normalization 'own'"
        )
    if e.qat != "off":
        _round_frozen(model, e)
    shards = shards_of(e)
    own = e.normalization == "own"
    if own and not (model.norms or model.state_layout.size):
        raise ValueError(f"normalization must be shared for model {e.model!r}, which has no such layer")
    if e.teacher is not None and parents.teacher is None:
        raise ValueError("teacher must be trained first: hand its model over")
    return Task(
        experiment=e,
        parents=parents,
        dataset=dataset,
        shards=shards,
        model=model,
        x=dataset.train.x.to(e.device),
        y=dataset.train.y.to(e.device),
        initial=model.weights.clone(),
        initial_state=model.state,
        shared=~model.layout.marked(model.norms) if own else None,
        soft=torch.zeros(len(dataset.train), len(dataset.classes), device=e.device) if e.teacher else None,
        owner=held_out(dataset, shards, e.partition, e.seed) if own else None,
    )


def _dtypes(model: FlatModel, experiment: Experiment) -> dict[str, str]:
    """Return the dtype of each parameter that `qat` rounds, frozen ones too, by name."""
    shapes = {name: tuple(p.shape) for name, p in model.module.named_parameters() if name not in model.norms}
    return parameter_dtypes(shapes, experiment.qat, experiment.qat_keep)


@torch.no_grad()
def _round_frozen(model: FlatModel, experiment: Experiment) -> None:
    """Put frozen weights on the grid once: they are in no vector that could be rounded at each step."""
    for name, dtype in _dtypes(model, experiment).items():
        parameter = model.module.get_parameter(name)
        if not parameter.requires_grad:
            parameter.copy_(quantized(parameter, dtype))


def _module(experiment: Experiment, parents: Parents, dataset: Dataset) -> nn.Module:
    """Return the model with its weights before round one: fresh, or the final one of `start`, pruned."""
    start, recipe = experiment.start, experiment.start_recipe
    if start is None:
        return build(experiment.model, dataset.shape, len(dataset.classes), experiment.seed)
    if parents.start is None:
        raise ValueError("start must be trained first: hand its model over")
    theirs = load(start.dataset)
    if (theirs.shape, len(theirs.classes)) != (dataset.shape, len(dataset.classes)):
        raise ValueError(
            f"start must be trained on samples of shape {list(dataset.shape)} in {len(dataset.classes)} classes, "
            f"got {list(theirs.shape)} in {len(theirs.classes)} of dataset {theirs.name!r}"
        )
    module = deepcopy(parents.start.module).cpu()
    sample = dataset.preprocess(dataset.train.x[:2])
    return module if recipe is None else prune(module, sample, recipe, experiment.model)[0]
