"""What stands below the plots: points and runs that are named, hidden, exported, taken up again and compared."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlab_kit import catalog
from fedlab_kit.deployment.artifact import compress
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.lab import client_shelf, compare
from fedlab_kit.lab.bench import Bench
from fedlab_kit.lab.marks import Marks
from fedlab_kit.lab.shelf import Choice
from fedlab_kit.runs import history, train

TINY = Experiment(dataset="blobs", partition="dirichlet", model="mlp", clients=4, clients_per_round=2, rounds=2)
OTHER = TINY.replace(model="logistic", alpha=5.0)


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A bench with one run and two points."""
    made = Bench(TINY)
    made.run(block=True)
    made.controls["dtype"].value = "fp16"
    assert made.wait(20)
    yield made
    assert made.wait(20)


def press(bench: Bench, name: str) -> None:
    """Press a button of the shelves, and wait until that has been shown."""
    {**bench.screen.points.buttons, **bench.screen.runs.buttons}[name].click()
    assert bench.wait(20)


def unfolded(bench: Bench, shelf: object) -> object:
    shelf.widget.children[0].click()
    assert bench.wait(20)
    return shelf


def rows(html: str) -> dict[str, list[str]]:
    """The cells of a table by the heads of their rows."""
    found = re.findall(r'<tr[^>]*><th scope="row">(.*?)</th>(.*?)</tr>', html)
    return {head: re.findall("<td>(.*?)</td>", cells) for head, cells in found}


def test_the_current_point_is_chosen_named_hidden_and_brought_back(bench):
    shelf = bench.screen.points
    assert [label.split(", ")[-1] for label, _ in shelf.point.field.options] == ["fp16", "fp32"]
    shelf.point.field.value = 1
    assert bench.wait(20) and bench.artifact.card["recipe"]["dtype"] == "fp32"
    shelf.name.value = "whole"
    press(bench, "Pin")
    assert "1: whole, mlp, fp32" in rows(shelf.table.value)
    press(bench, "Hide")
    assert list(rows(shelf.table.value)) == ["2: mlp, fp16"]
    assert dict(shelf.point.field.options)["1: whole, mlp, fp32 (hidden)"] == 1
    press(bench, "Undo")
    press(bench, "Undo")
    assert list(rows(shelf.table.value)) == ["1: mlp, fp32", "2: mlp, fp16"]


def test_points_of_earlier_benches_can_be_left_out(bench):
    later = Bench(TINY)
    assert len(later.history) == 2 and later.points == []
    assert ": 2 points" in later.screen.scatter.value
    later.screen.points.earlier.value = False
    assert later.wait(20) and "no point yet" in later.screen.scatter.value
    later.screen.points.earlier.value = True
    later.screen.points.point.field.value = 2
    assert later.wait(20) and later.artifact.path == bench.artifact.path and len(later.points) == 1


def test_export_writes_to_the_folder_in_the_field_and_says_where(bench, tmp_path):
    bench.screen.points.folder.value = str(tmp_path / "mine")
    press(bench, "Export")
    assert f"Exported to {tmp_path / 'mine'}: open report.html there." in bench.screen.compress_status.value
    assert (tmp_path / "mine" / bench.artifact.path.name).read_bytes() == bench.artifact.path.read_bytes()
    Path(tmp_path / "taken").write_text("")
    bench.screen.points.folder.value = str(tmp_path / "taken")
    press(bench, "Export")
    assert "taken is a file: name a folder that does not exist yet" in bench.screen.compress_status.value


def test_export_of_an_earlier_point_trains_nothing(bench, tmp_path):
    later = Bench(TINY)
    with pytest.raises(ValueError, match="no point to export yet"):
        later.export(tmp_path / "none")
    later.screen.points.point.field.value = 2
    assert later.wait(20)
    folder = later.export(tmp_path / "mine")
    assert len((folder / "points.csv").read_text().splitlines()) == 3 and later.runs == []


def test_two_runs_side_by_side(bench):
    shelf = unfolded(bench, bench.screen.runs)
    assert list(rows(shelf.table.value)) == [
        "dataset blobs, model mlp, clients 4, clients_per_round 2, partition dirichlet, rounds 2"
    ]
    for name, value in (("model", "logistic"), ("alpha", 5.0)):
        bench.controls[name].value = value
    bench.run(block=True)
    one, other = bench.runs[-1], bench.runs[0]
    shelf.run.field.value, shelf.other.field.value = one.key, other.key
    assert bench.wait(20)
    table = rows(shelf.comparison.value)
    assert table["Model"] == ["logistic", "mlp"] and table["Alpha"] == ["5.0", "0.5"]
    assert "Clients" not in table and "Rounds" in table
    assert table["Accuracy"] == [f"{100 * run.accuracy:.1f} %" for run in (one, other)]
    assert table["Uplink"] == [compare.human_bytes(run.uplink_bytes) for run in (one, other)]
    worst = one.client_accuracy()[0]
    assert table["Worst client"][0].startswith(f"{worst.argmin()}: {100 * worst.min():.1f} % (")
    assert "1 earlier run behind it" in shelf.curve.value
    shelf.other.field.value = one.key
    assert bench.wait(20) and shelf.comparison.value == shelf.curve.value == ""


def test_a_run_is_named_hidden_and_taken_up_again(bench):
    shelf = unfolded(bench, bench.screen.runs)
    bench.controls["alpha"].value = 5.0
    bench.run(block=True)
    shelf.run.field.value = bench.runs[0].key
    shelf.name.value = "first"
    press(bench, "Rename run")
    assert "first" in rows(shelf.table.value) and "first" in bench.screen.points.table.value
    press(bench, "Hide run")
    assert "1 hidden" in shelf.table.value and shelf.buttons["Hide run"].description == "Show run"
    assert all(point["run"] != bench.runs[0].key for point in bench.history)
    press(bench, "Hide run")
    assert shelf.buttons["Hide run"].description == "Hide run" and "hidden" not in shelf.table.value
    press(bench, "Use its settings")
    assert bench.experiment == TINY and bench.controls["alpha"].value == 0.5
    bench.run(block=True)
    assert "Answered from the store" in bench.status


