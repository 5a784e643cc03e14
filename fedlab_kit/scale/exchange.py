"""The server's side of the adapter: a round's broadcasts and answers over Flower's Grid."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from threading import Event
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.client import Stopped
from fedlab_kit.federation.messages import ClientState, open_broadcast, remember
from fedlab_kit.federation.rounds import Exchanged
from fedlab_kit.federation.setup import Task
from fedlab_kit.scale.client import RECORD


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
        self,
        job: Task,
        round: int,
        broadcasts: Mapping[int, bytes],
        kept: Mapping[int, ClientState],
        stop: Event | None,
    ) -> Exchanged:
        """Send the broadcasts, wait for the answers, and say what became of each. Raises Stopped."""
        _pause(0, stop)
        experiment = job.experiment
        self._roll_call(experiment, stop)
        messages = {
            client: self._message(experiment, round, client, broadcast, kept[client])
            for client, broadcast in broadcasts.items()
            if self.nodes.get(client) in self.online
        }
        sent = set(self.grid.push_messages(list(messages.values()))) if messages else set()
        waiting = {m.metadata.message_id: client for client, m in messages.items() if m.metadata.message_id in sent}
        unreached = frozenset(broadcasts) - set(waiting.values())
        replies = self._collect(waiting, stop)
        result = Exchanged({}, {}, dict.fromkeys(unreached, "not connected"), unreached)
        result.silent.update(dict.fromkeys(waiting.values(), f"no answer within {self.patience:g} s"))
        for client, fields in replies.items():
            if _enter(result, client, fields):
                result.kept[client] = _known(job, round, client, broadcasts[client], kept[client])
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

    def _roll_call(self, experiment: Experiment, stop: Event | None) -> None:
        """See who is connected; before the first round wait until everybody is, but not longer than `patience`."""
        end = time.monotonic() + (0 if self.nodes else self.patience)
        while True:
            self._look(experiment.clients)
            if {self.nodes.get(client) for client in range(experiment.clients)} <= self.online:
                return
            if time.monotonic() >= end:
                break
            _pause(0.2, stop)
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

    def _collect(self, waiting: dict[str, int], stop: Event | None) -> dict[int, Mapping[str, Any]]:
        """Return the fields of the replies by client; who has not answered in time stays in `waiting`."""
        replies: dict[int, Mapping[str, Any]] = {}
        began = time.monotonic()
        while waiting and (passed := time.monotonic() - began) < self.patience:
            for reply in self.grid.pull_messages(list(waiting)):
                client = waiting.pop(reply.metadata.reply_to_message_id, None)
                if client is not None:
                    replies[client] = _fields(reply)
            if waiting:
                _pause(min(0.5, 0.01 + passed / 20), stop)  # asking costs the server, waiting costs the round
        return replies


def _fields(reply: Message) -> Mapping[str, Any]:
    """Return what a reply says; an error of Flower's or of the client's code as the field `error`."""
    if reply.has_error():
        return {"error": reply.error.reason or f"Flower error {reply.error.code}"}
    return reply.content.config_records.get(RECORD, {})


def _enter(result: Exchanged, client: int, fields: Mapping[str, Any]) -> bool:
    """Put a reply into the result; return whether the client keeps something until the next round."""
    if isinstance(fields.get("payload"), bytes):
        result.payloads[client] = fields["payload"]
        return bool(fields.get("keeps"))
    if "lost" in fields:
        result.kept[client] = {"round": torch.tensor(0)}
        result.silent[client] = "it no longer has what it kept, and begins anew"
    elif "dropped" not in fields:
        result.silent[client] = _first_line(fields.get("error", "an answer without a payload"))
    return False


def _first_line(reason: object) -> str:
    return (str(reason).strip().splitlines() or ["an answer without a reason"])[0][:200]


def _known(job: Task, round: int, client: int, broadcast: bytes, kept: ClientState) -> ClientState:
    """Return what the server notes about a client that keeps something: since when, and what the model is for it."""
    noted: ClientState = {"round": torch.tensor(round)}
    if job.experiment.downlink == "fp32":
        return noted
    return remember(job, open_broadcast(job, client, broadcast, kept), noted)


def _pause(seconds: float, stop: Event | None) -> None:
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise Stopped
