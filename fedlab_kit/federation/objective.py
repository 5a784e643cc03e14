"""What a client minimises and where: the loss, what the strategy adds to its gradient, the grid and the mask."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedlab_kit.compression.distill import distillation_slope, hard_slope
from fedlab_kit.federation.task import Task


@dataclass(frozen=True)
class Objective:
    """One round's objective for a cohort whose clients are the rows of `start` [C, P] and of their `state` [C, S].

    `pull` draws back towards `start` (FedProx, Li et al. 2020), `shift` [C, P] is added to the gradients (SCAFFOLD,
    Karimireddy et al. 2020), `mask`, [P] or a row for each client [C, P], marks the weights that may differ from zero.
    """

    job: Task
    start: Tensor
    state: Tensor
    pull: float = 0.0
    shift: Tensor | None = None
    mask: Tensor | None = None

    def slope(self, logits: Tensor, index: Tensor) -> Tensor:
        """Return each sample's gradient of the loss by its logits; both [..., classes], `index` [...] the samples."""
        labels, experiment = self.job.y[index], self.job.experiment
        if self.job.soft is None:
            return hard_slope(logits, labels)
        teacher = self.job.soft[index]
        return distillation_slope(logits, teacher, labels, experiment.temperature, experiment.distill_weight)

    def drift(self, weights: Tensor, rows: slice) -> Tensor | None:
        """Return what the strategy adds to the gradients of the clients in `rows`, now at `weights` [rows, P]."""
        if self.shift is not None:
            return self.shift[rows]
        return self.pull * (weights - self.start[rows]) if self.pull else None

    def confine(self, weights: Tensor, first: int) -> None:
        """Put masked weights back to zero, in place; `weights` [rows, P] are the clients from row `first` on."""
        if self.mask is not None:
            weights.mul_(self.mask if self.mask.ndim == 1 else self.mask[first : first + len(weights)])
