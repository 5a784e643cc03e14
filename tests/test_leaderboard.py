"""The leaderboard believes no card: honest, forged, damaged and foreign folders in one room."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fedlab_kit as fk
from fedlab_kit.data import load as load_data
from fedlab_kit.deployment import stranger
from fedlab_kit.deployment.artifact import load
from fedlab_kit.lab import leaderboard as board
from fedlab_kit.lab.leaderboard import moved, worst_client
from fedlab_kit.runs import identify

ROOM = fk.Experiment(
    dataset="blobs", partition="dirichlet", model="mlp", clients=4, clients_per_round=4, rounds=6, alpha=0.3, lr=0.2
)
ELSEWHERE = fk.Experiment(
    dataset="tiny_images", partition="dirichlet", model="logistic", clients=2, clients_per_round=2, rounds=1
)
PLAIN, SMALL = fk.Recipe(), fk.Recipe(dtype="fp16")


def hand_in(folder: Path, experiment: fk.Experiment, recipe: fk.Recipe) -> Path:
    """What a team exports, as far as the leaderboard looks at it; returns the artifact's path."""
    artifact = fk.compress(fk.train(experiment), recipe, folder)
    artifact.test()
    return artifact.path


def forge(path: Path, **changes: object) -> None:
    card_file = path.with_name(f"{path.name}.json")
    card = json.loads(card_file.read_text())
    for name, value in changes.items():
        card[name] = {**card[name], **value} if isinstance(value, dict) else value
    card_file.write_text(json.dumps(card))


def settle(path: Path, experiment: fk.Experiment) -> None:
    """Put another experiment on a card, with the key that its run would have."""
    forge(path, experiment=experiment.model_dump(mode="json"), run=identify(experiment))


def put(path: Path, content: bytes) -> None:
    """Hand in another file under a card that fits it."""
    path.write_bytes(content)
    forge(path, digest=hashlib.sha256(content).hexdigest())


def graph(*nodes: onnx.NodeProto, kind: int = TensorProto.FLOAT, shape: object = ("n", 6), **stored: object) -> bytes:
    """A file from raw samples, blobs float [n, 6] unless told otherwise, to y, with stored values."""
    kept = [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()]
    x = helper.make_tensor_value_info("x", kind, shape)
    made = helper.make_graph(nodes, "g", [x], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], kept)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    """Two teams: the same run, whole and in half precision."""
    room = tmp_path_factory.mktemp("room")
    hand_in(room / "plain", ROOM, PLAIN)
    hand_in(room / "small", ROOM, SMALL)
    return room


@pytest.fixture
def room(honest, tmp_path) -> Path:
    return shutil.copytree(honest, tmp_path / "room")


def by_team(table: pandas.DataFrame) -> dict:
    return table.set_index("team").to_dict("index")


def test_the_smallest_file_wins_and_every_figure_is_the_files(room):
    table = fk.leaderboard(room, experiment=ROOM)
    assert table["team"].tolist() == ["small", "plain"] and table["rank"].tolist() == [1, 2]
    for team, row in by_team(table).items():
        artifact = load(next((room / team).glob("*.onnx")))
        accuracy, (low, high) = artifact.test()
        assert (row["accuracy"], row["low"], row["high"]) == (accuracy, low, high)
        assert (row["bytes"], row["zstd_bytes"]) == (artifact.bytes, artifact.zstd_bytes)
        assert row["latency_ms"] > 0 and row["remark"] == ""


def test_those_below_the_stated_accuracy_have_no_rank(room):
    table = fk.leaderboard(room, accuracy=1.0, experiment=ROOM)
    assert table["rank"].isna().all()
    assert set(table["remark"]) == {"below 100.0 % on test."}


def test_a_forged_card_changes_nothing_but_the_remark(room):
    before = by_team(fk.leaderboard(room, experiment=ROOM))
    plain, small = (next((room / team).glob("*.onnx")) for team in ("plain", "small"))
    forge(plain, measured={"bytes": 10, "zstd_bytes": 9, "latency_ms": 1e-9, "accuracy": 1.0})
    forge(small, test={"accuracy": 0.01, "interval": [0.0, 0.02]})
    after = by_team(fk.leaderboard(room, experiment=ROOM))
    for team, row in after.items():
        assert all(row[name] == before[team][name] for name in ("rank", "accuracy", "bytes", "zstd_bytes"))
    assert after["plain"]["remark"] == "its card claims 10 bytes"
    assert after["small"]["remark"] == "its card claims 1.0 % on test"


