"""An artifact in service: every hospital's stream of patients is scored, and watched while it is.

Watched are the inputs and the confidence (see `drift`), how many answers are late, how many patients could not be
scored, and, where outcomes become known, how many answers were wrong. Each hospital is compared with its own
reference patients; what it knows of them stays there, but for a covariance.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from fedlab_kit.data import Split
from fedlab_kit.deployment.artifact import Artifact
from fedlab_kit.deployment.drift import LEVEL, TOLERANCE, Drift, Look, Reference, directions
from fedlab_kit.deployment.score import matrix, odd_rows

FEWEST = 10  # reference patients that a site must have to be watched for drift
RECENT = 500  # answers that a budget looks back on
NAMED = 3  # features that an alarm names


@dataclass(frozen=True)
class Alarm:
    """Something is wrong at one site: `kind` is "inputs", "confidence", "late", "failed" or "wrong".

    `patient` counts the site's patients so far (for drift, those that were scored); `value` went beyond `limit`;
    `what` says it in words.
    """

    site: str
    patient: int
    kind: str
    value: float
    limit: float
    what: str

    def to_dict(self) -> dict[str, Any]:
        """Return the alarm as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Budgets:
    """What a site may spend: the share of answers later than `latency_ms`, not given at all (`failed`), or `wrong`."""

    latency_ms: float = 50.0
    late: float = 0.01
    failed: float = 0.01
    wrong: float = 0.1


