"""Drift and budgets: the limit by simulation, shifts that must be caught, differences that must not, plain records."""

import json

import numpy as np
import pytest
import torch

import fedlab_kit as fk
from fedlab_kit.data import Split, load
from fedlab_kit.deployment import drift as room
from fedlab_kit.deployment.drift import FIRST, LEVEL, WINDOW, Drift, Reference, directions, limit
from fedlab_kit.deployment.monitor import Budgets, Monitor

EXPERIMENT = fk.Experiment(
    dataset="clinics", model="logistic", partition="site", clients=3, clients_per_round=3, rounds=10, lr=0.2
)
COVARIANCE = np.array([[1.0, 0.95, 0.0], [0.95, 1.0, 0.0], [0.0, 0.0, 1.0]])


@pytest.fixture(scope="module")
def artifact() -> fk.Artifact:
    return fk.compress(fk.train(EXPERIMENT), fk.Recipe())


def patients(rng: np.random.Generator, count: int, shift: tuple[float, ...] = (0, 0, 0)) -> np.ndarray:
    return rng.multivariate_normal(np.zeros(3), COVARIANCE, count) + shift


def watch(reference: np.ndarray, tolerance: float = 1.0) -> Drift:
    known = Reference.of(reference, np.ones(3))
    return Drift(known, np.ones(3), directions([known]), tolerance)


def resampled(site: int, count: int, seed: int = 0) -> np.ndarray:
    test = load("clinics").test
    pool = test.x[test.site == site].numpy()
    return pool[np.random.default_rng(seed).integers(len(pool), size=count)]


# the statistic


def test_the_limit_is_exceeded_as_often_as_it_says(monkeypatch):
    """A thousand times as often as in use, so that it can be counted."""
    monkeypatch.setattr(room, "LEVEL", 1e-2)
    bound, rng = limit.__wrapped__(100, 60, 5, 0.8), np.random.default_rng(1)
    truth = np.array([0.8, 0, 0, 0, 0])
    distances = rng.normal(truth, np.sqrt(1 / 100 + 1 / 60), (40_000, 5))
    assert (np.linalg.norm(distances, axis=1) > bound).mean() == pytest.approx(1e-2, rel=0.15)


def test_the_limit_falls_with_patients_to_the_tolerance():
    bounds = [limit(n, n, 4, 1.0) for n in (20, 100, 1000, 100_000)]
    assert bounds == sorted(bounds, reverse=True) and 1.0 < bounds[-1] < 1.03
    assert limit(100, 100, 4, 0.5) < limit(100, 100, 4, 1.0) < limit(100, 100, 30, 1.0)


def test_hospitals_that_add_up_their_scatters_find_the_directions_of_all_patients():
    rng = np.random.default_rng(2)
    groups = [patients(rng, 40) + centre for centre in (0.0, 5.0, -3.0)]
    found = directions([Reference.of(group, np.ones(3)) for group in groups])
    pooled = np.concatenate([group - group.mean(0) for group in groups])
    covariance = 0.95 * pooled.T @ pooled / (len(pooled) - 3)
    covariance += 0.05 * np.trace(covariance / 0.95) / 3 * np.eye(3)
    assert found.T @ covariance @ found == pytest.approx(np.eye(3), abs=1e-9)


def test_a_shift_that_breaks_what_belongs_together_is_seen_sooner_than_a_larger_one_along_it():
    rng = np.random.default_rng(3)
    reference, along, against = patients(rng, 200), (0.6, 0.6, 0.0), (0.5, -0.5, 0.0)
    assert watch(reference).add(patients(rng, 200, along)) == []
    alarms = watch(reference).add(patients(rng, 200, against))
    assert alarms and alarms[0].patients <= 50
    assert np.argsort(-np.abs(alarms[0].shift))[:2].tolist() in ([0, 1], [1, 0])


def test_nothing_is_said_of_patients_like_the_reference_and_an_alarm_starts_anew():
    rng = np.random.default_rng(4)
    drift = watch(patients(rng, 100))
    assert drift.add(patients(rng, 5000)) == [] and len(drift.looks) == (5000 - FIRST) // 10 + 1
    first, second, *_ = drift.add(patients(rng, 400, (3.0, -3.0, 0.0)))
    assert second.patients >= first.patients + FIRST and first.alarm
    assert drift.add(patients(rng, WINDOW)) == []


def test_how_rows_are_batched_changes_nothing():
    rng = np.random.default_rng(5)
    reference, rows = patients(rng, 50), patients(rng, 95, (1.5, 0.0, 0.0))
    one, many = watch(reference), watch(reference)
    one.add(rows)
    for row in rows:
        many.add(row[None])
    assert [look.distance for look in one.looks] == pytest.approx([look.distance for look in many.looks])


def test_a_single_absurd_patient_is_not_drift():
    rng = np.random.default_rng(6)
    drift, rows = watch(patients(rng, 100)), patients(rng, 200)
    rows[100] = 1e9
    assert drift.add(rows) == []


# in service


def test_a_quiet_stream_gives_the_artifacts_answers_and_no_alarm(artifact):
    monitor, rows = Monitor(artifact, load("clinics").train), resampled(0, 2000)
    answers = np.concatenate([monitor.watch("north", rows[i : i + 50]) for i in range(0, 2000, 50)])
    assert np.array_equal(answers, artifact.predict(rows))
    assert monitor.alarms == [] and monitor.sites["north"].patients == 2000
    assert monitor.sites["south"].patients == 0


