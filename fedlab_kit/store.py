"""The folder of one run, and how a round is written to it so that a kill at any moment leaves the last whole round.

A folder holds `experiment.json` (what was asked; where, when and how long it ran), `records.jsonl` (one line a round),
`state.safetensors` (all that the server remembers) and `clients/` (what each client keeps). The state is renamed
into place last: it makes the round count.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from fedlab_kit import catalog
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.record import RoundRecord
from fedlab_kit.federation.server import ServerState, start
from fedlab_kit.federation.task import Task
from fedlab_kit.files import StoreError, read_tensors, write_bytes, write_tensors, writing


class RunFolder:
    """One run's files: load what is there, commit a round, describe where it was made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clients = ClientFiles(path / "clients")

    @contextmanager
    def locked(self, stop: Event | None) -> Iterator[None]:
        """Hold the folder against other notebooks; wait for whoever has it, or until `stop` is set.

        Raises StoreError when the folder cannot be made, and TimeoutError when `stop` came first.
        """
        from filelock import FileLock, Timeout

        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", timeout=0.1)
            while True:
                try:
                    with lock:
                        yield
                    return
                except Timeout:
                    if stop is not None and stop.is_set():
                        raise TimeoutError(f"{self.path} is in use by another notebook") from None

    def load(self, job: Task) -> tuple[ServerState, list[RoundRecord]]:
        """Return the state and the records of the last whole round, or the start. Raises StoreError when damaged."""
        file = self.path / "state.safetensors"
        if not file.exists():
            return start(job), []
        tensors, about = read_tensors(file)
        tensors = {name: tensor.to(job.experiment.device) for name, tensor in tensors.items()}
        round, weights = int(about["round"]), tensors.pop("weights")
        records = self.records()[:round]
        if [record.round for record in records] != list(range(1, round + 1)):
            raise StoreError(f"{self.path} is damaged: records of {round} rounds were expected; delete the folder")
        return replace(start(job), round=round, weights=weights, slots=tensors), records

    def memory(self, client: int) -> dict[str, Tensor]:
        """Return what a client keeps after the last whole round; {} for one that keeps nothing."""
        files = sorted(self.clients.folder.glob(f"{client}-*.safetensors"), key=lambda p: int(p.stem.split("-")[1]))
        return read_tensors(files[-1])[0] if files else {}

    def records(self) -> list[RoundRecord]:
        """Return the whole lines of the record file; a line that was cut by a kill is none."""
        try:
            lines = (self.path / "records.jsonl").read_text().split("\n")[:-1]
            return [RoundRecord.from_dict(json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(f"{self.path}/records.jsonl is damaged ({error}); delete the folder") from error

    def about(self) -> dict[str, Any]:
        """Return what `describe` wrote."""
        return json.loads((self.path / "experiment.json").read_text())

    def measured(self) -> dict[str, Any]:
        """Return when, on which machine, with which torch and in how many seconds the records were made."""
        about = self.about()
        return {name: about[name] for name in ("when", "machine", "torch", "seconds")}

    def out_of_reach(self, engine: str) -> bool:
        """Whether going on would need what clients kept on another engine, or in a Flower run that is over."""
        if not any(self.clients.folder.glob("*.safetensors")):
            return False
        return "flower" in (engine, self.about().get("engine"))

    def prepare(self, experiment: Experiment, records: list[RoundRecord], engine: str) -> None:
        """Do away with whatever a kill left behind the last whole round."""
        if not records:
            (self.path / "state.safetensors").unlink(missing_ok=True)
        lines = "".join(_line(record) for record in records)
        write_bytes(self.path / "records.jsonl", lines.encode())
        self.clients.rewind(len(records))
        self.describe(experiment, records, engine)

    def commit(self, state: ServerState, record: RoundRecord) -> None:
        """Write one round."""
        log = self.path / "records.jsonl"
        with writing(log), log.open("a") as file:
            file.write(_line(record))
        self.clients.flush(state.round)
        tensors = {"weights": state.weights, **state.slots}
        write_tensors(self.path / "state.safetensors", tensors, {"round": str(state.round)})
        self.clients.settle(state.round)

    def describe(self, experiment: Experiment, records: list[RoundRecord], engine: str) -> None:
        """Write what was asked, and when, where, on what engine and in how many seconds it was measured."""
        about = {
            "experiment": experiment.changes(),
            **when_and_where(),
            "torch": torch.__version__,
            "code": catalog.code(),
            "engine": engine,
            "seconds": sum(record.seconds for record in records),
        }
        write_bytes(self.path / "experiment.json", json.dumps(about, indent=1).encode())


def when_and_where() -> dict[str, str]:
    """Return the time (UTC, to the second) and the machine of a measurement, as it stands beside every figure."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _line(record: RoundRecord) -> str:
    return json.dumps(record.to_dict()) + "\n"


class ClientFiles(MutableMapping[int, dict[str, Tensor]]):
    """What clients keep between rounds, on disk: memory follows the cohort, however large the population.

    Files are named `<client>-<round>`, so that a kill in the middle of a round leaves what was true before it:
    `flush` writes what changed, `settle` removes what it replaced once the round counts, `rewind` does away with
    what came after a round that counts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.changed: dict[int, dict[str, Tensor]] = {}
        self.files: dict[int, Path] = {}

    def __getitem__(self, client: int) -> dict[str, Tensor]:
        if client in self.changed:
            return self.changed[client]
        return read_tensors(self.files[client])[0]

    def __setitem__(self, client: int, memory: dict[str, Tensor]) -> None:
        self.changed[client] = memory

    def __delitem__(self, client: int) -> None:
        raise TypeError("what a client keeps is replaced, never deleted")

    def __iter__(self) -> Iterator[int]:
        return iter(self.files.keys() | self.changed.keys())

    def __len__(self) -> int:
        return len(self.files.keys() | self.changed.keys())

    def flush(self, round: int) -> None:
        """Write what changed in this round beside what was there."""
        for client, memory in self.changed.items():
            write_tensors(self._file(client, round), memory, {})

    def settle(self, round: int) -> None:
        """Forget what this round replaced."""
        for client in self.changed:
            old, self.files[client] = self.files.get(client), self._file(client, round)
            if old is not None:
                old.unlink(missing_ok=True)
        self.changed = {}

    def rewind(self, round: int) -> None:
        """Find each client's newest file up to `round` and remove the others."""
        self.changed, self.files = {}, {}
        named = sorted(
            (int(p.stem.split("-")[1]), int(p.stem.split("-")[0]), p) for p in self.folder.glob("*-*.safetensors")
        )
        for made, client, path in named:
            if made > round:
                path.unlink(missing_ok=True)
                continue
            if client in self.files:
                self.files[client].unlink(missing_ok=True)
            self.files[client] = path

    def _file(self, client: int, round: int) -> Path:
        return self.folder / f"{client}-{round}.safetensors"
