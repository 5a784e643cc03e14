"""The loop: a generator of round records. It names no technique and touches no disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import replace
from threading import Event
from time import perf_counter
from typing import NamedTuple

import torch

from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.descent import Stopped
from fedlab_kit.federation.local import cohort_step
from fedlab_kit.federation.messages import ClientState
from fedlab_kit.federation.record import RoundRecord
from fedlab_kit.federation.server import (
    ServerState,
    answering,
    broadcast,
    select,
    server_step,
    start,
    without,
)
from fedlab_kit.federation.task import OUTCOMES


class Exchanged(NamedTuple):
    """What came of a round's broadcasts, by client id.

    `payloads` are the answers, `kept` what is remembered about clients until the next round; `silent` says why a
    client that was expected to answer did not; `unreached` names those to whom the broadcast was never handed over.
    """

    payloads: dict[int, bytes]
    kept: dict[int, ClientState]
    silent: dict[int, str]
    unreached: frozenset[int] = frozenset()


Exchange = Callable[
    [Experiment, int, Mapping[int, bytes], Mapping[int, ClientState], Event | None],
    Exchanged,
]
"""(experiment, round, broadcasts, kept, stop) -> what came back: how messages travel between server and clients."""


def in_process(
    experiment: Experiment,
    round: int,
    broadcasts: Mapping[int, bytes],
    kept: Mapping[int, ClientState],
    stop: Event | None,
) -> Exchanged:
    """Hand the broadcasts to clients of this process, and train those that do not drop out together."""
    present = answering(experiment, round, sorted(broadcasts))
    return Exchanged(*cohort_step(experiment, round, {c: broadcasts[c] for c in present}, kept, stop), {})


def rounds(experiment: Experiment, stop: Event | None = None) -> Iterator[RoundRecord]:
    """Run the experiment and yield one `RoundRecord` a round; nothing is stored.

    Setting `stop` ends the loop before the next batch, without a record of the broken round.
    """
    for parent in experiment.parents:
        _finish(parent, stop)
    if stop is None or not stop.is_set():
        for _, record in play(start(experiment), {}, stop):
            yield record


def _finish(experiment: Experiment, stop: Event | None) -> None:
    """Play an experiment that another needs to its end, unless somebody has done so in this process."""
    if experiment in OUTCOMES:
        return
    for parent in experiment.parents:
        _finish(parent, stop)
    for state, _ in play(start(experiment), {}, stop):
        if state.round == experiment.rounds:
            OUTCOMES[experiment] = state.weights


def play(
    state: ServerState,
    clients: MutableMapping[int, ClientState],
    stop: Event | None = None,
    exchange: Exchange = in_process,
) -> Iterator[tuple[ServerState, RoundRecord]]:
    """Go on from `state` to the last round and yield the new state with its record after each.

    `clients` holds what clients keep between rounds, by id; it is updated in place just before each yield. `exchange`
    carries the messages: within this process, or wherever the clients are.
    """
    experiment = state.experiment
    while state.round < experiment.rounds:
        began = perf_counter()
        try:
            state, record = _round(state, clients, stop, exchange)
        except Stopped:
            return
        yield state, replace(record, seconds=perf_counter() - began)
        if record.diverged:
            return


def _round(
    state: ServerState, clients: MutableMapping[int, ClientState], stop: Event | None, exchange: Exchange
) -> tuple[ServerState, RoundRecord]:
    experiment, round = state.experiment, state.round + 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the fastest for models this small, and the only setting that repeats bit for bit
    try:
        # 1. The server samples a cohort and sends it the model.
        cohort = select(experiment, round)
        kept = {client: clients.get(client, {}) for client in cohort}
        messages, state = broadcast(state, cohort, {client: memory.get("copy") for client, memory in kept.items()})
        # 2. Those who do not drop out train on their own samples and pack what changed.
        answers = exchange(experiment, round, messages, kept, stop)
        # 3. The server decodes and combines the updates. 4. It evaluates the new model.
        state, record = server_step(without(state, answers.unreached), answers.payloads, answers.silent)
    finally:
        torch.set_num_threads(threads)
    clients.update({client: memory for client, memory in answers.kept.items() if memory})
    return state, record
