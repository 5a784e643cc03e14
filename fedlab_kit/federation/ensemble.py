"""FedDF: the server distils what the clients know together into their average (Lin et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlab_kit.compression.distill import distillation_slope
from fedlab_kit.federation.task import Task, chance

BATCH = 20


def distil_ensemble(
    job: Task, round: int, weights: Tensor, state: Tensor, clients: list[tuple[Tensor, Tensor]], mask: Tensor | None
) -> Tensor:
    """Return `weights` [P] after SGD towards the mean logits of the `clients`' models on the public samples.

    A client's model is its weights [P] and its state [S]; `state` is that of the average.

    The public split is used without its labels; `server_epochs` passes, the clients' learning rate, T^2 KL.
    """
    experiment, public = job.experiment, job.dataset.public
    target = torch.stack([job.logits(own, public, theirs) for own, theirs in clients]).mean(0)
    inputs, model = job.dataset.preprocess(public.x.to(experiment.device)), job.model
    unlabelled, weights = torch.zeros(len(public), dtype=torch.int64, device=target.device), weights.clone()
    model.state = state
    model.module.eval()
    for epoch in range(experiment.server_epochs):
        order = torch.from_numpy(chance(experiment, "public", round, epoch).permutation(len(public)))
        for index in order.to(target.device).split(BATCH):
            model.weights.copy_(weights)
            model.gradient.zero_()
            logits = model.module(inputs[index])
            slope = distillation_slope(logits.detach(), target[index], unlabelled[index], experiment.temperature, 1.0)
            logits.backward(slope.div_(len(index)))
            gradient = model.gradient if job.shared is None else model.gradient * job.shared.to(weights.device)
            weights.sub_(gradient, alpha=experiment.lr)
            if mask is not None:
                weights.mul_(mask)
    return weights