def test_settings_that_have_no_control_are_taken_up_too():
    student = TINY.replace(model="logistic", teacher=TINY)
    train(student)
    bench = Bench(TINY)
    shelf = unfolded(bench, bench.screen.runs)
    shelf.run.field.value = next(key for label, key in shelf.run.field.options if "teacher mlp" in label)
    press(bench, "Use its settings")
    assert bench.experiment == student and not bench.controls["temperature"].field.disabled


def test_runs_of_older_code_are_marked_and_their_points_exported(runs_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "code", lambda: "0" * 64)
        compress(train(TINY), Recipe())
    bench = Bench(TINY)
    (old,) = history()[0]
    assert old.older and compare.run_option(old, Marks(runs_folder)).endswith(", made by older code")
    assert "made by older code" in compare.runs_table([old], Marks(runs_folder))
    bench.desk.compressor.choose(1)
    deadline = time.monotonic() + 30
    while bench.desk.compressor.busy and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "Made by older code" in (bench.export(tmp_path / "out") / "reproduce.py").read_text()
    bench.run(block=True)
    assert bench.desk.session.runs[-1].key != old.key and not bench.desk.session.runs[-1].from_store


def test_two_runs_are_told_apart_by_their_names_or_by_what_differs(runs_folder):
    train(TINY)
    train(OTHER)
    (one, other), marks = history()[0], Marks(runs_folder)
    assert compare.told_apart(one, other, marks) == "model mlp, alpha 0.5"
    assert compare.told_apart(other, one, marks) == "model logistic, alpha 5.0"
    marks.name(one.key, "first")
    assert compare.told_apart(one, other, marks) == "first"


def test_the_table_of_runs_shows_the_last_and_counts_all(runs_folder):
    for alpha in (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0):
        train(TINY.replace(alpha=alpha))
    runs, marks = history()[0], Marks(runs_folder)
    table = compare.runs_table(runs, marks)
    assert (
        "The last 6 of 7 runs" in table
        and "alpha 0.05," not in table
        and next(iter(rows(table))).endswith("alpha 2.0, rounds 2")
    )
    assert compare.runs_table([], marks) == "<p>No run yet.</p>"
    assert rows(compare.comparison(runs[0], runs[0], ("a", "b")))["Settings"] == ["the same", "the same"]


def test_values_that_are_settings_themselves_are_said_in_short(runs_folder):
    teacher = TINY.replace(rounds=1)
    train(TINY.replace(teacher=teacher))
    train(TINY)
    marks = Marks(runs_folder)
    one, other = (next(r for r in history()[0] if r.experiment.teacher == t) for t in (teacher, None))
    table = rows(compare.comparison(one, other, ("with <b>", "without")))
    assert table["Teacher"] == [
        "dataset blobs, model mlp, clients 4, clients_per_round 2, partition dirichlet, rounds 1",
        "none",
    ]
    assert "with &lt;b&gt;" in compare.comparison(one, other, ("with <b>", "without"))
    assert compare.run_option(one, marks).endswith(" UTC")


def test_the_worst_client_is_not_looked_for_where_that_takes_long(runs_folder, monkeypatch):
    train(TINY)
    run = history()[0][0]
    monkeypatch.setattr(compare, "MOST", 3)
    assert rows(compare.comparison(run, run, ("a", "b")))["Worst client"][0].startswith("not looked for among more")
    monkeypatch.undo()
    monkeypatch.setattr(compare, "client_names", lambda *_: (_ for _ in ()).throw(OSError("no such file")))
    assert rows(compare.comparison(run, run, ("a", "b")))["Worst client"][0] == "unknown: the data are not at hand"


def test_clients_are_drawn_once_unfolded_and_follow_the_controls(bench):
    shelf = bench.screen.clients
    assert shelf.labels.value == shelf.accuracy.value == ""
    unfolded(bench, shelf)
    assert 'alt="Samples of 3 labels at 4 clients' in shelf.labels.value
    worst = bench.runs[-1].client_accuracy()[0]
    assert f"worst client {worst.argmin()} with {100 * worst.min():.1f} %" in shelf.accuracy.value
    bench.controls["clients"].value = 6
    assert bench.wait(20) and "at 6 clients" in shelf.labels.value
    bench.controls["clients"].value = client_shelf.MOST + 1
    assert bench.wait(20) and "these settings have 101" in shelf.labels.value


def test_clients_of_a_data_set_that_is_not_at_hand_are_not_fetched_to_be_drawn(bench):
    shelf = unfolded(bench, bench.screen.clients)
    bench.controls["dataset"].value = "digits"
    assert bench.wait(20) and "Press Run to load the data set." in shelf.labels.value


def test_what_cannot_be_dealt_out_is_said_in_the_place_of_the_picture(bench):
    shelf = unfolded(bench, bench.screen.clients)
    bench.controls["partition"].value = "site"
    assert bench.wait(20) and "<img" not in shelf.labels.value and "site" in shelf.labels.value


def test_a_choice_that_fills_itself_tells_nobody():
    heard = []
    choice = Choice("Point", lambda: heard.append(choice.value))
    choice.fill([("one", 1), ("two", 2)], 2)
    assert choice.value == 2 and heard == []
    choice.field.value = 1
    assert heard == [1]
    choice.fill([], None)
    assert choice.value is None and heard == [1]
