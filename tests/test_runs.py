"""Runs: the store answers, resumes, and loses nothing, whatever happens in between."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import fedlab_kit as fk
from fedlab_kit import __main__ as cli
from fedlab_kit import catalog, runs
from fedlab_kit.files import StoreError, read_json, write_bytes, write_json
from fedlab_kit.lab.canvas import human_bytes
from fedlab_kit.runs import history
from fedlab_kit.store import ClientFiles, RunFolder

SMALL = fk.Experiment(
    dataset="blobs", partition="dirichlet", model="mlp", clients=6, clients_per_round=4, rounds=5, lr=0.05
)


def test_a_run_is_plain_files_and_answered_from_the_store():
    run = fk.train(SMALL)
    assert run.status == "finished" and not run.from_store and len(run.records) == 5
    assert {"experiment.json", "records.jsonl", "state.safetensors"} <= {p.name for p in run.path.iterdir()}
    assert json.loads((run.path / "experiment.json").read_text())["experiment"] == SMALL.changes()
    seen = []
    again = fk.train(SMALL, progress=seen.append)
    assert again.from_store and tuple(seen) == again.records == run.records
    assert torch.equal(again.weights, run.weights)
    assert fk.find(SMALL).records == run.records and fk.find(SMALL.replace(seed=8)) is None
    (stored,), damaged = history()
    assert (stored.key, stored.records, stored.measured) == (run.key, run.records, run.measured) and not damaged
    assert set(run.measured) == {"when", "machine", "torch", "seconds"}


def test_the_model_is_the_last_rounds():
    run = fk.train(SMALL)
    validation = run.dataset.validation
    with torch.no_grad():
        answers = run.model(run.dataset.preprocess(validation.x)).argmax(1)
    assert (answers == validation.y).double().mean().item() == run.accuracy
    accuracy, low, high = run.test()
    with torch.no_grad():
        answers = run.model(run.dataset.preprocess(run.dataset.test.x)).argmax(1)
    assert accuracy == (answers == run.dataset.test.y).double().mean().item() and low < accuracy < high


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "scaffold"])
@pytest.mark.parametrize("model", ["mlp", "norm_net"])
def test_a_stopped_run_goes_on_to_the_same_weights(strategy, model, monkeypatch, tmp_path):
    experiment = SMALL.replace(strategy=strategy, model=model)
    whole = fk.train(experiment)
    monkeypatch.setenv("FEDLAB_RUNS", str(tmp_path / "other"))
    for rounds in (2, 3):
        stop = threading.Event()
        part = fk.train(experiment, stop, lambda r, n=rounds, s=stop: s.set() if r.round == n else None)
        assert part.status == "stopped" and len(part.records) == rounds
    rest = fk.train(experiment)
    assert rest.status == "finished" and torch.equal(rest.weights, whole.weights)
    assert [r.accuracy for r in rest.records] == [r.accuracy for r in whole.records]


def test_a_killed_process_goes_on_to_the_same_weights(runs_folder, monkeypatch, tmp_path):
    code = """
import sys; sys.path.insert(0, {tests!r})
import worlds; worlds.register()
import fedlab_kit as fk, time
experiment = fk.Experiment(dataset="blobs", partition="dirichlet", model="mlp", clients=6,
                           clients_per_round=4, rounds=5, lr=0.05, strategy="scaffold")
def slow(record):
    print(record.round, flush=True)
    if record.round == 3: time.sleep(60)
