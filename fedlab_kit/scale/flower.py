"""The same experiment on Flower: its rounds over the Grid, the apps of `flwr run .`, and engine="flower" on Ray."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.client import pause
from fedlab_kit.federation.messages import ClientState
from fedlab_kit.federation.rounds import Exchanged
from fedlab_kit.federation.server import RoundRecord
from fedlab_kit.federation.setup import Task
from fedlab_kit.run import Run
from fedlab_kit.runs import execute
from fedlab_kit.scale.client import RECORD, client, line, modules_of, read

server = ServerApp()


class GridExchange:
    """Carries rounds over a Flower Grid: an `Exchange`, to be given to `train` or `play`.

    A node that was registered under a client's number is that client, whenever it is connected. Where no node has
    such a name (in a simulation) the nodes are numbered in order. `patience` is how many seconds the server waits
    for all nodes before its first round, and in each round for answers; `modules` are imported by the clients first.

    A client's memory counts only when the server has its answer: each message names the last such round (`base`),
    and the client goes on from what it kept then. So a lost answer does no harm, and a client that has lost its
    memory says so and begins anew.
    """

    def __init__(self, grid: Grid, patience: float = 60.0, modules: Iterable[str] = ()) -> None:
        self.grid, self.patience, self.modules = grid, patience, json.dumps(list(modules))
        self.nodes: dict[int, int] = {}  # client -> node
        self.online: set[int] = set()

    def __call__(
        self, task: Task, round: int, broadcasts: Mapping[int, bytes], kept: Mapping[int, ClientState]
    ) -> Exchanged:
        """Send the broadcasts, wait for the answers, and say what became of each. Raises Stopped."""
        pause()
        experiment = task.experiment
        self._roll_call(experiment)
        messages = {
            client: self._message(experiment, round, client, broadcast, kept[client])
            for client, broadcast in broadcasts.items()
            if self.nodes.get(client) in self.online
        }
        sent = set(self.grid.push_messages(list(messages.values()))) if messages else set()
        waiting = {m.metadata.message_id: client for client, m in messages.items() if m.metadata.message_id in sent}
        unreached = frozenset(broadcasts) - set(waiting.values())
        replies = self._collect(waiting)
        lost = frozenset(client for client, fields in replies.items() if "lost" in fields)
        result = Exchanged({}, {}, dict.fromkeys(unreached, "not connected"), unreached, lost)
        result.silent.update(dict.fromkeys(waiting.values(), f"no answer within {self.patience:g} s"))
        for sender, fields in replies.items():
            _enter(result, round, sender, fields)
        return result

    def _message(self, experiment: Experiment, round: int, client: int, broadcast: bytes, kept: ClientState) -> Message:
        asked: dict[str, Any] = {
            "experiment": json.dumps(experiment.changes()),
            "modules": self.modules,
            "round": round,
            "client": client,
            "base": int(kept.get("round", 0)),
            "broadcast": broadcast,
        }
        content = RecordDict({RECORD: ConfigRecord(asked)})
        return Message(content, self.nodes[client], "train", ttl=2 * self.patience, group_id=str(round))

    def _roll_call(self, experiment: Experiment) -> None:
        """See who is connected; before the first round wait until everybody is, but not longer than `patience`."""
        end = time.monotonic() + (0 if self.nodes else self.patience)
        while True:
            self._look(experiment.clients)
            if {self.nodes.get(client) for client in range(experiment.clients)} <= self.online:
                return
            if time.monotonic() >= end:
                break
            pause(0.2)
        if not self.nodes:
            raise ValueError(
                f"clients must be at most the connected nodes ({len(self.online)}), got {experiment.clients}: "
                "start more nodes, or set clients"
            )

    def _look(self, clients: int) -> None:
        online = set(self.grid.get_node_ids())
        if online == self.online and self.nodes:
            return
        self.online = online
        named = {int(node.name): node.node_id for node in self.grid.get_nodes() if node.name.isdecimal()}
        if named:
            self.nodes |= {client: node for client, node in named.items() if client < clients}
        elif not self.nodes and len(online) >= clients:
            self.nodes = dict(enumerate(sorted(online)))

    def _collect(self, waiting: dict[str, int]) -> dict[int, Mapping[str, Any]]:
        """Return the fields of the replies by client; who has not answered in time stays in `waiting`."""
        replies: dict[int, Mapping[str, Any]] = {}
        began = time.monotonic()
        while waiting and (passed := time.monotonic() - began) < self.patience:
            for reply in self.grid.pull_messages(list(waiting)):
                client = waiting.pop(reply.metadata.reply_to_message_id, None)
                if client is not None:
                    replies[client] = _fields(reply)
            if waiting:
                pause(min(0.5, 0.01 + passed / 20))  # asking costs the server, waiting costs the round
        return replies


def _fields(reply: Message) -> Mapping[str, Any]:
    """Return what a reply says; an error of Flower's or of the client's code as the field `error`."""
    if reply.has_error():
        return {"error": reply.error.reason or f"Flower error {reply.error.code}"}
    return reply.content.config_records.get(RECORD, {})


def _enter(result: Exchanged, round: int, client: int, fields: Mapping[str, Any]) -> None:
    """Put a reply into the result, and where the client keeps something, since when."""
    if isinstance(fields.get("payload"), bytes):
        result.payloads[client] = fields["payload"]
        if fields.get("keeps"):
            result.kept[client] = {"round": torch.tensor(round)}
    elif "lost" in fields:
        result.silent[client] = "it no longer has what it kept, and begins anew"
    elif "dropped" not in fields:
        result.silent[client] = _first_line(fields.get("error", "an answer without a payload"))


def _first_line(reason: object) -> str:
    return (str(reason).strip().splitlines() or ["an answer without a reason"])[0][:200]


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run's settings describe; the run lands in this machine's store."""
    settings = dict(context.run_config)
    patience, modules = float(settings.pop("patience")), str(settings.pop("modules")).split()
    for module in modules:
        import_module(module)
    execute(
        read(settings),
        progress=lambda record: print(line(record), flush=True),
        exchange=GridExchange(grid, patience, modules),
    )


