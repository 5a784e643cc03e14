"""A claim as a value: arms tuned alike on some seeds and compared on others, with an interval and a verdict."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import inf, isfinite
from operator import index
from pathlib import Path
from statistics import fmean
from threading import Event
from typing import TYPE_CHECKING, Any

from fedlab_kit.arms import COSTS, Arm, Measure, Progress, arm_of, check_measure, class_in, measured, with_settings
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.files import at, read_json, write_bytes, write_json
from fedlab_kit.identity import Unknowable, fingerprint
from fedlab_kit.runs import runs_folder
from fedlab_kit.settings import complaint
from fedlab_kit.statistics import UNDECIDED, mean_difference, verdict
from fedlab_kit.sweep import listed

if TYPE_CHECKING:
    from pandas import DataFrame

Outcomes = Callable[[Sequence[Arm]], Iterable[Mapping[str, Any]]]
Plan = list[tuple[str, dict[str, Any], int]]  # arm, combination, seed


@dataclass(frozen=True)
class Study:
    """The claim that one arm is ahead of another by more than a margin, and all that decides how it is judged.

    `arms` are named experiments, or pairs of an experiment and the recipe of its file. `tune` gives values for fields
    of Experiment or Recipe: every arm is tried with all combinations on each of `seeds`, and takes the one with the
    fewest failed runs, then the best mean, then the first in the grid's order. On the seeds `judge`, which are others,
    the chosen are compared: `contrast` says which arm minus which (the first two unless given), in the measure's own
    unit, and the claim is that it is above `margin`; below zero that is "not worse by as much".

    `measure` is "accuracy" or "recall of <class>" on the validation split, of the file where an arm has a recipe, else
    of the run; one of COSTS, of which less is better (loss and traffic of the run, size of the file, in fp32 where an
    arm has no recipe); or a function of the artifact where an arm has a recipe, else of the run: more is better.

    A seed goes to the experiment and to those of its parents whose seed is their child's; a parent with a seed of its
    own stays as it is. Raises ValueError that names what is wrong.
    """

    arms: Mapping[str, Any]
    tune: Mapping[str, Iterable[Any]] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    judge: Sequence[int] = ()
    contrast: Sequence[str] = ()
    margin: float = 0.0
    measure: Measure = "accuracy"

    def __post_init__(self) -> None:
        if not isinstance(self.arms, Mapping) or not all(isinstance(name, str) for name in self.arms):
            raise ValueError(f"arms must be experiments by name, got {self.arms!r}")
        if not isinstance(self.tune, Mapping):
            raise ValueError(f"tune must be lists of values by field, got {self.tune!r}")
        tune = {name: listed("tune", name, given) for name, given in self.tune.items()}
        seeds, judge = _seeds("seeds", self.seeds, 1 if tune else 0), _seeds("judge", self.judge, 2)
        arms = {name: arm_of(name, given) for name, given in self.arms.items()}
        contrast = tuple(self.contrast) or tuple(arms)[:2]
        for name, value in {"arms": arms, "tune": tune, "seeds": seeds, "judge": judge, "contrast": contrast}.items():
            object.__setattr__(self, name, value)
        if both := set(seeds) & set(judge):
            raise ValueError(f"judge must be other seeds than those that tune, got {min(both)} in both")
        if len(contrast) != 2 or len(set(contrast) & set(arms)) != 2:
            raise ValueError(f"contrast must be two of the arms ({', '.join(arms)}), got {contrast}")
        fields = (set(Experiment.model_fields) | set(Recipe.model_fields)) - {"seed"}
        if unknown := [name for name in tune if name not in fields]:
            raise ValueError(f"tune must name fields of Experiment or Recipe other than seed, got {unknown[0]!r}")
        if type(self.margin) not in (int, float) or not isfinite(self.margin):
            raise ValueError(f"margin must be a number, got {self.margin!r}")
        check_measure(self.measure)
        self._settings(self._grid((*seeds, *judge)))  # what does not go together is told before anything is trained

    @property
    def digest(self) -> str:
        """The SHA-256 (hex) of the whole plan."""
        return _digest(self._plan())

    @property
    def folder(self) -> Path:
        """Where the plan and then the choice are written before what depends on them is run."""
        return runs_folder() / "studies" / self.digest[:20]

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON. ValueError where the measure is a function, which no file holds."""
        if callable(self.measure):
            raise ValueError(f"measure must be a name to be saved, got the function {self.measure.__qualname__}")
        self._write(at(path))

    @classmethod
    def load(cls, path: Path | str) -> Study:
        """Return the study that `save` wrote. ValueError when the file holds none, or was changed since."""
        try:
            plan = json.loads(at(path).read_text())
            if plan.pop("digest") != _digest(plan):
                raise ValueError("it was changed after it was written")
            for name, (experiment, recipe) in plan["arms"].items():
                plan["arms"][name] = (Experiment(**experiment), recipe and Recipe(**recipe))
            return cls(**plan)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{path} holds no study: {complaint(error)}") from error

    def run(
        self, stop: Event | None = None, progress: Progress | None = None, outcomes: Outcomes | None = None
    ) -> Finding:
        """Tune, write down the choice, judge, and say what came out.

        What is in the store is not trained again, so an interrupted study goes on where it was; training uses both
        cores, and `progress(done, of, words)` is called as it goes. A run that fails is a row that says why, and counts
        as the worst there is: 0 for accuracy and recall, else infinite. `outcomes` may stand in for training: given
        pairs of an experiment and its recipe or None, it returns for each a mapping with at least a `value`, NaN where
        the run failed. Raises TimeoutError when `stop` was set, and ValueError where no run of an arm can be had.
        """
        import pandas

        found = outcomes or (lambda arms: measured(arms, self.measure, stop, progress))
        if not (self.folder / "plan.json").exists():
            self._write(self.folder / "plan.json")
        tuned = self._rows("tune", self._grid(self.seeds) if self.tune else [], found)
        chosen = {name: self._choose([row for row in tuned if row["arm"] == name]) for name in self.arms}
        self._commit(chosen)
        judged = self._rows("judge", [(name, chosen[name], seed) for name in self.arms for seed in self.judge], found)
        values = [[row["value"] for row in judged if row["arm"] == name] for name in self.contrast]
        difference, low, high = mean_difference(*values)
        one, other = self._settings([(name, chosen[name], self.judge[0]) for name in self.contrast])
        said = UNDECIDED if one == other else verdict(low, high, self.margin)  # an arm against itself shows nothing
        return Finding(self, chosen, pandas.DataFrame(tuned + judged), difference, low, high, said)

    def _combinations(self) -> list[dict[str, Any]]:
        return [dict(zip(self.tune, values, strict=True)) for values in product(*self.tune.values())]

    def _grid(self, seeds: Sequence[int]) -> Plan:
        return [(name, values, seed) for name in self.arms for values in self._combinations() for seed in seeds]

    def _settings(self, plan: Plan) -> list[Arm]:
        return [with_settings(name, self.arms[name], values, seed) for name, values, seed in plan]

    def _rows(self, phase: str, plan: Plan, outcomes: Outcomes) -> list[dict[str, Any]]:
        rows, worst = [], 0.0 if self.measure == "accuracy" or class_in(self.measure) else -self._sign * inf
        for (name, values, seed), found in zip(plan, outcomes(self._settings(plan)), strict=True):
            value, fine = float(found["value"]), isfinite(found["value"])
            row = {"phase": phase, "arm": name, **values, "seed": seed, "value": value}
            row |= {"status": "finished" if fine else "diverged", "note": "", **found}
            rows.append(row | {"value": value if fine else worst})
        for name in self.arms:
            notes = [row["note"] for row in rows if row["arm"] == name and row["status"] == "failed"]
            if notes and len(notes) * len(self.arms) == len(plan):
                raise ValueError(f"arms must be such that they can be run, {name!r} is not: {notes[0]}")
        return rows

    @property
    def _sign(self) -> int:
        return -1 if self.measure in COSTS else 1

    def _choose(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the combination with the fewest failed runs, then the best mean, then the first of the grid."""

        def rank(values: dict[str, Any]) -> tuple[int, float]:
            mine = [row for row in rows if all(row[name] == value for name, value in values.items())]
            failed = sum(row["status"] != "finished" for row in mine)
            return failed, -self._sign * fmean(row["value"] for row in mine)

        return min(self._combinations(), key=rank) if rows else {}

    def _plan(self) -> dict[str, Any]:
        plan = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if callable(self.measure):
            try:
                plan["measure"] = fingerprint(self.measure, "measure")
            except Unknowable:
                plan["measure"] = self.measure.__qualname__
        return _plain(plan)

    def _write(self, path: Path) -> None:
        write_bytes(path, json.dumps({"digest": self.digest, **self._plan()}, indent=1).encode())

    def _commit(self, chosen: dict[str, Any]) -> None:
        """Write the choice, before any judging run exists; say so where another one was made before."""
        path, content = self.folder / "choice.json", {"study": self.digest, "chosen": _plain(chosen)}
        if path.exists() and read_json(path) != content:
            warnings.warn(f"{path} held another choice: code, data or outcomes have changed since", stacklevel=3)
        elif path.exists():
            return
        write_json(path, content)


@dataclass(frozen=True, eq=False, repr=False)
class Finding:
    """What came out of a study.

    `chosen` has each arm's tuned settings. `table` has a row for every run: `phase` ("tune" or "judge"), `arm`, the
    tuned fields, `seed`, the measure's `value`, `status` ("finished", "diverged" or "failed"), a `note` that says why,
    and what else was measured. `difference` is the mean of the contrast over the judging seeds, paired by seed, and
    `low` to `high` its 95 % interval by Student's t over such seeds: on these data, other pictures are not in it.
    `verdict` is "supported", "not supported" or "undecided", see `statistics.verdict`.
    """

    study: Study
    chosen: dict[str, dict[str, Any]]
    table: DataFrame
    difference: float
    low: float
    high: float
    verdict: str

    def __repr__(self) -> str:
        study, failed = self.study, int((self.table["status"] != "finished").sum())
        settings = {n: ", ".join(f"{key}={value!r}" for key, value in self.chosen[n].items()) for n in study.contrast}
        arms = " minus ".join(name + f" with {how}" * bool(how) for name, how in settings.items())
        measure = study.measure.__qualname__ if callable(study.measure) else study.measure
        return (
            f"{arms}: {measure} {self.difference:+.4g}, 95 % interval {self.low:+.4g} to {self.high:+.4g} (Student's "
            f"t, mean over {len(study.judge)} seeds, paired); above {study.margin:g}: {self.verdict}"
            + f"; {failed} of {len(self.table)} runs failed"
            * bool(failed)
        )


def _seeds(name: str, given: Any, least: int) -> tuple[int, ...]:
    try:
        found = tuple(map(index, given))
    except TypeError:
        raise ValueError(f"{name} must be a list of whole numbers, got {given!r}") from None
    if len(set(found)) < max(least, len(found)):
        raise ValueError(f"{name} must be at least {least} different seeds, got {list(found)}")
    return found


def _plain(content: Any) -> Any:
    """Return what JSON makes of it, settings with all their fields: defaults may change."""
    return json.loads(json.dumps(content, default=lambda settings: settings.model_dump(mode="json")))


def _digest(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