def damage(room: Path) -> None:
    """Hand in everything that should not be handed in."""
    cut = shutil.copytree(room / "small", room / "cut")
    file = next(cut.glob("*.onnx"))
    file.write_bytes(file.read_bytes()[:-20])
    rubbish = shutil.copytree(room / "small", room / "rubbish")
    file = next(rubbish.glob("*.onnx"))
    file.write_bytes(b"not a graph")
    forge(file, digest=hashlib.sha256(b"not a graph").hexdigest())
    card = shutil.copytree(room / "small", room / "card")
    next(card.glob("*.onnx.json")).write_text("[]")
    (room / "empty").mkdir()
    hand_in(
        room / "foreign",
        fk.Experiment(
            dataset="tiny_images", partition="dirichlet", model="logistic", clients=2, clients_per_round=2, rounds=1
        ),
        PLAIN,
    )
    (room / ".hidden").mkdir()
    (room / "readme.txt").write_text("a file is no team")


def test_every_damaged_or_foreign_folder_has_its_reason_and_stops_nobody(room):
    damage(room)
    table = fk.leaderboard(room, experiment=ROOM)
    assert table["team"].tolist()[:2] == ["small", "plain"] and len(table) == 7
    assert table["rank"].tolist()[:2] == [1, 2] and table["rank"].isna().sum() == 5
    said = {team: row["remark"] for team, row in by_team(table).items()}
    assert "truncated or altered" in said["cut"] and "must hold one artifact (.onnx), found 0" in said["empty"]
    assert "model card" in said["card"] and "INVALID" in said["rubbish"].upper() and "x" in said["foreign"]
    assert all(said[team].startswith("not measured: ") for team in ("cut", "rubbish", "card", "empty", "foreign"))


def occupy(room: Path) -> dict[str, str]:
    """Put in the place of a file whatever might hold up who opens it; returns what should be said of each team."""
    team = {
        name: shutil.copytree(room / "small", room / name) for name in ("pipe", "device", "folder", "sparse", "link")
    }
    file = {name: next(path.glob("*.onnx")) for name, path in team.items()}
    for path in file.values():
        path.unlink()
    os.mkfifo(file["pipe"])
    file["device"].symlink_to("/dev/zero")
    file["folder"].mkdir()
    file["link"].symlink_to(next((room / "small").glob("*.onnx")))
    with file["sparse"].open("wb") as hole:
        hole.truncate(10 << 30)
    card = shutil.copytree(room / "small", room / "card")
    next(card.glob("*.json")).unlink()
    os.mkfifo(f"{next(card.glob('*.onnx'))}.json")
    (room / "beside").symlink_to(room / "small", target_is_directory=True)
    nested = shutil.copytree(room / "small", room / "nested")
    next(nested.glob("*.json")).write_text("[" * 100_000)
    return {
        "pipe": "is no regular file",
        "device": "is a link",
        "folder": "is no regular file",
        "sparse": "is larger than 67,108,864 bytes",
        "link": "is a link",
        "card": "is no regular file",
        "beside": "is a link",
        "nested": "model card",
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes with names")
def test_what_would_hold_up_the_room_costs_its_team_the_rank(room):
    expected = occupy(room)
    table = by_team(fk.leaderboard(room, experiment=ROOM))
    for team, told in expected.items():
        assert pandas.isna(table[team]["rank"]) and told in table[team]["remark"], team
        assert table[team]["remark"].startswith("not measured: ") and pandas.isna(table[team]["accuracy"])
    assert table["small"]["rank"] == 1 and table["plain"]["rank"] == 2


def test_an_endless_file_costs_its_team_the_rank_and_nobody_their_room(room, monkeypatch):
    info = helper.make_tensor_value_info
    goes_in = [info("i", TensorProto.INT64, []), info("on", TensorProto.BOOL, []), info("v", TensorProto.FLOAT, None)]
    comes_out = [info("still", TensorProto.BOOL, []), info("u", TensorProto.FLOAT, None)]
    turns = [helper.make_node("Identity", names[:1], names[1:]) for names in (["on", "still"], ["v", "u"])]
    loop = helper.make_node("Loop", ["", "on", "x"], ["y"], body=helper.make_graph(turns, "b", goes_in, comes_out))
    path = shutil.copytree(room / "small", room / "endless")
    put(next(path.glob("*.onnx")), graph(loop, on=np.array(True)))
    monkeypatch.setattr(stranger, "SECONDS", 6.0)
    table = by_team(fk.leaderboard(room, experiment=ROOM))
    assert table["endless"]["remark"] == "not measured: it does not answer 300 rows within 6 s"
    assert table["small"]["rank"] == 1 and table["plain"]["rank"] == 2


def knows_places() -> bytes:
    """Answers with the labels of the test split, first to last, whatever the rows hold."""
    labels = np.tile(np.eye(3, dtype=np.float32)[load_data("blobs").test.y.numpy()], (2, 1))
    size = helper.make_node("Shape", ["x"], ["size"], start=0, end=1)
    return graph(size, helper.make_node("Slice", ["labels", "zero", "size"], ["y"]), labels=labels, zero=np.array([0]))


def knows_values() -> bytes:
    """Looks up the first value of a row among those of the test split."""
    test = load_data("blobs").test
    nodes = [
        helper.make_node("Gather", ["x", "first"], ["value"], axis=1),
        helper.make_node("Equal", ["value", "known"], ["found"]),
        helper.make_node("Cast", ["found"], ["which"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["which", "labels"], ["y"]),
    ]
    labels = np.eye(3, dtype=np.float32)[test.y.numpy()]
    return graph(*nodes, first=np.array([0]), known=test.x[:, 0].numpy()[None], labels=labels)


def knows_rows() -> bytes:
    """Stores eight directions of each test row of the digits, and answers by the nearest: no value is exact."""
    test = load_data("digits").test
    rows, directions = test.x.flatten(1).float().numpy(), np.random.default_rng(0).normal(size=(784, 8))
    stored = rows @ directions.astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"]),
        helper.make_node("MatMul", ["flat", "directions"], ["place"]),
        helper.make_node("MatMul", ["place", "stored"], ["along"]),
        helper.make_node("Sub", ["along", "half"], ["near"]),
        helper.make_node("Hardmax", ["near"], ["which"]),
        helper.make_node("MatMul", ["which", "labels"], ["y"]),
    ]
    kept = {"directions": directions.astype(np.float32), "stored": stored.T, "half": (stored**2).sum(1) / 2}
    labels = np.eye(10, dtype=np.float32)[test.y.numpy()]
    return graph(*nodes, kind=TensorProto.UINT8, shape=["n", 1, 28, 28], labels=labels, **kept)


@pytest.mark.parametrize(
    ("content", "name", "told"),
    [
        (
            knows_places(),
            "blobs",
            "below 90.0 % on test.|not measured: it knows the test rows by heart: 100.0 % right, ",
        ),
        (knows_values(), "blobs", "not measured: it knows the test rows by heart: 100.0 % right, .* moves a little"),
        (knows_rows(), "digits", "not measured: it knows the test rows by heart: 100.0 % right, .* on other rows"),
    ],
)
def test_who_looks_the_test_rows_up_does_not_win(content, name, told, room):
    test = load_data(name).test
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])  # right about all as stored
    assert session.run(None, {"x": test.x.numpy()})[0].argmax(1).tolist() == test.y.tolist()
    put(next((room / "small").glob("*.onnx")), content)
    row = by_team(fk.leaderboard(room, accuracy=0.9, experiment=ROOM.replace(dataset=name)))["small"]
    assert pandas.isna(row["rank"]) and re.match(told, row["remark"])


