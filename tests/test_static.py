"""Static int8: the runtime computes what the file says, the file says what the model says, and clients add up to one.

Oracles: the float file; the same int8 file run node by node, without the runtime's fusions; onnxruntime's own
calibrater and quantizer; numpy's percentile; and the published entropy search written out in plain loops.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, create_calibrator, quantize_static
from torch import Tensor, nn

import fedlab_kit as fk
from fedlab_kit.compression.quantize import grid_codes
from fedlab_kit.data import Preprocess
from fedlab_kit.deployment import calibration, convert, measure, onnx_export, static
from fedlab_kit.deployment.artifact import slug

METHODS = ("minmax", "percentile", "entropy")


def conv(inputs: int, outputs: int, kernel: int = 3, **more: Any) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **more)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    """A float first layer, an addition right behind it, a pool, an addition of int8 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), conv(8, 8), conv(8, 8)
        self.c, self.skip, self.head = conv(8, 8), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.max_pool2d(F.relu(x + self.b(self.a(x))), 2)
        return self.head(F.relu(self.skip(x) + self.c(x)).mean((2, 3)))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(1, 8), conv(8, 4, 1), nn.Sequential(conv(8, 4, 1), conv(4, 4))
        self.c, self.d, self.head = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(8, 4, 1)), conv(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.d(torch.cat([self.a(x), self.b(x), self.c(x)], 1)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(12, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.last = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1, 2))
        return self.last(self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.last = nn.GRU(12, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gru(x.flatten(1, 2))[0][:, -1])


class Odd(nn.Module):
    """Constants between layers, a layer used twice, and a product that is no plain Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bias = nn.Linear(144, 16), nn.Linear(16, 16), nn.Parameter(torch.randn(4))
        self.weight = nn.Parameter(torch.randn(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.gelu(self.b(self.a(x.flatten(1)) + torch.arange(16.0))))
        return torch.addmm(self.bias, x, self.weight, beta=0.5, alpha=2.0)


MODELS = {
    "residual": Residual,
    "inception": Inception,
    "attention": Attention,
    "recurrent": Recurrent,
    "odd": Odd,
    "depthwise": lambda: nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.MaxPool2d(2),
        nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4),
    ),
    "one dimension": lambda: nn.Sequential(
        nn.Flatten(1, 2), nn.Conv1d(12, 8, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 4, 5), nn.Flatten()
    ),
}  # fmt: skip


def raw(count: int = 96) -> Tensor:
    return torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(5)).cumsum(-1)


def exported(model: nn.Module, x: Tensor, preprocess: Preprocess | None = None) -> Any:
    model.train()
    with torch.no_grad():
        model(x[:32])  # statistics of BatchNorm
    return onnx_export.export(model.eval(), preprocess or Preprocess(0.0, 1.0), x[:8])


def logits(graph: Any, x: Tensor, optimize: bool = True) -> np.ndarray:
    return measure.logits(measure.open_session(graph.SerializeToString(), optimize), x)


def off(graph: Any, other: Any, x: Tensor) -> float:
    """How far two files' logits are apart at most, in standard deviations of the logits."""
    found, wanted = logits(graph, x), logits(other, x)
    return float(np.abs(found - wanted).max() / wanted.std())


@pytest.mark.parametrize("name", MODELS)
def test_the_int8_file_says_what_the_float_file_says(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    x = raw()
    graph = exported(MODELS[name](), x)
    before = graph.SerializeToString(deterministic=True)
    capfd.readouterr()
    quantized = static.quantize(graph, calibration.calibrate(graph, [x]))
    onnx.checker.check_model(quantized, full_check=True)
    assert off(quantized, graph, x) < 0.15
    fused, plain = logits(quantized, x), logits(quantized, x, optimize=False)
    assert np.abs(fused - plain).max() / plain.std() < 0.05  # a code on the edge may fall on either side
    assert capfd.readouterr() == ("", "")
    assert graph.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("name", "layers"), [("residual", 5), ("inception", 5), ("depthwise", 4), ("attention", 4), ("one dimension", 2)]
)
def test_weights_are_the_codes_of_the_grid(name: str, layers: int) -> None:
    torch.manual_seed(3)
    x = raw(16)
    graph = exported(MODELS[name](), x)
    floats = measure.stored_weights(graph)
    quantized = static.quantize(graph, calibration.calibrate(graph, [x]))
    codes = {name: w for name, w in measure.stored_weights(quantized).items() if w.dtype == np.int8}
    assert len(codes) >= layers
    for name, found in codes.items():
        weight = torch.from_numpy(floats[name.removesuffix("_quantized")].copy())
        ways = [grid_codes(weight, "int8").codes.numpy()]
        ways += [grid_codes(weight.T, "int8").codes.numpy().T] if weight.ndim == 2 else []
        assert any(np.array_equal(found, way) for way in ways)


@pytest.mark.parametrize("preprocess", [Preprocess(0.0, 1.0), Preprocess(0.5, 2.0)])
def test_an_input_that_is_a_layers_own_is_measured_too(preprocess: Preprocess) -> None:
    model, x = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(40, 10)
    graph = onnx_export.export(model.eval(), preprocess, x[:8])
    quantized = static.quantize(graph, calibration.calibrate(graph, [x]))
    assert {w.dtype for w in measure.stored_weights(quantized).values()} == {np.dtype(np.int8)}
    assert off(quantized, graph, x) < 0.15


@pytest.mark.parametrize("method", METHODS)
def test_dead_layers_keep_the_bias_behind_them(method: Any) -> None:
    """No weights, nothing but negative values before a Relu, and weights that are nothing beside their bias."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(288, 8), nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip
    with torch.no_grad():
        model[2].bias.fill_(-1.0), model[2].weight[:4].zero_(), model[2].weight[4:].mul_(1e-3)
        model[4].weight[:3].zero_(), model[4].weight[3].fill_(1e-12), model[4].bias.uniform_(0.1, 0.4)
        model[4].bias[3] = 5.0
    x = raw()
    graph = exported(model, x)
    quantized = static.quantize(graph, calibration.calibrate(graph, [x], method))
    np.testing.assert_allclose(logits(quantized, x), logits(graph, x), atol=0.02)


def test_what_has_no_finite_range_stays_float() -> None:
    model, x = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(40, 10)
    graph = onnx_export.export(model.eval(), Preprocess(0.0, 1.0), x[:8])
    ranges = calibration.calibrate(graph, [x])
    first = next(iter(ranges))
    for broken in (
        {**ranges, first: (np.float32(-np.inf), np.float32(1))},
        {k: v for k, v in ranges.items() if k != first},
    ):
        quantized = static.quantize(graph, broken)
        assert {w.dtype.name for w in measure.stored_weights(quantized).values()} == {"float32", "int8"}
        assert off(quantized, graph, x) < 0.15
    np.testing.assert_array_equal(logits(static.quantize(graph, {}), x), logits(graph, x))
    x[3, 2] = np.inf  # a sample of its own can do it as well
    for method in METHODS:
        assert off(static.quantize(graph, calibration.calibrate(graph, [x], method)), graph, x[4:]) < 0.15


@pytest.mark.parametrize("ends", [(0.4, 0.9), (-0.9, -0.4), (-0.5, 0.5)])
def test_limits_that_leave_zero_out_still_hold(ends: tuple[float, float]) -> None:
    torch.manual_seed(3)
    x = raw()
    for order in ((nn.Hardtanh(*ends), nn.MaxPool2d(2)), (nn.MaxPool2d(2), nn.Hardtanh(*ends))):
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), conv(8, 8), nn.Conv2d(8, 8, 3), *order, nn.Conv2d(8, 4, 4), nn.Flatten()
        )
        graph = exported(model, x)
        assert off(static.quantize(graph, calibration.calibrate(graph, [x])), graph, x) < 0.2


def test_a_product_with_factors_keeps_them() -> None:
    model, x = nn.Linear(10, 3), torch.randn(40, 10, generator=torch.Generator().manual_seed(1))
    nn.init.constant_(model.bias, 3.0)
    graph = onnx_export.export(model.eval(), Preprocess(0.5, 2.0), x[:8])
    [gemm] = [node for node in graph.graph.node if node.op_type == "Gemm"]
    [beta] = [item for item in gemm.attribute if item.name == "beta"]
    beta.f = 0.5
    assert off(static.quantize(graph, calibration.calibrate(graph, [x])), graph, x) < 0.15


def test_a_model_without_a_layer_to_quantize_stays_as_it_is() -> None:
    graph = exported(nn.Sequential(nn.Conv2d(1, 4, 12), nn.Flatten()), raw(8))
    assert calibration.calibrate(graph, [raw(8)]) == {}
    np.testing.assert_array_equal(logits(static.quantize(graph, {}), raw(8)), logits(graph, raw(8)))


class Batches(CalibrationDataReader):
    def __init__(self, x: Tensor) -> None:
        self._batches = iter([{"x": part.numpy()} for part in x.split(8)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def test_ranges_are_those_of_onnxruntimes_calibrater(tmp_path: Path) -> None:
    torch.manual_seed(3)
    x = raw(48)
    graph = exported(Inception(), x)
    onnx.save(static.plan_int8(graph).graph, tmp_path / "float.onnx")
    calibrator = create_calibrator(tmp_path / "float.onnx", augmented_model_path=str(tmp_path / "augmented.onnx"))
    calibrator.collect_data(Batches(x))
    theirs = calibrator.compute_data()
    ours = calibration.client_ranges(graph, x)
    assert len(ours) >= 6
    for name, (low, high) in ours.items():
        np.testing.assert_allclose((low, high), np.ravel(theirs[name].range_value), rtol=1e-5, atol=1e-6)


def test_it_is_onnxruntimes_quantizer_called_plainly_with_biases_in_floats(tmp_path: Path) -> None:
    torch.manual_seed(3)
    x = raw(48)
    graph = exported(nn.Sequential(conv(1, 8), nn.MaxPool2d(2), conv(8, 8), nn.Flatten(), nn.Linear(288, 4)), x)
    graph = convert.on_grid(graph, "int8")
    ours = static.quantize(graph, calibration.calibrate(graph, [x]))
    plan = static.plan_int8(graph)
    quantize_static(
        plan.graph, tmp_path / "theirs.onnx", Batches(x), per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_quantize=[n.name for n in plan.nodes],
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
    )  # fmt: skip
    theirs = onnx.load(tmp_path / "theirs.onnx")
    assert len(ours.SerializeToString()) < len(theirs.SerializeToString())
    apart = np.abs(logits(ours, x, optimize=False) - logits(theirs, x, optimize=False))
    assert np.quantile(apart, 0.9) < 1e-5 and apart.max() < 2e-3  # a code on the edge may fall on either side
    scales, wanted = ({i.name: numpy_helper.to_array(i) for i in g.graph.initializer} for g in (ours, theirs))
    for name in scales.keys() & wanted.keys():
        np.testing.assert_allclose(scales[name], wanted[name], rtol=1e-6)
    biases = [item for item in ours.graph.initializer if item.name.endswith("bias")]
    assert biases and all(item.data_type == onnx.TensorProto.FLOAT for item in biases)


def test_pools_stay_where_they_are_quick_and_additions_beside_them() -> None:
    """Behind an int8 convolution a pool is int8 and its Relu before it, behind a float layer float and after it."""
    torch.manual_seed(3)
    graph = exported(Residual(), raw(16))
    quantized = static.quantize(graph, calibration.calibrate(graph, [raw(16)]))
    behind: dict[str, list[str]] = {}
    for node in quantized.graph.node:
        for name in node.input:
            behind.setdefault(name, []).append(node.op_type)
    pools = [behind[node.output[0]] for node in quantized.graph.node if node.op_type == "MaxPool"]
    assert pools == [["Relu"], ["Relu"]] or sorted(map(sorted, pools)) == [["QuantizeLinear"], ["Relu"]]
    assert off(quantized, graph, raw(16)) < 0.15


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [[48], [5, 1, 42], [16, 16, 16], [1] * 48])
def test_clients_together_are_one_client_with_all_samples(method: Any, sizes: list[int]) -> None:
    torch.manual_seed(3)
    x = raw(48)
    graph = exported(nn.Sequential(conv(1, 8), conv(8, 8), nn.Flatten(), nn.Linear(1152, 4)), x)
    assert calibration.calibrate(graph, list(x.split(sizes)), method) == calibration.calibrate(graph, [x], method)


def test_histograms_add_up_to_numpys() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(3))
    model, preprocess = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), Preprocess(0.5, 2.0)
    graph = onnx_export.export(model.eval(), preprocess, x)
    ranges = calibration.client_ranges(graph, x)
    first = next(iter(ranges))
    parts = [calibration.client_histograms(graph, part, ranges) for part in x.split([7, 43])]
    merged = calibration.merge_histograms(parts)
    theirs = np.histogram(preprocess(x).numpy(), calibration.BINS, tuple(map(float, ranges[first])))[0]
    assert merged[first].sum() == 300
    assert np.abs(np.cumsum(merged[first]) - np.cumsum(theirs)).max() <= 1  # a value on an edge
    assert all(counts.dtype == np.int64 for counts in merged.values())


def test_the_percentile_is_numpys_to_a_bin() -> None:
    values = np.random.default_rng(0).standard_gamma(2, 100_000).astype(np.float32) - 1
    span = (values.min(), values.max())
    ranges, again = calibration.percentile_ranges({"v": calibration._counts(values, *span)}, {"v": span})
    outside = (100 - calibration.PERCENTILE) / 2
    bin_width = (span[1] - span[0]) / calibration.BINS
    np.testing.assert_allclose(ranges["v"], np.percentile(values, [outside, 100 - outside]), atol=1.01 * bin_width)
    assert not again
    wild = np.append(values, np.float32(1e6))
    span = (wild.min(), wild.max())
    assert calibration.percentile_ranges({"v": calibration._counts(wild, *span)}, {"v": span})[1]


def divergence_by_hand(counts: np.ndarray, first: int, last: int) -> float:
    """Migacz (2017): the reference P with what was cut at its ends, Q merged into levels and spread out again."""
    p = [float(c) for c in counts[first:last]]
    inside = list(p)
    p[0] += float(counts[:first].sum())
    p[-1] += float(counts[last:].sum())
    q, size = [0.0] * len(p), len(p)
    for level in range(calibration.LEVELS):
        bins = range(size * level // calibration.LEVELS, size * (level + 1) // calibration.LEVELS)
        held = [b for b in bins if p[b] > 0]
        for b in held:
            q[b] = max(sum(inside[b] for b in bins) / len(held), 1e-4)
    return sum(a / sum(p) * np.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("signed", [True, False])
def test_entropy_is_the_published_search(signed: bool) -> None:
    values = np.random.default_rng(1).laplace(size=20_000).astype(np.float32)
    values = values if signed else np.maximum(values, 0)
    span = (values.min(), values.max())
    counts = calibration._counts(values, *span)
    low, high = calibration.entropy_ranges({"v": counts}, {"v": span})["v"]
    edges = np.linspace(*map(float, span), calibration.BINS + 1)
    zero = calibration.BINS * -edges[0] / (edges[-1] - edges[0])
    parts = []
    for width in range(calibration.LEVELS, calibration.BINS + 1, 8):
        first = round(zero * (1 - width / calibration.BINS))
        parts.append((divergence_by_hand(np.sqrt(counts), first, first + width), edges[first], edges[first + width]))
    _, wanted_low, wanted_high = min(parts)
    assert (low, high) == pytest.approx((wanted_low, wanted_high), rel=1e-5, abs=1e-6)
    assert high < span[1]


def test_one_wild_value_ruins_extremes_alone() -> None:
    """A table of floats where one client has typed one value wrong."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, 4, (400,), generator=generator)
    x = torch.randn(4, 12, generator=generator)[y] + 0.8 * torch.randn(400, 12, generator=generator)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:200]), y[:200]).backward()
        optimizer.step()
    graph = onnx_export.export(model.eval(), Preprocess(0.0, 1.0), x[:8])

    def right(clients: list[Tensor], method: Any) -> float:
        quantized = static.quantize(graph, calibration.calibrate(graph, clients, method))
        return float((logits(quantized, x[200:]).argmax(1) == y[200:].numpy()).mean())

    held = float((logits(graph, x[200:]).argmax(1) == y[200:].numpy()).mean())
    wild = x[:200].clone()
    wild[17, 3] = 1e4
    tame = [right(list(x[:200].split(40)), method) for method in METHODS]
    with_it = dict(zip(METHODS, [right(list(wild.split(40)), method) for method in METHODS], strict=True))
    assert held > 0.85 and all(abs(score - held) <= 0.02 for score in tame)
    assert with_it["minmax"] < held - 0.3
    assert with_it["percentile"] > held - 0.03 and with_it["entropy"] > held - 0.03