def simulate(
    experiment: Experiment,
    stop: Event | None = None,
    progress: Callable[[RoundRecord], None] | None = None,
    store: Path | None = None,
) -> Run:
    """Do `fedlab_kit.runs.execute` with every client as a virtual node of Flower's simulation on Ray.

    Ray starts one worker per core and is gone when this returns. Raises ValueError when the experiment uses a model,
    data set or codec that is defined in a notebook: workers import what they need from files.
    """
    app, ended = ServerApp(), stop or Event()
    outcome: list[Run] = []
    modules = modules_of(experiment)

    @app.main()
    def _(grid: Grid, context: Context) -> None:
        exchange = GridExchange(grid, patience=3600.0, modules=modules)
        outcome.append(execute(experiment, ended, progress, store, exchange))

    # Flower prefers `flwr run`, which leaves a server behind; this starts nothing that outlives the call.
    with _ray():
        try:
            run_simulation(app, client, experiment.clients, backend_config={"client_resources": {"num_cpus": 1}})
        except BaseException:
            ended.set()
            raise
    return outcome[0]


@contextmanager
def _ray() -> Iterator[None]:
    """Ray with a worker per core, its files in a temporary folder; Flower's log is kept to errors meanwhile."""
    import ray

    logger, path = logging.getLogger("flwr"), os.environ.get("PYTHONPATH")
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # workers find what this process finds
    with tempfile.TemporaryDirectory(prefix="fedlab-", ignore_cleanup_errors=True) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _start_ray(folder)
            yield
        finally:
            ray.shutdown()
            logger.setLevel(level)
            os.environ.pop("PYTHONPATH")
            if path is not None:
                os.environ["PYTHONPATH"] = path


def _start_ray(folder: str) -> None:
    """Start Ray on this machine; on a busy one its own limit of 30 s is too short, so it is tried again."""
    import ray

    for left in (2, 1, 0):
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                object_store_memory=200 * 2**20,
                _temp_dir=folder,
                _node_ip_address="127.0.0.1",
            )
            return
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise
            ray.shutdown()
