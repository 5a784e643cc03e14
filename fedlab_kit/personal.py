"""What a client can do by itself, and what all could do with pooled data: federated training lies between the two."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.client import client_step
from fedlab_kit.federation.masking import first_mask
from fedlab_kit.federation.messages import Broadcast, open_payload, pack_broadcast
from fedlab_kit.federation.setup import task
from fedlab_kit.runs import parents_of, train

if TYPE_CHECKING:
    from pandas import DataFrame

Model = tuple[Tensor, Tensor]
"""A model's weights [P] and its state [S]."""


def pooled(experiment: Experiment) -> Experiment:
    """Return the same experiment with all samples in one place: one client that holds everything and always answers.

    ValueError where clients write in hands of their own: one client would write all in one.
    """
    if experiment.partition == "hands":
        raise ValueError("partition must not be hands to pool the samples: a single client has a single hand")
    everything = {"partition": "iid", "clients": 1, "clients_per_round": 1, "normalization": "shared"}
    return experiment.replace(**everything, devices="equal", deadline=0.0, dropout=0.0)


def alone(experiment: Experiment, client: int, start: Model | None = None, rounds: int | None = None) -> Model:
    """Train on one client's own samples, without the others, and return the weights [P] and the state [S].

    From the first weights of the experiment, for as many rounds as it has: what a client gets that takes no part. From
    the final model of a run for a few `rounds`: personal fine-tuning. Raises PayloadError when it diverges.
    """
    own = experiment.replace(
        strategy="fedavg", uplink="fp32", downlink="fp32", mask_ratio=0.0, devices="equal", teacher=None,
        normalization="shared",
    )  # fmt: skip
    job = task(own, parents_of(own))
    mask = first_mask(job)
    memory = {} if mask is None else {"mask": mask}
    weights, state = start or (job.initial, job.initial_state)
    for round in range(1, 1 + (experiment.rounds if rounds is None else rounds)):
        message = pack_broadcast(job, round, client, Broadcast(weights, state, mask=mask), None, False, False)
        payload, _ = client_step(job, round, client, message, memory)
        answer = open_payload(job, round, payload, mask)
        weights, state = weights + answer.update, state if answer.state is None else answer.state
    return weights, state


def side_by_side(experiment: Experiment, tuning: int = 2) -> DataFrame:
    """Return each site's accuracy on its own validation samples, four ways; the last row is all patients together.

    Columns: `patients`; `alone` (a model of its own), `federated`, `tuned` (the federated model after `tuning` more
    rounds at the site alone) and `pooled`. Each way passes over its data as often as the experiment does. Raises
    ValueError unless the clients are sites.
    """
    import pandas

    if experiment.partition != "site":
        raise ValueError(f"partition must be site to compare the sites, got {experiment.partition!r}")
    run, whole = train(experiment), train(pooled(experiment)).tensors()
    job, sites = run.task, range(experiment.clients)
    together = [run.tensors(site) for site in sites]
    ways = {
        "alone": [alone(experiment, site) for site in sites],
        "federated": together,
        "tuned": [alone(experiment, site, together[site], tuning) for site in sites],
        "pooled": [whole] * len(sites),
    }
    results = {
        way: [job.evaluate(w, job.dataset.validation, state) for w, state in models] for way, models in ways.items()
    }
    patients = torch.tensor(results["pooled"][0].total)
    hits = {way: torch.tensor([found[site].correct[site] for site in sites]) for way, found in results.items()}
    table = {"patients": [*patients.tolist(), int(patients.sum())]}
    for way, right in hits.items():
        table[way] = [*(right / patients).tolist(), float(right.sum() / patients.sum())]
    return pandas.DataFrame(table, index=[*job.dataset.sites, "all"])
