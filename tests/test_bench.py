"""The bench through its traits and methods; tests/browser/test_bench.py does the same in a real JupyterLab."""

import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from time import perf_counter

import ipywidgets as widgets
import pytest

from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.lab import chart
from fedlab_kit.lab.bench import TEXT, Bench
from fedlab_kit.lab.workbench import NO_RUN, earlier_curves
from fedlab_kit.runs import history

TINY = Experiment(dataset="digits", model="logistic", partition="dirichlet", clients=4, clients_per_round=2, rounds=3)


@pytest.fixture
def bench():
    made = Bench(TINY)
    yield made
    made.stop()
    assert made.wait(20)


def drawn(bench: Bench) -> widgets.Widget:
    """The screen as soon as it shows what was done."""
    if bench.busy:
        bench.refresh()
    else:
        assert bench.wait(60)
    return bench.screen


def shown(bench: Bench) -> str:
    """The status as it stands on the screen."""
    return re.search('role="status"[^>]*>(.*)</div>', drawn(bench).train_status.value).group(1)


def alt(bench: Bench) -> str:
    return re.search('<img alt="([^"]*)"', drawn(bench).curve.picture.value).group(1)


def buttons(bench: Bench) -> dict[str, widgets.Button]:
    return {button.description: button for button in (drawn(bench).run, bench.screen.stop, bench.screen.seed)}


