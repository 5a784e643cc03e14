"""Intervals against scipy, published formulas worked out by hand, and simulation: how often they hold the truth."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm, t, ttest_rel

from fedlab_kit.statistics import crossed_loss, holm, mean_difference, not_hurt, paired_loss, verdict, wilson


def test_known_values():
    # 8 of 10: centre (0.8 + 3.8415/20)/(1.38415) = 0.71674, half-width 0.22658
    low, high = wilson(8, 10)
    assert low == pytest.approx(0.49016, abs=1e-4)
    assert high == pytest.approx(0.94332, abs=1e-4)


def test_extremes_stay_in_range():
    assert wilson(0, 5)[0] == 0.0 and wilson(0, 5)[1] > 0.3
    assert wilson(5, 5)[1] == 1.0 and wilson(5, 5)[0] < 0.7


@given(st.integers(1, 1000), st.data())
def test_contains_the_share_and_is_symmetric(total, data):
    hits = data.draw(st.integers(0, total))
    low, high = wilson(hits, total)
    assert 0 <= low <= hits / total + 1e-12 and hits / total - 1e-12 <= high <= 1
    assert wilson(total - hits, total) == pytest.approx((1 - high, 1 - low))


def test_agrees_with_scipy():
    from scipy.stats import binomtest

    interval = binomtest(37, 91).proportion_ci(method="wilson")
    assert wilson(37, 91) == pytest.approx((interval.low, interval.high))


def test_the_paired_interval_is_tangos():
    """Four lost, one gained among twenty: at both ends the score, with the likeliest cells by search, is 1.96."""
    before, after = np.repeat([1, 0, 1], [4, 1, 15]) == 1, np.repeat([0, 1, 1], [4, 1, 15]) == 1
    share, *ends, _ = paired_loss(before, after)
    assert share == 3 / 20 and ends[0] < share < ends[1]
    for end in ends:
        gained = np.linspace(max(0, -end), (1 - end) / 2, 200_001)[1:-1]
        likelihood = 4 * np.log(gained + end) + np.log(gained) + 15 * np.log(1 - 2 * gained - end)
        best = gained[likelihood.argmax()]
        score = (3 - 20 * end) / (20 * (2 * best + end * (1 - end))) ** 0.5
        assert abs(score) == pytest.approx(1.96, abs=1e-3)
    _, low, high, _ = paired_loss(after[:2], after[:2])
    assert low < -0.4 and high > 0.4  # two patients prove nothing


def test_the_interval_of_a_mean_difference_is_scipys():
    first, second = np.random.default_rng(0).normal(size=(2, 5))
    mean, low, high = mean_difference(first, second)
    interval = ttest_rel(first, second).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((np.mean(first - second), interval.low, interval.high))
    assert mean_difference([3, 3], [1, 1]) == (2, 2, 2)


def test_a_difference_without_bounds_leaves_every_mean_possible():
    """Where Student's interval goes as one of five differences grows."""
    for other in (1e3, 1e9, np.inf):
        mean, low, high = mean_difference([1, 1, 1, 1, -other], [0] * 5)
        assert mean < -100 and low < -100 and high > 100
    assert (low, high) == (-np.inf, np.inf)
    assert mean_difference([np.inf, 1], [np.inf, 1])[1:] == (-np.inf, np.inf)


def answers(rng, seeds, samples, means, of_seeds, of_samples, same=0.8):
    """Right or wrong [seeds, samples], twice: a normal skill of each training and ease of each sample, by a probit."""
    ease = rng.normal(0, of_samples, (2, samples))
    eases = ease[0], same * ease[0] + (1 - same**2) ** 0.5 * ease[1]
    skills = rng.normal(0, of_seeds, (2, seeds, 1))
    return [m + s + e + rng.normal(size=(seeds, samples)) > 0 for m, s, e in zip(means, skills, eases, strict=True)]


