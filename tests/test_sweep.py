"""Sweeps: every combination, from the store where it can be, in processes where it pays; and what to choose."""

import os
import re
import threading
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedlab_kit as fk
from fedlab_kit import runs
from fedlab_kit.deployment import artifact, measure
from fedlab_kit.deployment.artifact import load
from fedlab_kit.deployment.selection import choose, front, front_share
from fedlab_kit.files import StoreError
from fedlab_kit.lab.history import Marks, Points
from fedlab_kit.lab.workbench import Compressor
from fedlab_kit.runs import find, history
from fedlab_kit.statistics import crossed_loss
from fedlab_kit.store import when_and_where
from fedlab_kit.sweep import pareto, spread, sweep

sweeping = import_module("fedlab_kit.sweep")  # the package's attribute of that name is the function

SMALL = fk.Experiment(
    dataset="blobs", partition="dirichlet", model="mlp", clients=6, clients_per_round=4, rounds=2, lr=0.05
)


def test_every_combination_is_a_measured_row():
    table = sweep(SMALL, {"dtype": ["fp32", "int8"], "seed": [1, 2]}, fk.Recipe(quantization="dynamic"))
    assert table[["seed", "dtype"]].to_dict("records") == [
        {"seed": s, "dtype": d} for s in (1, 2) for d in ("fp32", "int8")
    ]
    for row in table.itertuples():
        assert row.path.stat().st_size == row.bytes and row.low <= row.accuracy <= row.high
        assert row.uplink_bytes == fk.train(SMALL.replace(seed=row.seed)).uplink_bytes
    assert table["front"].any()


def test_numbers_of_numpy_are_fine():
    assert len(sweep(SMALL, {"prune_ratio": np.linspace(0, 0.5, 2), "rounds": np.array([1])})) == 2


def test_wrong_fields_and_values_are_answered_before_anything_is_trained(runs_folder):
    with pytest.raises(ValueError, match="grid must name fields of Experiment or Recipe, got 'depth'"):
        sweep(SMALL, {"depth": [1]})
    with pytest.raises(ValueError, match="lr must be above 0"):
        sweep(SMALL, {"lr": [0.1, -1]})
    with pytest.raises(ValueError, match="grid must give a list of values for dtype, got 'int8'"):
        sweep(SMALL, {"dtype": "int8"})
    with pytest.raises(ValueError, match="grid must give a list of values for seed, got 3"):
        sweep(SMALL, {"seed": 3})
    with pytest.raises(ValueError, match="grid must give at least one value for alpha, got none"):
        sweep(SMALL, {"alpha": []})
    assert not runs_folder.exists()


def test_stop_keeps_what_is_there_and_goes_on_later():
    stop = threading.Event()
    seen = []

    def watch(done, of, words):
        seen.append((done, of, words))
        if words == "experiments trained" and done == 2:
            stop.set()

    grid = {"seed": [1, 2, 3]}
    assert len(sweep(SMALL, grid, stop=stop, progress=watch)) == 0
    assert seen == [(1, 3, "experiments trained"), (2, 3, "experiments trained")]
    seen.clear()
    assert len(sweep(SMALL, grid, progress=lambda *a: seen.append(a))) == 3
    assert [s for s in seen if s[2] == "experiments trained"] == [(1, 1, "experiments trained")]


TINY = fk.Experiment(
    dataset="digits", model="logistic", partition="dirichlet", rounds=1, clients=4, clients_per_round=2
)


@pytest.fixture
def impatient(monkeypatch):
    """A second process is started with the first round."""
    monkeypatch.setattr(sweeping, "PATIENCE", 0.0)
    monkeypatch.setattr(sweeping.os, "cpu_count", lambda: 2)


def test_a_second_process_trains_what_it_is_given_and_counts(runs_folder, impatient):
    second = sweeping.SecondProcess([TINY, TINY.replace(seed=1)])
    second.start_if_it_pays()
    second.start_if_it_pays()
    assert second._process.wait(60) == 0
    second.end()
    assert second.done == 2
    assert fk.find(TINY).from_store and fk.find(TINY.replace(seed=1)).from_store


