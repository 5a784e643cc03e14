"""The live side without a widget: the newest recipe, the baseline first, errors in words, marks that can be undone."""

import json
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest

from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.federation.server import RoundRecord
from fedlab_kit.files import StoreError
from fedlab_kit.lab import workbench as module
from fedlab_kit.lab.history import Filter, Marks, Points
from fedlab_kit.lab.text import said, table, words
from fedlab_kit.lab.workbench import NO_RUN, Compressor
from fedlab_kit.run import Run, StoredRun
from fedlab_kit.runs import history, runs_folder, train
from fedlab_kit.sweep import MEASURED

TINY = Experiment(dataset="blobs", partition="dirichlet", model="mlp", clients=4, clients_per_round=2, rounds=1)
HALF = Recipe(prune_ratio=0.5)


@pytest.fixture
def run() -> Run:
    return train(TINY)


def compressor_of(**options) -> Compressor:
    """A compressor on the test's own store."""
    return Compressor(Points(Marks(runs_folder()), history()[0]), **options)


def settle(compressor: Compressor) -> Compressor:
    assert compressor.wait(60), compressor.status
    return compressor


def recipes(compressor: Compressor) -> list[Recipe]:
    return [point.recipe for point in compressor.points.all]


def test_the_uncompressed_file_is_measured_first_and_once(run):
    compressor = compressor_of()
    assert compressor.status == NO_RUN and compressor.artifact is None
    compressor.ask(run, HALF)
    settle(compressor)
    assert recipes(compressor) == [Recipe(), HALF]
    assert compressor.artifact.path.stat().st_size == compressor.points.rows()[1]["bytes"]
    compressor.ask(run, Recipe(dtype="fp16"))
    assert recipes(settle(compressor)) == [Recipe(), HALF, Recipe(dtype="fp16")]
    assert compressor.status.startswith("3: mlp, fp16: ")


def test_of_the_recipes_of_a_drag_the_latest_is_measured(run):
    compressor = compressor_of()
    for ratio in (0.1, 0.2, 0.3, 0.4):
        compressor.ask(run, Recipe(prune_ratio=ratio), delay=0.3)
    assert recipes(settle(compressor)) == [Recipe(), Recipe(prune_ratio=0.4)]


def test_a_recipe_that_was_measured_is_shown_again_not_measured_again(run, monkeypatch):
    compressor = compressor_of()
    compressor.ask(run, HALF)
    settle(compressor)
    monkeypatch.setattr(module, "compress", None)
    compressor.ask(run, Recipe(prune="channel"))  # ratio 0: the same file as the baseline
    settle(compressor)
    assert compressor.error == "" and compressor.points.current.number == 1
    compressor.points.marks.hide(compressor.points.current.key)
    assert [row["point"] for row in compressor.points.rows()] == [2]
    compressor.ask(run, Recipe())
    assert [row["point"] for row in settle(compressor).points.rows()] == [1, 2]


def test_an_impossible_recipe_is_answered_in_words_and_the_next_one_measured(run):
    told = []
    compressor = compressor_of(failed=told.append)
    compressor.ask(run, Recipe(prune="channel", prune_ratio=0.999))
    settle(compressor)
    assert compressor.status == f"Error: {compressor.error}" and list(map(str, told)) == [compressor.error]
    assert compressor.error.startswith("prune_ratio 0.999 would remove")
    compressor.ask(run, HALF)
    assert settle(compressor).error == "" and recipes(compressor) == [Recipe(), HALF]


def test_an_unforeseen_failure_is_said(run, monkeypatch):
    def broken(*_):
        raise KeyError("oops")

    monkeypatch.setattr(module, "compress", broken)
    compressor = compressor_of()
    compressor.ask(run, HALF)
    assert settle(compressor).status == "Error: KeyError: 'oops'"


def test_preparing_leaves_no_point_and_no_file(runs_folder):
    compressor = compressor_of()
    compressor.prepare(TINY)
    settle(compressor)
    assert compressor.status == NO_RUN and compressor.points.all == () and not runs_folder.exists()


def test_preparing_gives_way_to_a_run_but_not_to_a_question(run):
    compressor = compressor_of(occupied=lambda: True)
    compressor.prepare(TINY)
    assert not compressor.wait(0.3)
    assert compressor.busy and "Preparing" in compressor.status
    compressor.ask(run, HALF)
    assert recipes(settle(compressor)) == [Recipe(), HALF]


def test_preparing_what_cannot_be_built_says_nothing_yet():
    compressor = compressor_of()
    compressor.prepare(TINY.replace(model="cnn"))
    assert settle(compressor).status == NO_RUN


FIGURES = {
    **dict.fromkeys(MEASURED, 0.5),
    "bytes": 1000,
    "zstd_bytes": 1000,
    "interval": [0.4, 0.6],
    "lost_interval": [0.0, 1.0],
    "recall": [0.5],
    "note": "",
}
CARD = {"measured": FIGURES, "when": "2026-11-22T15:46:10+00:00", "machine": "Linux x86_64, 2 cores"}


def stored() -> StoredRun:
    """A run on paper."""
    record = RoundRecord(1, 0.5, 0.4, 0.6, 1.0, 1000, 1000, 0.5, (0,), (0,), (5,), (10,))
    measured = {"seconds": 0.5, "when": "2026", "machine": ""}
    return StoredRun(
        Experiment(dataset="digits", partition="dirichlet", rounds=1), Path("abc"), (record,), measured, from_store=True
    )