@pytest.mark.parametrize("name", ["blobs", "tiny_images"])
def test_values_move_and_stay_what_they_are(name):
    dataset = load_data(name)
    raw = dataset.test.x.numpy()
    new = moved(raw, dataset, np.random.default_rng(0))
    far = np.abs(new.astype(float) - raw)
    assert new.dtype == raw.dtype and new.shape == raw.shape and 0 < far.max() <= 0.05 * dataset.preprocess.std
    assert (far > 0).mean() > 0.5
    dark = np.zeros((4, 1, 12, 12), np.uint8)
    if raw.dtype == np.uint8:
        assert moved(dark, dataset, np.random.default_rng(0)).max() < 4  # below zero nothing turns bright


@pytest.mark.parametrize("claim", [True, "1.0", float("nan"), 10**400, [0.5], None, {"accuracy": 1}])
def test_a_word_on_a_card_is_no_number(room, claim):
    path = next((room / "small").glob("*.onnx"))
    forge(path, test={"accuracy": claim})
    row = by_team(fk.leaderboard(room, experiment=ROOM))["small"]
    assert row["remark"] == "its card claims no number for test" and row["rank"] == 1
    forge(path, measured={"bytes": claim})
    row = by_team(fk.leaderboard(room, experiment=ROOM))["small"]
    assert row["remark"].startswith("not measured: its model card is damaged") and pandas.isna(row["rank"])