@pytest.mark.parametrize("seeds", [8, 20])
@pytest.mark.parametrize("samples", [60, 200])
@pytest.mark.parametrize(
    ("means", "of_seeds", "of_samples"),
    [((1.5, 1.2), 0.3, 1.5), ((3.0, 2.7), 0.1, 1.5), ((3.0, 3.0), 0.0, 2.0), ((2.0, 1.5), 0.6, 0.5)],
)
def test_the_interval_over_seeds_and_samples_holds_the_true_loss_as_often_as_it_says(
    seeds, samples, means, of_seeds, of_samples
):
    rng, wide = np.random.default_rng(7), (1 + of_seeds**2 + of_samples**2) ** 0.5
    truth, held = norm.cdf(means[0] / wide) - norm.cdf(means[1] / wide), 0
    for _ in range(400):
        _, low, high = crossed_loss(*answers(rng, seeds, samples, means, of_seeds, of_samples))
        held += low <= truth <= high
    assert held / 400 >= 0.92


def test_over_seeds_or_over_samples_alone_the_interval_would_be_too_narrow():
    """What the crossed interval is for: with trainings and samples that both spread, either alone holds too rarely."""
    rng, held = np.random.default_rng(8), np.zeros(3)
    for _ in range(200):
        before, after = answers(rng, 8, 60, (1.0, 1.0), 0.3, 2.0, same=0.0)
        intervals = crossed_loss(before, after), mean_difference(before.mean(1), after.mean(1))
        held += [low <= 0 <= high for _, low, high in (*intervals, paired_loss(before[0], after[0])[:3])]
    assert held[0] >= 184 and held[1] < 140 and held[2] < 186


def test_the_crossed_interval_by_hand():
    """Eight seeds by 40 samples; the two added are lost and won by all: mean squares by the sums of the textbook."""
    before = np.ones((8, 40), bool)
    after = np.array([[0, 1], [0, 1], [0, 0], [0, 0], [1, 1], [0, 1], [0, 1], [0, 1]], bool).repeat(20, axis=1)
    wide = np.column_stack([before.astype(int) - after, np.ones(8), -np.ones(8)])
    grand = wide.sum() ** 2 / wide.size
    rows, columns = (wide.sum(1) ** 2).sum() / 42 - grand, (wide.sum(0) ** 2).sum() / 8 - grand
    squares = rows / 7, columns / 41, ((wide**2).sum() - grand - rows - columns) / 287
    spread = squares[0] + squares[1] - squares[2]
    freedom = spread**2 / (squares[0] ** 2 / 7 + squares[1] ** 2 / 41 + squares[2] ** 2 / 287)
    half = t.ppf(0.975, freedom) * (spread / wide.size) ** 0.5
    share, low, high = crossed_loss(before, after)
    assert share == 9 / 16 and (low, high) == pytest.approx((wide.mean() - half, wide.mean() + half))
    assert crossed_loss(after, before) == pytest.approx((-share, -high, -low))
    _, low, high = crossed_loss(before, before)
    assert low == -high < 0  # two samples that nobody lost prove little
    with pytest.raises(ValueError, match=r"^seeds must be at least 8 to say what holds for others, got 7$"):
        crossed_loss(before[:7], after[:7])


def test_holms_correction_is_that_of_a_textbook_and_of_the_closed_test():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    p = list(np.random.default_rng(3).random(5) ** 3)
    for number, value in enumerate(holm(p)):  # rejected when Bonferroni rejects every intersection that it is in
        others = p[:number] + p[number + 1 :]
        families = [(p[number], *c) for size in range(5) for c in itertools.combinations(others, size)]
        closed = [min(1.0, len(family) * min(family)) for family in families]
        assert value == pytest.approx(max(closed))
    corrected = holm([0.04, np.nan, 0.01])
    assert corrected[::2] == [0.04, 0.02] and np.isnan(corrected[1]) and holm([]) == []


def test_a_verdict_needs_the_whole_interval():
    assert [verdict(0.1, 0.2, m) for m in (0.05, 0.1, 0.15, 0.2, 0.3)] == [
        "supported", "undecided", "undecided", "undecided", "not supported",
    ]  # fmt: skip
    assert verdict(-0.5, 0.5, -1) == "supported" and verdict(float("nan"), float("nan")) == "undecided"


def test_not_hurt_needs_a_margin_and_enough_answers():
    for total, said in ((100, "undecided"), (1000, "supported")):
        before = np.ones(total, bool)
        after = np.arange(total) >= total // 100  # one in a hundred is lost
        assert not_hurt(before, after, 0.03) == said
        assert not_hurt(before, np.zeros(total, bool), 0.03) == "not supported"
    with pytest.raises(ValueError, match=r"^margin must be above 0, the loss that still counts as none, got 0$"):
        not_hurt(before, after, 0)
