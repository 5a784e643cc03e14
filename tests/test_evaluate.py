"""Evaluation per site: every figure by hand or by an oracle, what cannot be estimated, and who is hurt."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import roc_auc_score

import fedlab_kit as fk
from fedlab_kit.data import load
from fedlab_kit.deployment import evaluate as room
from fedlab_kit.deployment.evaluate import METRICS, compare, evaluate, measure, readable
from fedlab_kit.statistics import auc_interval, mean_interval, paired_loss, wilson

EXPERIMENT = fk.Experiment(
    dataset="clinics", model="logistic", partition="site", clients=3, clients_per_round=3, rounds=10, lr=0.2
)


@pytest.fixture(scope="module")
def artifact() -> fk.Artifact:
    return fk.compress(fk.train(EXPERIMENT), fk.Recipe())


def stand_in(answers: np.ndarray) -> SimpleNamespace:
    """Something that answers the validation split with these classes."""
    figures = {"latency_ms": 1.0, "bytes": 1, "zstd_bytes": 1}
    card = {"training": {"uplink_bytes": 1, "downlink_bytes": 2}}
    return SimpleNamespace(predict=lambda x: np.eye(2)[answers], dataset=load("clinics"), card=card, **figures)


# intervals


@given(st.floats(0, 1), st.integers(1, 300), st.integers(1, 300))
def test_the_interval_of_an_area_holds_it_and_is_a_mirror_image(auc, m, n):
    low, high = auc_interval(auc, m, n)
    assert 0 <= low <= auc <= high <= 1 and low < high
    assert auc_interval(1 - auc, m, n) == pytest.approx((1 - high, 1 - low), abs=1e-6)


def test_the_interval_of_an_area_holds_the_true_one_as_often_as_it_says():
    rng, truth = np.random.default_rng(1), 0.9214  # of two normals 2 apart: Phi(2 / sqrt 2)
    y, held = np.repeat([0, 1], [30, 15]), 0
    for _ in range(400):
        low, high = auc_interval(float(roc_auc_score(y, rng.normal(2.0 * y))), 15, 30)
        held += low <= truth <= high
    assert 0.92 <= held / 400 <= 0.99


def test_the_interval_of_an_area_is_newcombes():
    """At both ends the measured area lies 1.96 standard deviations away, by Hanley and McNeil's formula there."""
    m, n = 15, 30
    for end in auc_interval(0.8, m, n):
        more = ((m + n) / 2 - 1) * ((1 - end) / (2 - end) + end / (1 + end))
        assert abs(0.8 - end) == pytest.approx(1.96 * (end * (1 - end) * (1 + more) / (m * n)) ** 0.5, rel=1e-3)


def test_an_area_of_one_has_a_width_that_shrinks_with_patients():
    lows = [auc_interval(1.0, n, n)[0] for n in (5, 20, 200)]
    assert lows == sorted(lows) and lows[0] < 0.75 and lows[2] > 0.97


def test_the_interval_of_a_mean_by_hand():
    low, high = mean_interval(np.array([0.2, 0.4]), 0.0, 1.0)  # of 0.2, 0.4, 0 and 1: sd 0.43205, t(3) 3.18245
    assert (low, high) == (0.0, pytest.approx(min(1.0, 0.4 + 3.18245 * 0.43205 / 2), abs=1e-4))
    values = np.random.default_rng(2).normal(0, 0.2, 400).clip(-1, 1)
    low, high = mean_interval(values, -1.0, 1.0)  # with many values it is the normal one
    assert (low, high) == pytest.approx((values.mean() - 0.0196, values.mean() + 0.0196), abs=0.005)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_the_interval_of_a_mean_holds_it_and_stays_in_the_range(values):
    low, high = mean_interval(np.array(values), -1.0, 1.0)
    assert -1 <= low <= np.mean(values) + 1e-12 and np.mean(values) - 1e-12 <= high <= 1


RISKS = {  # how risks are drawn, and the true chance that belongs to a risk
    "even": (lambda rng, n: rng.beta(2, 2, n), lambda r: r),
    "skewed": (lambda rng, n: rng.beta(1, 9, n), lambda r: r),
    "very skewed": (lambda rng, n: rng.beta(0.2, 1.8, n), lambda r: r),
    "sure": (lambda rng, n: np.where(rng.random(n) < 0.5, 0.02, 0.98), lambda r: np.where(r > 0.5, 0.97, 0.03)),
    "too sure": (lambda rng, n: rng.beta(0.1, 0.1, n), lambda r: 0.1 + 0.8 * r),
    "too low": (lambda rng, n: rng.beta(2, 5, n), lambda r: np.minimum(1, 1.7 * r)),
}


