"""Exported folders: whole or absent, measured on the exported file, and really reproducible from the code in them."""

import csv
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import onnxruntime
import pandas
import pytest
import torch

import fedlab_kit as fk
from fedlab_kit import catalog
from fedlab_kit.deployment.artifact import load
from fedlab_kit.files import StoreError
from fedlab_kit.lab.bundle import export
from fedlab_kit.lab.history import Mark, Point
from fedlab_kit.reproduce import reproduce
from fedlab_kit.run import StoredRun

EXPERIMENT = fk.Experiment(
    dataset="digits",
    partition="dirichlet",
    model="half_mlp",
    clients=4,
    clients_per_round=3,
    rounds=2,
    alpha=1.0,
    teacher=fk.Experiment(dataset="digits", partition="dirichlet", rounds=1),
)
RECIPE = fk.Recipe(prune_ratio=0.3, dtype="int8")


@pytest.fixture(scope="module")
def run() -> fk.Run:
    return fk.train(EXPERIMENT)


@pytest.fixture(scope="module")
def artifact(run, tmp_path_factory) -> fk.Artifact:
    return fk.compress(run, RECIPE, tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="module")
def points(run, artifact, tmp_path_factory) -> list[dict]:
    plain = fk.compress(run, fk.Recipe(), tmp_path_factory.mktemp("artifacts"))
    made = [Point(1, run, fk.Recipe(), plain.path, plain.card, earlier=True),
            Point(2, run, RECIPE, artifact.path, artifact.card, earlier=False)]  # fmt: skip
    return [made[0].row(Mark("the <baseline>"), "first"), made[1].row(Mark())]


@pytest.fixture(scope="module")
def folder(run, artifact, points, tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("room") / "team one", artifact, run, points)


class Page(HTMLParser):
    """What a page refers to, and what its pictures say."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.alts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        self.alts += [value for name, value in attributes if tag == "img" and name == "alt"]
        assert tag not in ("link", "iframe")


def test_the_folder_holds_five_files_and_nothing_is_left_beside_it(folder, artifact):
    names = {artifact.path.name, f"{artifact.path.name}.json", "reproduce.py", "points.csv", "report.html"}
    assert {path.name for path in folder.iterdir()} == names
    assert list(folder.parent.iterdir()) == [folder]
    assert load(folder / artifact.path.name).digest == artifact.digest


def test_the_exported_card_has_the_test_accuracy_of_the_exported_file(folder, artifact, run):
    card = json.loads((folder / f"{artifact.path.name}.json").read_text())
    session = onnxruntime.InferenceSession(folder / artifact.path.name)
    logits = session.run(None, {"x": run.dataset.test.x.numpy()})[0]
    assert card["test"]["accuracy"] == (logits.argmax(1) == run.dataset.test.y.numpy()).mean()
    low, high = card["test"]["interval"]
    assert low < card["test"]["accuracy"] < high
    assert "test" not in artifact.card and "test" not in load(artifact.path).card  # the store keeps its test split shut


def test_the_code_reproduces_the_artifact_in_another_process(folder, artifact, tmp_path):
    code = (folder / "reproduce.py").read_text()
    lines = [line for line in code.splitlines() if line and not line.startswith("#")]
    assert len(lines) == 3
    prelude, check = "import torch; torch.set_num_threads(1)\n", "\nprint(artifact.digest)"
    environment = {**os.environ, "FEDLAB_RUNS": str(tmp_path / "empty")}
    arguments = [sys.executable, "-c", prelude + code + check]
    printed = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == artifact.digest
    assert artifact.digest in code


def test_code_tells_what_was_registered_by_hand(tmp_path):
    own = fk.Experiment(
        dataset="blobs", partition="dirichlet", model="norm_net", clients=3, clients_per_round=3, rounds=1
    )
    run = fk.train(
        fk.Experiment(
            dataset="blobs", partition="dirichlet", model="norm_net", clients=3, clients_per_round=3, rounds=1
        )
    )
    code = reproduce(run, fk.Recipe(), "0" * 64)
    assert "\ndef norm_net(" in code and "\ndef blobs(" in code and "Not carried" not in code
    assert f"run = train({own!r})" in code
    compile(code, "reproduce.py", "exec")


OWN = """
import functools
import math
from functools import partial