def everything(widget: widgets.Widget) -> Iterator[widgets.Widget]:
    """A widget and all within it."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from everything(child)


def under_way(bench: Bench) -> Bench:
    bench.controls["rounds"].value = 100_000
    bench.run()
    deadline = perf_counter() + 60
    while "after round" not in bench.screen.curve.picture.value and perf_counter() < deadline:
        bench.wait(0.01)
    assert bench.busy
    return bench


def test_at_first_it_is_ready_and_the_plot_empty(bench):
    assert shown(bench) == bench.status == "Ready: press Run."
    assert alt(bench) == "Accuracy per round: no round yet."
    assert not buttons(bench)["Run"].disabled and buttons(bench)["Stop"].disabled
    assert bench.experiment == TINY and bench.runs == []


def test_run_to_the_end_draws_the_last_round_and_frees_the_buttons(bench):
    bench.run(block=True)
    assert shown(bench).startswith("Finished: ") and alt(bench).startswith("Accuracy per round: ")
    assert "after round 3 of 3" in alt(bench)
    assert not buttons(bench)["Run"].disabled and buttons(bench)["Stop"].disabled
    assert [run.experiment for run in bench.runs] == [TINY]


def test_the_buttons_do_what_they_say(bench):
    bench.screen.run.click()
    assert bench.wait(60) and len(bench.runs) == 1
    bench.screen.seed.click()
    assert bench.wait(60) and bench.runs[-1].experiment == TINY.replace(seed=8)


def test_the_curve_grows_during_a_run_and_stop_keeps_what_was_made(bench):
    under_way(bench)
    assert buttons(bench)["Run"].disabled and not buttons(bench)["Stop"].disabled
    bench.screen.stop.click()
    assert bench.wait(5)
    rounds = len(bench.workbench.session.records)
    assert shown(bench).startswith(f"Stopped after round {rounds} of 100000")
    assert f"after round {rounds} of 100000" in alt(bench)
    assert not buttons(bench)["Run"].disabled and buttons(bench)["Stop"].disabled


def test_a_second_run_is_refused_on_the_screen(bench):
    under_way(bench).run()
    assert "Run was refused" in shown(bench)
    bench.new_seed()
    assert bench.experiment.seed == TINY.seed


def test_controls_may_be_moved_during_a_run(bench):
    under_way(bench).controls["alpha"].slider.value = 10
    bench.controls["lr"].value = -1.0
    assert bench.busy and bench.workbench.session.experiment.alpha == 0.5
    bench.stop()
    assert bench.wait(5) and shown(bench).startswith("Stopped")


def test_a_wrong_value_starts_nothing_and_its_message_goes_when_it_is_mended(bench):
    bench.controls["lr"].value = -1.0
    bench.run(block=True)
    assert shown(bench) == "Ready: press Run. Not started: lr must be above 0 and at most 10, got -1.0."
    assert bench.runs == [] and bench.experiment.lr == TINY.lr
    bench.controls["lr"].value = 0.2
    assert shown(bench) == "Ready: press Run."


def test_an_error_of_the_run_is_in_the_status_and_beside_its_control(bench):
    bench.controls["partition"].value = "site"
    bench.run(block=True)
    assert shown(bench).startswith("Error: ")
    assert 'role="alert"' in bench.controls["partition"].note.value
    bench.controls["partition"].value = "iid"
    bench.run(block=True)
    assert shown(bench).startswith("Finished")


def test_a_run_from_the_store_says_so_and_new_seed_is_offered(bench):
    bench.run(block=True)
    again = Bench(TINY)
    again.run(block=True)
    assert "Answered from the store, measured " in shown(again) and "New seed" in shown(again)
    again.new_seed(block=True)
    assert again.controls["seed"].value == 8 and "store" not in shown(again)
    assert "1 earlier run behind it" in alt(again)


def test_divergence_is_shown_with_a_clear_word():
    bench = Bench(TINY.replace(model="2nn", lr=10.0, rounds=30, batch_size=10))
    bench.run(block=True)
    assert shown(bench).startswith("Diverged in round ")


def test_what_is_out_of_date_is_said(bench):
    bench.run(block=True)
    bench.controls["alpha"].value = 5.0
    assert "Changed since the bold curve: alpha 5.0. Press Run." in drawn(bench).hint.value
    bench.run(block=True)
    assert "Changed" not in drawn(bench).hint.value


def test_the_first_screen_holds_the_chosen_controls_and_nothing_twice():
    bench = Bench(controls=["rounds", "dtype", "dropout"])
    _, _, knobs, below, _, _ = bench.screen.widget.children
    train, compress = (side.children for side in knobs.children)
    assert train[1:3] == (bench.controls["rounds"].widget, bench.controls["dropout"].widget)
    assert compress[1] is bench.controls["dtype"].widget
    folded = list(everything(below))
    assert bench.controls["rounds"].widget not in folded and bench.controls["dtype"].widget not in folded
    assert folded.count(bench.controls["alpha"].widget) == folded.count(bench.controls["prune_ratio"].widget) == 1


def test_an_unknown_control_is_refused():
    with pytest.raises(ValueError, match=r"controls must be among dataset, .*, got 'colour'"):
        Bench(controls=["colour"])


def test_the_cell_output_is_the_view_and_one_constant_line(bench):
    before = bench._repr_mimebundle_()
    bench.run(block=True)
    assert bench._repr_mimebundle_() == before
    assert before["text/plain"] == TEXT and "\n" not in TEXT
    assert before["application/vnd.jupyter.widget-view+json"]["model_id"] == bench.screen.widget.model_id


def test_nothing_is_drawn_twice(live, monkeypatch):
    before = live.screen.curve.picture.value, live.screen.scatter.picture.value
    monkeypatch.setattr(chart, "to_html", None)
    live.refresh()
    assert (live.screen.curve.picture.value, live.screen.scatter.picture.value) == before


LIVE = Experiment(dataset="blobs", partition="dirichlet", model="mlp", clients=4, clients_per_round=2, rounds=2)


@pytest.fixture
def live() -> Iterator[Bench]:
    made = Bench(LIVE)
    made.run(block=True)
    yield made
    made.stop()
    assert made.wait(20)


def spoken(bench: Bench) -> str:
    """What is said on the compress side."""
    return unescape(re.search('role="status"[^>]*>(.*)</div>', drawn(bench).compress_status.value).group(1))


def seen(bench: Bench) -> str:
    """What the plot of accuracy against size shows."""
    return re.search('<img alt="([^"]*)"', drawn(bench).scatter.picture.value).group(1)


def test_the_first_point_is_the_uncompressed_file(live):
    assert [(row["dtype"], row["prune_ratio"]) for row in live.points] == [("fp32", 0.0)]
    assert live.artifact.path.stat().st_size == live.points[0]["bytes"]
    assert ": 1 point, 1 on the Pareto front; the current one has " in seen(live)
    assert spoken(live).startswith("1: mlp, fp32: ") and "1: mlp, fp32" in live.screen.points.table.value


def test_a_recipe_that_is_set_beforehand_follows_the_baseline():
    bench = Bench(LIVE, Recipe(dtype="fp16"), controls=["dtype"])
    bench.run(block=True)
    assert [row["dtype"] for row in bench.points] == ["fp32", "fp16"] and bench.recipe == Recipe(dtype="fp16")


def test_a_compress_control_answers_by_itself_and_only_the_last_value_of_a_drag(live):
    for ratio in (0.1, 0.2, 0.5):
        live.controls["prune_ratio"].slider.value = ratio
    assert live.wait(20)
    assert [row["prune_ratio"] for row in live.points] == [0, 0.5]
    assert live.points[1]["sparsity"] > 0.4 and live.artifact.card["recipe"]["prune_ratio"] == 0.5
    assert ": 2 points, " in seen(live) and spoken(live).startswith("2: mlp, weight 0.5 fp32: ")


def test_without_a_finished_run_compress_says_what_is_missing(bench):
    bench.controls["dtype"].value = "int8"
    assert bench.wait(20) and spoken(bench) == NO_RUN and bench.points == [] and bench.artifact is None
    bench.compress(block=True)
    assert spoken(bench) == NO_RUN and "no point yet" in seen(bench)


def test_an_impossible_recipe_is_answered_beside_its_control(live):
    live.controls["prune"].value = "channel"
    live.controls["prune_ratio"].value = 0.999
    assert live.wait(20) and spoken(live).startswith("Error: prune_ratio 0.999 would remove")
    assert "prune_ratio 0.999" in live.controls["prune_ratio"].note.value
    live.controls["prune_ratio"].value = 1.5
    assert spoken(live) == "Not measured: prune_ratio must be at least 0 and below 1, got 1.5."
    live.controls["prune_ratio"].value = 0.2
    assert live.wait(20) and live.points[-1]["prune_ratio"] == 0.2
    assert live.controls["prune_ratio"].note.layout.display == "none"


def test_compress_answers_during_a_run_for_the_one_before(live):
    live.controls["rounds"].value = 100_000
    live.run()
    live.controls["dtype"].value = "fp16"
    deadline = perf_counter() + 20
    while len(live.points) < 2 and perf_counter() < deadline:
        live.wait(0.05)
    assert live.busy and live.points[-1]["dtype"] == "fp16" and len(live.runs) == 1
    live.refresh()
    assert spoken(live).endswith("A run is under way: the points are of those before it.")


def test_points_are_named_hidden_and_brought_back_and_the_axis_is_switched(live):
    live.controls["dtype"].value = "fp16"
    assert live.wait(20)
    live.screen.points.name.value = "half"
    live.screen.points.buttons["Pin"].click()
    assert live.points[1]["name"] == "half" and "2: half, mlp, fp16" in drawn(live).points.table.value
    live.screen.points.buttons["Hide"].click()
    assert len(live.points) == 1 and ": 1 point, 1 on the Pareto front." in seen(live)
    live.screen.points.buttons["Undo"].click()
    live.screen.axis.value = "latency_ms"
    assert re.fullmatch("Accuracy against latency of one prediction: 2 points, .* at .* (ms|µs)[.]", seen(live))


def test_the_teacher_is_trained_first_and_stands_behind_its_student():
    teacher = LIVE.replace(rounds=3)
    bench = Bench(LIVE.replace(teacher=teacher, model="logistic"))
    assert not bench.controls["temperature"].field.disabled
    bench.run(block=True)
    assert [run.experiment for run in bench.runs] == [teacher, bench.experiment]
    (label, _), *_ = earlier_curves(bench.workbench.session, bench.workbench.marks, LIVE)
    assert label == "teacher mlp" and bench.points[0]["model"] == "logistic"
    bench.controls["temperature"].value = 9.0
    assert "Changed since the bold curve: temperature 9.0. Press Run." in drawn(bench).hint.value


def test_without_a_teacher_the_temperature_says_what_it_needs(live):
    control = live.controls["temperature"]
    assert control.field.disabled and "needs a teacher" in control.note.value
    live.controls["strategy"].value = "feddf"
    assert not control.field.disabled and live.controls["distill_weight"].field.disabled


def test_a_teacher_goes_with_its_student_to_another_data_set():
    bench = Bench(LIVE.replace(teacher=LIVE))
    bench.controls["dataset"].value = "blobs_at_sites"
    assert bench.experiment.teacher.dataset == "blobs_at_sites" and bench.controls.errors == {}


def test_showing_the_bench_prepares_the_exporter():
    bench = Bench(LIVE)
    bench._repr_mimebundle_()
    assert bench.wait(60) and spoken(bench) == NO_RUN and bench.points == []


def test_the_default_has_a_use_for_each_of_its_three_knobs():
    bench = Bench()
    assert not any(bench.controls[name].field.disabled for name in ("prune_ratio", "dtype", "temperature"))


def test_two_hundred_random_interactions_never_get_it_stuck(live, tmp_path, monkeypatch):
    """A seeded person who presses and moves everything; afterwards a run and a point come as ever."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(200)
    values = {
        "prune_ratio": [0.0, 0.3, 0.9, 0.999, 1.5, -1.0], "prune": ["weight", "channel"], "lr": [0.1, 0.3, -1.0],
        "dtype": ["fp32", "fp16", "int8", "int2"], "quantization": ["static", "dynamic"], "rounds": [1, 2, 300, 0],
        "calibration": ["minmax", "percentile", "entropy"],
        "model": ["mlp", "logistic"], "clients": [4, 1], "partition": ["iid", "site"], "seed": [7, 8],
    }  # fmt: skip
    points, runs, clients = live.screen.points, live.screen.runs, live.screen.clients
    chosen = {
        live.screen.axis: ["bytes", "zstd_bytes", "latency_ms"], points.filters["time"]: ["", "this bench"],
        points.name: ["small", "", "<b>"], points.folder: ["a", "b", "../c"],
        runs.name: ["first", ""],
    }  # fmt: skip
    presses = [
        live.run, live.stop, live.new_seed, live.compress, live.refresh,
        *(button.click for button in points.buttons.values()), *(button.click for button in runs.buttons.values()),
        *(shelf.widget.children[0].click for shelf in (runs, clients)),
    ]  # fmt: skip
    points.folder.value = str(tmp_path / "a")
    finished = set()
    for _ in range(200):
        what = rng.choice([*values, *values, *chosen, points.point, runs.run, runs.other, *presses, *presses])
        if what in values:
            live.controls[what].value = rng.choice(values[what])
        elif what in chosen:
            what.value = rng.choice(chosen[what])
        elif what in presses:
            what()
        else:
            what.field.value = rng.choice([value for _, value in what.field.options])
        live.wait(rng.choice([0, 0, 0.02]))
        now = {run.key for run in live.runs if run.status == "finished"}
        assert finished <= now and no_traceback(live)
        finished = now
    live.stop()
    assert live.wait(60) and not live.busy and not live.screen.run.disabled and live.screen.stop.disabled
    for name, value in {**dict(LIVE), **dict(Recipe(prune_ratio=0.25))}.items():
        if name in values:
            live.controls[name].value = value
    assert live.controls.errors == {}
    live.run(block=True)
    assert shown(live).startswith("Finished") and spoken(live).split(": ")[1].endswith("weight 0.25 fp32")
    assert ("prune_ratio", 0.25) in live.points[-1].items() and finished and no_traceback(live)
    kept, damaged = history()
    assert finished <= {run.key for run in kept if run.status == "finished"} and not damaged


