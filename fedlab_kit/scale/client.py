"""An experiment as the flat settings of a Flower run, and what Flower calls on a client's node."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load, save

from fedlab_kit import catalog
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation import setup
from fedlab_kit.federation.client import client_step
from fedlab_kit.federation.messages import ClientState
from fedlab_kit.federation.server import RoundRecord, answering, select
from fedlab_kit.federation.setup import Parents, Task
from fedlab_kit.identity import Unknowable
from fedlab_kit.runs import find, identify, parents_of, parts

RECORD = "fedlab"  # the one record in every message, both ways
NESTED = ("teacher", "start", "start_recipe", "missing")  # travel as JSON text, "" for none


def write(experiment: Experiment) -> dict[str, Any]:
    """Return the experiment as the flat settings of a Flower run."""
    settings = experiment.changes()
    return {name: json.dumps(value) if name in NESTED else value for name, value in settings.items()}


def read(settings: Mapping[str, Any]) -> Experiment:
    """Return the experiment that a run's settings describe. Raises ValueError naming a field that is wrong."""
    values = dict(settings)
    for name in NESTED:
        text = values.pop(name, "")
        if text:
            values[name] = json.loads(text)
    return Experiment(**values)


def line(record: RoundRecord) -> str:
    """Return one round in one line."""
    said = [
        f"round {record.round:3}",
        f"accuracy {record.accuracy:6.1%}",
        f"answered {len(record.answered)} of {len(record.cohort)}",
        f"up {record.uplink_bytes:,} B",
        f"down {record.downlink_bytes:,} B",
        f"{record.seconds:.1f} s",
        *(f"client {client}: {why}" for client, why in record.refused),
        *([record.note] if record.note else []),
    ]
    return " | ".join(said)


def modules_of(experiment: Experiment) -> list[str]:
    """Return the modules, beside the package, that hold what the experiment uses. ValueError if one is no module."""
    own = {thing.__module__: thing.__qualname__ for thing in parts(experiment) if not catalog.is_built_in(thing)}
    if name := own.get("__main__"):
        raise ValueError(
            f"{name} is defined in a notebook or script: Flower's processes need it in a module of its own"
        )
    return sorted(set(own).union(*map(modules_of, experiment.parents)))


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Do `client_step` with what the message asks and what the context remembers; the reply carries the payload."""
    reply = answer(message.content.config_records[RECORD], context.state)
    return Message(RecordDict({RECORD: ConfigRecord(reply)}), reply_to=message)


def answer(asked: Mapping[str, Any], shelf: RecordDict) -> dict[str, Any]:
    """Return the fields of the reply, and put what the client keeps on its `shelf`.

    `asked` has experiment (JSON of its changes), modules (JSON list), round, client, base and broadcast (bytes). The
    reply has payload (bytes) and keeps (whether anything is remembered); or dropped, for a client that the experiment
    lets drop out; or lost, when what the client should remember from round `base` is gone. Raises ValueError when
    the experiment is impossible here, and PayloadError when the broadcast is damaged.
    """
    for module in json.loads(asked["modules"]):
        import_module(module)
    experiment = Experiment(**json.loads(asked["experiment"]))
    round, me = asked["round"], asked["client"]
    if me not in answering(experiment, round, select(experiment, round)):
        return {"dropped": True}
    task = _task(experiment)
    try:
        name = f"{identify(experiment)}/{me}"
    except Unknowable:  # no store can keep it, but a shelf lasts for one run alone
        name = f"aside/{me}"
    memory = _recall(shelf, name, asked["base"])
    if memory is None:
        return {"lost": asked["base"]}
    torch.set_num_threads(1)
    payload, after = client_step(task, round, me, asked["broadcast"], memory)
    if after:
        _remember(shelf, name, asked["base"], round, after)
    return {"payload": payload, "keeps": bool(after)}


def _recall(shelf: RecordDict, name: str, base: int) -> ClientState | None:
    """Return what was kept from round `base`, the last whose answer the server has; None if it is gone."""
    if base == 0:
        return {}
    kept = shelf.config_records.get(name, ConfigRecord()).get(str(base))
    return load(kept) if isinstance(kept, bytes) else None


def _remember(shelf: RecordDict, name: str, base: int, round: int, memory: ClientState) -> None:
    """Keep this round's memory beside that of round `base`: nobody knows yet whether the answer will arrive."""
    kept = shelf.config_records.get(name, ConfigRecord())
    now = {str(base): kept[str(base)]} if str(base) in kept else {}
    shelf[name] = ConfigRecord({**now, str(round): save({key: t.contiguous() for key, t in memory.items()})})


def _task(experiment: Experiment) -> Task:
    """Return the experiment's task, its parents' models from this machine's store."""
    for parent in experiment.parents:
        if find(parent) is None:
            raise ValueError(f"the run that this experiment needs is not in this machine's store: {parent!r}")
    return setup.task(experiment, _parents(identify(experiment), experiment))


@lru_cache(maxsize=8)
def _parents(key: str, experiment: Experiment) -> Parents:
    """Kept by the run's key: the same models serve all rounds and clients of this process."""
    return parents_of(experiment)
