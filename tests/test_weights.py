"""Weights of every kind of layer in a file: the codes of training, the answers of torch, bytes counted by hand."""

import copy

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlab_kit.compression.quantize import grid_codes, parameter_dtypes, quantized
from fedlab_kit.data import Preprocess
from fedlab_kit.deployment import convert, measure
from fedlab_kit.deployment.onnx_export import export

PREPROCESS = Preprocess(0.1, 1.1)
NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)


class Convolutions(nn.Module):
    """Grouped, depthwise, transposed and one-dimensional ones, with three channels of input and a clip."""

    shape = (3, 9, 9)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.grouped, self.up = nn.Conv2d(8, 12, 1, groups=2), nn.ConvTranspose2d(12, 6, 3, stride=2)
        self.line, self.head = nn.Conv1d(6, 4, 3), nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.grouped(F.relu(self.deep(F.relu(self.first(x))))), -1, 2)
        return self.head(self.line(self.up(x).mean(2)).flatten(1))


class Recurrent(nn.Module):
    shape = (7, 6)

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True)
        self.gru, self.head = nn.GRU(16, 9, batch_first=True, bidirectional=True), nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(x)[0])[0].mean(1))


class Attention(nn.Module):
    shape = (7, 6)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(6, 8), nn.Parameter(torch.randn(7, 8) / 10)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)
        self.register_buffer("mask", torch.triu(torch.full((7, 7), float("-inf")), 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.embed(x) + self.position)
        return self.head(self.attention(x, x, x, attn_mask=self.mask, need_weights=False)[0].mean(1))


class Tied(nn.Module):
    """A table that is a matrix as well, looked up by whole numbers."""

    shape = (7,)

    def __init__(self) -> None:
        super().__init__()
        self.table, self.back, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False), nn.Linear(20, 5)
        self.back.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.back(self.table(x.abs().long() % 20).mean(1)))


class Branches(nn.Module):
    """Two branches, one of which counts how many features are large."""

    shape = (10,)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 16), nn.Linear(6, 16), nn.Linear(33, 5)

    def forward(self, x: Tensor) -> Tensor:
        large = (x > 0.5).sum(1, keepdim=True).to(x.dtype)
        return self.head(torch.cat([F.relu(self.a(x[:, :4])), F.relu(self.b(x[:, 4:])), large], 1))


KINDS = (Convolutions, Recurrent, Attention, Tied, Branches)


def made(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    """A model and raw samples for it."""
    torch.manual_seed(5)
    model = kind().eval()
    with torch.no_grad():
        weight = max(model.parameters(), key=torch.numel)
        weight[1], weight[2, ...] = 0, 0.25  # an empty channel, and one without any spread
    return model, torch.randn(20, *kind.shape) * 3  # type: ignore[attr-defined]


def run(graph: onnx.ModelProto, x: Tensor) -> np.ndarray:
    onnx.checker.check_model(graph, full_check=True)
    return measure.open_session(graph.SerializeToString()).run(None, {"x": x.numpy()})[0]


def on_grid(model: nn.Module, dtype: str, keep: str) -> nn.Module:
    """What torch computes with the values that training rounds the weights to."""
    rounded = copy.deepcopy(model)
    norms = {id(p) for layer in rounded.modules() if isinstance(layer, NORMS) for p in layer.parameters()}
    shapes = {name: tuple(p.shape) for name, p in rounded.named_parameters() if id(p) not in norms}
    for name, chosen in parameter_dtypes(shapes, dtype, keep).items():
        parameter = rounded.get_parameter(name)
        parameter.data = quantized(parameter.data, chosen)
    return rounded


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def ground(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, onnx.ModelProto]:
    model, x = made(request.param)
    return model, x, export(model, PREPROCESS, x)


Ground = tuple[nn.Module, Tensor, onnx.ModelProto]


@pytest.mark.parametrize(("dtype", "keep"), [("int4", "none"), ("int2", "none"), ("int2", "ends")])
@torch.no_grad()
def test_the_file_answers_as_torch_does_with_the_weights_of_training(ground: Ground, dtype: str, keep: str) -> None:
    model, x, graph = ground
    expected = on_grid(model, dtype, keep)(PREPROCESS(x)).numpy()
    found = run(convert.convert(graph, dtype, keep=keep), x)
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))
    assert np.abs(expected - model(PREPROCESS(x)).numpy()).max() > 1e-3  # few bits show


