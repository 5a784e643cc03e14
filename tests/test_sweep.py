"""Sweeps: every combination, from the store where it can be, in processes where it pays; and what to choose."""

import threading

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedlab_kit as fk
from fedlab_kit.deployment.fleet import choose
from fedlab_kit.sweep import pareto, spread, sweep

SMALL = fk.Experiment(dataset="blobs", model="mlp", clients=6, clients_per_round=4, rounds=2, lr=0.05)


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


def test_built_in_experiments_are_trained_in_processes(runs_folder):
    experiment = fk.Experiment(model="logistic", rounds=1, clients=4, clients_per_round=2)
    table = sweep(experiment, {"seed": [1, 2, 3]})
    assert len(table) == 3
    assert all(fk.find(experiment.replace(seed=s)).from_store for s in (1, 2, 3))


def test_spread_over_seeds():
    table = sweep(SMALL, {"seed": [1, 2], "dtype": ["fp32", "fp16"]})
    together = spread(table)
    assert list(together["dtype"]) == ["fp32", "fp16"] and list(together["points"]) == [2, 2]
    fp32 = table[table["dtype"] == "fp32"]["accuracy"]
    assert together["accuracy"][0] == pytest.approx(fp32.mean())
    assert together["accuracy_sd"][0] == pytest.approx(fp32.std())
    with pytest.raises(ValueError, match="over must be a column"):
        spread(table, over="alpha")


def test_front_by_hand():
    #        cheap/bad  dominated  equal twins   dear/good
    cost, gain = [1, 3, 2, 2, 4], [0.5, 0.6, 0.7, 0.7, 0.9]
    assert pareto(cost, gain) == [True, False, True, True, True]
    assert pareto([], []) == []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_every_point_is_on_the_front_or_beaten_by_one_that_is(points):
    front = pareto(*zip(*points, strict=True))
    assert any(front)
    best = [p for p, on in zip(points, front, strict=True) if on]
    for cost, gain in points:
        assert any(c <= cost and g >= gain for c, g in best)


TABLE = pd.DataFrame({"accuracy": [0.9, 0.95, 0.95], "bytes": [10, 40, 30], "latency_ms": [0.1, 0.3, 0.2]})


def test_choose_takes_the_best_within_the_budget_and_the_smaller_of_equals():
    assert choose(TABLE, bytes=100)["bytes"] == 30
    assert choose(TABLE, bytes=20)["accuracy"] == 0.9
    assert choose(TABLE, accuracy=0.92, latency_ms=0.25)["bytes"] == 30


def test_choose_says_what_is_missing():
    with pytest.raises(ValueError, match="no point has bytes at most 5; the nearest has 10"):
        choose(TABLE, bytes=5)
    with pytest.raises(ValueError, match=r"no point has accuracy at least 0.99; the nearest has 0.95"):
        choose(TABLE, accuracy=0.99)
    with pytest.raises(ValueError, match=r"budget must name columns of the table .*, got 'size'"):
        choose(TABLE, size=1)
