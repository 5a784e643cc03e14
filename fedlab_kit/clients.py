"""How well one model serves each client, from what a round counted on the validation split."""

from __future__ import annotations

import numpy as np

from fedlab_kit.data import load
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.record import RoundRecord
from fedlab_kit.federation.task import strata
from fedlab_kit.partition import label_counts, partition
from fedlab_kit.statistics import Z95


def client_accuracy(experiment: Experiment, record: RoundRecord) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return accuracy, low and high (95 %) per client, each [clients], after the round of a record.

    Clients that are sites are measured on their site's validation samples. Elsewhere clients differ in their
    label mix alone, so the accuracies per class are weighted by the client's own mix (post-stratification):
    every validation sample counts for every client, and no client is judged on what it trained on.
    """
    total = np.maximum(np.array(record.total, dtype=float), 1)
    rate = np.array(record.correct) / total
    mix = client_mix(experiment, len(total))
    # Agresti and Coull's two extra hits and misses keep the spread of a class above zero at 0 % and 100 %.
    smooth = (np.array(record.correct) + 2) / (total + 4)
    half = Z95 * np.sqrt((mix**2) @ (smooth * (1 - smooth) / (total + 4)))
    mean = mix @ rate
    return mean, np.clip(mean - half, 0, 1), np.clip(mean + half, 0, 1)


def client_mix(experiment: Experiment, count: int) -> np.ndarray:
    """Return the share of each of `count` classes (or sites) among each client's samples, [clients, count]."""
    e, dataset = experiment, load(experiment.dataset)
    if e.normalization == "own":
        return np.eye(count)  # the strata are the clients themselves
    shards = partition(dataset, e.partition, e.clients, e.alpha, e.seed)
    held = label_counts(strata(e, dataset.train), shards, count).numpy()
    return held / held.sum(1, keepdims=True)


def client_names(experiment: Experiment) -> tuple[str, ...]:
    """Return the names of clients that are sites, () where clients have numbers alone."""
    return load(experiment.dataset).sites if experiment.partition == "site" else ()
