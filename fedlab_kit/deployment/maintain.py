"""Maintenance: a few federated rounds on newer data, a new version, and promotion only when it is better."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlab_kit import data
from fedlab_kit.data import Split
from fedlab_kit.deployment.artifact import Artifact, compress
from fedlab_kit.deployment.evaluate import EVERYONE, compare
from fedlab_kit.deployment.registry import Registry, Version
from fedlab_kit.experiment import Recipe
from fedlab_kit.run import Run
from fedlab_kit.runs import train

LEVEL = 0.05
SMALLEST = 1e-6  # probability: one patient who was given less does not decide alone


@dataclass(frozen=True)
class Upkeep:
    """What maintenance did: the new `version`, whether it was `promoted`, and `why`; the new `run` to go on from."""

    version: Version
    promoted: bool
    why: str
    run: Run


def maintain(registry: Registry, run: Run, dataset: str, recipe: Recipe, rounds: int = 5) -> Upkeep:
    """Train the run's model on for a few rounds on a newer data set, compress it, and promote it if it is better.

    Better than the version in service, on the validation patients of the newer data: see `better`. Otherwise the new
    version stays in the registry, out of service. Raises ValueError when nothing is in service or the data do not fit.
    """
    registry.in_service()
    experiment = run.experiment.replace(
        dataset=dataset, start=run.experiment, start_recipe=None, teacher=None, rounds=rounds
    )
    renewed = train(experiment)
    artifact = compress(renewed, recipe)
    won, why = better(artifact, registry.in_service().load(), dataset)
    version = registry.add(artifact, f"{rounds} rounds on {dataset}")
    if won:
        registry.promote(version, why)
    return Upkeep(version, won, why, renewed)


def better(new: Artifact, old: Artifact, dataset: str) -> tuple[bool, str]:
    """Say whether `new` is better than `old` on the same validation patients, and why.

    The rule: the mean log loss must be lower, by a paired permutation test at 5 %, and no site may be "hurt" as
    `compare` calls it.
    """
    from scipy.stats import permutation_test

    known = data.load(dataset)
    part = known.filled("validation")
    gain = log_loss(old, part) - log_loss(new, part)
    p = permutation_test((gain,), np.mean, permutation_type="samples", alternative="greater", rng=0).pvalue
    verdicts = compare(old, {"new": new}, dataset=known).set_index("site")["verdict"].drop(EVERYONE)
    hurt = verdicts[verdicts == "hurt"].index.tolist()
    said = f"log loss {'fell' if gain.mean() > 0 else 'rose'} by {abs(gain.mean()):.3f} nats a patient (p = {p:.4f})"
    if hurt:
        return False, f"{said}, but it hurts {', '.join(hurt)}"
    return bool(p <= LEVEL), said if p <= LEVEL else f"{said}, which is not enough"


def log_loss(artifact: Artifact, part: Split) -> np.ndarray:
    """Return each sample's log loss in nats, float64 [n]."""
    given = artifact.predict(part.x)[np.arange(len(part)), part.y.numpy()]
    return -np.log(given.astype(np.float64).clip(SMALLEST, 1))
