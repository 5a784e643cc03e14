"""The folder of one run, and how a round is written to it so that a kill at any moment leaves the last whole round.

A folder holds `experiment.json` (what was asked; where, when and how long it ran), `records.jsonl` (one line a round),
`state.safetensors` (what the server remembers), `clients/` (what each client keeps) and `copies/` (what the server
knows each to hold, which sends differences). The state is renamed
into place last: it makes the round count. It carries the digests of the records up to its round and of every client's
file, so that a flipped bit or a lost file is found when it is read, and said, never trained on. A round that was told
is on the disk.
"""

from __future__ import annotations

import hashlib
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

from fedlab_kit import code_reading
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.server import RoundRecord, ServerState, start
from fedlab_kit.federation.setup import Task
from fedlab_kit.files import (
    StoreError,
    at,
    damaged,
    is_number,
    read_about,
    read_json,
    read_tensors,
    sweep_up,
    to_disk,
    write_bytes,
    write_json,
    write_tensors,
    writing,
)


class RunFolder:
    """One run's files: load what is there, commit a round, describe where it was made."""

    def __init__(self, path: Path) -> None:
        self.path = at(path)
        self.clients, self.copies = ClientFiles(self.path / "clients"), ClientFiles(self.path / "copies")
        self.state, self.log = self.path / "state.safetensors", self.path / "records.jsonl"
        self._digest = hashlib.sha256()  # of the records so far

    @contextmanager
    def locked(self, stop: Event | None) -> Iterator[None]:
        """Hold the folder against other notebooks; wait for whoever has it, or until `stop` is set.

        What killed processes left half-written is swept up.
        Raises StoreError when the folder cannot be made, and TimeoutError when `stop` came first.
        """
        from filelock import FileLock, Timeout

        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", timeout=0.1)
            while True:
                try:
                    with lock:
                        for folder in (self.path, self.clients.folder, self.copies.folder, self.path / "artifacts"):
                            sweep_up(folder)
                        yield
                    return
                except Timeout:
                    if stop is not None and stop.is_set():
                        raise TimeoutError(f"{self.path} is in use by another notebook") from None

    def load(self, task: Task) -> tuple[ServerState, list[RoundRecord]]:
        """Return the state and the records of the last whole round, or the start. Raises StoreError when damaged."""
        if not self._counts():
            return start(task), []
        tensors, about = read_tensors(self.state)
        records = self._records_of(about)
        if not records:
            return start(task), []
        self.about()
        try:
            self.clients.expect(about.get("clients"))
            self.copies.expect(about.get("copies"))
        except StoreError:
            if read_about(self.state) == about:  # nobody has finished another round since
                raise
            return self.load(task)
        tensors = {name: tensor.to(task.experiment.device) for name, tensor in tensors.items()}
        if (weights := tensors.pop("weights", None)) is None:
            raise damaged(self.state, "the weights are gone")
        return replace(start(task), round=len(records), weights=weights, optimizer=tensors), records

    def whole(self) -> list[RoundRecord]:
        """Return the records of the whole rounds. Raises StoreError when they are not those that were written."""
        return self._records_of(read_about(self.state)) if self._counts() else []

    def memory(self, client: int) -> dict[str, Tensor]:
        """Return what a client keeps after the last whole round; {} for one that keeps nothing."""
        self.clients.expect(read_about(self.state).get("clients"))
        return self.clients.get(client, {})

    def records(self) -> list[RoundRecord]:
        """Return the whole lines of the record file, also of a round that does not count yet."""
        return self._parsed(self._lines())

    def _counts(self) -> bool:
        """Whether a state was written. Raises StoreError when it was and is gone: it comes before the first record."""
        try:
            names = os.listdir(self.path)
        except OSError as error:
            raise damaged(self.path, error) from error
        if self.state.name not in names and self.log.name in names and self._lines():
            raise damaged(self.state, "it is gone")
        return self.state.name in names

    def _records_of(self, about: dict[str, str]) -> list[RoundRecord]:
        """Return the records of the rounds that a state counts."""
        round = int(about["round"]) if about.get("round", "").isdigit() else 0
        lines = self._lines()[:round] if round else []
        self._digest = hashlib.sha256(b"".join(lines))
        records = self._parsed(lines)
        whole = about.get("records", self._digest.hexdigest()) == self._digest.hexdigest()  # older versions: no digest
        if not whole or [record.round for record in records] != list(range(1, round + 1)):
            raise damaged(self.log, f"{round} rounds were expected, as they were written")
        return records

    def _lines(self) -> list[bytes]:
        """Return the lines of the record file; one that was cut by a kill is none."""
        try:
            return [line + b"\n" for line in self.log.read_bytes().split(b"\n")[:-1]]
        except OSError as error:
            raise damaged(self.log, error) from error

    def _parsed(self, lines: list[bytes]) -> list[RoundRecord]:
        try:
            return RoundRecord.from_json(b"[" + b",".join(lines) + b"]")
        except ValueError as error:
            raise damaged(self.log, f"{len(lines)} rounds were expected, as they were written") from error

    def about(self) -> dict[str, Any]:
        """Return what `describe` wrote."""
        return read_json(self.path / "experiment.json")

    def measured(self) -> dict[str, Any]:
        """Return when, on which machine, with which torch and in how many seconds the records were made."""
        about = self.about()
        found = {name: about.get(name) for name in ("when", "machine", "torch", "seconds")}
        *words, seconds = found.values()
        if not (all(isinstance(word, str) for word in words) and is_number(seconds)):
            raise damaged(self.path / "experiment.json", f"text and seconds are expected, got {found!r:.200}")
        return found

    def out_of_reach(self, engine: str) -> bool:
        """Whether going on would need what clients kept on another engine, or in a Flower run that is over."""
        if not any(self.clients.folder.glob("*.safetensors")):
            return False
        return "flower" in (engine, self.about().get("engine"))

    def prepare(self, state: ServerState, records: list[RoundRecord], engine: str) -> None:
        """Do away with whatever a kill left behind the last whole round; without one, begin with a state of none."""
        if not records:
            self._digest, self.clients.kept, self.copies.kept = hashlib.sha256(), {}, {}
            self._count(state)
        if self.log.exists():
            write_bytes(self.log, b"".join(self._lines()[: len(records)]))
        self.clients.rewind()
        self.copies.rewind()
        self.describe(state.experiment, records, engine)

    def commit(self, state: ServerState, record: RoundRecord) -> None:
        """Bring one round to the disk, each file before the next: the state that makes the round count is last."""
        line = f"{json.dumps(record.to_dict())}\n".encode()
        self._digest.update(line)
        with writing(self.log), self.log.open("ab") as file:
            file.write(line)
        to_disk(self.log)
        replaced = [*self.clients.write(state.round), *self.copies.write(state.round)]
        self._count(state)
        for path in replaced:
            path.unlink(missing_ok=True)

    def _count(self, state: ServerState) -> None:
        about = {"round": f"{state.round}", "records": self._digest.hexdigest()}
        about |= {"clients": self.clients.manifest(), "copies": self.copies.manifest()}
        write_tensors(self.state, {"weights": state.weights, **state.optimizer}, about)

    def describe(self, experiment: Experiment, records: list[RoundRecord], engine: str) -> None:
        """Write what was asked, and when, where, on what engine and in how many seconds it was measured."""
        about = {
            "experiment": experiment.changes(),
            **when_and_where(),
            "torch": torch.__version__,
            "code": code_reading.own_code(),
            "engine": engine,
            "seconds": sum(record.seconds for record in records),
        }
        write_json(self.path / "experiment.json", about)