def no_traceback(bench: Bench) -> bool:
    """Whether nothing went wrong but what is answered in words of our own; those do not begin with an error's type."""
    said = (bench.workbench.session.error, bench.workbench.compressor.error, bench.workbench.compressor.status)
    return not any(re.match(r"(Not drawn: )?(Error: )?\w+(Error|Exception|Interrupt|Iteration|Warning): ", text)
                   for text in said)  # fmt: skip


def test_a_kernel_that_is_killed_loses_no_finished_run_and_the_unfinished_one_goes_on(runs_folder):
    """The killed process has finished one run with two points and is in the middle of a second run."""
    code = f"""
from fedlab_kit import Bench, Experiment
import os, signal, torch
torch.set_num_threads(1)
bench = Bench({TINY!r})
bench.run(block=True)
bench.controls["dtype"].value = "fp16"
bench.wait()
bench.workbench.pin("half")
bench.controls["rounds"].value = 100_000
bench.run()
while len(bench.workbench.session.records) < 5:
    bench.wait(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    bench = Bench(TINY)
    assert bench.workbench.store_error == "" and [point["name"] for point in bench.history] == ["", "half"]
    finished, unfinished = sorted(bench.workbench.session.known, key=lambda run: run.experiment.rounds)
    assert (finished.status, unfinished.status) == ("finished", "stopped") and len(unfinished.records) >= 5
    bench.run(block=True)
    assert "Answered from the store" in shown(bench)
    bench.controls["rounds"].value = 100_000
    bench.run()
    while len(bench.workbench.session.records) <= len(unfinished.records):
        bench.wait(0.01)
    bench.stop()
    assert bench.wait(20)
    assert bench.workbench.session.records[: len(unfinished.records)] == list(unfinished.records)


def test_the_ranges_of_the_default_knobs_show_a_trade_off():
    """At least 10 points of accuracy and 8 times the size, on the axis that is chosen at first."""
    bench = Bench()
    bench.run(block=True)
    for ratio, dtype in ((0.95, "fp32"), (0.95, "int8")):
        bench.controls["dtype"].value = dtype
        bench.controls["prune_ratio"].slider.value = ratio
        assert bench.wait(60)
    sizes = [point[bench.screen.axis.value] for point in bench.points]
    accuracies = [point["accuracy"] for point in bench.points]
    assert max(sizes) >= 8 * min(sizes) and max(accuracies) - min(accuracies) >= 0.1


def test_the_package_imports_no_widget_and_no_plot():
    code = "import sys, fedlab_kit; print([m for m in ('ipywidgets', 'matplotlib') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_the_current_point_is_exported_as_a_folder(bench, tmp_path):
    with pytest.raises(ValueError, match="no point to export yet"):
        bench.export(tmp_path / "mine")
    bench.run(block=True)
    folder = bench.export(tmp_path / "mine")
    assert (folder / bench.artifact.path.name).read_bytes() == bench.artifact.path.read_bytes()
    assert {"reproduce.py", "points.csv", "report.html"} < {file.name for file in folder.iterdir()}
