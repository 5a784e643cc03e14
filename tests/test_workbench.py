"""What a bench can besides training and compressing: answers while a slider moves, state to share, and a clean end."""

import gc
import json
import threading
import weakref
from collections.abc import Iterator
from threading import Event

import ipywidgets as widgets
import pytest

from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.lab import bench as module
from fedlab_kit.lab import workbench as work
from fedlab_kit.lab.bench import Bench
from fedlab_kit.lab.history import Filter
from fedlab_kit.lab.worker import Worker
from fedlab_kit.runs import train

TINY = Experiment(dataset="blobs", partition="dirichlet", model="mlp", clients=4, clients_per_round=2, rounds=2)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(TINY)
    made.run(block=True)
    yield made
    made.close()


def ratios(bench: Bench) -> list[float]:
    return [row["prune_ratio"] for row in bench.points]


def test_a_drag_leaves_one_point_however_slow_it_is_and_its_files_alone(bench):
    for ratio in (0.2, 0.4, 0.6):
        bench.controls["prune_ratio"].slider.value = ratio
        assert bench.workbench.compressor.wait(20)
    assert ratios(bench) == [0, 0.6] and bench.artifact.card["recipe"]["prune_ratio"] == 0.6
    files = sorted(file.name for file in (bench.runs[0].path / "artifacts").iterdir())
    assert len(files) == 6 and sum("weight-0.6" in name for name in files) == 3
    bench.controls["prune_ratio"].value = 0.3  # typed: a question of its own
    assert bench.workbench.compressor.wait(20)
    bench.controls["prune_ratio"].slider.value = 0.5
    assert bench.wait(20) and ratios(bench) == [0, 0.6, 0.3, 0.5]


def test_a_drag_that_comes_back_keeps_what_it_comes_back_to(bench):
    for ratio in (0.2, 0.4, 0.2, 0.0):
        bench.controls["prune_ratio"].slider.value = ratio
        assert bench.workbench.compressor.wait(20)
    assert ratios(bench) == [0] and bench.workbench.points.current.number == 1


def test_the_nearest_known_answer_is_shown_in_grey_until_the_measured_one_comes(bench, monkeypatch):
    bench.controls["dtype"].value = "fp16"
    assert bench.wait(20)
    go, real = Event(), work.compress
    monkeypatch.setattr(work, "compress", lambda *given: (go.wait(20), real(*given))[1])
    bench.controls["prune_ratio"].slider.value = 0.5
    assert bench.workbench.compressor.nearest == 2
    bench.refresh()
    assert "nearest known answer is 2: mlp, fp16" in bench.screen.compress_status.value
    assert "fedlab-hint" in bench.screen.compress_status.value and "nearest known" in bench.screen.scatter.plot
    go.set()
    assert bench.wait(20) and bench.workbench.compressor.nearest is None
    assert (
        "nearest known" not in bench.screen.scatter.plot and "3: mlp, weight 0.5" in bench.screen.compress_status.value
    )


def test_nearest_is_the_point_with_fewest_other_choices_then_the_nearest_ratio(bench):
    for recipe in (Recipe(prune_ratio=0.8), Recipe(prune_ratio=0.4), Recipe(prune_ratio=0.5, dtype="int8")):
        bench.workbench.measure(recipe)
        assert bench.wait(20)
    near = [bench.workbench.points.nearest(bench.runs[0], r).recipe for r in (
        Recipe(prune_ratio=0.5), Recipe(prune_ratio=0.7), Recipe(prune_ratio=0.9, dtype="int8"))]  # fmt: skip
    assert near == [Recipe(prune_ratio=0.4), Recipe(prune_ratio=0.8), Recipe(prune_ratio=0.5, dtype="int8")]


def test_choosing_settings_whose_run_is_stored_makes_compress_usable_at_once():
    other = TINY.replace(model="logistic")
    train(other)
    bench = Bench(TINY)
    bench.controls["dtype"].value = "fp16"
    assert bench.wait(20) and bench.points == []
    bench.controls["model"].value = "logistic"
    assert bench.wait(20) and "act on a stored run" in bench.screen.compress_status.value
    bench.compress(block=True)
    assert [(row["model"], row["dtype"]) for row in bench.points] == [("logistic", "fp32"), ("logistic", "fp16")]
    assert bench.runs == [] and not bench.busy
    bench.close()