def test_a_shift_at_one_hospital_is_its_own_alarm_as_a_plain_record(artifact):
    monitor = Monitor(artifact, load("clinics").train)
    for start in range(0, 200, 20):
        monitor.watch("north", resampled(0, 20, start))
        monitor.watch("south", resampled(1, 20, start) + np.float32([0, 0, 10, 0]))  # two standard deviations of size
    assert {alarm.site for alarm in monitor.alarms} == {"south"}
    record = monitor.alarms[0].to_dict()
    assert json.loads(json.dumps(record)) == record
    assert record["kind"] == "inputs" and record["what"].startswith("moved most: size +") and record["patient"] <= 100
    assert record["value"] > record["limit"] > 1


def test_a_model_that_becomes_unsure_is_seen_in_its_confidence(artifact):
    rows = resampled(2, 200)
    rows[:, :2] = (0.75, 1.0)  # every patient lies between the classes
    monitor = Monitor(artifact, load("clinics").train, tolerance=0.5)
    monitor.watch("west", rows)
    assert "confidence" in {alarm.kind for alarm in monitor.alarms}


def test_budgets_for_late_failed_and_wrong_answers(artifact):
    now = iter(np.arange(0.0, 1e6, 0.9))  # each answer takes 0.9 s
    monitor = Monitor(artifact, load("clinics").train, clock=lambda: next(now))
    rows, y = resampled(0, 40), np.zeros(40, int)
    rows[::4, 1] = np.nan
    for i in range(40):
        monitor.watch("north", rows[i : i + 1], 1 - artifact.predict(np.nan_to_num(rows[i : i + 1])).argmax(1) + y[:1])
    kinds = [alarm.kind for alarm in monitor.alarms]
    assert {"late", "failed", "wrong"} <= set(kinds)
    late = next(alarm for alarm in monitor.alarms if alarm.kind == "late")
    assert late.what == "100.0% of the recent answers were late, the budget is 1.0%" and late.patient <= 5


def test_within_the_budget_nothing_is_said(artifact):
    monitor, rows = Monitor(artifact, load("clinics").train, budgets=Budgets(failed=0.2)), resampled(0, 1000)
    rows[np.random.default_rng(7).random(1000) < 0.15, 0] = np.nan
    rows[:3, 0] = np.nan  # three at the start are more than the budget and still chance
    answers = monitor.watch("north", rows)
    assert [alarm for alarm in monitor.alarms if alarm.kind == "failed"] == []
    assert np.isnan(answers).any(axis=1).sum() == np.isnan(rows[:, 0]).sum()


def test_wrong_columns_fail_at_one_hospital_and_the_others_go_on(artifact):
    monitor = Monitor(artifact, load("clinics").train)
    for _ in range(5):
        with pytest.raises(ValueError, match=r"got float32 \[3, 3\]"):
            monitor.watch("south", np.zeros((3, 3), np.float32))
    assert [(alarm.site, alarm.kind) for alarm in monitor.alarms][:1] == [("south", "failed")]
    assert monitor.watch("north", resampled(0, 5)).shape == (5, 2)


def test_hospitals_that_join_late_are_small_or_unknown(artifact):
    train = load("clinics").train
    few = torch.cat([torch.nonzero(train.site < 2)[:, 0], torch.nonzero(train.site == 2)[:4, 0]])
    monitor = Monitor(artifact, Split(train.x[few], train.y[few], train.site[few]))
    assert monitor.sites["west"].drifts == {} and monitor.watch("west", resampled(2, 300)).shape == (300, 2)
    with pytest.raises(ValueError, match="site must be one of north, south, west, got 'east'"):
        monitor.watch("east", resampled(0, 5))
    with pytest.raises(ValueError, match="reference must hold at least 10 patients of 'east', got 4"):
        monitor.join("east", resampled(0, 4))
    monitor.join("east", resampled(0, 60, 9))
    monitor.watch("east", resampled(0, 100) + np.float32([0, 0, 15, 0]))
    assert [alarm.site for alarm in monitor.alarms] == ["east"] * len(monitor.alarms) and monitor.alarms
    with pytest.raises(ValueError, match="reference must hold at least 10 patients of some site, got 4 in all"):
        Monitor(artifact, Split(train.x[:4], train.y[:4], train.site[:4]))


def test_a_shift_downwards_is_named_first(artifact):
    monitor = Monitor(artifact, load("clinics").train)
    monitor.watch("south", resampled(1, 200) - np.float32([0, 0, 10, 0]))
    assert monitor.alarms[0].what.startswith("moved most: size -")


@pytest.mark.parametrize(("budget", "kinds"), [(50.0, set()), (20.0, {"late"})])
def test_lateness_is_that_of_one_answer(artifact, budget, kinds):
    now = iter(np.arange(0.0, 1e6, 0.9))  # 40 answers take 0.9 s, one 22.5 ms
    monitor = Monitor(artifact, load("clinics").train, Budgets(latency_ms=budget), clock=lambda: next(now))
    for turn in range(5):
        monitor.watch("north", resampled(0, 40, turn))
    assert {alarm.kind for alarm in monitor.alarms} == kinds


def test_patients_who_were_not_scored_are_not_wrong(artifact):
    monitor, rows = Monitor(artifact, load("clinics").train, Budgets(failed=1.0)), resampled(0, 300)
    y = artifact.predict(rows).argmax(1)
    rows[::3, 0], y[::3] = np.nan, 1
    monitor.watch("north", rows, y)
    assert monitor.alarms == []


def test_of_pictures_the_confidence_is_watched():
    run = fk.train(
        fk.Experiment(
            dataset="tiny_images", partition="dirichlet", model="tiny_cnn", clients=2, clients_per_round=2, rounds=1
        )
    )
    monitor = Monitor(fk.compress(run, fk.Recipe()), run.dataset.train)
    assert monitor.watch("all", run.dataset.test.x.numpy()).shape == (40, 2)
    assert set(monitor.sites["all"].drifts) == {"confidence"} and LEVEL == 1e-6
