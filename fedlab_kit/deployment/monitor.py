"""An artifact in service: every hospital's stream of patients is scored, and watched while it is.

Watched are inputs and confidence (see `drift`), and how many answers are late, missing, or wrong where outcomes become
known. Each hospital is compared with its own reference patients, who stay there, but for a covariance.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from fedlab_kit.data import Preprocess, Split
from fedlab_kit.deployment.artifact import Artifact
from fedlab_kit.deployment.drift import LEVEL, TOLERANCE, Drift, Look, Reference, directions
from fedlab_kit.deployment.score import matrix, odd_rows
from fedlab_kit.settings import Settings, knob

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

    `reference` are unlabelled patients of each site whose like the artifact is for; a site with fewer than ten is not
    watched for drift. Inputs are watched where they are tables; of pictures the confidence alone. Example:
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
        values = self._values(rows, artifact.predict(rows))
        spreads = {kind: each.std(axis=0) for kind, each in values.items()}
        self._scales = {kind: np.where(spread > 0, spread, 1.0) for kind, spread in spreads.items()}
        watched = {
            name: self._references({kind: each[where == number] for kind, each in values.items()})
            for number, name in enumerate(known)
            if (where == number).sum() >= FEWEST
        }
        if not watched:
            raise ValueError(f"reference must hold at least {FEWEST} patients of some site, got {len(rows)} in all")
        self._whiten = {kind: directions(one[kind] for one in watched.values()) for kind in self._scales}
        self.sites = {name: self._site(watched.get(name, {})) for name in known}

    def join(self, name: str, reference: np.ndarray) -> None:
        """Watch a hospital that joins late, or against new reference rows [m, ...]. ValueError below ten."""
        if len(reference) < FEWEST:
            raise ValueError(f"reference must hold at least {FEWEST} patients of {name!r}, got {len(reference)}")
        rows = matrix(reference, self.artifact.card["input"])
        self.sites[name] = self._site(self._references(self._values(rows, self.artifact.predict(rows))))

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

    def _references(self, values: dict[str, np.ndarray]) -> dict[str, Reference]:
        return {kind: Reference.of(each, self._scales[kind]) for kind, each in values.items()}

    def _site(self, references: dict[str, Reference]) -> Site:
        watched = references.items()
        drifts = {kind: Drift(one, self._scales[kind], self._whiten[kind], self.tolerance) for kind, one in watched}
        return Site({kind: Spending(getattr(self.budgets, kind)) for kind in ("failed", "late", "wrong")}, drifts)


class Stream(Settings):
    """A stream of one hospital's patients and what happens to it.

    Example: `Stream(patients=400, begin=200, gain=1.1, offset=0.5, features=10)`.
    """

    patients: int = knob(400, "Patients", "stream", ge=1, le=100_000, step=10, span=(100, 1000))
    """How many patients come."""
    begin: int = knob(200, "Begin", "stream", ge=0, le=100_000, step=10, span=(0, 500))
    """How many are measured as before."""
    features: int = knob(10, "Features", "stream", ge=0, span=(0, 30))
    """How many features change, drawn by the seed."""
    gain: float = knob(1.1, "Gain", "stream", ge=0, le=100, step=0.01, span=(0.8, 1.2))
    """A changed feature is multiplied by this."""
    offset: float = knob(0.5, "Offset", "stream", ge=-100, le=100, step=0.05, span=(-1, 1))
    """And this many of its standard deviations are added."""
    seed: int = knob(7, "Seed", "stream", ge=0, le=2**32 - 1)
    """Which patients come, and which features change."""


def draw(part: Split, site: int, preprocess: Preprocess, stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    """Return raw rows float32 [patients, d] and labels int64 [patients] of one site's patients, as `stream` says.

    Raises ValueError when the site has nobody there, or fewer columns than are to change.
    """
    pool = np.flatnonzero(part.site.numpy() == site) if part.site is not None else np.arange(len(part))
    if not len(pool):
        raise ValueError(f"site must have patients in this split, site {site} has none")
    width = part.x.shape[1]
    if stream.features > width:
        raise ValueError(f"features must be at most {width}, the columns of the table, got {stream.features}")
    rng = np.random.default_rng(stream.seed)
    chosen, rows = rng.permutation(width)[: stream.features], pool[rng.integers(len(pool), size=stream.patients)]
    x, y = part.x.numpy()[rows].copy(), part.y.numpy()[rows]
    x[stream.begin :] = changed(x[stream.begin :], chosen, preprocess, stream.gain, stream.offset)
    return x, y


def changed(
    rows: np.ndarray, features: np.ndarray, preprocess: Preprocess, gain: float, offset: float, about: Any = 0.0
) -> np.ndarray:
    """Return raw rows [n, d], some `features` stretched by `gain` about `about` and moved by `offset` deviations."""
    given = [np.broadcast_to(np.asarray(value, np.float32), rows.shape[1]) for value in (preprocess.std, about)]
    std, pivot = (each[features] for each in given)
    moved = rows.copy()
    moved[:, features] = pivot + np.float32(gain) * (rows[:, features] - pivot) + np.float32(offset) * std
    return moved
