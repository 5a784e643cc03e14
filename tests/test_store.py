"""The store defends itself: flipped bits, lost files, kills at any step, strange JSON, strange names."""

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fedlab_kit as fk
from fedlab_kit import catalog, files, runs
from fedlab_kit.deployment.artifact import compress, load
from fedlab_kit.deployment.registry import Registry
from fedlab_kit.federation.setup import task
from fedlab_kit.files import StoreError, at, file_name, read_tensors, sweep_up, write_bytes, write_json, write_tensors
from fedlab_kit.lab.history import Filter, Marks, Points
from fedlab_kit.lab.text import said, table
from fedlab_kit.runs import history
from fedlab_kit.store import RunFolder

MOST = fk.Experiment(
    dataset="blobs",
    partition="dirichlet",
    model="mlp",
    clients=6,
    clients_per_round=4,
    rounds=5,
    lr=0.05,
    strategy="scaffold",
    uplink="topk",
    downlink="int8",
)  # the server has controls and copies, every client has memory
GONE = 99_999_999  # a process that cannot be


def facts(run: fk.Run) -> tuple[bytes, list[tuple]]:
    """All that a run says but the seconds it took."""
    told = [tuple(value for name, value in r.to_dict().items() if name != "seconds") for r in run.records]
    return run.weights.numpy().tobytes(), told


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The key of a run that was stopped after three rounds, its folder, and what the whole run gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLAB_RUNS", str(tmp_path_factory.mktemp("stopped")))
        path, part = runs.path_of(MOST), tmp_path_factory.mktemp("part") / "run"
        stop = threading.Event()
        fk.train(MOST, stop, lambda record: stop.set() if record.round == 3 else None)
        shutil.copytree(path, part)
        whole = fk.train(MOST)
    return whole.key, part, facts(whole)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A finished run and an artifact in a store of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLAB_RUNS", str(tmp_path_factory.mktemp("compressed")))
        run = fk.train(MOST)
        compress(run, fk.Recipe())
    return run


def goes_on(runs_folder: Path, stopped) -> str:
    """Go on with the run in the store: "right" when the outcome is that of the whole run, else what was said."""
    try:
        run = fk.train(MOST)
    except StoreError as error:
        assert str(runs_folder) in str(error) and "delete" in str(error) and "\n" not in str(error)
        return str(error)
    assert facts(run) == stopped[2]
    return "right"


def files_of(folder: Path) -> list[Path]:
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


def test_a_flipped_bit_is_found_or_harmless(stopped, runs_folder):
    key, part, _ = stopped
    dice = random.Random(7)
    found = set()
    for name in files_of(part):
        content = (part / name).read_bytes()
        places = [0, len(content) - 1, *(dice.randrange(len(content)) for _ in range(12))]
        for place in places:
            shutil.rmtree(runs_folder, ignore_errors=True)
            shutil.copytree(part, runs_folder / key)
            flipped = bytearray(content)
            flipped[place] ^= 1 << dice.randrange(8)
            (runs_folder / key / name).write_bytes(flipped)
            if goes_on(runs_folder, stopped) != "right":
                found.add(name.parts[0])
    assert found == {"state.safetensors", "records.jsonl", "experiment.json", "clients", "copies"}


def test_every_flipped_bit_of_what_is_read_is_found(stopped, tmp_path):
    """Whatever the place: the header, the words, the tensors. The seal's own name may be hit, and nothing is lost."""
    file = tmp_path / "x.safetensors"
    tensors = {"a": torch.arange(5.0), "b": torch.ones(2, dtype=torch.uint8)}
    seal = write_tensors(file, tensors, {"round": "3"})
    content = file.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            found, about = read_tensors(file)
        except StoreError as error:
            assert "x.safetensors is damaged" in str(error)
            continue
        assert about.get("seal") != seal and about["round"] == "3"
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_lost_file_is_found_or_harmless(stopped, runs_folder):
    key, part, _ = stopped
    for name in files_of(part):
        shutil.rmtree(runs_folder, ignore_errors=True)
        shutil.copytree(part, runs_folder / key)
        (runs_folder / key / name).unlink()
        assert name.name in goes_on(runs_folder, stopped), name
        with pytest.raises(StoreError, match=name.name):
            fk.find(MOST)


def test_a_file_of_an_earlier_round_or_another_client_is_found(stopped, runs_folder):
    key, part, _ = stopped
    names = [p.name for p in (part / "clients").iterdir()]
    shutil.copytree(part, runs_folder / key)
    for one, other in zip(names, names[1:] + names[:1], strict=True):
        shutil.copyfile(part / "clients" / one, runs_folder / key / "clients" / other)
    assert "clients" in goes_on(runs_folder, stopped)


