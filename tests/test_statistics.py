"""Intervals against statsmodels' published formula, worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlab_kit.statistics import paired_loss, wilson


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
