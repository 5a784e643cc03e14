"""Measurements: counts by hand, turns kept, and the weights that a file really holds."""

from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from torch import nn

from fedlab_kit.data import Preprocess, Split
from fedlab_kit.deployment import measure
from fedlab_kit.deployment.calibration import client_ranges
from fedlab_kit.deployment.convert import convert
from fedlab_kit.deployment.onnx_export import export

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


def test_a_call_that_takes_seconds_is_timed_once_more_and_not_five_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def run(names: None, feed: dict[str, np.ndarray]) -> None:
        calls.append(len(feed["x"]))
        now[0] += 2.0

    found = measure.latencies([SimpleNamespace(run=run)], np.zeros((64, 3)))
    assert calls == [64, 64] and found == [measure.Timing(2.0, 0.0)]


@pytest.mark.parametrize(
    ("opset", "ir", "oldest"),
    [(17, 8, "1.17"), (20, 9, "1.17"), (20, 10, "1.18"), (21, 10, "1.18"), (22, 10, "1.21"), (23, 11, "1.23"),
     (25, 13, "1.24"), (99, 99, onnxruntime.__version__)],
)  # fmt: skip
def test_the_oldest_runtime_is_the_one_that_opened_it_when_tried(opset: int, ir: int, oldest: str) -> None:
    assert measure.oldest_runtime(_graph(opset, ir)) == oldest


@pytest.mark.parametrize(("kind", "oldest"), [("INT4", "1.19"), ("UINT4", "1.19"), ("INT2", "1.24"), ("INT8", "1.18")])
def test_kinds_of_codes_need_a_later_runtime_than_their_opset(kind: str, oldest: str) -> None:
    graph = _graph(21, 10)
    graph.graph.initializer.append(helper.make_tensor("w", TensorProto.DataType.Value(kind), [4], [1, 0, 1, 0]))
    assert measure.oldest_runtime(graph) == oldest


@pytest.mark.parametrize(("bits", "oldest"), [(4, "1.17"), (8, "1.23"), (2, "1.24")])
def test_packed_matrices_need_the_runtime_of_their_bits(bits: int, oldest: str) -> None:
    graph = _graph(20, 9)
    packed = helper.make_node("MatMulNBits", ["x", "w"], ["z"], domain="com.microsoft", bits=bits, K=4, N=2)
    graph.graph.node.append(packed)
    assert measure.oldest_runtime(graph) == oldest


def _graph(opset: int, ir: int) -> ModelProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    imports = [helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir)


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