@pytest.mark.parametrize("patients", [10, 15, 30, 100])
@pytest.mark.parametrize("name", RISKS)
def test_the_intervals_of_brier_score_and_calibration_hold_what_they_promise(name, patients):
    """The percentiles of the bootstrap held 83 % with 15 patients; without the two values Student's hold 36 %."""
    draw, chance = RISKS[name]
    rng = np.random.default_rng(5)
    risk = draw(rng, 200_000)
    truths = (chance(risk) * (1 - risk) ** 2 + (1 - chance(risk)) * risk**2).mean(), (risk - chance(risk)).mean()
    held = np.zeros(2)
    for _ in range(1000):
        risk = draw(rng, patients)
        sick = rng.random(patients) < chance(risk)
        intervals = mean_interval((risk - sick) ** 2, 0.0, 1.0), mean_interval(risk - sick, -1.0, 1.0)
        held += [low <= truth <= high for (low, high), truth in zip(intervals, truths, strict=True)]
    assert (held >= 940).all(), held


@pytest.mark.parametrize("patients", [10, 40, 200])
@pytest.mark.parametrize("shares", [(0.05, 0.0), (0.02, 0.02), (0.1, 0.02), (0.3, 0.1), (0.5, 0.0)])
def test_the_interval_of_a_paired_loss_holds_the_true_one_as_often_as_it_says(patients, shares):
    """Half a sample in each cell held 87 % of the losses of 5 % among 40,. It shows when none of them is lost."""
    counts = np.random.default_rng(6).multinomial(patients, [*shares, 1 - sum(shares)], 400)
    cells, often = np.unique(counts, axis=0, return_counts=True)
    held = 0
    for (worse, better, same), times in zip(cells, often, strict=True):
        before = np.repeat([True, False, True], [worse, better, same])
        _, low, high, _ = paired_loss(before, np.repeat([False, True, True], [worse, better, same]))
        held += times * (low <= shares[0] - shares[1] <= high)
    assert held / 400 >= 0.93


def test_the_interval_where_no_answer_changed_is_wilsons_of_none():
    same = np.ones(40, bool)
    assert paired_loss(same, same)[1:3] == pytest.approx((-wilson(0, 40)[1], wilson(0, 40)[1]))


def test_paired_loss_by_hand():
    before = np.array([True] * 10 + [False] * 10)
    after = before.copy()
    after[:4], after[10:11] = False, True
    loss, low, high, p = paired_loss(before, after)
    assert loss == 3 / 20 and low < loss < high
    assert p == pytest.approx(binom.sf(3, 5, 0.5))  # four or five of five
    assert paired_loss(before, before)[0] == 0.0 and paired_loss(before, before)[3] == 1.0
    assert paired_loss(after, before)[:3] == pytest.approx((-loss, -high, -low))


# one hospital


def test_metrics_by_hand():
    y = np.repeat([0, 1], [10, 10])
    risk = np.repeat([0.1, 0.9, 0.9, 0.1], [8, 2, 7, 3])
    row = measure(risk, y)
    assert (row["patients"], row["positive"], row["note"]) == (20, 10, "")
    assert [row[name] for name in ("accuracy", "sensitivity", "specificity")] == [0.75, 0.7, 0.8]
    assert (row["sensitivity_low"], row["sensitivity_high"]) == wilson(7, 10)
    assert row["auc"] == pytest.approx((56 + (14 + 24) / 2) / 100)  # pairs in order, and half of the ties
    assert row["brier"] == pytest.approx(0.75 * 0.01 + 0.25 * 0.81)
    assert row["calibration"] == pytest.approx((9 * 0.9 + 11 * 0.1) / 20 - 0.5)


def test_below_five_of_a_class_it_says_so_with_the_counts():
    row = measure(np.full(20, 0.2), np.repeat([0, 1], [16, 4]))
    assert row["note"] == "not estimable: auc, sensitivity, brier, calibration (4 positive, 16 negative)"
    assert row["accuracy"] == 0.8 and row["specificity"] == 1.0
    assert all(np.isnan(row[name]) for name in ("auc", "auc_low", "sensitivity", "brier", "calibration_high"))
    assert measure(np.array([]), np.array([]))["note"].startswith("not estimable: accuracy, auc, ")


# the table