def test_a_second_process_ends_when_its_parent_says_so(runs_folder, impatient):
    second = sweeping.SecondProcess([TINY.replace(rounds=100_000)])
    second.start_if_it_pays()
    second.end()
    assert second._process.poll() is not None and second.done == 0


def test_both_processes_together_train_everything_once(runs_folder, impatient):
    seen = []
    table = sweep(TINY, {"seed": [1, 2, 3, 4]}, progress=lambda *news: seen.append(news))
    assert len(table) == 4 and len(list(runs_folder.glob("*/experiment.json"))) == 4
    counts = [done for done, of, words in seen if words == "experiments trained"]
    assert counts == sorted(counts) and counts[-1] == 4


def test_what_only_this_process_knows_is_trained_here(impatient):
    second = sweeping.SecondProcess([SMALL])
    second.start_if_it_pays()
    assert second._process is None
    second.end()


def test_an_interrupted_sweep_ends_the_second_process_and_goes_on_later(runs_folder, impatient, monkeypatch):
    ended = []
    monkeypatch.setattr(sweeping.SecondProcess, "end", lambda second: ended.append(second))

    def interrupt(done, of, words):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(SMALL, {"seed": [1, 2, 3]}, progress=interrupt)
    assert len(ended) == 1 and fk.find(SMALL.replace(seed=1)) is not None


def test_a_stop_while_the_teacher_trains_is_no_error():
    stop = threading.Event()
    stop.set()
    assert len(sweep(SMALL.replace(teacher=SMALL.replace(seed=3)), {"seed": [1, 2]}, stop=stop)) == 0


def test_without_fields_of_the_recipe_a_row_is_the_fp32_file():
    table = sweep(SMALL, {"rounds": [1, 2]})
    for row, rounds in zip(table.itertuples(), (1, 2), strict=True):
        assert row.bytes == fk.compress(fk.train(SMALL.replace(rounds=rounds)), fk.Recipe()).bytes


def test_a_point_that_cannot_be_had_says_why_and_the_others_are_measured():
    table = sweep(SMALL.replace(lr=0.05, rounds=60, local_epochs=20), {"lr": [0.05, 10.0]})
    good, bad = table.to_dict("records")
    assert good["note"] == "" and good["front"]
    assert bad["note"].startswith("mlp as fp32: diverged")
    assert np.isnan(bad["accuracy"]) and np.isnan(bad["bytes"]) and not bad["front"] and bad["path"] is None