def when_and_where() -> dict[str, str]:
    """Return the time (UTC, to the second) and the machine of a measurement, as it stands beside every figure."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


class ClientFiles(MutableMapping[int, dict[str, Tensor]]):
    """What clients keep between rounds, on disk: memory follows the cohort, however large the population.

    Files are named `<client>-<round>`, so that a kill in the middle of a round leaves what was true before it: `write`
    says what its files replace once the round counts, `rewind` removes what came after a round that counts. `kept` has
    `<client>-<round>-<seal>` of each client's file and travels as `manifest` in the state; it is None when an older
    version wrote that, without.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.changed: dict[int, dict[str, Tensor]] = {}
        self.kept: dict[int, str] | None = {}

    def __getitem__(self, client: int) -> dict[str, Tensor]:
        if client in self.changed:
            return self.changed[client]
        file, seal = self._file(self._known[client]), self._known[client].split("-")[2]
        memory, about = read_tensors(file)
        if about.get("seal") != seal:
            raise damaged(file, "its digest is another one")
        return memory

    def __setitem__(self, client: int, memory: dict[str, Tensor]) -> None:
        self.changed[client] = memory

    def __delitem__(self, client: int) -> None:
        raise TypeError("what a client keeps is replaced, never deleted")

    def __iter__(self) -> Iterator[int]:
        return iter(self._known.keys() | self.changed.keys())

    def __len__(self) -> int:
        return len(self._known.keys() | self.changed.keys())

    @property
    def _known(self) -> dict[int, str]:
        if self.kept is None:
            raise StoreError(f"{self.folder.parent} was written by an older version: delete it to run it again")
        return self.kept

    def write(self, round: int) -> list[Path]:
        """Bring what changed in this round to the disk; returns the files that it replaces, which are left."""
        replaced = [self._file(self._known[client]) for client in self.changed if client in self._known]
        for client, memory in self.changed.items():
            seal = write_tensors(self._file(f"{client}-{round}-"), memory, {}, listed=False)
            self._known[client] = f"{client}-{round}-{seal}"
        if self.changed:
            to_disk(self.folder)
        self.changed = {}
        return replaced

    def manifest(self) -> str:
        """Return `kept` in one line."""
        return " ".join(self._known.values())

    def expect(self, manifest: str | None) -> None:
        """Take over a manifest. StoreError names a file that is gone; what is there is checked when read."""
        kept = {int(word.split("-")[0]): word for word in (manifest or "").split()}
        names = set(os.listdir(self.folder)) if self.folder.exists() else set()
        for word in kept.values():
            if (file := self._file(word)).name not in names:
                raise damaged(file, "it is gone")
        self.kept = None if manifest is None else kept

    def rewind(self) -> None:
        """Remove what is not kept."""
        self.changed, names = {}, {self._file(word).name for word in self._known.values()}
        for path in self.folder.glob("*.safetensors"):
            if path.name not in names:
                path.unlink(missing_ok=True)

    def _file(self, word: str) -> Path:
        return self.folder / f"{word.rpartition('-')[0]}.safetensors"