def test_a_layer_that_is_nearly_always_zero_keeps_its_range() -> None:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.fill_(-1), model[0].weight[0, 0].fill_(1), model[0].bias[0].fill_(-2.5)
    graph = onnx_export.export(model.eval(), Preprocess(0.0, 1.0), x[:8])
    assert (model[0](x) > 0).float().mean() < 0.002
    extremes = calibration.calibrate(graph, [x])
    hidden = list(extremes)[-1]
    for method in ("percentile", "entropy"):
        assert calibration.calibrate(graph, [x], method)[hidden] == extremes[hidden]


def test_calibration_needs_samples() -> None:
    graph = exported(nn.Sequential(nn.Flatten(), nn.Linear(144, 4)), raw(8))
    with pytest.raises(ValueError, match="calibration needs at least one sample"):
        calibration.client_ranges(graph, raw(8)[:0])
    for nobody in ([], [raw(8)[:0]]):
        with pytest.raises(ValueError, match="calibration needs at least one client"):
            calibration.calibrate(graph, nobody)
    some = calibration.calibrate(graph, [raw(8)[:0], raw(8)])  # a client without samples has nothing to say
    assert some == calibration.calibrate(graph, [raw(8)])


def test_a_recipe_says_how_it_was_calibrated(tmp_path: Path) -> None:
    run = fk.train(
        fk.Experiment(dataset="digits", partition="dirichlet", model="cnn", clients=4, clients_per_round=4, rounds=1)
    )
    files = {how: fk.compress(run, fk.Recipe(dtype="int8", calibration=how), tmp_path) for how in METHODS}
    assert len({file.path for file in files.values()}) == len({file.digest for file in files.values()}) == 3
    assert files["entropy"].card["recipe"]["calibration"] == "entropy"
    assert slug(fk.Recipe(dtype="int8")) == "int8-static" and slug(fk.Recipe(calibration="entropy")) == "fp32"
    with pytest.raises(ValueError, match="calibration must be one of minmax, percentile, entropy, got 'mean'"):
        fk.Recipe(calibration="mean")


