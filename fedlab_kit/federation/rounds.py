"""The loop: a generator of round records. It names no technique and touches no disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from threading import Event, Lock
from time import perf_counter
from typing import NamedTuple

import torch

from fedlab_kit.federation.descent import Stopped
from fedlab_kit.federation.local import cohort_step
from fedlab_kit.federation.messages import ClientState
from fedlab_kit.federation.record import RoundRecord
from fedlab_kit.federation.server import ServerState, answering, broadcast, select, server_step, without
from fedlab_kit.federation.task import Task


class Exchanged(NamedTuple):
    """What came of a round's broadcasts, by client id.

    `payloads` are the answers, `kept` what is remembered about clients until the next round; `silent` says why a
    client that was expected to answer did not; `unreached` names those to whom the broadcast was never handed over.
    """

    payloads: dict[int, bytes]
    kept: dict[int, ClientState]
    silent: dict[int, str]
    unreached: frozenset[int] = frozenset()


Exchange = Callable[[Task, int, Mapping[int, bytes], Mapping[int, ClientState], Event | None], Exchanged]
"""(job, round, broadcasts, kept, stop) -> what came back: how messages travel between server and clients."""


def in_process(
    job: Task, round: int, broadcasts: Mapping[int, bytes], kept: Mapping[int, ClientState], stop: Event | None
) -> Exchanged:
    """Hand the broadcasts to clients of this process, and train those that do not drop out together."""
    present = answering(job.experiment, round, sorted(broadcasts))
    return Exchanged(*cohort_step(job, round, {c: broadcasts[c] for c in present}, kept, stop), {})


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
    while state.round < state.experiment.rounds and not (stop is not None and stop.is_set()):
        began = perf_counter()
        try:
            with one_thread():
                state, record = _round(state, clients, stop, exchange)
        except Stopped:
            return
        yield state, replace(record, seconds=perf_counter() - began)
        if record.diverged:
            return


def _round(
    state: ServerState, clients: MutableMapping[int, ClientState], stop: Event | None, exchange: Exchange
) -> tuple[ServerState, RoundRecord]:
    job, round = state.job, state.round + 1
    # 1. The server samples a cohort and sends it the model.
    cohort = select(state.experiment, round)
    kept = {client: clients.get(client, {}) for client in cohort}
    messages, state = broadcast(state, cohort, {client: memory.get("copy") for client, memory in kept.items()})
    # 2. Those who do not drop out train on their own samples and pack what changed.
    answers = exchange(job, round, messages, kept, stop)
    # 3. The server decodes and combines the updates. 4. It evaluates the new model.
    own = None if job.shared is None else {**clients, **answers.kept}
    state, record = server_step(without(state, answers.unreached), answers.payloads, answers.silent, own)
    # What was refused did not happen: that client goes on from what it kept before.
    believed = {c: m for c, m in answers.kept.items() if m and (c in record.answered or c not in answers.payloads)}
    clients.update(believed)
    return state, record


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