import numpy
import torch
import torch.nn.functional as F
from torch import nn

import fedlab_kit as fk
from worlds import register

register()
WIDTH, KINDS = 5, {"a": (1, 2.5), "b": None}
ends = lambda x: x * WIDTH

class Net(nn.Module):
    steps = KINDS["a"][0]
    def __init__(self, inputs, classes):
        super().__init__()
        self.a, self.b = nn.Linear(inputs, WIDTH), nn.Linear(WIDTH, classes)
    def forward(self, x):
        return ends(self.b(F.relu(Block.twice(self, x))))

class Plain(Net):
    pass

def doubled(function):
    @functools.wraps(function)
    def wrapper(*values):
        return 2 * function(*values)
    return wrapper

@functools.lru_cache
def factor():
    return 3.0

class Block(Plain):
    @torch.no_grad()
    def probe(self, x):
        return x
    @doubled
    def twice(self, x):
        return self.a(x) * math.pi * factor()

@doubled
def number(one):
    return one

def make(shape, classes):
    return Block(shape[0], classes) if number(1) == 2 else None

fk.model("mine")(make)

@fk.codec("halves")
class Halves(fk.Codec):
    def encode(self, vector, rng):
        return (vector / 2).numpy().tobytes()
    def decode(self, body, size):
        return torch.from_numpy(numpy.frombuffer(body, numpy.float32).copy()) * 2