fk.train(experiment, progress=slow)
"""
    command = [sys.executable, "-c", code.format(tests=os.path.dirname(__file__))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.strip() == "3":
                break
        process.send_signal(signal.SIGKILL)
    experiment = SMALL.replace(strategy="scaffold")
    seen = []
    rest = fk.train(experiment, progress=lambda r: seen.append(r.round))
    assert seen == [1, 2, 3, 4, 5] and rest.records[2].seconds > 0
    monkeypatch.setenv("FEDLAB_RUNS", str(tmp_path / "other"))
    assert torch.equal(fk.train(experiment).weights, rest.weights)


def test_a_round_that_was_half_written_does_not_count(tmp_path):
    experiment = SMALL.replace(strategy="scaffold", rounds=6)
    path, copy = runs.path_of(experiment), tmp_path / "after round 4"
    stop = threading.Event()
    fk.train(experiment, stop, lambda record: stop.set() if record.round == 4 else None)
    shutil.copytree(path, copy)
    whole = fk.train(experiment)
    # Put back what the disk holds when a kill comes after the client files and in the record of round 5.
    lines = (path / "records.jsonl").read_text().splitlines(keepends=True)
    shutil.copytree(copy, path, dirs_exist_ok=True)
    (path / "records.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    assert torch.equal(fk.train(experiment).weights, whole.weights)


@pytest.mark.parametrize("name", ["state.safetensors", "records.jsonl"])
def test_a_damaged_file_is_named(name):
    run = fk.train(SMALL)
    file = run.path / name
    file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])
    with pytest.raises(StoreError, match=f"{run.key}.*damaged.*delete"):
        fk.train(SMALL)


def test_what_decides_the_outcome_decides_the_key(monkeypatch):
    key = runs.identify(SMALL)
    assert key == runs.identify(SMALL.replace()) != runs.identify(SMALL.replace(lr=0.06))
    for module, name, other in ((catalog, "code", lambda: "99"), (torch, "__version__", "0"), (np, "__version__", "0")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, other)
            assert runs.identify(SMALL) != key
    assert runs.identify(SMALL) == key


def test_a_default_that_another_version_has_is_part_of_the_key(monkeypatch):
    key = runs.identify(SMALL)
    monkeypatch.setattr(fk.Experiment, "changes", lambda self: {})
    assert runs.identify(SMALL) == key != runs.identify(SMALL.replace(alpha=0.6))


def test_a_changed_model_function_is_another_run():
    def one(shape, classes):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, classes))

    catalog.model("mine")(one)
    first = fk.train(SMALL.replace(model="mine"))

    def two(shape, classes):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, classes, bias=False))

    catalog.model("mine")(two)
    second = fk.train(SMALL.replace(model="mine"))
    assert not second.from_store and second.key != first.key and len(second.weights) == 18


def test_a_parent_that_changed_makes_another_run():
    keys = set()
    for bias in (True, False):

        def mine(shape, classes, bias=bias):
            return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, classes, bias=bias))

        catalog.model("mine")(mine)
        keys.add(runs.identify(SMALL.replace(teacher=SMALL.replace(model="mine"))))
    assert len(keys) == 2, "the default argument is another one, and so is the key"
    catalog.model("mine")(lambda shape, classes: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, classes)))
    assert runs.identify(SMALL.replace(teacher=SMALL.replace(model="mine"))) not in keys


CHANGED = {  # another value for each field, and what it needs to be allowed
    "dataset": "blobs_at_sites", "model": "logistic", "clients": 7, "clients_per_round": 3, "partition": "iid",
    "alpha": 0.6, "missing": (1,), "rounds": 6, "local_epochs": 2, "batch_size": 11, "lr": 0.06, "strategy": "fedprox",
    "normalization": "own", "proximal_mu": 0.02, "server_lr": 0.9, "server_momentum": 0.8, "adam_lr": 0.02,
    "dropout": 0.1, "devices": "unequal", "deadline": 9.0, "mask_ratio": 0.5, "mask_schedule": "dynamic",
    "qat": "int8", "qat_keep": "ends", "teacher": SMALL.replace(seed=1), "temperature": 3.0, "distill_weight": 0.4,
    "server_epochs": 3, "start": SMALL.replace(seed=1), "start_recipe": fk.Recipe(prune_ratio=0.5), "uplink": "int8",
    "uplink_keep": 0.02, "downlink": "int8", "downlink_keep": 0.05, "bucket": 64, "rounding": "nearest",
    "error_feedback": False, "zstd": True, "privacy": "client", "clip_norm": 0.9, "noise_multiplier": 0.9, "seed": 8,
    "device": "cuda",
}  # fmt: skip


@pytest.mark.parametrize("name", fk.Experiment.model_fields)
def test_every_field_is_part_of_the_key(name):
    before = SMALL.replace(start=SMALL) if name == "start_recipe" else SMALL
    assert runs.identify(before) != runs.identify(before.replace(**{name: CHANGED[name]}))


@pytest.mark.parametrize("change", [{"prune": "channel"}, {"prune_ratio": 0.3}])
@pytest.mark.parametrize("role", ["start", "teacher"])
def test_every_field_of_a_start_recipe_is_part_of_the_key_of_the_grandchild_too(role, change):
    recipe = fk.Recipe(prune_ratio=0.2)
    parents = [SMALL.replace(start=SMALL, start_recipe=r) for r in (recipe, recipe.replace(**change))]
    assert len({runs.identify(parent) for parent in parents}) == 2
    assert len({runs.identify(SMALL.replace(**{role: parent})) for parent in parents}) == 2


def test_a_start_and_a_teacher_are_told_apart():
    """Whatever is a parent, and as what: each way is a key of its own, and a run of its own."""
    a, b = SMALL.replace(seed=1), SMALL.replace(seed=2)
    ways = [{"start": s, "teacher": t} for s in (None, a, b) for t in (None, a, b)]
    nested = [{"start": a.replace(teacher=b)}, {"start": a.replace(start=b)}, {"teacher": a.replace(start=b)}]
    assert len({runs.identify(SMALL.replace(**way)) for way in ways + nested}) == len(ways) + len(nested)
    begun, taught = (fk.train(SMALL.replace(rounds=1, **{role: a})) for role in ("start", "teacher"))
    assert not taught.from_store and not torch.equal(begun.weights, taught.weights)


def test_changed_data_is_another_run():
    def made(offset):
        from worlds import blobs

        original = blobs()
        split = fk.Split(original.train.x + offset, original.train.y)
        return fk.Dataset("moved", original.classes, split, *[original.validation] * 3, original.preprocess)

    keys = set()
    for offset in (0.0, 1.0):
        catalog.dataset("moved")(lambda offset=offset: made(offset))
        keys.add(runs.identify(SMALL.replace(dataset="moved")))
    assert len(keys) == 2


def test_an_edited_helper_trains_the_edited_model():
    space = {"nn": torch.nn, "catalog": catalog, "__name__": "__main__"}
    exec("def power(x): return x\nclass Net(nn.Module):\n def __init__(self):\n  super().__init__()\n"
         "  self.a = nn.Linear(6, 3)\n def forward(self, x): return power(self.a(x))\n"
         "@catalog.model('mine')\ndef mine(shape, classes): return Net()", space)  # fmt: skip
    first = fk.train(SMALL.replace(model="mine"))
    exec("class Net(Net):\n def forward(self, x): return -self.a(x)", space)  # `mine` is not registered again
    second = fk.train(SMALL.replace(model="mine"))
    assert second.key != first.key and not second.from_store
    x = second.dataset.preprocess(second.dataset.validation.x)
    weight, bias = second.weights[:18].view(3, 6), second.weights[18:]
    torch.testing.assert_close(second.model(x), -(x @ weight.T + bias))


def _unknowable(bias=True):
    steps = (step for step in (1, 2, 3))

    def mine(shape, classes):
        assert steps is not None
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, classes, bias=bias))

    return catalog.model("mine")(mine)


@pytest.mark.parametrize("child", [None, "teacher", "start"])
def test_what_cannot_be_told_is_trained_each_time_kept_aside_and_said(child, runs_folder):
    _unknowable()
    mine = SMALL.replace(model="mine", rounds=2)
    experiment = (SMALL if child != "start" else mine).replace(**{child: mine}) if child else mine
    with pytest.warns(UserWarning, match="not stored: model 'mine' -> steps: a generator"):
        one = fk.train(experiment)
    with pytest.warns(UserWarning, match="not stored"):
        other = fk.train(experiment)
    assert one.unstored.startswith("model 'mine' -> steps") and "\n" not in one.unstored
    assert not one.from_store and not other.from_store and torch.equal(one.weights, other.weights)
    assert one.path != other.path and one.path.exists() and not runs_folder.exists()
    assert fk.find(experiment) is None and history() == ((), [])
    assert fk.compress(one, fk.Recipe()).accuracy == one.accuracy


def test_a_sweep_trains_what_cannot_be_told_once(monkeypatch):
    _unknowable()
    asked, train = [], runs.train
    monkeypatch.setattr("fedlab_kit.training.train", lambda e, *rest: asked.append(e) or train(e, *rest))
    with pytest.warns(UserWarning, match="not stored"):
        table = fk.sweep(SMALL.replace(model="mine", rounds=1), {"lr": [0.05, 0.1], "dtype": ["fp32", "int8"]})
    assert len(table) == 4 and len(asked) == 2 and table["accuracy"].notna().all()


def _made_by_other_code(run, code):
    file = run.path / "experiment.json"
    write_json(file, {**read_json(file), "code": code})


def test_a_run_of_older_code_is_listed_and_never_believed(monkeypatch, runs_folder):
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "code", lambda: "0" * 64)
        old = fk.train(SMALL)
        stop = threading.Event()
        fk.train(SMALL.replace(seed=9), stop, lambda record: stop.set())
    assert fk.find(SMALL) is None
    new, child = fk.train(SMALL), fk.train(SMALL.replace(seed=9))
    assert not new.from_store and new.key != old.key and len(child.records) == 5
    assert [run.older for run in history()[0]].count(True) == 2
    assert {run.key for run in history()[0] if not run.older} == {new.key, child.key}


@pytest.mark.parametrize("code", ["0" * 64, None])
def test_one_command_shows_and_frees_what_older_code_made(code, runs_folder, capsys, monkeypatch):
    old, new, held, broken = (fk.train(SMALL.replace(seed=seed, rounds=1)) for seed in range(4))
    _made_by_other_code(old, code)
    _made_by_other_code(held, code)
    (broken.path / "experiment.json").write_text("{")
    (runs_folder / "notes").mkdir()
    monkeypatch.setattr(sys, "argv", ["fedlab_kit", "runs"])
    cli.main()
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "older code" in lines[old.key] and "today's code" in lines[new.key] and "damaged" in lines[broken.key]
    monkeypatch.setattr(sys, "argv", ["fedlab_kit", "runs", "--free"])
    bytes_of_old = runs.size(old.path)
    with RunFolder(held.path).locked(None):
        thread = threading.Thread(target=cli.main)
        thread.start()
        thread.join()
    assert f"1 runs of older code deleted, {human_bytes(bytes_of_old)} freed" in capsys.readouterr().out
    assert {path.name for path in runs_folder.iterdir()} == {new.key, held.key, broken.key, "notes"}
    assert fk.train(SMALL.replace(seed=1, rounds=1)).from_store


def test_divergence_keeps_its_records():
    run = fk.train(SMALL.replace(lr=10.0, rounds=60, local_epochs=20))
    assert run.status == "diverged" and run.note.startswith("diverged") and run.records[-1].loss is None
    again = fk.find(run.experiment)
    assert again.status == "diverged" and again.records == run.records


def test_two_notebooks_on_one_run_share_it():
    results = []
    threads = [threading.Thread(target=lambda: results.append(fk.train(SMALL))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(run.from_store for run in results) == [False, True, True]
    assert all(torch.equal(run.weights, results[0].weights) for run in results)


def test_waiting_for_another_notebook_can_be_stopped():
    folder = RunFolder(runs.path_of(SMALL))
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    holding, release = threading.Event(), threading.Event()

    def hold():
        with folder.locked(None):
            holding.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait(5)
    with pytest.raises(TimeoutError, match="in use by another notebook"):
        fk.train(SMALL, stop)
    release.set()
    thread.join()


def test_a_store_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDLAB_RUNS", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot write .*file"):
        fk.train(SMALL)


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(StoreError, match=r"cannot write .*a\.bin: No space left on device"):
        write_bytes(path, b"new content")
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"] and path.read_bytes() == b"old"


def test_relative_folders_resolve_against_the_project(monkeypatch):
    monkeypatch.setenv("FEDLAB_RUNS", "somewhere/else")
    assert runs.runs_folder() == runs.ROOT / "somewhere/else"
    monkeypatch.delenv("FEDLAB_RUNS")
    assert runs.runs_folder() == runs.ROOT / "runs"


def test_client_files_keep_one_version_per_client(tmp_path):
    files = ClientFiles(tmp_path)
    for round, value in ((1, 1.0), (2, 2.0)):
        files[7] = {"control": torch.tensor([value])}
        packed, replaced = files.pack(round)
        for path, content in packed.items():
            write_bytes(path, content)
        for path in replaced:
            path.unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["7-2.safetensors"]
    assert files[7]["control"].item() == 2.0 and list(files) == [7] and len(files) == 1
    fresh = ClientFiles(tmp_path)
    fresh.expect(files.manifest())
    fresh.rewind()
    assert fresh[7]["control"].item() == 2.0
    fresh.expect("")
    fresh.rewind()
    assert list(fresh) == [] and not list(tmp_path.iterdir())


def test_client_accuracy_weighs_classes_by_the_clients_mix():
    run = fk.train(SMALL.replace(partition="shards"))
    mean, low, high = run.client_accuracy()
    record, labels = run.records[-1], run.dataset.train.y
    for client, shard in enumerate(run.shards):
        rates = [record.correct[y] / record.total[y] for y in labels[shard].tolist()]
        assert mean[client] == pytest.approx(np.mean(rates))
    assert (low <= mean).all() and (mean <= high).all()


def test_clients_that_are_sites_are_measured_on_their_own_site():
    experiment = SMALL.replace(dataset="blobs_at_sites", partition="site", clients=3, clients_per_round=3)
    run = fk.train(experiment)
    validation = run.dataset.validation
    with torch.no_grad():
        hit = run.model(run.dataset.preprocess(validation.x)).argmax(1) == validation.y
    expected = [hit[validation.site == site].double().mean().item() for site in range(3)]
    assert run.client_accuracy()[0] == pytest.approx(expected)


def test_another_store_may_be_named_for_an_experiment_and_what_it_needs(tmp_path, runs_folder):
    taught = SMALL.replace(teacher=SMALL.replace(seed=8))
    run = fk.train(taught, store=tmp_path / "spare")
    assert run.path.parent == tmp_path / "spare" and not runs_folder.exists()
    assert len(list(run.path.parent.iterdir())) == 2
    assert fk.train(taught).weights.equal(run.weights)


def test_train_within_another_thread_than_evaluate():
    found = []
    thread = threading.Thread(target=lambda: found.append(fk.train(SMALL)))
    thread.start()
    thread.join()
    assert found[0].test() == fk.find(SMALL).test()


def test_stop_during_a_long_round_is_quick():
    experiment = SMALL.replace(local_epochs=1000, rounds=1)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    began = time.monotonic()
    run = fk.train(experiment, stop)
    assert run.status == "stopped" and run.records == () and time.monotonic() - began < 30
    with pytest.raises(ValueError, match="no round"):
        _ = run.accuracy
