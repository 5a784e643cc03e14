"""From a file to a device: rows scored by numpy and onnxruntime alone, versions, promotion, rollback, damage."""

import csv
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas
import pytest

import fedlab_kit as fk
from fedlab_kit.data import load
from fedlab_kit.deployment.evaluate import evaluate, with_rates
from fedlab_kit.deployment.registry import Registry
from fedlab_kit.deployment.score import Model, main, odd_rows, probabilities
from fedlab_kit.deployment.selection import choose, plan
from fedlab_kit.files import StoreError

NAMES = load("clinics").features
EXPERIMENT = fk.Experiment(
    dataset="clinics", model="mlp", partition="site", clients=3, clients_per_round=3, rounds=3, lr=0.1
)


@pytest.fixture(scope="module")
def artifacts() -> list[fk.Artifact]:
    run = fk.train(EXPERIMENT)
    return [fk.compress(run, recipe) for recipe in (fk.Recipe(), fk.Recipe(dtype="int8"), fk.Recipe(dtype="int4"))]


@pytest.fixture
def patients() -> pandas.DataFrame:
    return pandas.DataFrame(load("clinics").test.x[:6].numpy(), columns=list(NAMES))


@pytest.fixture
def registry(artifacts, tmp_path) -> Registry:
    made = Registry(tmp_path / "registry")
    for artifact in artifacts:
        made.add(artifact, artifact.path.stem)
    return made


# ---- scoring on the device


def test_a_device_scores_patients_without_torch_and_without_this_package(registry, artifacts, patients, tmp_path):
    registry.promote(2, "fits")
    device = registry.install(tmp_path / "device")
    patients[list(NAMES[::-1])].to_csv(device / "patients.csv", index=False)  # columns in another order
    code = (
        "import sys, runpy\n"
        "for name in ('torch', 'fedlab_kit', 'sklearn', 'pandas'): sys.modules[name] = None\n"
        "sys.argv = ['score.py', 'model.onnx', 'patients.csv']\n"
        "runpy.run_path('score.py', run_name='__main__')\n"
    )
    ran = subprocess.run([sys.executable, "-I", "-c", code], cwd=device, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    said = list(csv.DictReader(io.StringIO(ran.stdout)))
    expected = artifacts[1].predict(load("clinics").test.x[:6])
    classes = ("healthy", "sick")
    assert [row["class"] for row in said] == [classes[best] for best in expected.argmax(1)]
    assert [float(row["probability"]) for row in said] == pytest.approx(expected.max(1), abs=1e-5)
    assert {path.name for path in device.iterdir()} == {"model.onnx", "model.onnx.json", "score.py", "patients.csv"}


def test_a_row_that_cannot_be_scored_says_why_and_the_others_go_on(artifacts, patients):
    model, table = Model(artifacts[0].path), patients.astype(object)
    table.loc[1, "dose"], table.loc[2, "age"], table.loc[4, "size"] = "?", 300.0, None
    answers = model.score(table)
    assert [answer["problem"] for answer in answers] == [
        "",
        "dose is missing or no number",
        "age is 300, more than 20 standard deviations from the training mean",
        "",
        "size is missing or no number",
        "",
    ]
    assert [answer["class"] is None for answer in answers] == [False, True, True, False, True, False]
    assert {answer["problem"] for answer in model.score({name: ["?", "?"] for name in NAMES})} != {""}


def test_a_value_is_odd_beyond_twenty_standard_deviations_either_way():
    card = {"preprocess": {"mean": [1.0, -3.0], "std": [2.0, 0.5]}, "input": {"features": ["a", "b"]}}
    usual = np.float32([[40.9, -3], [-38.9, -3], [1, 6.9], [1, -12.9]])
    assert odd_rows(usual, card) == {}
    odd = odd_rows(np.float32([[41.1, -3], [-39.1, -3], [1, 7.1], [1, -13.1], [1, -3]]), card)
    assert [odd[row][:5] for row in range(4)] == ["a is ", "a is ", "b is ", "b is "] and 4 not in odd


def test_probabilities_of_very_sure_answers_are_numbers():
    assert probabilities(np.float32([[1000, 0], [-1000, -1000]])).tolist() == [[1, 0], [0.5, 0.5]]


def test_wrong_columns_are_named(artifacts, patients):
    renamed = patients.rename(columns={"dose": "doses"})
    with pytest.raises(ValueError, match=r"^columns must be the model's 4: missing 'dose'; unknown 'doses'$"):
        artifacts[0].predict(renamed)
    with pytest.raises(ValueError, match="twice 'age'"):
        Model(artifacts[0].path).score(pandas.concat([patients, patients[["age"]]], axis=1))
    shuffled = artifacts[0].predict(patients[list(NAMES[::-1])])
    assert np.array_equal(shuffled, artifacts[0].predict(patients))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 3), np.float32), r"x must be raw float32 \[n, 4\] with n at least 1, got float32 \[2, 3\]"),
        (np.zeros((2, 4)), r"got float64 \[2, 4\]"),
        (np.zeros((0, 4), np.float32), r"got float32 \[0, 4\]"),
        (np.full((2, 4), np.nan, np.float32), "sample 0 has a value that is missing or infinite"),
    ],
)
def test_a_wrong_array_is_named(artifacts, x, message):
    with pytest.raises(ValueError, match=message):
        artifacts[0].predict(x)


