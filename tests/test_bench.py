"""The bench through its traits and methods; tests/browser/test_bench.py does the same in a real JupyterLab."""

import re
import subprocess
import sys
from time import perf_counter

import ipywidgets as widgets
import pytest

from fedlab_kit.experiment import Experiment
from fedlab_kit.lab.bench import TEXT, Bench

TINY = Experiment(model="logistic", clients=4, clients_per_round=2, rounds=3)


@pytest.fixture
def bench():
    made = Bench(TINY)
    yield made
    made.stop()
    assert made.wait(20)


def shown(bench: Bench) -> str:
    """The status as it stands on the screen."""
    return re.search('role="status"[^>]*>(.*)</div>', bench.screen.train_status.value).group(1)


def alt(bench: Bench) -> str:
    return re.search('<img alt="([^"]*)"', bench.screen.curve.value).group(1)


def buttons(bench: Bench) -> dict[str, widgets.Button]:
    return {button.description: button for button in (bench.screen.run, bench.screen.stop, bench.screen.seed)}


def under_way(bench: Bench) -> Bench:
    bench.controls["rounds"].value = 100_000
    bench.run()
    deadline = perf_counter() + 60
    while "after round" not in alt(bench) and perf_counter() < deadline:
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
    rounds = len(bench.session.records)
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
    assert bench.busy and bench.session.experiment.alpha == 0.5
    bench.stop()
    assert bench.wait(5) and shown(bench).startswith("Stopped")


def test_a_wrong_value_starts_nothing_and_its_message_goes_when_it_is_mended(bench):
    bench.controls["lr"].value = -1.0
    bench.run(block=True)
    assert shown(bench) == "Ready: press Run. Not started: lr must be above 0 and at most 10, got -1.0."
    assert bench.runs == [] and bench.experiment.lr == 0.1
    bench.controls["lr"].value = 0.2
    assert shown(bench) == "Ready: press Run."


def test_an_error_of_the_run_is_in_the_status_and_beside_its_control(bench):
    bench.controls["partition"].value = "site"
    bench.run(block=True)
    assert shown(bench).startswith("Error: ")
    assert 'role="alert"' in bench.controls[bench.session.error.split(" ")[0]].note.value
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
    bench = Bench(TINY.replace(model="mlp", lr=10.0, rounds=30, batch_size=1))
    bench.run(block=True)
    assert shown(bench).startswith("Diverged in round ")


def test_what_is_out_of_date_is_said(bench):
    bench.run(block=True)
    bench.controls["alpha"].value = 5.0
    assert "Changed since the bold curve: alpha 5.0. Press Run." in bench.screen.hint.value
    bench.run(block=True)
    assert "Changed" not in bench.screen.hint.value


def test_the_first_screen_holds_the_chosen_controls_and_nothing_twice():
    bench = Bench(controls=["rounds", "dtype", "dropout"])
    _, knobs, _, folded = bench.screen.widget.children
    train, compress = (side.children for side in knobs.children)
    assert train[1:3] == (bench.controls["rounds"].widget, bench.controls["dropout"].widget)
    assert compress[1] is bench.controls["dtype"].widget
    hidden = [row for side in folded.children for group in side.children
              if isinstance(group, widgets.VBox) for row in group.children[1].children]  # fmt: skip
    assert bench.controls["rounds"].widget not in hidden and bench.controls["dtype"].widget not in hidden
    assert bench.controls["alpha"].widget in hidden and bench.controls["prune_ratio"].widget in hidden


def test_an_unknown_control_is_refused():
    with pytest.raises(ValueError, match=r"controls must be among dataset, .*, got 'colour'"):
        Bench(controls=["colour"])


def test_the_cell_output_is_the_view_and_one_constant_line(bench):
    before = bench._repr_mimebundle_()
    bench.run(block=True)
    assert bench._repr_mimebundle_() == before
    assert before["text/plain"] == TEXT and "\n" not in TEXT
    assert before["application/vnd.jupyter.widget-view+json"]["model_id"] == bench.screen.widget.model_id


def test_nothing_is_drawn_twice(bench):
    bench.run(block=True)
    drawn = bench.screen.curve.value
    bench.screen.curve.value = "as it was"
    bench.refresh()
    assert drawn and bench.screen.curve.value == "as it was"


def test_the_package_imports_no_widget_and_no_plot():
    code = "import sys, fedlab_kit; print([m for m in ('ipywidgets', 'matplotlib') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