@torch.no_grad()
def test_eight_bits_answer_nearly_and_sixteen_all_but_exactly(ground: Ground) -> None:
    model, x, graph = ground
    expected = model(PREPROCESS(x)).numpy()
    size = np.abs(expected).max()
    np.testing.assert_allclose(run(convert.convert(graph, "fp16"), x), expected, atol=2e-3 * size)
    rounded = on_grid(model, "int8", "none")(PREPROCESS(x)).numpy()
    np.testing.assert_allclose(run(convert.convert(graph, "int8"), x), rounded, atol=0.03 * size)


@pytest.mark.parametrize(("dtype", "bits"), [("fp16", 16), ("int8", 8), ("int4", 4), ("int2", 2)])
def test_every_weight_is_stored_in_the_dtype_once(ground: Ground, dtype: str, bits: int) -> None:
    model, _, graph = ground
    converted = convert.convert(graph, dtype)
    weights = measure.stored_weights(converted)
    assert {str(values.dtype) for values in weights.values()} == {f"float{bits}" if bits == 16 else dtype}
    held = {id(p): p for name, p in model.named_parameters() if p.ndim > 1 and name != "position"}
    assert sum(values.size for values in weights.values()) == sum(p.numel() for p in held.values())
    raw = {item.name: len(item.raw_data) for item in converted.graph.initializer}
    assert sum(raw[name] for name in weights) == sum(-(-values.size * bits // 8) for values in weights.values())
    assert not any(item.data_type == onnx.TensorProto.FLOAT and len(item.dims) > 1 and np.prod(item.dims) > 130
                   for item in converted.graph.initializer)  # fmt: skip


def test_codes_of_the_file_are_those_of_training() -> None:
    """Convolutions as they are; a matrix behind a product is turned, and the gates of a GRU change places."""
    model, x = made(Convolutions)
    found = list(measure.stored_weights(convert.convert(export(model, PREPROCESS, x), "int2")).values())
    weights = [p for p in model.parameters() if p.ndim > 1]
    for codes, weight in zip(found, weights, strict=True):
        assert np.array_equal(codes.astype(int), grid_codes(weight.detach(), "int2").codes.numpy())
    model, x = made(Recurrent)
    *_, inward, _, _ = measure.stored_weights(convert.convert(export(model, PREPROCESS, x), "int4")).values()
    for codes, name in zip(inward.astype(int), ("weight_ih_l0", "weight_ih_l0_reverse"), strict=True):
        reset, update, new = grid_codes(getattr(model.gru, name).detach(), "int4").codes.numpy().reshape(3, 9, 16)
        assert np.array_equal(codes, np.concatenate([update, reset, new]))


def test_zeros_of_every_layer_are_counted() -> None:
    for kind in KINDS:
        model, x = made(kind)
        held = {id(p): p for name, p in model.named_parameters() if p.ndim > 1 and name != "position"}.values()
        with torch.no_grad():
            for weight in held:
                weight.flatten()[::3] = 0
        graph = export(model, PREPROCESS, x)
        zeros = sum(int((p == 0).sum()) for p in held) / sum(p.numel() for p in held)
        assert measure.sparsity(graph) == pytest.approx(zeros)
        for dtype in ("fp16", "int8", "int4", "int2"):
            assert measure.sparsity(convert.convert(graph, dtype)) >= zeros - 1e-9


@torch.no_grad()
def test_what_half_precision_cannot_hold_stays_as_it_is() -> None:
    """65,504 is its largest number, and below 6e-5 it loses digits."""
    for size in (1e6, 1e-7):
        model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 3)).eval()
        model[0].weight *= size
        model[1].weight /= size if size < 1 else 1
        x = torch.randn(5, 10)
        converted = convert.convert(export(model, PREPROCESS, x), "fp16")
        expected = model(PREPROCESS(x)).numpy()
        np.testing.assert_allclose(run(converted, x), expected, atol=2e-3 * np.abs(expected).max())
        kinds = [weight.dtype for weight in measure.stored_weights(converted).values()]
        assert kinds == [np.float32, np.float16 if size > 1 else np.float32]


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["int8", "int4", "int2"])
def test_huge_and_tiny_weights_have_their_own_scales(dtype: str) -> None:
    model = nn.Sequential(nn.Linear(10, 4)).eval()
    model[0].weight *= torch.tensor([1e20, 1e-20, 1.0, 0.0])[:, None]
    x = torch.randn(5, 10)
    expected = on_grid(model, dtype, "none")(PREPROCESS(x)).numpy()
    found = run(convert.convert(export(model, PREPROCESS, x), dtype), x)
    assert (np.abs(found - expected) <= (0.03 if dtype == "int8" else 1e-5) * np.abs(expected).max(0)).all()


