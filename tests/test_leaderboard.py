"""The leaderboard believes no card: honest, forged, damaged and foreign folders in one room."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pandas
import pytest
import torch

import fedlab_kit as fk
from fedlab_kit.deployment.artifact import load
from fedlab_kit.lab.leaderboard import worst_client

ROOM = fk.Experiment(dataset="blobs", model="mlp", clients=4, clients_per_round=4, rounds=6, alpha=0.3, lr=0.2)
ELSEWHERE = fk.Experiment(dataset="tiny_images", model="logistic", clients=2, clients_per_round=2, rounds=1)
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
        fk.Experiment(dataset="tiny_images", model="logistic", clients=2, clients_per_round=2, rounds=1),
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
    forge(hand_in(room / "liar", ROOM, PLAIN), experiment={"uplink": "int4", "lr": 1e-5})
    table = by_team(fk.leaderboard(room, rule="round", experiment=ROOM))
    run = fk.train(cheap)
    assert table["cheap"]["round_bytes"] == (run.uplink_bytes + run.downlink_bytes) / 6
    assert table["cheap"]["rank"] == 1 and table["plain"]["rank"] == table["small"]["rank"] == 2
    assert "its settings give" in table["liar"]["remark"] and pandas.isna(table["liar"]["rank"])


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
