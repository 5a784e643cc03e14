"""The loop: a generator of round records. It names no technique and touches no disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from threading import Event, Lock
from time import perf_counter
from typing import NamedTuple

import torch

from fedlab_kit.federation.client import Stopped, cohort_step, stoppable
from fedlab_kit.federation.messages import ClientState
from fedlab_kit.federation.server import (
    RoundRecord,
    ServerState,
    answering,
    broadcast,
    note_copies,
    select,
    server_step,
)
from fedlab_kit.federation.setup import Task


class Exchanged(NamedTuple):
    """What came of a round's broadcasts, by client id.

    `payloads` are the answers, `kept` what is to be remembered about clients if theirs counts; `silent` says why a
    client that was expected to answer did not; `unreached` names those to whom the broadcast was never handed over,
    `lost` those that have nothing left of earlier rounds and begin anew.
    """

    payloads: dict[int, bytes]
    kept: dict[int, ClientState]
    silent: dict[int, str]
    unreached: frozenset[int] = frozenset()
    lost: frozenset[int] = frozenset()


Exchange = Callable[[Task, int, Mapping[int, bytes], Mapping[int, ClientState]], Exchanged]
"""(task, round, broadcasts, kept) -> what came back: how messages travel between server and clients."""


def in_process(task: Task, round: int, broadcasts: Mapping[int, bytes], kept: Mapping[int, ClientState]) -> Exchanged:
    """Hand the broadcasts to clients of this process, and train those that do not drop out together."""
    present = answering(task.experiment, round, sorted(broadcasts))
    return Exchanged(*cohort_step(task, round, {c: broadcasts[c] for c in present}, kept), {})


def play(
    state: ServerState,
    clients: MutableMapping[int, ClientState],
    stop: Event | None = None,
    exchange: Exchange = in_process,
) -> Iterator[tuple[ServerState, RoundRecord]]:
    """Go on from `state` to the last round and yield the new state with its record after each.

    `clients` holds what clients keep between rounds, by id; it is updated in place just before each yield. `exchange`
    carries the messages: within this process, or wherever the clients are. Setting `stop` ends the loop before the
    next batch, without a record of the broken round.
    """
    task = state.task
    while state.round < task.experiment.rounds and not (stop is not None and stop.is_set()):
        began = perf_counter()
        try:
            with one_thread(), stoppable(stop):
                # 1. The server samples a cohort and sends it the model.
                cohort = select(task.experiment, state.round + 1)
                messages = broadcast(state, cohort)
                # 2. Those who do not drop out train on their own samples and pack what changed.
                kept = {client: clients.get(client, {}) for client in cohort}
                came = exchange(task, state.round + 1, messages, kept)
                # 3. The server decodes and combines the updates. 4. It evaluates the new model.
                sent = {client: b"" if client in came.unreached else m for client, m in messages.items()}
                own = None if task.shared is None else {**clients, **came.kept}
                after, record = server_step(state, sent, came.payloads, came.silent, own)
                note_copies(state, sent, record.answered, came.lost)
        except Stopped:
            return
        # What was refused did not happen: that client goes on from what it kept before.
        clients.update({client: came.kept[client] for client in record.answered if came.kept.get(client)})
        clients.update({client: {} for client in came.lost})
        state = after
        yield state, replace(record, seconds=perf_counter() - began)
        if record.diverged:
            return


_turn, _users, _threads = Lock(), 0, 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread inside the block: the fastest for models this small, and the only setting that
    repeats bit for bit. The setting is the process's: the last of several users puts back what the first found.
    """
    global _users, _threads
    with _turn:
        _users += 1
        if _users == 1:
            _threads = torch.get_num_threads()
            torch.set_num_threads(1)
    try:
        yield
    finally:
        with _turn:
            _users -= 1
            if _users == 0:
                torch.set_num_threads(_threads)
