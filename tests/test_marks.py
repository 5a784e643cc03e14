"""Marks: kept over a restart, undone step by step, shared by two notebooks, and never in the way of the work."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlab_kit.files import StoreError
from fedlab_kit.lab import history as module
from fedlab_kit.lab.history import Mark, Marks

CHANGES = st.lists(st.tuples(st.sampled_from(["name", "hide", "show"]), st.sampled_from("ab")), max_size=8)


def change(marks: Marks, how: str, key: str) -> None:
    marks.name(key, "x") if how == "name" else getattr(marks, how)(key)


def test_marks_survive_and_can_be_undone(tmp_path):
    marks = Marks(tmp_path)
    marks.name("run/int8", " small ")
    marks.hide("run")
    again = Marks(tmp_path)
    assert again["run/int8"] == Mark("small") and again["run"].hidden and again["other"] == Mark()
    assert not again.undo()
    assert marks.undo() and not marks["run"].hidden and marks.undo() and marks["run/int8"] == Mark()
    assert not marks.undo() and json.loads((tmp_path / "marks.json").read_text()) == {}


@given(CHANGES)
def test_undoing_every_change_leads_back_to_the_start(tmp_path_factory, changes):
    marks = Marks(tmp_path_factory.mktemp("marks"))
    for how, key in changes:
        change(marks, how, key)
    while marks.undo():
        pass
    names = {key: mark.name for key, mark in marks.all.items() if mark.name}
    assert names == {} and not any(mark.hidden for mark in marks.all.values())


@given(CHANGES, st.lists(st.booleans(), min_size=8, max_size=8))
def test_two_notebooks_keep_each_others_marks(tmp_path_factory, changes, whose):
    folder = tmp_path_factory.mktemp("marks")
    both, expected = (Marks(folder), Marks(folder)), {}
    for (how, key), second in zip(changes, whose, strict=False):
        key = f"{key}{int(second)}"  # each notebook marks things of its own
        change(both[second], how, key)
        expected[key] = both[second][key]
    found = Marks(folder)
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    "content", ["{", "[1, 2]", '{"a": 3}', '{"a": {"name": 3}}', '{"a": {"colour": "red"}}', "\xff"]
)
def test_a_damaged_file_is_named_and_left_as_it_is(tmp_path, content):
    file = tmp_path / "marks.json"
    file.write_bytes(content.encode("latin-1"))
    marks = Marks(tmp_path)
    assert str(file) in marks.error and "damaged" in marks.error and "\n" not in marks.error
    marks.hide("a")
    assert marks["a"].hidden and "damaged" in marks.error and file.read_bytes() == content.encode("latin-1")
    file.unlink()
    marks.name("b", "small")
    assert marks.error == "" and Marks(tmp_path)["a"].hidden and Marks(tmp_path)["b"].name == "small"


def test_a_disk_that_cannot_be_written_is_said_and_the_marks_stay(tmp_path: Path, monkeypatch):
    (tmp_path / "store").write_text("a file where the store should be")
    marks = Marks(tmp_path / "store")
    marks.hide("a")
    assert marks["a"].hidden and "cannot write" in marks.error

    def full(path, content):
        raise StoreError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(module, "write_bytes", full)
    marks = Marks(tmp_path)
    marks.hide("a")
    assert marks["a"].hidden and "No space left" in marks.error and not marks.file.exists()