def test_damaged_records_are_listed_and_not_shown(stopped, runs_folder):
    key, part, _ = stopped
    for change in (lambda text: text.replace('"accuracy": 0', '"accuracy": 1', 1), lambda text: text[:-9]):
        shutil.rmtree(runs_folder, ignore_errors=True)
        shutil.copytree(part, runs_folder / key)
        log = runs_folder / key / "records.jsonl"
        log.write_text(change(log.read_text()))
        assert history() == ((), [key])


# Kills


class Killed(BaseException):
    """What no `except Exception` catches."""


def test_a_kill_before_any_step_on_the_disk_loses_no_whole_round(stopped, tmp_path, monkeypatch):
    """Every write, fsync, rename and removal is the last one once; nothing is tidied up after that, as in a kill."""
    steps, number, seen = {"fsync", "replace", "unlink", "write"}, 0, set()
    experiment = MOST.replace(rounds=2)
    monkeypatch.setenv("FEDLAB_RUNS", str(tmp_path / "whole"))
    expected = facts(fk.train(experiment))
    while True:
        monkeypatch.setenv("FEDLAB_RUNS", str(tmp_path / str(number)))
        left = [number]

        def before(name, real, left=left):
            def step(*arguments, **options):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                seen.add(name)
                return real(*arguments, **options)

            return step

        with monkeypatch.context() as patch:
            for name in steps - {"write"}:
                patch.setattr(os, name, before(name, getattr(os, name)))
            patch.setattr(Path, "write_bytes", before("write", Path.write_bytes))
            try:
                fk.train(experiment)
                break
            except Killed:
                pass
        stored, damaged = history()
        assert not damaged and all(len(run.records) <= 2 for run in stored)
        assert facts(fk.train(experiment)) == expected, f"killed before step {number}"
        number += 3 if number > 12 else 1
    assert seen == steps and number > 30


