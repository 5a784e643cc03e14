"""Evaluation in each hospital on its own held-out patients, with intervals; and who is hurt by a smaller file.

Two classes, of which the second is the positive one. Below five patients of a class nothing is estimated from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedlab_kit import data
from fedlab_kit.data import Dataset, Split
from fedlab_kit.deployment.artifact import Artifact, load
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation import setup
from fedlab_kit.federation.client import client_step
from fedlab_kit.federation.masking import first_mask
from fedlab_kit.federation.messages import Broadcast, open_payload, pack_broadcast
from fedlab_kit.runs import parents_of, train
from fedlab_kit.statistics import auc_interval, holm, mean_interval, paired_loss, wilson

if TYPE_CHECKING:
    from pandas import DataFrame


LEAST = 5  # patients of a class, below which an estimate would be a guess
LEVEL = 0.05
MARGIN = 0.05  # share of patients whose loss nobody would accept
METRICS = ("accuracy", "auc", "sensitivity", "specificity", "brier", "calibration")
COSTS = ("latency_ms", "bytes", "zstd_bytes")
TRAFFIC = ("uplink_bytes", "downlink_bytes")
EVERYONE = "all"


def evaluate(artifacts: Mapping[str, Artifact] | Artifact, split: str = "validation") -> DataFrame:
    """Return a row for each artifact and site, and one for all patients together.

    Columns: `artifact`, `site`, `patients`, `positive`; `accuracy`, `auc`, `sensitivity`, `specificity`, `brier` (the
    Brier score) and `calibration` (mean risk minus the share that is positive), each with its 95 % interval in
    `<name>_low` and `<name>_high`, NaN where not estimable, which `note` explains; what the file costs (`latency_ms`,
    `bytes`, `zstd_bytes`) and what its training sent, NaN for a module of one's own. ValueError for an unknown split.
    """
    import pandas

    rows = []
    for name, artifact in _named(artifacts).items():
        part, groups = _groups(artifact, split)
        risk, y = artifact.predict(part.x)[:, 1], part.y.numpy()
        costs = {cost: getattr(artifact, cost) for cost in COSTS}
        sent = {key: (artifact.card["training"] or {}).get(key, np.nan) for key in TRAFFIC}
        for site, where in groups.items():
            rows.append({"artifact": name, "site": site, **measure(risk[where], y[where]), **costs, **sent})
    return pandas.DataFrame(rows)


def measure(risk: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """What one hospital reports: metrics with intervals of the predicted risk float [n] of labels 0 or 1 [n]."""
    from sklearn.metrics import brier_score_loss, roc_auc_score

    sick, called = y == 1, risk > 0.5
    positive, negative = int(sick.sum()), int((~sick).sum())
    few = {"sensitivity": positive < LEAST, "specificity": negative < LEAST}
    few |= dict.fromkeys(("auc", "brier", "calibration"), any(few.values())) | {"accuracy": len(y) < LEAST}
    row: dict[str, Any] = {f"{name}{end}": np.nan for name in METRICS for end in ("", "_low", "_high")}
    for name, wanted in (("accuracy", sick | True), ("sensitivity", sick), ("specificity", ~sick)):
        if not few[name]:
            hits, total = int((called == sick)[wanted].sum()), int(wanted.sum())
            row |= _with_interval(name, hits / total, wilson(hits, total))
    if not few["auc"]:
        auc = float(roc_auc_score(sick, risk))
        row |= _with_interval("auc", auc, auc_interval(auc, positive, negative))
        row |= _with_interval("brier", float(brier_score_loss(sick, risk)), mean_interval((risk - sick) ** 2, 0, 1))
        row |= _with_interval("calibration", float((risk - sick).mean()), mean_interval(risk - sick, -1, 1))
    missing = [name for name in METRICS if few[name]]
    counts = f"({positive} positive, {negative} negative)"
    row["note"] = f"not estimable: {', '.join(missing)} {counts}" if missing else ""
    return {"patients": len(y), "positive": positive, **row}


def compare(
    baseline: Artifact,
    artifacts: Mapping[str, Artifact] | Artifact,
    split: str = "validation",
    of: str = "accuracy",
    dataset: Dataset | None = None,
) -> DataFrame:
    """Return, for each artifact and site, what its patients lose against the baseline, patient by patient.

    `of` is "accuracy", "sensitivity" or "specificity". `loss` is a share of the patients that count, with its 95 %
    interval `low` to `high`; `p` is McNemar's exact test against "nothing lost". `verdict`: "hurt" when p, by Holm's
    correction over all artifacts and sites (over the artifacts for all patients together), is at most 0.05; else
    "unclear" when the interval reaches a loss of 5 points; else "fine"; "not estimable" below five patients. A good row
    for all patients excuses no hospital. Raises ValueError for another `of`.
    """
    import pandas

    rates = {"accuracy": (0, 1), "sensitivity": (1,), "specificity": (0,)}
    if of not in rates:
        raise ValueError(f"of must be one of {', '.join(rates)}, got {of!r}")
    part, groups = _groups(baseline, split, dataset)
    y, rows = part.y.numpy(), []
    counts = np.isin(y, rates[of])
    before = baseline.predict(part.x).argmax(1) == y
    for name, artifact in _named(artifacts).items():
        after = artifact.predict(part.x).argmax(1) == y
        for site, where in groups.items():
            pairs = before[where & counts], after[where & counts]
            rows.append({"artifact": name, "site": site, "of": of, **_loss(*pairs)})
    for together in (True, False):
        family = [row for row in rows if (row["site"] == EVERYONE) == together]
        for row, p in zip(family, holm([row["p"] for row in family]), strict=True):
            row["verdict"] = _verdict(p, row["high"])
    return pandas.DataFrame(rows)


def with_rates(points: DataFrame) -> DataFrame:
    """Return points of a sweep (each with the `path` of its artifact) with what `choose` can put a floor under.

    New columns: `auc`, `sensitivity` and `specificity` of all patients, `lowest_accuracy` of any site where it is
    estimable, and `lowest_site`, which one that is. Raises StoreError when an artifact is gone or damaged.
    """
    import pandas

    rows = []
    for path in points["path"]:
        table = evaluate(load(path)).set_index("site")
        everyone, sites = table.loc[EVERYONE], table.drop(EVERYONE)["accuracy"].dropna()
        row = {name: everyone[name] for name in ("auc", "sensitivity", "specificity")}
        rows.append({**row, "lowest_accuracy": sites.min(), "lowest_site": sites.idxmin() if len(sites) else ""})
    return pandas.concat([points, pandas.DataFrame(rows, index=points.index)], axis=1)


def readable(table: DataFrame, columns: tuple[str, ...] = METRICS) -> DataFrame:
    """Return the table of `evaluate` for people: each metric as text, "0.93 (0.88 to 0.96)" or "not estimable"."""
    shown = table[["artifact", "site", "patients", "positive"]].copy()
    for name in columns:
        triples = table[[name, f"{name}_low", f"{name}_high"]].itertuples(index=False)
        shown[name] = [f"{m:.2f} ({low:.2f} to {high:.2f})" if m == m else "not estimable" for m, low, high in triples]
    return shown


def _named(artifacts: Mapping[str, Artifact] | Artifact) -> Mapping[str, Artifact]:
    return {artifacts.path.stem: artifacts} if isinstance(artifacts, Artifact) else artifacts


def _groups(artifact: Artifact, split: str, dataset: Dataset | None = None) -> tuple[Split, dict[str, np.ndarray]]:
    """The split, and which of its samples belong to each site and to all."""
    if split not in data.SPLITS:
        raise ValueError(f"split must be one of {', '.join(data.SPLITS)}, got {split!r}")
    known = dataset or artifact.dataset
    if len(known.classes) != 2:
        raise ValueError(f"dataset must have two classes to have positives, {known.name!r} has {len(known.classes)}")
    part = known.filled(split)
    groups = {name: np.asarray(part.site == number) for number, name in enumerate(known.sites)}
    return part, groups | {EVERYONE: np.ones(len(part), bool)}


def _with_interval(name: str, value: float, interval: tuple[float, float]) -> dict[str, float]:
    return {name: value, f"{name}_low": interval[0], f"{name}_high": interval[1]}


def _loss(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    row: dict[str, Any] = {"patients": len(before), "worse": int((before & ~after).sum())}
    row["better"] = int((~before & after).sum())
    found = paired_loss(before, after) if len(before) >= LEAST else (np.nan,) * 4
    return row | dict(zip(("loss", "low", "high", "p"), found, strict=True))


def _verdict(p: float, high: float) -> str:
    if np.isnan(p):
        return "not estimable"
    return "hurt" if p <= LEVEL else "unclear" if high >= MARGIN else "fine"


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
    task = setup.task(own, parents_of(own))
    mask = first_mask(task)
    memory = {} if mask is None else {"mask": mask}
    weights, state = start or (task.initial, task.initial_state)
    for round in range(1, 1 + (experiment.rounds if rounds is None else rounds)):
        message = pack_broadcast(task, round, client, Broadcast(weights, state, mask=mask), None, False, False)
        payload, _ = client_step(task, round, client, message, memory)
        answer = open_payload(task, round, payload, mask)
        weights, state = weights + answer.update, state if answer.state is None else answer.state
    return weights, state


def side_by_side(experiment: Experiment, tuning: int = 2) -> DataFrame:
    """Return each site's accuracy on its own validation samples, four ways; the last row is all patients together.

    Columns: `patients`; `alone` (a model of its own), `federated`, `tuned` (the federated model after `tuning` more
    rounds at the site alone) and `pooled`. Raises ValueError unless the clients are sites.
    """
    import pandas

    if experiment.partition != "site":
        raise ValueError(f"partition must be site to compare the sites, got {experiment.partition!r}")
    run, whole = train(experiment), train(pooled(experiment)).tensors()
    task, sites = run.task, range(experiment.clients)
    together = [run.tensors(site) for site in sites]
    ways = {
        "alone": [alone(experiment, site) for site in sites],
        "federated": together,
        "tuned": [alone(experiment, site, together[site], tuning) for site in sites],
        "pooled": [whole] * len(sites),
    }
    held = task.dataset.validation
    results = {way: [task.evaluate(w, held, state) for w, state in models] for way, models in ways.items()}
    patients = torch.tensor(results["pooled"][0].total)
    hits = {way: torch.tensor([found[site].correct[site] for site in sites]) for way, found in results.items()}
    table = {"patients": [*patients.tolist(), int(patients.sum())]}
    for way, right in hits.items():
        table[way] = [*(right / patients).tolist(), float(right.sum() / patients.sum())]
    return pandas.DataFrame(table, index=[*task.dataset.sites, "all"])