parent = fk.Experiment(dataset="blobs", partition="iid", model="mine", clients=3, clients_per_round=3, rounds=1)
child = parent.replace(model="mlp", uplink="halves", teacher=parent)
"""


def _fresh(code: str, *folders: Path) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [Path(fk.__file__).parents[1], *folders]))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")


def test_code_brings_a_users_definitions_and_gets_the_same_key_in_a_fresh_process(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    ask = "import sys; sys.path.insert(0, 'TESTS'); import own, fedlab_kit as fk\n"
    ask += "from fedlab_kit.reproduce import reproduce\n"
    ask += "run = fk.train(own.child); print(run.key)\nprint(reproduce(run, fk.Recipe(), '0' * 64))"
    key, *lines = _fresh(ask.replace("TESTS", str(Path(__file__).parent)), tmp_path)
    code = "\n".join(lines)
    assert "Not carried" not in code and "import own" not in code and "worlds" not in code
    (tmp_path / "own.py").unlink()
    assert _fresh(code + "\nprint(run.key)")[-2] == key


def test_code_says_what_it_cannot_bring(tmp_path):
    table = torch.ones(6)

    def mine(shape, classes):
        assert len(table) == 6
        return torch.nn.Linear(6, classes)

    catalog.model("mine")(mine)
    run = fk.train(
        fk.Experiment(dataset="blobs", partition="dirichlet", model="mine", clients=3, clients_per_round=3, rounds=1)
    )
    code = reproduce(run, fk.Recipe(), "0" * 64)
    assert "# Not carried along, define it yourself: mine (it takes table from the function around it)." in code
    catalog.model("mine")(lambda shape, classes: torch.nn.Linear(6, classes))
    assert "# A definition, the data or a version is another one now" in reproduce(run, fk.Recipe(), "0" * 64)


def test_a_point_of_older_code_can_be_exported_and_says_so(run, artifact, points, tmp_path):
    older = StoredRun(run.experiment, run.path, run.records, run.measured, True, older=True)
    code = (export(tmp_path / "old", artifact, older, points) / "reproduce.py").read_text()
    assert "# Made by older code of fedlab-kit" in code


def test_the_table_is_that_of_the_points_without_folders_of_this_machine(folder, points):
    table = pandas.read_csv(folder / "points.csv")
    assert table["accuracy"].tolist() == [point["accuracy"] for point in points]
    assert table["file"].tolist() == [point["path"].name for point in points]
    assert table["name"].tolist()[0] == "the <baseline>" and table["run_name"].tolist()[0] == "first"
    assert table["earlier"].tolist() == [True, False] and set(table["run"]) == {points[0]["run"]}
    assert table[["when", "machine"]].values.tolist() == [[point["when"], point["machine"]] for point in points]
    assert str(points[0]["path"].parent) not in (folder / "points.csv").read_text()


def test_no_cell_of_the_table_is_a_formula_and_all_of_it_is_found_again(run, artifact, points, tmp_path):
    words = ['=HYPERLINK("http://a.b")', "+1;=2", "-x", "@SUM(A1)", "\t=1", "'quoted", "a,=b", "it's -5", "-5"]
    rows = [{**points[0], "note": word, "loss": -0.5} for word in words]
    file = export(tmp_path / "made", artifact, run, rows) / "points.csv"
    with file.open(newline="") as lines:
        cells = [cell for line in csv.reader(lines) for cell in line]
    parts = [part for cell in cells for part in re.split(r"[;,\t\r\n]", cell)]
    assert {"-0.5", "-5"} <= {part for part in parts if part.startswith(tuple("=+-@")) and float(part) < 0}  # numbers
    table = pandas.read_csv(file, dtype={"note": str})
    assert [re.sub(r"(^|[;,\t\r\n])'", r"\1", name) for name in table["note"]] == words
    assert table["loss"].tolist() == [-0.5] * len(words)


def test_the_report_needs_nothing_beside_it_and_reads_without_its_pictures(folder, artifact):
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert len(page.alts) == 5 and all(page.alts)
    assert "2 points, " in page.alts[1] and "the current one has" in page.alts[1]
    assert "prefers-color-scheme: dark" in text and not re.search(r"url\((?!#)|@import", text)
    assert f"({artifact.bytes:,} bytes)" in text and artifact.digest in text and "alpha" in text


def test_clients_that_are_no_sites_are_numbered_in_the_report(tmp_path):
    run = fk.train(
        fk.Experiment(
            dataset="blobs_at_sites", partition="dirichlet", model="mlp", clients=5, clients_per_round=5, rounds=1
        )
    )
    folder = export(tmp_path / "mixed", fk.compress(run, fk.Recipe()), run, [])
    assert re.search("Accuracy of each of 5 clients: .* worst client [0-4] with", (folder / "report.html").read_text())


def test_an_export_again_replaces_its_own_and_nothing_else(folder, artifact, run, points, tmp_path):
    mine = export(tmp_path / "mine", artifact, run, points[:1])
    (mine / "points.csv").unlink()  # as a person might
    assert export(mine, artifact, run, points) == mine
    assert len(pandas.read_csv(mine / "points.csv")) == 2
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match=r"mine holds other files \(thesis\.txt\): name a folder"):
        export(mine, artifact, run, points)
    assert (mine / "thesis.txt").read_text() == "years of work"
    with pytest.raises(StoreError, match=r"thesis\.txt is a file"):
        export(mine / "thesis.txt", artifact, run, points)


def test_nothing_is_left_of_an_export_that_fails(artifact, run, points, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fedlab_kit.lab.bundle._write_points", full)
        with pytest.raises(StoreError, match=r"cannot write .*out: No space left on device"):
            export(tmp_path / "out", artifact, run, points)
    damaged = fk.compress(run, fk.Recipe(dtype="fp16"), tmp_path / "damaged")
    damaged.path.write_bytes(damaged.path.read_bytes()[:-9])
    with pytest.raises(StoreError, match="truncated or altered"):
        export(tmp_path / "out", damaged, run, points)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_rows_of_a_sweep_do_for_an_export_failed_ones_too(tmp_path):
    asked = fk.Experiment(dataset="blobs", partition="iid", model="mlp", clients=3, clients_per_round=3, rounds=1)
    rows = fk.sweep(asked, {"prune_ratio": [0.0, 0.999], "dtype": ["fp32", "int8"]}).to_dict("records")
    run = fk.train(asked)
    made = export(tmp_path / "made", fk.compress(run, fk.Recipe(dtype="int8")), run, rows)
    page = (made / "report.html").read_text()
    assert {row["path"] for row in rows} > {None} and page.count("Accuracy on test") and "fp32" in page
