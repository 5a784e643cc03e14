"""The adapter to Flower, on a Grid in memory that carries Flower's own messages through their wire format."""

import json
import sys
import threading
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedlab_kit as fk
from fedlab_kit import runs
from fedlab_kit.federation import rounds as loop
from fedlab_kit.federation.client import client_step, cohort_step
from fedlab_kit.federation.server import start
from fedlab_kit.store import RunFolder

pytest.importorskip("flwr", reason='needs Flower: pip install -c constraints.txt -e ".[scale]"')

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load

from fedlab_kit.scale.client import RECORD, client, line, modules_of, read, write
from fedlab_kit.scale.flower import GridExchange

SMALL = fk.Experiment(
    dataset="blobs", partition="dirichlet", model="mlp", clients=4, clients_per_round=3, rounds=3, lr=0.05, batch_size=7
)


@pytest.fixture(autouse=True)
def _in_a_run_of_flower(monkeypatch):
    for name in ("run_id", "task_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)


class MemoryGrid(Grid):
    """Nodes in this process: every message takes the trip through protobuf, every node has a Context of its own."""

    def __init__(self, nodes: int, named: bool = True):
        self.infos = {
            100 + k: NodeInfo(node_id=100 + k, name=str(nodes - 1 - k) if named else "") for k in range(nodes)
        }
        self.online = set(self.infos)
        self.contexts = {node: self.fresh(node) for node in self.infos}
        self.replies: dict[str, Message] = {}
        self.carried = {"broadcast": 0, "payload": 0}
        self.fault = lambda round, client, reply: reply  # what happens to a reply on its way; None: it is lost

    def fresh(self, node):
        return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})

    def set_run(self, run): ...

    @property
    def run(self): ...

    def create_message(self, *_args, **_more): ...

    def send_and_receive(self, *_args, **_more): ...

    def get_node_ids(self):
        return list(self.online)

    def get_nodes(self):
        return [self.infos[node] for node in self.online]

    def push_messages(self, messages):
        return [self.deliver(message) for message in messages]

    def pull_messages(self, message_ids):
        return [self.replies.pop(name) for name in list(message_ids) if name in self.replies]

    def deliver(self, message):
        name = message.metadata.__dict__["_message_id"] = f"m{id(message)}"
        arrived = travel(message)
        asked = arrived.content.config_records[RECORD]
        self.carried["broadcast"] += len(asked["broadcast"])
        try:
            reply = travel(client(arrived, self.contexts[message.metadata.dst_node_id]))
        except Exception as error:
            reply = Message(Error(code=2, reason=str(error)), reply_to=arrived)
        reply = self.fault(asked["round"], asked["client"], reply)
        if reply is not None:
            fields = reply.content.config_records.get(RECORD, {}) if reply.has_content() else {}
            if isinstance(fields.get("payload"), bytes):
                self.carried["payload"] += len(fields["payload"])
            self.replies[name] = reply
        return name


def travel(message):
    return message_from_proto(message_to_proto(message))


def on_flower(experiment, grid=None, patience=0.3, **more):
    return fk_train(experiment, GridExchange(grid or MemoryGrid(experiment.clients), patience), **more)


def fk_train(experiment, exchange=loop.in_process, **more):
    return runs.execute(experiment, exchange=exchange, **more)


def timeless(records):
    return [replace(record, seconds=0.0) for record in records]


CASES = {
    "fedavg": {},
    "general path": {"model": "norm_net"},
    "drop-outs": {"dropout": 0.4, "rounds": 4},
    "error feedback": {"uplink": "topk", "uplink_keep": 0.1},
    "downlink copies": {"downlink": "int4", "rounds": 4},
    "control variates": {"strategy": "scaffold"},
    "masks": {"mask_ratio": 0.5, "mask_schedule": "dynamic", "rounds": 5, "downlink": "int8"},
    "all at once": {"strategy": "scaffold", "uplink": "stc", "uplink_keep": 0.1, "downlink": "stc", "mask_ratio": 0.5,
                    "zstd": True, "dropout": 0.2, "rounds": 5},
    "unequal devices": {"devices": "sliced", "model": "mlp"},
    "private": {"privacy": "client", "noise_multiplier": 0.3},
    "hands without a class": {"dataset": "tiny_images", "partition": "hands", "missing": (1,)},
}  # fmt: skip


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_weights_and_records_equal_the_process_bit_for_bit(changes, tmp_path):
    experiment, grid = SMALL.replace(**changes), MemoryGrid(4)
    here = fk_train(experiment, store=tmp_path / "here")
    there = on_flower(experiment, grid, store=tmp_path / "there")
    assert torch.equal(here.weights, there.weights)
    assert timeless(here.records) == timeless(there.records)
    assert grid.carried == {"broadcast": there.downlink_bytes, "payload": there.uplink_bytes}


