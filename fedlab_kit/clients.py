"""How well one model serves each client, from what a round counted on the validation split."""

from __future__ import annotations

import numpy as np

from fedlab_kit.data import load
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.server import RoundRecord
from fedlab_kit.federation.setup import strata
from fedlab_kit.partition import OWN, data_of, label_counts, shards_of
from fedlab_kit.statistics import Z95


def client_accuracy(experiment: Experiment, record: RoundRecord) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return accuracy, low and high (95 %) per client, each [clients], after the round of a record.

    Clients that are sites, or hands, are measured on their own validation samples. Elsewhere clients differ in their
    label mix alone, so the accuracies per class are weighted by the client's own mix (post-stratification):
    every validation sample counts for every client, and no client is judged on what it trained on.

    A client of whose classes (or of whose site) nobody was held out is not estimable: NaN. If that is true of a part
    of its mix, the accuracy is the mean over the rest, and the interval leaves open that the model gets all of that
    part wrong, or all of it right: who is measured on half of its mix is known by half.
    """
    mix, correct, total = client_mix(experiment, len(record.total)), np.array(record.correct), np.array(record.total)
    mean, known = mean_over(mix, correct, total)
    # Agresti and Coull's two extra hits and misses keep the spread of a class above zero at 0 % and 100 %.
    smooth = (correct + 2) / (total + 4)
    spread = np.divide(smooth * (1 - smooth), total, out=np.zeros(len(total)), where=total > 0)
    half = Z95 * np.sqrt(mix**2 @ spread)
    low, high = np.clip(known * mean - half, 0, known), np.clip(known * mean + half, 0, known)
    return mean, np.where(known > 0, low, np.nan), np.where(known > 0, high + 1 - known, np.nan)


def mean_over(mix: np.ndarray, correct: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each client's accuracy over the classes (or sites) that were measured, and their share of its mix.

    `mix` is [clients, classes]; hits `correct` and samples `total` [classes]. The accuracy is NaN at a share of 0.
    """
    known = np.where((mix > 0) @ (total > 0), 1 - mix @ (total == 0), 0.0)  # exactly 1 where nothing is missing
    hits = mix @ (correct / np.maximum(total, 1))
    return np.divide(hits, known, out=np.full(len(mix), np.nan), where=known > 0), known


def client_mix(experiment: Experiment, count: int) -> np.ndarray:
    """Return the share of each of `count` classes (or sites) among each client's samples, [clients, count]."""
    if experiment.normalization == "own" or experiment.partition in OWN:
        return np.eye(count)  # the strata are the clients themselves
    held = label_counts(strata(experiment, data_of(experiment).train), shards_of(experiment), count).numpy()
    return held / held.sum(1, keepdims=True)


def client_names(experiment: Experiment) -> tuple[str, ...]:
    """Return the names of clients that are sites, () where clients have numbers alone."""
    return load(experiment.dataset).sites if experiment.partition == "site" else ()