def errors():
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, NotImplemented

    return [
        ValueError("it does not fit"), StoreError("cannot write there: No space left on device"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory:\nyou tried to allocate 8 GB"), MemoryError(),
        Fail("[ONNXRuntimeError] : 1 : FAIL : Load model failed"), NotImplemented("Could not find an implementation"),
        AttributeError("'GRU' object has no attribute 'out_channels'"),
    ]  # fmt: skip


@pytest.mark.parametrize("error", errors(), ids=lambda error: type(error).__name__)
def test_whatever_one_point_ends_in_is_a_row_that_names_model_and_recipe(error, monkeypatch):
    real = artifact._converted

    def converted(subject, recipe, model):
        if recipe.dtype == "int8":
            raise error
        return real(subject, recipe, model)

    monkeypatch.setattr(artifact, "_converted", converted)
    grid = {"dtype": ["fp32", "int8", "fp16"], "prune_ratio": [0.5], "quantization": ["dynamic"]}
    first, bad, last = sweep(SMALL, grid).to_dict("records")
    assert first["bytes"] > last["bytes"] > 0 and first["note"] == last["note"] == ""
    words = " ".join(str(error).split()) or "MemoryError"
    assert bad["note"].startswith("mlp as weight 0.5 int8 dynamic: ") and words in bad["note"]
    with pytest.raises((ValueError, StoreError), match=re.escape(words)) as alone:
        fk.compress(find(SMALL), fk.Recipe(dtype="int8"))
    assert "\n" not in str(alone.value) and "\n" not in bad["note"] and bad["path"] is None and not bad["front"]
    assert all(np.isnan(bad[name]) for name in ("accuracy", "bytes", "zstd_bytes", "latency_ms", "low", "high"))
    assert bad["uplink_bytes"] == first["uplink_bytes"] > 0  # the run was made
    assert not list(find(SMALL).path.glob("artifacts/*int8*"))


def test_an_interrupt_still_ends_a_sweep(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "_converted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(SMALL, {"dtype": ["fp32", "int8"]})


def test_what_cannot_be_trained_is_a_row():
    table = sweep(SMALL, {"model": ["cnn", "mlp"]})
    bad, good = table.to_dict("records")
    assert bad["note"].startswith("cnn as fp32: samples must be images") and np.isnan(bad["uplink_bytes"])
    assert good["note"] == "" and good["front"] and not bad["front"]


def test_fields_that_do_not_go_together_are_a_row():
    table = sweep(SMALL, {"clients_per_round": [4, 7], "dtype": ["fp32", "fp16"]})
    assert [note == "" for note in table["note"]] == [True, True, False, False]
    assert table["note"][2] == "mlp as fp32: clients_per_round must be at most clients (6), got 7"


def test_a_run_that_is_damaged_is_a_row_with_the_remedy():
    sweep(SMALL, {"seed": [1, 2]})
    (find(SMALL.replace(seed=1)).path / "state.safetensors").write_bytes(b"cut")
    bad, good = sweep(SMALL, {"seed": [1, 2]}).to_dict("records")
    assert "delete the run's folder to run it again" in bad["note"] and good["accuracy"] > 0


GRID = {"prune": ["weight", "channel"], "prune_ratio": [0, 0.5], "dtype": ["fp32", "int8"]}


@pytest.fixture
def made(monkeypatch):
    """The names of the files that are made."""
    real, names = artifact._compress, []

    def compress(subject, recipe, folder):
        done = real(subject, recipe, folder)
        names.append(done.path.name)
        return done

    monkeypatch.setattr(artifact, "_compress", compress)
    return names


def test_what_was_measured_is_not_made_again(made):
    table = sweep(SMALL, GRID)
    assert len(table) == 8 and len(made) == len(set(made)) == 6  # at ratio 0 both ways of pruning are one file
    made.clear()
    assert sweep(SMALL, GRID).equals(table) and made == []
    assert load(table["path"][0]).accuracy == table["accuracy"][0]


def test_what_is_damaged_is_made_again_and_said(made):
    table = sweep(SMALL, GRID)
    path = table["path"].iloc[-1]
    card, compressed = path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.zst")
    flattered = re.sub(rb'"accuracy": [0-9.]+', b'"accuracy": 1.0', card.read_bytes())
    for damage in (
        lambda: os.truncate(path, 5000), lambda: os.remove(path), lambda: path.write_bytes(bytes(5000)),
        lambda: os.truncate(compressed, 100), lambda: os.remove(compressed),
        lambda: os.truncate(card, 100), lambda: card.write_bytes(flattered),
    ):  # fmt: skip
        made.clear()
        damage()
        with pytest.warns(UserWarning, match=f"{path.name} or a file beside it is cut or altered; it is made again"):
            again = sweep(SMALL, GRID)
        assert made == [path.name] and again["zstd_bytes"].equals(table["zstd_bytes"])
        assert again["accuracy"].equals(table["accuracy"])
    made.clear()
    os.remove(card)  # without a card nobody can tell that anything was there
    assert len(sweep(SMALL, GRID)) == 8 and made == [path.name]


@pytest.mark.parametrize("what", ["code", "versions"])
def test_what_other_code_or_another_version_made_is_made_again(made, monkeypatch, what):
    sweep(SMALL, GRID)
    made.clear()
    today = artifact._made_by()
    monkeypatch.setattr(artifact, "_made_by", lambda: {**today, what: {"torch": "1.0"}})
    sweep(SMALL, GRID)
    assert len(made) == 6


def test_what_another_machine_made_is_timed_again_and_nothing_else(made, monkeypatch):
    table = sweep(SMALL, GRID)
    load(table["path"][1]).test()
    made.clear()
    here = when_and_where()
    monkeypatch.setattr(artifact, "when_and_where", lambda: {**here, "machine": "another one"})
    monkeypatch.setattr(measure, "latencies", lambda sessions, x: [measure.Timing(0.25, 0.0)])
    again = sweep(SMALL, GRID)
    times = ["latency_ms", "throughput"]
    assert made == [] and (again[times] == [250.0, 256.0]).all(axis=None)
    assert again.drop(columns=times).equals(table.drop(columns=times))
    card = load(table["path"][1]).card
    assert card["machine"] == "another one" and card["measured"]["latency_ms"] == 250.0 and "test" in card
    monkeypatch.setattr(measure, "latencies", None)  # once is enough
    assert sweep(SMALL, GRID).equals(again)


def test_a_bench_takes_over_what_a_sweep_has_measured(made):
    sweep(SMALL, GRID)
    made.clear()
    compressor = Compressor(Points(Marks(runs.runs_folder()), history()[0]))
    compressor.ask(find(SMALL), fk.Recipe(dtype="int8"))
    assert compressor.wait(60)
    assert made == [] and compressor.points.current.recipe.dtype == "int8" and not compressor.error


def test_spread_over_seeds():
    table = sweep(SMALL, {"seed": [1, 2], "dtype": ["fp32", "fp16"]})
    together = spread(table)
    assert list(together["dtype"]) == ["fp32", "fp16"] and list(together["points"]) == [2, 2]
    fp32 = table[table["dtype"] == "fp32"]["accuracy"]
    first = together.iloc[0]
    assert first["accuracy"] == pytest.approx(fp32.mean()) and first["accuracy_sd"] == pytest.approx(fp32.std())
    assert (first["low"], first["high"]) == (fp32.min(), fp32.max())
    assert together["front"].any()
    with pytest.raises(ValueError, match="over must be a column"):
        spread(table, over="alpha")


def test_what_a_method_loses_has_an_interval_over_eight_seeds_and_their_samples():
    table = sweep(SMALL.replace(rounds=2), {"seed": range(1, 9), "dtype": ["int2"]})
    [method] = spread(table).to_dict("records")
    before, after = [], []
    for seed in range(1, 9):
        run = fk.train(SMALL.replace(rounds=2, seed=seed))
        truth = run.dataset.validation.y.numpy()
        for dtype, rows in (("fp32", before), ("int2", after)):
            rows.append(fk.compress(run, fk.Recipe(dtype=dtype)).predict(run.dataset.validation.x).argmax(1) == truth)
    share, low, high = crossed_loss(np.stack(before), np.stack(after))
    expected = [100 * share, 100 * low, 100 * high]
    assert [method[name] for name in ("lost", "lost_low", "lost_high")] == pytest.approx(expected)
    few = spread(table[table["seed"] < 8])
    assert few["lost_low"].isna().all() and few["points"].tolist() == [7]


def test_spread_of_seeds_alone_and_of_settings_that_may_be_none():
    assert list(spread(sweep(SMALL, {"seed": [1, 2]}))["points"]) == [2]
    taught = spread(sweep(SMALL, {"teacher": [None, SMALL], "seed": [1, 2]}))
    assert list(taught["points"]) == [2, 2]


def test_front_by_hand():
    #        cheap/bad  dominated  equal twins   dear/good
    cost, gain = [1, 3, 2, 2, 4], [0.5, 0.6, 0.7, 0.7, 0.9]
    assert pareto(cost, gain) == [True, False, True, True, True]
    assert pareto([], []) == []
    assert pareto([1, float("nan"), 2], [0.5, 0.9, float("nan")]) == [True, False, False]


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=12))
def test_the_front_is_what_nothing_beats(points):
    def beats(a, b):
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    unbeaten = [not any(beats(other, point) for other in points) for point in points]
    assert pareto([cost for cost, _ in points], [gain for _, gain in points]) == unbeaten
    assert front(points) == sorted({point for point, on in zip(points, unbeaten, strict=True) if on})