def test_latencies_come_with_an_interval_beside_fp32_and_never_during_a_run(bench):
    assert bench.wait(20)
    plain = bench.points[0]
    assert plain["latency_low"] <= plain["latency_ms"] <= plain["latency_high"] and plain["latency_ratio"] == 1
    bench.controls["rounds"].value = 100_000
    bench.run()
    bench.controls["dtype"].value = "fp16"
    assert bench.workbench.compressor.wait(20) and bench.points[1]["dtype"] == "fp16" and bench.busy
    assert not bench.workbench.compressor.worker.wait(1, resting=True) and bench.points[1]["latency_ratio"] is None
    bench.stop()
    assert bench.wait(20) and bench.points[1]["latency_ratio"] > 0
    assert bench.artifact.card["latency"]["ratio"] == bench.points[1]["latency_ratio"]
    assert " of fp32; " in bench.workbench.compressor.status


def test_a_point_that_is_clicked_sets_the_knobs_and_one_in_the_list_is_ringed(bench):
    bench.controls["dtype"].value = "fp16"
    bench.controls["model"].value = "logistic"
    bench.run(block=True)
    bench.screen.scatter.chosen = "1"
    assert bench.wait(20) and bench.recipe == Recipe() and bench.experiment == TINY
    assert bench.workbench.points.current.number == 1
    bench.controls["prune_ratio"].value = 0.5  # acts on the run of the point that was chosen
    assert bench.wait(20) and (bench.points[-1]["model"], bench.points[-1]["prune_ratio"]) == ("mlp", 0.5)
    bench.screen.points.point.field.value = 3
    assert bench.wait(20) and bench.screen.scatter.chosen == "3" and bench.experiment.model == "logistic"
    bench.screen.curve.chosen = "earlier/0"
    assert bench.experiment.model == "mlp"


def test_one_knob_is_varied_over_its_range_and_over_seeds(bench):
    study = bench.screen.study
    study.widget.children[0].click()
    study.buttons["Vary this knob"].click()
    assert bench.wait(60) and ratios(bench) == pytest.approx([0, 0.16, 0.32, 0.47, 0.63, 0.79])
    assert "Accuracy by Prune ratio: 0.0: " in study.picture.value and "0.95: no point." in study.picture.value
    study.knob.value = "model"
    study.buttons["Repeat over seeds"].click()
    assert bench.wait(60) and {run.experiment.seed for run in bench.runs} == {7, 8, 9, 10}
    assert "Accuracy by Seed: 7: " in study.picture.value


@pytest.mark.parametrize(("name", "values"), [
    ("strategy", ["fedavg", "fedprox", "fedavgm", "fedadam", "scaffold", "feddf", "median"]),
    ("rounds", [1, 18, 34, 50, 67, 84, 100]), ("lr", [0.001, 0.0032, 0.01, 0.032, 0.1, 0.32, 1.0]),
])  # fmt: skip
def test_what_a_knob_can_be(name, values):
    assert work.values_over(TINY, name) == values


def test_progress_is_said_and_drawn(bench):
    teacher = TINY.replace(rounds=3)
    bench.controls.take(TINY.replace(model="logistic", teacher=teacher, rounds=100_000))
    bench.run()
    while bench.workbench.session.stage != bench.experiment or not bench.workbench.session.records:
        bench.wait(0.01)
    bench.refresh()
    assert 0.5 <= bench.workbench.session.done < 1 and "<progress" in bench.screen.train_status.value
    assert "s left." in bench.status
    bench.stop()
    assert bench.wait(20) and "<progress" not in bench.screen.train_status.value


def test_what_is_asked_is_on_the_plot():
    for e in (TINY, TINY.replace(clients=5), TINY.replace(strategy="fedprox", model="logistic")):
        first = Bench(e)
        first.run(block=True)
        first.close()
    later = Bench(TINY)
    assert [row["model"] for row in later.history] == ["mlp", "logistic"]
    later.workbench.pin("")
    for wanted, count in ((Filter(""), 3), (Filter("blobs", time="today"), 3), (Filter("digits"), 0),
                          (Filter(model="mlp"), 1), (Filter(strategy="fedprox"), 1), (Filter(tag="x"), 0),
                          (Filter(time="this bench"), 0)):  # fmt: skip
        later.workbench.filter = wanted
        assert len(later.history) == count, wanted
    later.refresh()
    assert later.screen.points.filters["time"].value == "this bench"
    later.screen.points.filters["time"].value = ""
    assert later.workbench.filter == Filter() and later.wait(20) and ": 2 points" in later.screen.scatter.picture.value
    later.close()


