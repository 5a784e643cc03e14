"""The live side without a widget: the newest recipe, the baseline first, errors in words, marks that can be undone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.lab import compressor as module
from fedlab_kit.lab.compressor import NO_RUN, Compressor
from fedlab_kit.lab.points import Points, said, table, words
from fedlab_kit.runs import Run, train

TINY = Experiment(dataset="blobs", model="mlp", clients=4, clients_per_round=2, rounds=1)
HALF = Recipe(prune_ratio=0.5)


@pytest.fixture
def run() -> Run:
    return train(TINY)


def settle(compressor: Compressor) -> Compressor:
    for _ in range(600):
        if not compressor.busy:
            return compressor
        compressor.watch(0.1)
    raise AssertionError(compressor.status)


def recipes(compressor: Compressor) -> list[Recipe]:
    return [point.recipe for point in compressor.points.all]


def test_the_uncompressed_file_is_measured_first_and_once(run):
    compressor = Compressor()
    assert compressor.status == NO_RUN and compressor.artifact is None
    compressor.ask(run, HALF)
    settle(compressor)
    assert recipes(compressor) == [Recipe(), HALF]
    assert compressor.artifact.path.stat().st_size == compressor.points.rows()[1]["bytes"]
    compressor.ask(run, Recipe(dtype="fp16"))
    assert recipes(settle(compressor)) == [Recipe(), HALF, Recipe(dtype="fp16")]
    assert compressor.status.startswith("3: mlp, fp16: ")


def test_of_the_recipes_of_a_drag_the_latest_is_measured(run):
    compressor = Compressor()
    for ratio in (0.1, 0.2, 0.3, 0.4):
        compressor.ask(run, Recipe(prune_ratio=ratio), delay=0.3)
    assert recipes(settle(compressor)) == [Recipe(), Recipe(prune_ratio=0.4)]


def test_a_recipe_that_was_measured_is_shown_again_not_measured_again(run, monkeypatch):
    compressor = Compressor()
    compressor.ask(run, HALF)
    settle(compressor)
    monkeypatch.setattr(module, "compress", None)
    compressor.ask(run, Recipe(prune="channel"))  # ratio 0: the same file as the baseline
    settle(compressor)
    assert compressor.error == "" and compressor.points.current.number == 1
    compressor.points.hide(1)
    compressor.ask(run, Recipe())
    assert [row["point"] for row in settle(compressor).points.rows()] == [1, 2]


def test_an_impossible_recipe_is_answered_in_words_and_the_next_one_measured(run):
    told = []
    compressor = Compressor(failed=told.append)
    compressor.ask(run, Recipe(prune="channel", prune_ratio=0.999))
    settle(compressor)
    assert compressor.status == f"Error: {compressor.error}" and told == [compressor.error]
    assert compressor.error.startswith("prune_ratio 0.999 would remove")
    compressor.ask(run, HALF)
    assert settle(compressor).error == "" and recipes(compressor) == [Recipe(), HALF]


def test_an_unforeseen_failure_is_said(run, monkeypatch):
    def broken(*_):
        raise KeyError("oops")

    monkeypatch.setattr(module, "compress", broken)
    compressor = Compressor()
    compressor.ask(run, HALF)
    assert settle(compressor).status == "Error: KeyError: 'oops'"


def test_preparing_leaves_no_point_and_no_file(runs_folder):
    compressor = Compressor()
    compressor.prepare(TINY)
    settle(compressor)
    assert compressor.status == NO_RUN and compressor.points.all == () and not runs_folder.exists()


def test_preparing_gives_way_to_a_run_but_not_to_a_question(run):
    compressor = Compressor(occupied=lambda: True)
    compressor.prepare(TINY)
    compressor.watch(0.3)
    assert compressor.busy and "Preparing" in compressor.status
    compressor.ask(run, HALF)
    assert recipes(settle(compressor)) == [Recipe(), HALF]


def test_preparing_what_cannot_be_built_says_nothing_yet():
    compressor = Compressor()
    compressor.prepare(TINY.replace(model="cnn"))
    assert settle(compressor).status == NO_RUN


class Thing:
    """Stands for a run and an artifact alike: all numbers are 0.5 but the sizes."""

    key, note, interval = "abc", "", (0.4, 0.6)
    experiment, measured = Experiment(), {"seconds": 0.5}
    bytes = zstd_bytes = uplink_bytes = 1000

    def __getattr__(self, name: str) -> float:
        return 0.5


def two_points() -> Points:
    points = Points()
    points.add(Thing(), Recipe(), Thing())
    points.add(Thing(), HALF, Thing())
    return points


def test_marks_can_be_undone():
    points = two_points()
    points.pin(2, "small")
    points.hide(2)
    assert [row["point"] for row in points.rows()] == [1]
    assert points.undo() and [row["name"] for row in points.rows()] == ["", "small"]
    assert points.undo() and [row["name"] for row in points.rows()] == ["", ""]
    assert not points.undo()


@given(st.lists(st.tuples(st.sampled_from(["pin", "hide"]), st.integers(1, 2)), max_size=6))
def test_undoing_every_mark_leads_back_to_the_start(marks):
    points = two_points()
    before = points.rows()
    for mark, number in marks:
        points.pin(number, "x") if mark == "pin" else points.hide(number)
    for _ in marks:
        assert points.undo()
    assert points.rows() == before


def test_a_point_in_words_and_in_the_table():
    points = two_points()
    points.pin(2, "<mine>")
    first, second = points.rows()
    assert words(first) == "1: cnn, fp32" and words(second) == "2: <mine>, cnn, weight 0.5 fp32"
    assert said(first) == "1: cnn, fp32: 50.0 % (95 % interval 40.0 % to 60.0 %), 1 kB, 1 kB with zstd."
    assert said({**first, "note": "int4 does nothing here"}).endswith("with zstd. Note: int4 does nothing here.")
    text = table([first, second], current=2)
    assert "&lt;mine&gt;" in text and text.index("2: ") < text.index("1: ")
    assert text.count("<tr") == 3 and text.count("aria-current") == 1
    assert "The last 1 of 2 points" in table([first, second], 2, most=1) and table([], None) == ""
