"""What earlier benches left in the store: runs without their models."""

from __future__ import annotations

from pathlib import Path

from fedlab_kit.experiment import Experiment
from fedlab_kit.run import StoredRun
from fedlab_kit.store import RunFolder


class History:
    """The runs of a store, oldest first.

    A folder that cannot be read is left out and named in `damaged`; one without a whole round is passed over.
    """

    def __init__(self, folder: Path) -> None:
        self.runs: tuple[StoredRun, ...] = ()
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