class Spending:
    """One budget of one site: a share of the recent answers that must not be exceeded."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._recent: deque[bool] = deque(maxlen=RECENT)

    def add(self, spent: bool) -> float | None:
        """Count one answer; return the share spent when that is more than chance within the budget explains."""
        from scipy.stats import binom

        self._recent.append(spent)
        if not spent:
            return None
        hits, total = sum(self._recent), len(self._recent)
        if hits <= self.share * total or binom.sf(hits - 1, total, self.share) > LEVEL:
            return None
        self._recent.clear()
        return hits / total


@dataclass
class Site:
    """What is watched at one hospital."""

    spending: dict[str, Spending]
    drifts: dict[str, Drift] = field(default_factory=dict)
    patients: int = 0


class Monitor:
    """Scores patients and watches; `alarms` holds the plain records, oldest first, `sites` what is known of each.

    `reference` are patients whose like the artifact is for, of each site; labels are not looked at. A site with fewer
    than ten of them is not watched for drift. Inputs are watched when they are tables; of pictures the confidence
    alone. Example:
    `monitor = Monitor(artifact, dataset.train); monitor.watch("rural", rows)`.
    """

    def __init__(
        self,
        artifact: Artifact,
        reference: Split,
        budgets: Budgets | None = None,
        tolerance: float = TOLERANCE,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.artifact, self.budgets, self.tolerance = artifact, budgets or Budgets(), tolerance
        self.alarms: list[Alarm] = []
        self._clock = clock
        known = tuple(artifact.card["data"]["sites"]) or ("all",)
        rows = np.asarray(reference.x)
        where = np.zeros(len(rows), int) if reference.site is None else reference.site.numpy()
        groups = {name: rows[where == number] for number, name in enumerate(known)}
        self._scales = self._scale(rows)
        watched = {name: self._references(group) for name, group in groups.items() if len(group) >= FEWEST}
        if not watched:
            raise ValueError(f"reference must hold at least {FEWEST} patients of some site, got {len(rows)} in all")
        self._whiten = {kind: directions(one[kind] for one in watched.values()) for kind in self._scales}
        self.sites = {name: self._site(watched.get(name)) for name in known}

    def join(self, name: str, reference: np.ndarray) -> None:
        """Watch a hospital that joins late, or watch one against new reference patients, raw rows [m, ...].

        Raises ValueError when there are fewer than ten.
        """
        if len(reference) < FEWEST:
            raise ValueError(f"reference must hold at least {FEWEST} patients of {name!r}, got {len(reference)}")
        self.sites[name] = self._site(self._references(matrix(reference, self.artifact.card["input"])))

    def watch(self, site: str, x: Any, y: np.ndarray | None = None) -> np.ndarray:
        """Score raw rows [n, ...] of one site: probabilities [n, classes], NaN for a patient that cannot be scored.

        `y` [n] are the true classes, if known. Raises ValueError for an unknown site, and for wrong columns, which
        count as a failure there; other sites are not touched.
        """
        if site not in self.sites:
            raise ValueError(f"site must be one of {', '.join(self.sites)}, got {site!r}")
        here = self.sites[site]
        try:
            rows = matrix(x, self.artifact.card["input"])
        except ValueError:
            here.patients += 1
            self._spend(site, "failed", [True])
            raise
        good = np.ones(len(rows), bool)
        good[list(odd_rows(rows, self.artifact.card))] = False
        answers = np.full((len(rows), len(self.artifact.card["data"]["classes"])), np.nan, np.float32)
        began = self._clock()
        if good.any():
            answers[good] = self.artifact.predict(rows[good])
        late = 1e3 * (self._clock() - began) / len(rows) > self.budgets.latency_ms
        here.patients += len(rows)
        self._spend(site, "failed", ~good)
        self._spend(site, "late", [late] * len(rows))
        if y is not None:
            self._spend(site, "wrong", (answers.argmax(axis=1) != y)[good])
        self._drift(site, rows[good], answers[good])
        return answers

    def _spend(self, site: str, kind: str, spent: Any) -> None:
        here, budget = self.sites[site], getattr(self.budgets, kind)
        for one in spent:
            share = here.spending[kind].add(bool(one))
            if share is not None:
                what = f"{share:.1%} of the recent answers were {kind}, the budget is {budget:.1%}"
                self.alarms.append(Alarm(site, here.patients, kind, share, budget, what))

    def _drift(self, site: str, rows: np.ndarray, answers: np.ndarray) -> None:
        here = self.sites[site]
        values = self._values(rows, answers) if len(rows) else {}
        for kind, drift in here.drifts.items():
            for look in drift.add(values[kind]) if kind in values else ():
                what = self._moved(look) if kind == "inputs" else f"the confidence moved by {look.shift[0]:+.1f} sd"
                self.alarms.append(Alarm(site, look.patients, kind, look.distance, look.limit, what))

    def _moved(self, look: Look) -> str:
        names = self.artifact.card["input"]["features"] or [f"feature {n}" for n in range(len(look.shift))]
        most = np.argsort(-np.abs(look.shift))[:NAMED]
        return "moved most: " + ", ".join(f"{names[n]} {look.shift[n]:+.1f} sd" for n in most)

    def _values(self, rows: np.ndarray, answers: np.ndarray) -> dict[str, np.ndarray]:
        """What is watched: the confidence as log odds [n, 1] of the likelier class, and a table's inputs [n, d]."""
        best = answers.max(axis=1, keepdims=True).astype(np.float64).clip(1e-6, 1 - 1e-6)
        tables = {"inputs": rows.astype(np.float64)} if rows.ndim == 2 else {}
        return {**tables, "confidence": np.log(best / (1 - best))}

    def _scale(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        values = self._values(rows, self.artifact.predict(rows))
        scales = {kind: each.std(axis=0) for kind, each in values.items()}
        return {kind: np.where(scale > 0, scale, 1.0) for kind, scale in scales.items()}

    def _references(self, rows: np.ndarray) -> dict[str, Reference]:
        values = self._values(rows, self.artifact.predict(rows))
        return {kind: Reference.of(each, self._scales[kind]) for kind, each in values.items()}

    def _site(self, references: dict[str, Reference] | None) -> Site:
        drifts = {
            kind: Drift(reference, self._scales[kind], self._whiten[kind], self.tolerance)
            for kind, reference in (references or {}).items()
        }
        return Site({kind: Spending(getattr(self.budgets, kind)) for kind in ("failed", "late", "wrong")}, drifts)
