"""An experiment made concrete: its data, its clients' shards, its model, and how a model is evaluated on them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlab_kit import catalog
from fedlab_kit.compression.prune import plan_channels, prune_channels, prune_weights
from fedlab_kit.compression.quantize import quantized
from fedlab_kit.data import Dataset, Split, at_hand
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.flat import FlatModel
from fedlab_kit.federation.stacked import Stack
from fedlab_kit.models import build
from fedlab_kit.partition import partition
from fedlab_kit.statistics import wilson

OUTCOMES: dict[Experiment, Tensor] = {}
"""Final weights [P] of experiments that others start from or learn from; `rounds` and `train` fill it."""


@dataclass(frozen=True, eq=False)
class Task:
    """What the rounds of one experiment work on; tensors live on the experiment's device.

    `x` [n, *shape] holds raw training values (preprocessed batch by batch, so that memory follows the cohort),
    `y` [n] their labels, `shards` each client's indices into them, `stack` the fast path or None, `initial` [P] the
    weights before the first round, `soft` [n, classes] the teacher's logits (None without a teacher; see `teach`).
    """

    experiment: Experiment
    dataset: Dataset
    shards: list[Tensor]
    model: FlatModel
    stack: Stack | None
    x: Tensor
    y: Tensor
    initial: Tensor
    soft: Tensor | None
    taught: set[int] = field(default_factory=set)

    def teach(self, clients: list[int]) -> None:
        """Fill in the teacher's logits for the samples of these clients, once each."""
        teacher = self.experiment.teacher
        if teacher is None or self.soft is None:
            return
        for client in set(clients) - self.taught:
            shard = self.shards[client].to(self.soft.device)
            split = Split(self.x[shard], self.y[shard])
            self.soft[shard] = task(teacher).logits(OUTCOMES[teacher], split)
            self.taught.add(client)

    def inputs(self, index: Tensor) -> Tensor:
        """Return the preprocessed training inputs at `index` [k] as float32 [k, *shape]."""
        return self.dataset.preprocess(self.x.index_select(0, index))

    def samples(self, client: int) -> int:
        """How many training samples the client holds."""
        return len(self.shards[client])

    @cached_property
    def _validation(self) -> list[Tensor]:
        """The validation inputs, which every round needs, preprocessed once."""
        return list(self._chunks(self.dataset.validation))

    def _chunks(self, split: Split, chunk: int = 500) -> Iterable[Tensor]:
        return (self.dataset.preprocess(raw) for raw in split.x.to(self.experiment.device).split(chunk))

    @torch.no_grad()
    def logits(self, weights: Tensor, split: Split) -> Tensor:
        """Return what the model with `weights` [P] answers on a whole split, as logits [n, classes]."""
        self.model.weights.copy_(weights)
        self.model.module.eval()
        chunks = self._validation if split is self.dataset.validation else self._chunks(split)
        return torch.cat([self.stack.logits(weights, x) if self.stack else self.model.module(x) for x in chunks])

    def on_grid(self, weights: Tensor) -> Tensor:
        """Return `weights` [P] or [clients, P] rounded to the grid of `qat`; the same tensor when that is off."""
        if self.experiment.qat == "off":
            return weights
        rounded, stacked = weights.clone(), weights.ndim == 2
        for where, shape in zip(self.model.layout.slices, self.model.layout.shapes, strict=True):
            if len(shape) >= 2:
                tensor = weights[..., where].unflatten(-1, shape)
                rounded[..., where] = quantized(tensor, self.experiment.qat, stacked).flatten(int(stacked))
        return rounded

    def evaluate(self, weights: Tensor, split: Split) -> Evaluation:
        """Count the hits of the model with `weights` [P] on a split, stratum by stratum.

        After quantization-aware training that is the model on its grid, as it will be deployed.
        """
        logits, y = self.logits(self.on_grid(weights), split), split.y.to(self.experiment.device)
        hit = logits.argmax(1) == y
        where = strata(self.experiment, split).to(hit.device)
        count = len(self.dataset.sites) if self.experiment.partition == "site" else len(self.dataset.classes)
        return Evaluation(
            correct=tuple(torch.bincount(where[hit], minlength=count).tolist()),
            total=tuple(torch.bincount(where, minlength=count).tolist()),
            loss=float(F.cross_entropy(logits, y)),
        )


@dataclass(frozen=True)
class Evaluation:
    """Hits and samples per stratum, and the mean cross entropy in nats."""

    correct: tuple[int, ...]
    total: tuple[int, ...]
    loss: float

    def accuracy(self) -> tuple[float, float, float]:
        """Return the share of hits in 0..1 and its 95 % interval: (accuracy, low, high)."""
        hits, total = sum(self.correct), sum(self.total)
        return hits / total, *wilson(hits, total)


def strata(experiment: Experiment, split: Split) -> Tensor:
    """Return the stratum [n] of each sample: its site if clients are sites, else its label.

    Clients that differ only in their label mix are told apart by weighing the classes; see `Run.client_accuracy`.
    """
    return split.site if experiment.partition == "site" and split.site is not None else split.y


def chance(experiment: Experiment, purpose: str, *where: int) -> np.random.Generator:
    """Return the generator for one purpose in one place (round, client): order and process do not matter."""
    return np.random.default_rng([experiment.seed, crc32(purpose.encode()), *where])


def task(experiment: Experiment) -> Task:
    """Return the experiment's task, kept for the next call of the same thread.

    Raises ValueError for an unknown data set or model, or a partition that is impossible.
    """
    makers = catalog.lookup("model", experiment.model), catalog.lookup("dataset", experiment.dataset)
    return _task(experiment, makers, threading.get_ident())


@lru_cache(maxsize=8)
def _task(experiment: Experiment, makers: object, thread: int) -> Task:
    dataset = at_hand(experiment)
    module = _module(experiment, dataset)
    stack = Stack(module, dataset.shape) if Stack.supports(module, dataset.shape) else None  # type: ignore[arg-type]
    model, device = FlatModel(module, experiment.device), experiment.device
    return Task(
        experiment=experiment,
        dataset=dataset,
        shards=partition(dataset, experiment.partition, experiment.clients, experiment.alpha, experiment.seed),
        model=model,
        stack=stack,
        x=dataset.train.x.to(device),
        y=dataset.train.y.to(device),
        initial=model.weights.clone(),
        soft=torch.zeros(len(dataset.train), len(dataset.classes), device=device) if experiment.teacher else None,
    )


def _module(experiment: Experiment, dataset: Dataset) -> nn.Module:
    """Return the model with its weights before round one: fresh, or the final one of `start`, pruned."""
    start, recipe = experiment.start, experiment.start_recipe
    if start is None:
        return build(experiment.model, dataset.shape, len(dataset.classes), experiment.seed)
    theirs, parent = task(start).dataset, task(start).model
    if (theirs.shape, len(theirs.classes)) != (dataset.shape, len(dataset.classes)):
        raise ValueError(
            f"start must be trained on samples of shape {list(dataset.shape)} in {len(dataset.classes)} classes, "
            f"got {list(theirs.shape)} in {len(theirs.classes)} of dataset {theirs.name!r}"
        )
    parent.weights.copy_(OUTCOMES[start])
    module = deepcopy(parent.module).cpu()
    if recipe is None or recipe.prune_ratio == 0:
        return module
    if recipe.prune == "channel":
        return prune_channels(module, dataset.shape, plan_channels(module, dataset.shape, recipe.prune_ratio))
    return prune_weights(module, recipe.prune_ratio)