@pytest.mark.parametrize("step", [9, 17])
def test_a_real_kill_between_two_steps(step, stopped, runs_folder):
    code = f"""
import os, signal, sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_store, worlds, fedlab_kit as fk; worlds.register()
real, left = os.replace, [{step}]
def replace(*names):
    left[0] -= 1
    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
    real(*names)
os.replace = replace
fk.train(test_store.MOST)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    [folder] = [path for path in runs_folder.iterdir() if path.is_dir()]
    assert [path for path in folder.rglob(".*") if path.name != ".lock"], "something was left half-written"
    assert goes_on(runs_folder, stopped) == "right"
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"]


def test_only_what_nobody_writes_any_more_is_swept_up(tmp_path):
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    names = {
        f".state.safetensors.{GONE}.1": True,
        f".a.{living.pid}.1": False,
        f".b.{os.getpid()}.1": False,
        f".older.{os.getpid()}.1": True,  # of a process whose number came again
        ".lock": False,
        "state.safetensors": False,
        ".notes.2024.txt": False,
    }
    for name in names:
        (tmp_path / name).write_text("x")
    os.utime(tmp_path / f".older.{os.getpid()}.1", (1e9, 1e9))
    sweep_up(tmp_path)
    sweep_up(tmp_path / "nowhere")
    assert {path.name for path in tmp_path.iterdir()} == {name for name, goes in names.items() if not goes}
    living.communicate(b"\n")


def test_runs_artifacts_and_marks_sweep_up(compressed, runs_folder):
    store = compressed.path.parent
    left = [store / f".marks.json.{GONE}.1"]
    left += [compressed.path / place / f".x.{GONE}.1" for place in ("", "clients", "artifacts")]
    for file in left:
        file.write_text("x")
    with RunFolder(compressed.path).locked(None):
        pass
    compress(compressed, fk.Recipe())
    Marks(store).name("a", "b")
    assert not [file for file in left if file.exists()]


def test_files_are_on_the_disk_before_they_are_renamed_and_folders_after(monkeypatch, runs_folder):
    opened, events = {}, []
    for name in ("open", "fsync", "replace"):
        real = getattr(os, name)

        def call(*arguments, name=name, real=real, **options):
            result = real(*arguments, **options)
            if name == "open":
                opened[result] = str(arguments[0])
            events.append((name, opened.get(arguments[0]) if name == "fsync" else [str(a) for a in arguments]))
            return result

        monkeypatch.setattr(os, name, call)
    fk.train(MOST.replace(rounds=2))
    renamed = 0
    for place, (name, what) in enumerate(events):
        if name == "replace" and str(runs_folder) in what[0]:
            renamed += 1
            assert ("fsync", what[0]) in events[:place], what
            assert ("fsync", os.path.dirname(what[1])) in events[place:], what
    log = str(runs.path_of(MOST.replace(rounds=2)) / "records.jsonl")
    assert renamed > 8 and events.count(("fsync", log)) == 2


# Strange JSON

OTHER = [None, True, -3, 2.5, "x", [], [1], {}, {"a": 1}, [[["x"]]], 10**400]


def mutants(value):
    """Yield copies of a JSON value in which one value, at any depth, became one of each other type."""
    for other in OTHER:
        if type(other) is not type(value):
            yield other
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for changed in mutants(value[key]):
            result = copy.copy(value)
            result[key] = changed
            yield result
    for key in value if isinstance(value, dict) else ():
        yield {name: one for name, one in value.items() if name != key}


def look(good: Path) -> list[str]:
    """All that a bench does with a store before anybody presses a button; returns the folders that are damaged."""
    stored, damaged = history()
    assert good in [run.path for run in stored]
    points = Points(Marks(good.parent), stored)
    rows = points.shown(MOST, Filter("blobs"))
    assert table(rows, None) and all(said(row) for row in rows)
    for run in stored:
        assert f"{run!r}{run.interval}{run.note}{run.uplink_bytes}{run.measured['seconds']:.1f}"
    return damaged


@pytest.fixture
def store(compressed, runs_folder):
    """A store with a good run, and a function that adds a copy of it to be damaged."""
    good = runs_folder / compressed.key
    shutil.copytree(compressed.path, good)

    def add() -> Path:
        path = runs_folder / f"{len(list(runs_folder.iterdir())):020x}"
        path.mkdir()
        for name in ("experiment.json", "records.jsonl", "state.safetensors"):
            shutil.copyfile(good / name, path / name)
        return path

    return good, add


@pytest.mark.parametrize("sealed", [True, False])
def test_a_strange_experiment_costs_that_run_alone(store, sealed):
    good, add = store
    about = json.loads((good / "experiment.json").read_text())
    about.pop("seal")
    about["experiment"]["teacher"] = {"dataset": "blobs", "model": "mlp"}
    broken = set()
    for mutant in mutants(about):
        path = add()
        if sealed and isinstance(mutant, dict):
            write_json(path / "experiment.json", mutant)
        else:
            (path / "experiment.json").write_text(json.dumps(mutant))
        broken.add(path.name)
    damaged = set(look(good))
    assert damaged <= broken and len(damaged) > 0.7 * len(broken)  # the rest is strange and still a run
    bench = fk.Bench(MOST)
    assert "cannot be read and are left out" in bench.workbench.store_error and bench.history


def test_strange_records_cost_that_run_alone(store):
    good, add = store
    lines = (good / "records.jsonl").read_bytes().splitlines(keepends=True)
    tensors, _ = read_tensors(good / "state.safetensors")
    record = json.loads(lines[0])
    broken = 0
    for mutant in mutants({**record, "refused": [[1, "late"]]}):
        path = add()
        write_tensors(path / "state.safetensors", tensors, {"round": "1"})  # as older versions did, without a digest
        (path / "records.jsonl").write_text(json.dumps(mutant) + "\n")
        broken += 1
    assert len(look(good)) > 0.7 * broken
    assert fk.Bench(MOST).history


@pytest.mark.parametrize("sealed", [True, False])
def test_a_strange_card_costs_that_point_alone(store, sealed):
    good, _ = store
    [card_file] = (good / "artifacts").glob("*.json")
    card = {name: value for name, value in json.loads(card_file.read_text()).items() if name != "seal"}
    for number, mutant in enumerate(mutants(card)):
        file = card_file.with_name(f"{number}.onnx.json")
        if sealed and isinstance(mutant, dict):
            write_json(file, mutant)
        else:
            file.write_text(json.dumps(mutant))
        file.with_suffix("").write_bytes(b"x")
        if number % 25 == 0:
            with pytest.raises(OSError, match=f"{number}.onnx"):
                load(file.with_suffix(""))
    assert look(good) == []
    assert card_file.with_suffix("") in [point["path"] for point in fk.Bench(MOST).history]


def test_a_flipped_bit_in_a_card_costs_that_point_alone(store):
    good, _ = store
    [file] = (good / "artifacts").glob("*.json")
    points = Points(Marks(good.parent), history()[0]).shown(MOST, Filter("blobs"))
    text = file.read_text()
    dice = random.Random(7)
    for _ in range(60):
        flipped = bytearray(text.encode())
        flipped[dice.randrange(len(flipped))] ^= 1 << dice.randrange(7)
        file.write_bytes(flipped)
        assert Points(Marks(good.parent), history()[0]).shown(MOST, Filter("blobs")) in ([], points)


def test_whatever_lies_in_the_store_costs_nobody_else(store, runs_folder):
    good, add = store
    deep = "[" * 100_000
    for name in ("experiment.json", "records.jsonl", "state.safetensors"):
        for content in (b"", b"{", b"\xff\xfe\x00", deep.encode(), b'{"a": ' * 5000):
            (add() / name).write_bytes(content)
        path = add() / name
        path.unlink()
        path.mkdir()
    (runs_folder / ("f" * 20)).write_text("a file")
    (runs_folder / "notes.txt").write_text("a file of somebody's")
    (runs_folder / ".ipynb_checkpoints").mkdir()
    (runs_folder / ("e" * 20)).mkdir()
    if hasattr(os, "symlink"):
        (runs_folder / ("d" * 20)).symlink_to(runs_folder / "nowhere")
    (good / "artifacts" / "deep.onnx.json").write_text(deep)
    (good / "artifacts" / "folder.onnx.json").mkdir()
    Marks(runs_folder).file.write_text(deep)
    damaged = look(good)
    assert {"f" * 20, "d" * 20} <= set(damaged) and len(damaged) == 3 * 6 + 2
    bench = fk.Bench(MOST)
    said = bench.workbench.store_error
    assert "20 stored run(s) cannot be read" in said and "marks.json" in said


def test_an_unreadable_folder_costs_that_run_alone(store, monkeypatch):
    good, add = store
    closed, real = add(), os.listdir

    def listdir(path="."):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(closed))
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)  # whoever runs the tests may read everything
    assert look(good) == [closed.name]


def test_a_run_of_an_older_version_can_be_looked_at_and_not_gone_on_with(stopped, runs_folder):
    key, part, _ = stopped
    shutil.copytree(part, runs_folder / key)
    folder = RunFolder(runs_folder / key)
    tensors, about = read_tensors(folder.state)
    write_tensors(folder.state, tensors, {"round": about["round"]})
    about = json.loads((folder.path / "experiment.json").read_text())
    (folder.path / "experiment.json").write_text(json.dumps({k: v for k, v in about.items() if k != "seal"}))
    assert [len(run.records) for run in history()[0]] == [3]
    assert len(folder.load(task(MOST))[1]) == 3
    assert "older version" in goes_on(runs_folder, stopped)


# Names and places

NAMES = [
    "../../etc/x",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    "n" * 300,
    ".hidden",
    "..",
    "CON",
    "nul.x",
    "com1",
    "-rf",
    "模型",
    " ",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_models_name_never_becomes_a_path(name, tmp_path):
    catalog.model(name)(lambda shape, classes: torch.nn.Linear(6, classes))
    try:
        run = fk.train(MOST.replace(model=name, rounds=1, strategy="fedavg"))
        artifact = compress(run, fk.Recipe(), tmp_path / "out")
        assert artifact.path.parent == tmp_path / "out" and len(artifact.path.name) < 120
        assert {p.name for p in (tmp_path / "out").iterdir()} == {
            artifact.path.name + end for end in ("", ".json", ".zst")
        }
        assert load(artifact.path).card["experiment"]["model"] == name
        assert {p.name for p in tmp_path.iterdir()} <= {"out", "runs"}
    finally:
        catalog.MODELS.pop(name)


def test_file_names_are_ones_that_every_system_takes():
    reserved = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10))}
    for name in [*NAMES, "", *reserved, *(f"{one}.txt" for one in reserved)]:
        whole = f"{file_name(name)}-12345678-fp32.onnx"
        assert whole.isascii() and whole[0] not in ".- " and 0 < len(file_name(name)) <= 60
        assert set(whole) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        assert whole.split(".")[0].upper() not in reserved
    assert file_name("cnn_2-b") == "cnn_2-b"


def test_folders_mean_what_people_expect(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("FEDLAB_RUNS", "~/x")
    assert runs.runs_folder() == tmp_path / "x" and at("~/y") == tmp_path / "y"
    for empty in ("", None):
        monkeypatch.setenv("FEDLAB_RUNS", empty) if empty is not None else monkeypatch.delenv("FEDLAB_RUNS")
        assert runs.runs_folder() == files.ROOT / "runs"
    assert RunFolder(Path("~/z")).path == tmp_path / "z"
    assert Registry("~/r").folder == tmp_path / "r"
    write_bytes(at("~/w/a"), b"1")
    assert (tmp_path / "w" / "a").read_bytes() == b"1"
