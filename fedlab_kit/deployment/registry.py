"""A registry: a folder with the versions of a model for one class of devices, and what is in service.

`versions/0001/` holds an artifact with its card, `history.jsonl` tells line by line what was promoted and rolled back,
when and why; what is in service follows from it. Each file is written whole or not at all, under a lock, so nothing is
lost, whoever else writes at the same time and wherever a process is killed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fedlab_kit import data
from fedlab_kit.data import Split
from fedlab_kit.deployment import score
from fedlab_kit.deployment.artifact import Artifact, compress, load
from fedlab_kit.deployment.evaluate import EVERYONE, compare
from fedlab_kit.experiment import Recipe
from fedlab_kit.files import StoreError, at, filling, sweep_up, write_bytes, writing
from fedlab_kit.run import Run
from fedlab_kit.runs import train

MODEL = "model.onnx"


@dataclass(frozen=True)
class Version:
    """One artifact in a registry: its `number`, where it lies, its SHA-256, and what was noted when it was added."""

    number: int
    path: Path
    digest: str
    note: str

    def load(self) -> Artifact:
        """Open the artifact. Raises StoreError when the file is not the one that was added."""
        artifact = load(self.path / MODEL)
        if artifact.digest != self.digest:
            raise StoreError(f"{self.path} is damaged: another artifact lies there than was added; roll back")
        return artifact


class Registry:
    """The versions in a folder and the one in service; made when first written to. Two processes may share it.

    Example: `registry = Registry("registry/tablet"); registry.promote(registry.add(artifact), "first")`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = at(folder)

    @property
    def versions(self) -> list[Version]:
        """All versions, oldest first. Raises StoreError naming a file that is damaged."""
        return [self.version(number) for number in self._numbers()]

    @property
    def history(self) -> list[dict[str, Any]]:
        """What happened, oldest first: `event` (promote or rollback), `version` in service since, `why`, `when`."""
        file, older = self.folder / "history.jsonl", sorted(self.folder.glob("events/[0-9]*"))  # once a file for each
        files = [file] if file.exists() else older
        return [event for path in files for event in _read(path, "event", "version", "why", "when")]

    @property
    def current(self) -> Version | None:
        """The version in service, None before the first promotion."""
        stack = self._stack()
        return self.version(stack[-1]) if stack else None

    def in_service(self) -> Version:
        """Return the version in service. Raises ValueError when there is none."""
        if (current := self.current) is None:
            raise ValueError("nothing is in service yet: promote a version first")
        return current

    def version(self, number: int) -> Version:
        """Return one version. ValueError lists those that exist."""
        path = self.folder / "versions" / f"{number:04d}"
        if not path.is_dir():
            raise ValueError(
                f"version must be one of {', '.join(map(str, self._numbers())) or 'none yet'}, got {number}"
            )
        [about] = _read(path / "version.json", "digest", "note")
        return Version(number, path, about["digest"], about["note"])

    def add(self, artifact: Artifact, note: str = "") -> Version:
        """Copy an artifact in as the next version, not yet in service. StoreError when damaged or not to be written."""
        digest = load(artifact.path).digest
        with self._locked():
            number = max(self._numbers(), default=0) + 1
            target = self.folder / "versions" / f"{number:04d}"
            with filling(target) as made:
                for end in ("", ".json"):
                    shutil.copyfile(f"{artifact.path}{end}", made / f"{MODEL}{end}")
                write_bytes(made / "version.json", json.dumps({"digest": digest, "note": note}).encode())
        return self.version(number)

    def promote(self, version: Version | int, why: str) -> Version:
        """Put a version into service, once its file has been opened. ValueError or StoreError leave all as it was."""
        wanted = self.version(version.number if isinstance(version, Version) else version)
        wanted.load()
        with self._locked():
            self._note("promote", wanted.number, why)
        return wanted

    def rollback(self, why: str) -> Version:
        """Put the version into service that was there before the current one; again, and the one before that.

        Raises ValueError when there is none, StoreError when its file is damaged; the current one then stays.
        """
        with self._locked():
            stack = self._stack()
            if len(stack) < 2:
                raise ValueError("there is no earlier version to go back to")
            earlier = self.version(stack[-2])
            earlier.load()
            self._note("rollback", earlier.number, why)
        return earlier

    def install(self, folder: str | Path) -> Path:
        """Copy what is in service to a device's folder, with its card and `score.py`. ValueError when nothing is."""
        current, target = self.in_service(), at(folder)
        current.load()
        write_bytes(target / "score.py", Path(score.__file__).read_bytes())
        for name in (MODEL, f"{MODEL}.json"):
            write_bytes(target / name, (current.path / name).read_bytes())
        return target

    def _stack(self) -> list[int]:
        """The versions that a chain of rollbacks would go through, the current one last."""
        stack: list[int] = []
        for event in self.history:
            if event["event"] == "promote":
                stack.append(event["version"])
            elif stack[-2:-1] == [event["version"]]:
                stack.pop()
            else:
                raise StoreError(f"the registry {self.folder} is damaged: what came before {event} is gone")
        return stack

    def _numbers(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.glob("versions/[0-9]*"))

    def _note(self, event: str, number: int, why: str) -> None:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        events = [*self.history, {"event": event, "version": number, "why": why, "when": when}]
        write_bytes(self.folder / "history.jsonl", "".join(f"{json.dumps(one)}\n" for one in events).encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock

        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                sweep_up(self.folder, "history.jsonl")
                yield


def _read(path: Path, *keys: str) -> list[dict[str, Any]]:
    """Read a JSON-lines file of the registry. Raises StoreError naming it, and the line that is cut or altered."""
    place, found = str(path), []
    try:
        for number, line in enumerate(path.read_text().splitlines() or [""], start=1):
            place = f"{path}, line {number},"
            content = json.loads(line)
            found.append({key: content[key] for key in keys})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"the registry's file {place} is damaged ({error}): restore it from a copy") from error
    return found


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
    """Train the run's model on for a few rounds on a newer data set, compress it, add it, and promote it if `better`.

    That is judged on the validation patients of the newer data. Raises ValueError when nothing is in service or the
    data do not fit.
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

    The mean log loss must be lower, by a paired permutation test at 5 %, and no site "hurt" as `compare` calls it.
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