TABLE = pd.DataFrame({"accuracy": [0.9, 0.95, 0.95], "bytes": [10, 40, 30], "latency_ms": [0.1, 0.3, 0.2]})


def test_choose_takes_the_best_within_the_budget_and_the_smaller_of_equals():
    assert choose(TABLE, bytes=100)["bytes"] == 30
    assert choose(TABLE, bytes=20)["accuracy"] == 0.9
    assert choose(TABLE, accuracy=0.92, latency_ms=0.25)["bytes"] == 30


def test_a_budget_on_what_got_lost_means_the_end_of_its_interval():
    table = pd.DataFrame({"accuracy": [0.9, 0.8], "bytes": [1, 1], "lost": [0.5, 0.9], "lost_high": [2.0, 1.0]})
    assert choose(table, lost=1)["accuracy"] == 0.8
    with pytest.raises(ValueError, match=r"no point has lost_high at most 0\.9; the nearest has 1"):
        choose(table, lost=0.9)


def test_a_point_that_is_better_by_luck_is_on_the_front_as_often_as_the_luck_comes_again():
    right = np.ones(200, bool)
    worse, lucky, other = right.copy(), right.copy(), right.copy()
    worse[:100], lucky[:9], other[5:15] = False, False, False  # nine wrong answers against ten, five of them together
    shares = front_share([1, 2, 3, 4], [worse, lucky, other, None])
    rng = np.random.default_rng(1)  # the dearer one comes back where more of the other's own mistakes are drawn again
    again = rng.multinomial(200, [4 / 200, 5 / 200, 191 / 200], size=200_000)
    higher = (again[:, 0] * 1 > again[:, 1]).mean()  # lucky errs alone on 4 samples + 0, other alone on 5
    assert shares[0] == 1.0 and shares[3] == 0.0
    assert shares[1] == 1.0
    assert shares[2] == pytest.approx(higher, abs=0.06) and 0.2 < higher < 0.5
    assert front_share([2, 1], [right, right]) == [0.0, 1.0] and front_share([1, 1], [right, right]) == [1.0, 1.0]