def two_points(folder: Path) -> Points:
    points = Points(Marks(folder))
    for recipe in (Recipe(), HALF):
        points.add(stored(), recipe, SimpleNamespace(path=Path("x.onnx"), card=CARD))
    return points


def test_a_point_in_words_and_in_the_table(tmp_path):
    points = two_points(tmp_path)
    points.marks.name("abc/weight-0.5-fp32", "<mine>")
    first, second = points.rows()
    assert words(first) == "1: cnn, fp32" and words(second) == "2: <mine>, cnn, weight 0.5 fp32"
    assert said(first) == "1: cnn, fp32: 50.0 % (95 % interval 40.0 % to 60.0 %), 1 kB, 1 kB with zstd; measured now."
    assert said({**first, "note": "int4 does nothing here"}).endswith("measured now. Note: int4 does nothing here.")
    earlier = said({**first, "earlier": True})
    assert earlier.endswith("measured 2026-11-22 15:46 UTC on Linux x86_64, 2 cores.")
    text = table([first, {**second, "earlier": True}], current=2)
    assert "<td>now</td>" in text and "<td>2026-11-22 15:46 UTC</td>" in text and "on Linux x86_64, 2 cores" in text
    assert "&lt;mine&gt;" in text and text.index("2: ") < text.index("1: ")
    assert text.count("<tr") == 3 and text.count("aria-current") == 1
    assert "The last 6 of 7 points" in table([first] * 6 + [second], 2) and table([], None) == ""


def test_points_of_earlier_benches_are_there_and_answered_from_their_files(run, monkeypatch):
    first = compressor_of()
    first.ask(run, HALF)
    assert first.worker.wait(60, resting=True)
    second = compressor_of()
    assert [row["earlier"] for row in second.points.shown(TINY)] == [True, True] and second.points.rows() == []
    assert second.points.shown(TINY, Filter(time="this bench")) == second.points.shown(Experiment()) == []
    monkeypatch.setattr(module, "compress", None)
    second.ask(run, HALF)
    settle(second)
    assert (
        second.error == ""
        and "; measured 20" in second.status
        and [row["point"] for row in second.points.rows()] == [1, 2]
    )
    same = ("accuracy", "bytes", "zstd_bytes", "latency_ms", "path")
    assert [[row[name] for name in same] for row in second.points.rows()] == [
        [row[name] for name in same] for row in first.points.rows()
    ]
    assert second.artifact.predict(run.dataset.validation.x[:2]).shape == (2, 3)


@pytest.mark.parametrize("wrong", [{"recipe": {"prune": "by lot"}}, {"measured": {}}, {"when": 3}])
def test_a_card_of_another_version_or_a_damaged_one_is_no_point(run, wrong):
    first = compressor_of()
    first.ask(run, HALF)
    card = settle(first).artifact.path.with_suffix(".onnx.json")
    card.write_text(json.dumps({**first.artifact.card, **wrong}))
    assert [row["dtype"] for row in compressor_of().points.shown(TINY)] == ["fp32"]
    card.write_text("[]")
    assert len(compressor_of().points.all) == 1


def test_any_earlier_point_can_be_made_the_current_one(run):
    first = compressor_of()
    first.ask(run, HALF)
    settle(first)
    second = compressor_of()
    second.choose(2)
    assert settle(second).points.current.recipe == HALF and second.artifact.sparsity > 0.4
    second.points.all[0].path.write_bytes(b"cut")
    second.choose(1)
    assert "is missing or altered: press Run" in settle(second).status and second.points.current.number == 2
    second.ask(run, Recipe())
    assert settle(second).status.endswith("measured now.") and second.points.current.number == 1


def test_an_artifact_that_the_disk_does_not_take_is_measured_all_the_same(run, monkeypatch):
    real = module.compress

    def full(run, recipe, folder=None):
        if folder is None:
            raise StoreError("cannot write here: No space left on device")
        return real(run, recipe, folder)

    monkeypatch.setattr(module, "compress", full)
    compressor = compressor_of()
    compressor.ask(run, HALF)
    assert settle(compressor).status.endswith("Not stored: cannot write here: No space left on device.")
    assert recipes(compressor) == [Recipe(), HALF] and compressor.artifact.path.exists() and compressor.error == ""


def test_something_else_can_be_done_and_fail_in_words():
    compressor = compressor_of()
    compressor.do("Doing it.", lambda: "Done.")
    assert settle(compressor).status == "Done."

    def broken() -> str:
        raise StoreError("cannot write there")

    compressor.do("Doing it.", broken)
    assert settle(compressor).status == "Error: cannot write there"


def test_a_bench_with_a_run_under_way_does_not_keep_another_waiting(run):
    """One prepares its exporter behind a long run, one is dragged without an end; a third gets its point."""
    over = Event()
    preparing, dragged, other = compressor_of(occupied=lambda: not over.is_set()), compressor_of(), compressor_of()
    preparing.prepare(TINY)
    dragged.ask(run, HALF, delay=3600.0)
    other.ask(run, Recipe(dtype="fp16"))
    settle(other)
    assert recipes(other) == [Recipe(), Recipe(dtype="fp16")] and not other.error
    assert preparing.busy and dragged.busy and recipes(dragged) == []
    over.set()
    dragged.ask(run, HALF)
    settle(preparing)
    settle(dragged)