def test_no_bias_is_rounded_away_by_the_runtime() -> None:
    """The runtime stores a bias as a 32-bit multiple of input step times weight scale: neither 0 nor too large."""
    weight = np.zeros((4, 5), np.float32)
    weight[1], weight[2] = 1e-15, 0.5
    bias = np.array([0.3, 7.0, -0.2, 0.0], np.float32)
    for unit in (1.0, 1e-4, 1e-9):
        steps = bias / (static._scales(weight, bias, unit).astype(np.float64) * unit)
        assert np.abs(steps).max() < 2**31
        assert np.abs(steps[:2]).min() > 2**15
    [plain] = grid_codes(torch.full((1, 5), 0.5), "int8").scale.flatten().tolist()
    assert static._scales(weight, bias, 1e-2)[2] == np.float32(plain)


def test_no_int8_file_holds_what_nobody_uses() -> None:
    graph = exported(nn.Sequential(conv(1, 8), conv(8, 8), nn.Flatten(), nn.Linear(1152, 4)), raw(16))
    quantized = static.quantize(graph, calibration.calibrate(graph, [raw(16)]))
    used = {name for node in quantized.graph.node for name in node.input}
    assert {item.name for item in quantized.graph.initializer} <= used
    assert all(numpy_helper.to_array(item).size for item in quantized.graph.initializer)