def test_a_bench_is_opened_again_from_its_state(bench, tmp_path):
    bench.controls["lr"].value = 0.3
    bench.controls["dtype"].value = "int8"
    bench.screen.axis.value = "bytes"
    bench.screen.points.filters["model"].value = "mlp"
    state = bench.state()
    (tmp_path / "state.json").write_text(json.dumps(state))
    for given in (state, json.dumps(state), tmp_path / "state.json", str(tmp_path / "state.json")):
        other = Bench.from_state(given)
        assert other.state() == state and other.experiment == TINY.replace(lr=0.3) and other.recipe.dtype == "int8"
        other.close()
    for wrong, why in (("{", "as JSON"), ("nowhere.json", "No such file"), ({"colour": 1}, "got 'colour'"),
                       ({"experiment": {"lr": -1}}, "lr must be above 0")):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            Bench.from_state(wrong)
    bench.screen.share.text.value = json.dumps({"experiment": {"model": "logistic"}})
    bench.screen.share._open()
    assert bench.experiment.model == "logistic"


def test_locked_and_hidden_knobs():
    bench = Bench(TINY, controls=["lr"], locked=["lr"], hidden=["seed"])
    assert bench.controls["lr"].field.disabled
    assert bench.controls["seed"].widget not in list(every(bench.screen.widget))
    bench.open({"experiment": {"lr": 0.9, "rounds": 3}})
    assert bench.experiment.lr == TINY.lr and bench.experiment.rounds == 3
    bench.close()


def every(widget: widgets.Widget) -> Iterator[widgets.Widget]:
    yield widget
    for child in getattr(widget, "children", ()):
        yield from every(child)


def test_close_gives_back_threads_widgets_and_memory():
    before, threads = set(widgets.widget._instances), threading.active_count()
    bench = Bench(TINY)
    bench.controls["rounds"].value = 100_000
    bench.run()
    seen = weakref.ref(bench)
    bench.close()
    assert bench.wait(20) and not bench.busy
    assert set(widgets.widget._instances) <= before
    bench.run()  # and nothing happens any more
    assert not bench.workbench.session.worker.busy
    assert not bench.busy and threading.active_count() <= threads
    del bench
    gc.collect()
    assert seen() is None


def test_a_cell_that_is_run_again_closes_what_it_showed_before(monkeypatch):
    class Shell:
        parent_header = {"metadata": {"cellId": "a"}}  # noqa: RUF012

    monkeypatch.setattr("IPython.core.getipython.get_ipython", lambda: Shell)
    closed: list[Bench] = []
    monkeypatch.setattr(Bench, "close", lambda self: closed.append(self))
    first, second = Bench(TINY), Bench(TINY)
    first._repr_mimebundle_()
    first._repr_mimebundle_()
    assert closed == []
    second._repr_mimebundle_()
    assert closed == [first]
    module._IN_CELLS.clear()
    for one in (first, second):
        assert one.wait(60)


def test_a_worker_does_the_newest_of_a_name_all_others_in_order_and_what_rests_at_last():
    done: list[object] = []
    worker, go = Worker(done.append), Event()
    worker.ask(lambda: go.wait(10))
    worker.ask(lambda: done.append("rest"), resting=True)
    for number in range(3):
        worker.ask(lambda n=number: done.append(n), "newest")
        worker.ask(lambda n=number: done.append(-n))
    worker.ask(lambda: 1 / 0)
    assert worker.busy and worker.waits("newest")
    go.set()
    assert worker.wait(10, resting=True) and not worker.resting
    assert done[:4] == [0, 2, -1, -2] or sorted(map(str, done[:4])) == ["-1", "-2", "0", "2"]
    assert isinstance(done[4], ZeroDivisionError) and done[5] == "rest"
    worker.close()
    worker.ask(lambda: done.append("late"))
    assert worker.wait(1) and "late" not in done