def test_images_are_no_columns():
    run = fk.train(
        fk.Experiment(
            dataset="tiny_images", partition="dirichlet", model="tiny_cnn", clients=2, clients_per_round=2, rounds=1
        )
    )
    with pytest.raises(ValueError, match="this model names no columns: give an array"):
        fk.compress(run, fk.Recipe()).predict({"pixel": [1]})


def test_the_command_says_in_one_line_what_is_wrong(artifacts, patients, tmp_path, capsys):
    patients.drop(columns="age").to_csv(tmp_path / "short.csv", index=False)
    assert main([str(artifacts[0].path), str(tmp_path / "short.csv")]) == 1
    assert capsys.readouterr().err == "error: columns must be the model's 4: missing 'age'\n"
    (tmp_path / "twice.csv").write_text("age,age\n1,2\n")
    assert main([str(artifacts[0].path), str(tmp_path / "twice.csv")]) == 1
    assert "must have different names, got age, age" in capsys.readouterr().err
    shutil.copy(artifacts[0].path, tmp_path / "bare.onnx")
    assert main([str(tmp_path / "bare.onnx"), "x"]) == 1 and "needs its model card" in capsys.readouterr().err
    (tmp_path / "bare.onnx.json").write_text(json.dumps({"digest": "0" * 64}))
    assert main([str(tmp_path / "bare.onnx"), "x"]) == 1 and "truncated or altered" in capsys.readouterr().err
    assert main([]) == 1 and capsys.readouterr().err.startswith("usage: ")


# ---- versions


def test_promotions_and_rollbacks_are_a_stack_and_nothing_is_lost(registry, artifacts):
    assert registry.current is None and [v.number for v in registry.versions] == [1, 2, 3]
    for number in (1, 2, 3):
        registry.promote(number, f"try {number}")
    assert registry.current.load().digest == artifacts[2].digest
    assert registry.rollback("too many misses").number == 2 and registry.rollback("still").number == 1
    with pytest.raises(ValueError, match="no earlier version"):
        registry.rollback("again")
    registry.promote(3, "mended")
    assert registry.rollback("no").number == 1
    happened = [(event["event"], event["version"], event["why"]) for event in registry.history]
    assert happened[3:] == [
        ("rollback", 2, "too many misses"),
        ("rollback", 1, "still"),
        ("promote", 3, "mended"),
        ("rollback", 1, "no"),
    ]
    assert len(Registry(registry.folder).versions) == 3


def test_what_is_not_there_is_named(registry, tmp_path):
    with pytest.raises(ValueError, match="version must be one of 1, 2, 3, got 9"):
        registry.promote(9, "?")
    with pytest.raises(ValueError, match="nothing is in service yet"):
        registry.install(tmp_path / "device")
    with pytest.raises(ValueError, match="version must be one of none yet, got 1"):
        Registry(tmp_path / "empty").promote(1, "?")


@pytest.mark.parametrize("damage", ["cut", "swapped"])
def test_a_damaged_version_is_not_put_into_service(registry, damage):
    registry.promote(1, "first")
    other, good = registry.version(2).path, registry.version(3).path
    if damage == "cut":
        model = other / "model.onnx"
        model.write_bytes(model.read_bytes()[:-9])
    else:
        for name in ("model.onnx", "model.onnx.json"):
            shutil.copy(good / name, other / name)
    with pytest.raises(StoreError, match=r"truncated or altered|another artifact lies there"):
        registry.promote(2, "second")
    assert registry.current.number == 1 and len(registry.history) == 1


