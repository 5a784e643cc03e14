"""What earlier benches left in the store: runs without their models, and the cards of their artifacts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlab_kit.experiment import Experiment
from fedlab_kit.run import StoredRun
from fedlab_kit.store import RunFolder


class History:
    """The runs of a store, oldest first, and the cards of each run's artifacts, by the artifact's path.

    A folder that cannot be read is left out and named in `damaged`; one without a whole round is passed over.
    """

    def __init__(self, folder: Path) -> None:
        self.runs: tuple[StoredRun, ...] = ()
        self.cards: dict[str, dict[Path, dict[str, Any]]] = {}
        self.damaged: list[str] = []
        found: list[tuple[str, int, StoredRun]] = []  # `when` has whole seconds; the file's own time tells the rest
        for file in sorted(folder.glob("*/experiment.json")):
            try:
                run = _run(file.parent)
            except (OSError, ValueError, TypeError, KeyError):
                self.damaged.append(file.parent.name)
                continue
            if run.records:
                found.append((run.measured["when"], file.stat().st_mtime_ns, run))
                self.cards[run.key] = dict(_cards(file.parent))
        self.runs = tuple(run for *_, run in sorted(found, key=lambda one: one[:2]))

    @property
    def error(self) -> str:
        """A sentence on what could not be read, "" if nothing."""
        names = ", ".join(self.damaged[:3]) + (" and more" if len(self.damaged) > 3 else "")
        return f"{len(self.damaged)} stored run(s) cannot be read and are left out: {names}" if self.damaged else ""


def _run(path: Path) -> StoredRun:
    folder = RunFolder(path)
    experiment = Experiment(**folder.about()["experiment"])
    return StoredRun(experiment, path, tuple(folder.records()), folder.measured(), from_store=True)


def _cards(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the artifacts of a run, oldest first; one that lost its card or file is none."""
    found = []
    for file in (path / "artifacts").glob("*.onnx.json"):
        artifact = file.with_suffix("")
        try:
            card = json.loads(file.read_text())
            found.append((age(artifact, card), artifact, card))
        except (OSError, ValueError, TypeError, KeyError):
            continue
    yield from ((artifact, card) for _, artifact, card in sorted(found, key=lambda one: one[0]))


def age(artifact: Path, card: Mapping[str, Any]) -> tuple[str, int]:
    """Return what sorts artifacts by the time of their measurement; OSError when the file is gone."""
    return card["when"], artifact.stat().st_mtime_ns
