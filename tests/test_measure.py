"""Measurements: counts by hand, turns kept, and the weights that a file really holds."""

import numpy as np
import pytest
import torch
from torch import nn

from fedlab_kit.data import Preprocess, Split
from fedlab_kit.deployment import measure
from fedlab_kit.deployment.convert import client_ranges, convert
from fedlab_kit.deployment.export import export
from fedlab_kit.models import flops

RAW = torch.arange(12, dtype=torch.float32).reshape(4, 3)


def _linear() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.0, 3.0]]))
    return model


def test_accuracy_counts_hits_of_the_session() -> None:
    session = measure.open_session(export(_linear(), Preprocess(0.0, 1.0), RAW).SerializeToString())
    accuracy, (low, high) = measure.accuracy(session, Split(RAW, torch.tensor([1, 1, 1, 0])))
    assert accuracy == 0.75
    assert 0.30 < low < 0.75 < high < 0.96
    with pytest.raises(ValueError, match="at least one sample"):
        measure.accuracy(session, Split(RAW[:0], torch.zeros(0, dtype=torch.int64)))


def test_logits_do_not_depend_on_the_batch() -> None:
    session = measure.open_session(export(_linear(), Preprocess(0.0, 1.0), RAW).SerializeToString())
    assert np.array_equal(measure.logits(session, RAW), measure.logits(session, RAW, batch=3))


def test_calls_are_timed_in_turns() -> None:
    order: list[str] = []
    found = measure.timings([lambda: order.append("a"), lambda: order.append("b")], seconds=0, least=3)
    assert order == ["a", "b"] + ["a", "a", "b", "b"] * 3  # untimed, then three turns that begin untimed
    assert all(timing.median > 0 and timing.spread >= 0 for timing in found)


def test_a_timing_is_the_median_and_the_distance_of_the_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    now, takes = [0.0], iter([99.0, 4.0, 100.0, 1.0, 3.0, 2.0])  # the first call is not timed
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += next(takes)

    assert measure.timings([call], seconds=0, least=5) == [measure.Timing(3.0, 2.0)]


def test_flops_of_a_matrix_are_two_per_weight() -> None:
    assert flops(nn.Linear(3, 2), (3,)) == 2 * 3 * 2


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int8 static", "int4", "int2"])
def test_the_zeros_of_a_file_are_those_of_the_weights(dtype: str) -> None:
    exported = export(_linear(), Preprocess(0.0, 1.0), RAW)
    ranges = client_ranges(exported, RAW) if dtype == "int8 static" else None
    graph = convert(exported, dtype.split()[0], ranges)
    [stored] = measure.stored_weights(graph).values()
    assert stored.size == 6  # two codes of int4 share a byte, four of int2; what fills the last does not count
    assert measure.sparsity(graph) == 0.5


@pytest.mark.parametrize("lowest", [-8, -2])
def test_packed_codes_are_read_in_their_order(lowest: int) -> None:
    model, codes = _linear(), torch.tensor([[lowest, 1.0, 0.0], [1.0, -2.0, lowest]])
    with torch.no_grad():
        model[1].weight.copy_(codes / 4)
    graph = convert(export(model, Preprocess(0.0, 1.0), RAW), f"int{2 if lowest == -2 else 4}")
    [stored] = measure.stored_weights(graph).values()
    assert stored.tolist() == codes.tolist()