def test_choose_says_what_is_missing():
    with pytest.raises(ValueError, match="no point has bytes at most 5; the nearest has 10"):
        choose(TABLE, bytes=5)
    with pytest.raises(ValueError, match=r"no point has accuracy at least 0.99; the nearest has 0.95"):
        choose(TABLE, accuracy=0.99)
    with pytest.raises(ValueError, match=r"budget must name columns of the table .*, got 'size'"):
        choose(TABLE, size=1)


def test_more_is_better_of_rates_and_less_of_costs():
    rates = ["accuracy", "low", "throughput", "sensitivity", "specificity", "auc", "lowest_accuracy"]
    costs = ["bytes", "zstd_bytes", "latency_ms", "flops", "parameters", "uplink_bytes", "downlink_bytes"]
    table = pd.DataFrame({name: [1.0, 2.0] for name in rates + costs} | {"accuracy": [2.0, 2.0], "place": [0, 1]})
    table.loc[1, "accuracy"] = 3.0
    assert [int(choose(table, **{name: 1.5}).place) for name in costs] == [0] * len(costs)
    table.loc[:, "accuracy"] = [3.0, 2.0]
    assert [int(choose(table, **{name: 1.5}).place) for name in rates[1:]] == [1] * (len(rates) - 1)
    with pytest.raises(ValueError, match="no point has accuracy at least 4"):
        choose(table, accuracy=4)
