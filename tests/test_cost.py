"""What a round costs: the line through measurements, and a measurement whose bytes are known."""

import pytest

import fedlab_kit as fk
from fedlab_kit.scale.cost import Cost, Line, measure


def test_the_line_goes_through_exact_measurements_and_on():
    costs = [Cost(n, 2.0 * n, 3.0 * n, 40.0 + 0.5 * n, 0.1 + 0.01 * n) for n in (10, 20, 40)]
    line = Line.through(costs)
    assert line.at(100_000) == pytest.approx(Cost(100_000, 200_000, 300_000, 50_040, 1000.1))


def test_a_measured_round_counts_its_bytes():
    small = measure(
        fk.Experiment(dataset="digits", model="logistic", partition="iid", clients=40, clients_per_round=30)
    )
    frame = 14 + 4 * (28 * 28 + 1) * 10
    assert small.clients == 30 and small.up * 1e6 == pytest.approx(30 * frame)
    assert small.down * 1e6 == pytest.approx(30 * (1 + frame)) and small.seconds > 0 and small.memory >= 0


def test_a_failed_measurement_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)^the measurement failed:.*dataset must be one of"):
        measure(fk.Experiment(dataset="nowhere", partition="dirichlet"))