def test_weights_hidden_beside_the_file_are_not_loaded(room, monkeypatch):
    path = next((room / "small").glob("*.onnx"))
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    forge(path, digest=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.chdir(path.parent)
    row = by_team(fk.leaderboard(room, experiment=ROOM))["small"]
    assert row["remark"].startswith("not measured: ") and pandas.isna(row["rank"])


def test_a_round_is_counted_by_running_the_settings_again(room):
    cheap = ROOM.replace(uplink="int8", downlink="int8")
    hand_in(room / "cheap", cheap, PLAIN)
    settle(hand_in(room / "liar", ROOM, PLAIN), ROOM.replace(uplink="int4", lr=1e-5))
    table = by_team(fk.leaderboard(room, rule="round", experiment=ROOM))
    run = fk.train(cheap)
    assert table["cheap"]["round_bytes"] == (run.uplink_bytes + run.downlink_bytes) / 6
    assert table["cheap"]["rank"] == 1 and table["plain"]["rank"] == table["small"]["rank"] == 2
    assert "its settings give" in table["liar"]["remark"] and pandas.isna(table["liar"]["rank"])


def test_the_cost_of_one_experiment_is_not_passed_off_as_that_of_another(room):
    """Settings that are changed on the card, with and without the key of a run that belongs to them."""
    cheap = ROOM.replace(uplink="int8", downlink="int8")
    forge(hand_in(room / "forger", ROOM, PLAIN), experiment={"uplink": "int8", "downlink": "int8"})
    settle(hand_in(room / "claimer", ROOM, PLAIN), cheap)
    settle(hand_in(room / "visitor", ROOM, PLAIN), ROOM.replace(dataset="blobs_at_sites"))
    table = by_team(fk.leaderboard(room, rule="round", experiment=ROOM))
    for team, told in {
        "forger": "its settings are not those of its run, or other versions made it: export it again here",
        "visitor": "its settings train on blobs_at_sites, the room on blobs",
    }.items():
        assert table[team]["remark"] == f"not measured: {told}" and pandas.isna(table[team]["rank"])
    run, claimer = fk.train(cheap), table["claimer"]
    made = fk.compress(run, PLAIN, room.parent / "again")
    assert claimer["remark"].startswith("claimed: its settings make another file here")
    assert claimer["round_bytes"] == (run.uplink_bytes + run.downlink_bytes) / 6 < table["plain"]["round_bytes"]
    assert (claimer["accuracy"], claimer["bytes"]) == (made.test()[0], made.bytes)
    assert claimer["rank"] == 3 > table["plain"]["rank"]  # whoever is verified stands before


def test_settings_without_end_are_not_run_to_their_end(room, monkeypatch):
    settle(next((room / "small").glob("*.onnx")), ROOM.replace(rounds=100_000, lr=1e-6))
    monkeypatch.setattr(board, "PATIENCE", 0.2)
    row = by_team(fk.leaderboard(room, rule="round", experiment=ROOM))["small"]
    assert row["remark"] == "not measured: its settings take more than 0.2 s to run again" and pandas.isna(row["rank"])


def test_cheap_rounds_do_not_hide_the_dear_ones_that_they_start_from(room):
    last = ROOM.replace(start=ROOM, rounds=1, uplink="int4", downlink="int4")
    hand_in(room / "last", last, PLAIN)
    table = by_team(fk.leaderboard(room, rule="round", experiment=ROOM))
    assert table["last"]["round_bytes"] == table["plain"]["round_bytes"] and table["last"]["remark"] == ""


def test_the_worst_client_is_that_of_the_room_whatever_a_card_says(room):
    path = next((room / "small").glob("*.onnx"))
    forge(path, experiment={"partition": "iid"})
    table = by_team(fk.leaderboard(room, rule="worst client", experiment=ROOM))
    assert table["small"]["worst_client"] == table["plain"]["worst_client"] < table["plain"]["accuracy"]
    assert table["small"]["rank"] == table["plain"]["rank"] == 1


def test_the_worst_client_by_hand():
    sites = fk.Experiment(dataset="blobs_at_sites", model="logistic", clients=3, clients_per_round=3, partition="site")
    where = np.arange(60) % 3
    right = np.ones(60, dtype=bool)
    right[np.flatnonzero(where == 1)[:5]] = False
    assert worst_client(sites, right) == 0.75
    run = fk.train(ROOM)
    held = torch.stack([torch.bincount(run.dataset.train.y[shard], minlength=3) for shard in run.shards]).double()
    right = run.dataset.test.y.numpy() != 2  # wrong on the whole of one class
    assert worst_client(ROOM, right) == pytest.approx(float((1 - held[:, 2] / held.sum(1)).min()))


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^rule must be one of size, round, worst client, got 'luck'$"):
        fk.leaderboard(tmp_path, rule="luck")
    with pytest.raises(ValueError, match=r"^folder must be one that holds exported folders, got .*nowhere'$"):
        fk.leaderboard(tmp_path / "nowhere")
    assert fk.leaderboard(tmp_path).empty