def test_what_a_client_keeps_lies_in_its_context():
    grid = MemoryGrid(4)
    run = on_flower(SMALL.replace(uplink="topk", uplink_keep=0.1), grid)
    heard = {client for record in run.records for client in record.answered}
    kept = {100 + 3 - client: f"{run.key}/{client}" for client in heard}  # MemoryGrid names its nodes backwards
    assert {node: list(grid.contexts[node].state) for node in kept} == {node: [name] for node, name in kept.items()}
    assert on_flower(SMALL).client_bytes == 0


def test_a_teacher_and_a_start_come_from_the_store_of_the_machine(tmp_path):
    experiment = SMALL.replace(teacher=SMALL.replace(rounds=1), start=SMALL.replace(rounds=2), lr=0.02)
    here = fk_train(experiment, store=tmp_path / "here")
    assert torch.equal(on_flower(experiment).weights, here.weights)


def test_virtual_nodes_are_numbered_and_must_suffice():
    here = fk_train(SMALL)
    grid = MemoryGrid(4, named=False)
    assert torch.equal(on_flower(SMALL.replace(seed=8), grid).weights, fk_train(SMALL.replace(seed=8)).weights)
    assert here.status == "finished"
    with pytest.raises(
        ValueError, match=r"^clients must be at most the connected nodes \(3\), got 4: start more nodes, or set clients"
    ):
        on_flower(SMALL.replace(seed=9), MemoryGrid(3, named=False), patience=0.01)


def whole(experiment=SMALL):
    """Everybody in every round, so that a fault meets a known client."""
    return experiment.replace(clients_per_round=4, rounds=4)


def test_a_node_that_leaves_and_comes_back_is_in_the_records():
    grid, seen = MemoryGrid(4), []

    def watch(record):
        seen.append(record)
        grid.online = set(grid.infos) - ({100 + 3 - 2} if record.round == 1 else set())

    run = on_flower(whole(), grid, progress=watch)
    assert [record.refused for record in run.records] == [(), ((2, "not connected"),), (), ()]
    assert [record.answered for record in run.records][1] == (0, 1, 3)
    assert run.records[1].cohort == (0, 1, 2, 3)
    assert grid.carried["broadcast"] == run.downlink_bytes  # what was never sent is not counted
    assert run.records[1].downlink_bytes == 3 * run.records[0].downlink_bytes // 4


def test_garbage_is_refused_and_the_run_goes_on():
    def spoil(round, client, reply):
        if (round, client) == (1, 0):
            reply.content.config_records[RECORD]["payload"] = b"not a payload at all, but bytes"
        if (round, client) == (2, 1):
            reply.content.config_records[RECORD]["payload"] = 7
        if (round, client) == (3, 2):
            del reply.content[RECORD]
        return reply

    grid = MemoryGrid(4)
    grid.fault = spoil
    run = on_flower(whole(), grid)
    assert run.status == "finished"
    first, second, third, last = (record.refused for record in run.records)
    assert first[0][0] == 0 and "codec" in first[0][1]
    assert second == ((1, "an answer without a payload"),) and third == ((2, "an answer without a payload"),)
    assert last == () and run.records[-1].answered == (0, 1, 2, 3)


def test_code_that_fails_on_a_client_is_told_in_one_line(monkeypatch):
    def step(experiment, round, client, *more):
        if client == 3:
            raise OSError("disk full\nat line 7")
        return client_step(experiment, round, client, *more)

    monkeypatch.setattr("fedlab_kit.scale.client.client_step", step)
    run = on_flower(whole())
    assert [record.answered for record in run.records] == [(0, 1, 2)] * 4
    assert all(len(record.refused) == 1 and "disk full" in record.refused[0][1] for record in run.records)
    assert "client 3: " in line(run.records[0]) and "\n" not in line(run.records[0])


@pytest.mark.parametrize("changes", [{"uplink": "topk", "uplink_keep": 0.1, "downlink": "int4"},
                                     {"strategy": "scaffold"}, {"mask_ratio": 0.5}])  # fmt: skip