@pytest.mark.parametrize(("dtype", "share"), [("int4", 0.6), ("int2", 0.4)])
def test_few_bits_take_few_bytes(dtype: str, share: float) -> None:
    """Weights and scales against those of int8, the float biases apart."""
    model = nn.Sequential(nn.Conv2d(1, 8, 5, bias=False), nn.ReLU(), nn.Conv2d(8, 16, 3, bias=False), nn.Flatten(),
                          nn.Linear(16 * 9, 10, bias=False))  # fmt: skip
    x = torch.randn(5, 1, 9, 9)
    graph = export(model.eval(), PREPROCESS, x)
    sizes = {}
    for name in ("int8", dtype):
        converted = convert.convert(graph, name)
        sizes[name] = sum(len(item.raw_data) for item in converted.graph.initializer if np.prod(item.dims) >= 8)
    assert sizes[dtype] <= share * sizes["int8"]
    per_scale = 4 * (8 + 16 + 10)
    assert sizes[dtype] == 2792 * int(dtype[3:]) // 8 + per_scale


def test_biases_lose_half_of_their_digits() -> None:
    model, x = made(Attention)
    converted = convert.convert(export(model, PREPROCESS, x), "int8")
    floats = [item for item in converted.graph.initializer if item.data_type == onnx.TensorProto.FLOAT]
    biases = [onnx.numpy_helper.to_array(item) for item in floats if list(item.dims) == [24]]
    assert len(biases) > 2  # of two attentions, biases and scales
    assert not any((values.view(np.uint32) & 0xFFFF).any() for values in biases)


def test_an_lstm_computes_in_whole_numbers_where_it_is_dynamic() -> None:
    model, x = made(Recurrent)
    kinds = [node.op_type for node in convert.convert(export(model, PREPROCESS, x), "int8").graph.node]
    assert (kinds.count("DynamicQuantizeLSTM"), kinds.count("LSTM"), kinds.count("MatMulInteger")) == (2, 0, 1)


class Twins(nn.Module):
    """Two halves of a series through one LSTM, and one matrix on both answers."""

    shape = (8, 6)

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        one, other = (self.head(self.lstm(half)[0][:, -1]) for half in (x[:, :4], x[:, 4:]))
        return one - torch.tanh(other)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4", "int2"])
def test_layers_that_are_called_twice_are_stored_once(dtype: str) -> None:
    model, x = made(Twins)
    converted = convert.convert(export(model, PREPROCESS, x), dtype)
    assert len(measure.stored_weights(converted)) == 3
    expected = on_grid(model, dtype, "none")(PREPROCESS(x)).numpy()
    near = {"fp16": 2e-3, "int8": 0.03}.get(dtype, 1e-5)
    np.testing.assert_allclose(run(converted, x), expected, atol=near * np.abs(expected).max())