def test_the_table_holds_what_each_site_measures_on_its_own_patients(artifact):
    table, split = evaluate({"float": artifact}), load("clinics").validation
    assert list(table.site) == ["north", "south", "west", "all"]
    assert list(table.patients) == [40, 40, 40, 120] and table.positive.iloc[2] == 2
    hits = artifact.predict(split.x).argmax(1) == split.y.numpy()
    assert list(table.accuracy) == [*(hits[split.site.numpy() == k].mean() for k in range(3)), hits.mean()]
    assert table.accuracy.iloc[-1] == artifact.accuracy
    west = table.iloc[2]
    assert np.isnan(west.auc) and "(2 positive, 38 negative)" in west.note
    assert set(table.bytes) == {artifact.bytes} and set(table.uplink_bytes) == {fk.train(EXPERIMENT).uplink_bytes}


def test_people_read_intervals_and_plain_words(artifact):
    shown = readable(evaluate(artifact))
    assert shown.auc.iloc[2] == "not estimable"
    assert shown.sensitivity.iloc[0].count(".") == 3 and " to " in shown.sensitivity.iloc[0]
    assert list(shown.columns[4:]) == list(METRICS)


def test_what_cannot_be_evaluated_is_named(artifact):
    with pytest.raises(ValueError, match=r"^split must be one of train, validation, public, test, got 'all'$"):
        evaluate(artifact, split="all")
    with pytest.raises(ValueError, match="must have two classes to have positives, 'blobs_at_sites' has 3"):
        compare(artifact, artifact, dataset=load("blobs_at_sites"))
    with pytest.raises(ValueError, match="of must be one of accuracy, sensitivity, specificity, got 'auc'"):
        compare(artifact, artifact, of="auc")


# who is hurt


def test_a_hospital_that_is_hurt_is_flagged_though_the_mean_is_better():
    split = load("clinics").validation
    y, site = split.y.numpy(), split.site.numpy()
    rng = np.random.default_rng(3)
    before = np.where(rng.random(120) < 0.2, 1 - y, y)
    before[site == 1] = y[site == 1]  # the south was all right
    after = y.copy()
    after[np.flatnonzero(site == 1)[:8]] ^= 1  # and loses eight patients; everyone else gains
    table = compare(stand_in(before), {"small": stand_in(after)})
    assert list(table.verdict) == ["fine", "hurt", "fine", "fine"]
    assert table.loss.iloc[-1] < 0 and table.p.iloc[1] == pytest.approx(0.5**8)
    assert (table.worse.iloc[1], table.better.iloc[1], table.loss.iloc[1]) == (8, 0, 0.2)


def test_few_patients_are_unclear_rather_than_fine():
    y = load("clinics").validation.y.numpy()
    same = compare(stand_in(y), {"same": stand_in(y)}, of="sensitivity")
    assert list(same.verdict[:3]) == ["unclear", "unclear", "not estimable"]
    whole = compare(stand_in(y), {"same": stand_in(y)})  # of 40 patients who lose 5 % one in eight groups loses nobody
    assert list(zip(whole.patients, whole.verdict, strict=True)) == [(40, "unclear")] * 3 + [(120, "fine")]


def test_a_class_is_paired_by_itself():
    split = load("clinics").validation
    y = split.y.numpy()
    lost = np.where((y == 1) & (split.site.numpy() == 0), 0, y)
    sensitivity = compare(stand_in(y), {"blind": stand_in(lost)}, of="sensitivity").iloc[0]
    specificity = compare(stand_in(y), {"blind": stand_in(lost)}, of="specificity").iloc[0]
    assert (sensitivity.verdict, sensitivity.loss, specificity.worse) == ("hurt", 1.0, 0)


def test_the_rule_is_the_one_that_is_stated():
    assert (room.LEAST, room.MARGIN) == (5, 0.05)


def test_the_limits_are_where_they_are_said_to_be():
    row = measure(np.full(10, 0.5), np.repeat([0, 1], 5))  # five of each are enough; at 0.5 a file says the first class
    assert (row["sensitivity"], row["specificity"], row["auc"], row["note"]) == (0, 1, 0.5, "")


def test_the_level_is_shared_by_the_hospitals():
    split = load("clinics").validation
    y, lost = split.y.numpy(), split.y.numpy().copy()
    lost[np.flatnonzero(split.site.numpy() == 0)[:5]] ^= 1  # p is 1/32: below 0.05, above a third of it
    table = compare(stand_in(y), {"small": stand_in(lost)})
    assert list(table.verdict) == ["unclear", "unclear", "unclear", "hurt"] and table.p[0] == table.p[3] == 0.5**5
    lost[np.flatnonzero(split.site.numpy() == 0)[5]] ^= 1  # 1/64: a third of 0.05 with one artifact, a sixth with two
    alone, two = (compare(stand_in(y), dict.fromkeys(names, stand_in(lost))) for names in ("a", "ab"))
    assert list(alone.verdict[alone.site == "north"]) == ["hurt"]
    assert list(two.verdict[two.site == "north"]) == ["unclear"] * 2