def test_a_lost_answer_counts_as_if_it_had_never_been_given(changes, tmp_path):
    experiment, lost = whole(SMALL.replace(**changes)), (2, 1)

    def deaf(experiment, round, broadcasts, kept):
        """In process: client 1 is not asked in round 2."""
        asked = {c: b for c, b in broadcasts.items() if (round, c) != lost}
        silent = {c: "no answer within 0.3 s" for c in broadcasts if (round, c) == lost}
        return loop.Exchanged(*cohort_step(experiment, round, asked, kept), silent)

    grid = MemoryGrid(4)
    grid.fault = lambda round, client, reply: None if (round, client) == lost else reply
    here, there = fk_train(experiment, deaf, store=tmp_path / "here"), on_flower(experiment, grid)
    assert torch.equal(here.weights, there.weights)
    assert timeless(here.records) == timeless(there.records)


def test_a_client_that_lost_its_memory_says_so_and_begins_anew():
    grid = MemoryGrid(4)

    def restart(record):
        if record.round == 2:
            grid.contexts[100] = grid.fresh(100)  # client 3

    run = on_flower(whole(SMALL.replace(downlink="int4", mask_ratio=0.5)), grid, progress=restart)
    assert [bool(record.refused) for record in run.records] == [False, False, True, False]
    assert run.records[2].refused == ((3, "it no longer has what it kept, and begins anew"),)
    assert run.records[3].answered == (0, 1, 2, 3)
    folder = RunFolder(run.path)
    folder.load(run.task)
    for one in range(4):  # the server knows what each holds
        kept = grid.contexts[100 + 3 - one].state.config_records[f"{run.key}/{one}"]
        assert torch.equal(load(kept["4"])["copy"], folder.copies[one]["copy"])


def test_stop_ends_the_wait_without_a_record():
    stop, grid = threading.Event(), MemoryGrid(4)

    def hold(round, client, reply):
        if round == 2:
            stop.set()
            return None
        return reply

    grid.fault = hold
    run = on_flower(whole(), grid, patience=60.0, stop=stop)
    assert run.status == "stopped" and len(run.records) == 1


def test_a_stopped_run_goes_on_only_where_its_memory_is(tmp_path):
    for changes, kept in (({}, 2), ({"uplink": "topk"}, 0)):
        experiment, stop = whole(SMALL.replace(**changes)), threading.Event()
        halt = on_flower(experiment, stop=stop, progress=lambda r, stop=stop: stop.set() if r.round == 2 else None)
        assert halt.status == "stopped" and len(halt.records) == 2
        resumed = fk_train(experiment)
        assert resumed.records[:kept] == halt.records[:kept]
        assert torch.equal(resumed.weights, fk_train(experiment, store=tmp_path / str(kept)).weights)


def test_the_settings_of_flwr_run_name_every_field():
    project = tomllib.loads((Path(fk.__file__).parents[1] / "pyproject.toml").read_text())
    settings = dict(project["tool"]["flwr"]["app"]["config"])
    assert settings.pop("patience") > 0 and settings.pop("modules") == ""
    assert set(settings) == set(fk.Experiment.model_fields)
    assert read(settings) == fk.Experiment(clients=2, clients_per_round=2)  # as many as Flower's simulation starts
    nested = SMALL.replace(teacher=SMALL, start=SMALL, start_recipe=fk.Recipe(prune_ratio=0.5), missing=(0, 2))
    assert read(json.loads(json.dumps(write(nested)))) == nested


def test_processes_import_what_is_in_a_module_and_refuse_what_is_in_a_notebook(monkeypatch):
    assert modules_of(fk.Experiment()) == []
    assert modules_of(SMALL) == ["worlds"] and modules_of(SMALL.replace(start=SMALL)) == ["worlds"]
    monkeypatch.setattr(sys.modules["worlds"].blobs, "__module__", "__main__")
    with pytest.raises(ValueError, match=r"^blobs is defined in a notebook or script: Flower's processes need it"):
        fk.train(SMALL, engine="flower")


def test_unknown_engines_and_a_missing_extra_have_one_clear_line(monkeypatch):
    with pytest.raises(ValueError, match=r"^engine must be one of process, flower, got 'ray'$"):
        fk.train(SMALL, engine="ray")
    monkeypatch.setattr("fedlab_kit.runs.find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r'^this needs Flower: pip install -c constraints.txt -e "\.\[scale\]"$'
    ):
        fk.train(SMALL, engine="flower")


def test_a_round_nobody_can_be_reached_in_leaves_the_model():
    grid = MemoryGrid(4)
    exchange = GridExchange(grid, 0.1)
    exchange._roll_call(SMALL)
    grid.online = set()
    state, record = next(loop.play(start(SMALL), {}, exchange=exchange))
    assert torch.equal(state.weights, start(SMALL).weights) and record.downlink_bytes == 0
    assert record.note == "nobody answered: the model stays as it was" and len(record.refused) == 3