def test_a_damaged_version_is_not_installed(registry, tmp_path):
    registry.promote(1, "first")
    for name in ("model.onnx", "model.onnx.json"):
        shutil.copy(registry.version(3).path / name, registry.version(1).path / name)
    with pytest.raises(StoreError, match="another artifact lies there"):
        registry.install(tmp_path / "device")
    assert not (tmp_path / "device").exists()


def test_a_rollback_to_a_damaged_version_leaves_the_current_one(registry):
    registry.promote(1, "first")
    registry.promote(2, "second")
    (registry.version(1).path / "model.onnx").unlink()
    with pytest.raises(StoreError, match=r"model\.onnx cannot be opened"):
        registry.rollback("?")
    assert registry.current.number == 2


def test_damaged_books_are_named(registry):
    registry.promote(1, "first")
    registry.promote(2, "second")
    history = registry.folder / "history.jsonl"
    first, second = history.read_text().splitlines()
    history.write_text(f"{first[:-9]}\n{second}\n")
    with pytest.raises(StoreError, match=r"history\.jsonl, line 1, is damaged"):
        _ = registry.current
    history.write_text(f"{first}\n\n{second}\n")
    with pytest.raises(StoreError, match=r"history\.jsonl, line 2, is damaged"):
        registry.rollback("?")
    back = json.dumps({**json.loads(first), "event": "rollback"})
    history.write_text(f"{second}\n{back}\n")
    with pytest.raises(StoreError, match=r"is damaged: what came before .*'rollback'.* is gone"):
        _ = registry.current
    (registry.version(2).path / "version.json").write_text("[]")
    with pytest.raises(StoreError, match=r"version\.json, line 1, is damaged"):
        _ = registry.versions


def test_a_registry_with_a_file_for_each_event_goes_on(registry):
    registry.promote(1, "first")
    registry.promote(2, "second")
    history, events = registry.folder / "history.jsonl", registry.folder / "events"
    events.mkdir()
    for number, line in enumerate(history.read_text().splitlines(), start=1):
        (events / f"{number:06d}.json").write_text(line)
    history.unlink()
    assert registry.current.number == 2 and registry.rollback("back").number == 1
    assert [event["why"] for event in registry.history] == ["first", "second", "back"]
    assert len(history.read_text().splitlines()) == 3


def test_two_processes_lose_nothing(artifacts, tmp_path):
    code = (
        "import sys, threading\n"
        "from fedlab_kit.deployment.artifact import load\n"
        "from fedlab_kit.deployment.registry import Registry\n"
        "registry, artifact = Registry(sys.argv[1]), load(sys.argv[2])\n"
        "for turn in range(5): registry.promote(registry.add(artifact, f'{sys.argv[3]} {turn}'), sys.argv[3])\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "shared"), str(artifacts[0].path)]
    running = [subprocess.Popen([*arguments, who]) for who in ("a", "b")]
    assert [process.wait() for process in running] == [0, 0]
    shared = Registry(tmp_path / "shared")
    assert sorted(v.note for v in shared.versions) == sorted(f"{who} {turn}" for who in "ab" for turn in range(5))
    assert sorted(event["version"] for event in shared.history) == list(range(1, 11))
    assert not list(shared.folder.glob(".adding-*"))


def test_a_kill_while_adding_leaves_no_version(registry, artifacts, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedlab_kit.deployment.registry.write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        registry.add(artifacts[0])
    assert len(registry.versions) == 3


# ---- which artifact for which device


def test_each_class_of_devices_gets_what_fits_it(artifacts):
    points = pandas.DataFrame(
        [{"accuracy": a.accuracy, "bytes": a.bytes, "latency_ms": a.latency_ms, "path": a.path} for a in artifacts]
    )
    table = with_rates(points)
    assert {"auc", "sensitivity", "specificity", "lowest_accuracy", "lowest_site"} <= set(table.columns)
    sites = evaluate(artifacts[0]).set_index("site").accuracy.drop("all")
    assert table.lowest_accuracy[0] == sites.min() < sites.max() and sites[table.lowest_site[0]] == sites.min()
    smallest = int(table.bytes.min())
    chosen = plan(table, {"server": {}, "tablet": {"bytes": smallest, "sensitivity": 0.1}})
    assert chosen.loc["tablet"].bytes == smallest
    assert chosen.loc["server"].accuracy == table.accuracy.max() == choose(table).accuracy
    with pytest.raises(ValueError, match=r"^device class 'watch': no point has bytes at most 10; the nearest has"):
        plan(table, {"server": {}, "watch": {"bytes": 10}})
    with pytest.raises(ValueError, match=r"no point has sensitivity at least 1\.5"):
        choose(table, sensitivity=1.5)
