"""Exported graphs against torch: many architectures, other weights, other widths, and nothing of another model."""

import copy
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlab_kit.data import Preprocess
from fedlab_kit.deployment import measure, onnx_export

PREPROCESS = Preprocess(0.1, 1.2)
IMAGE, SERIES, TABLE = (1, 16, 16), (6, 8), (10,)


class Net(nn.Module):
    """Layers by name and what is done with them."""

    def __init__(self, run: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Flagged(nn.Module):
    """Branches and constants that stand in attributes alone."""

    def __init__(self, limit: object = 0.3, flag: bool = True) -> None:
        super().__init__()
        self.body, self.limit, self.flag = nn.Linear(10, 4), limit, flag
        self.table = torch.linspace(0.5, 1.5, 4)  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = x.clamp(max=self.limit["high"] if isinstance(self.limit, dict) else self.limit) if self.flag else x.relu()
        return x * self.table


def plain(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(width * 49, 12), nn.Linear(12, 4)
    )


def normed(width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU6(),
        nn.Conv2d(width, width, 3, groups=width), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 6), nn.BatchNorm1d(6), nn.Linear(6, 4),
    )  # fmt: skip


def residual(width: int = 8) -> nn.Module:
    branch = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
    return Net(
        lambda net, x: net.head(torch.relu((x := net.stem(x)) + net.branch(x)).mean((2, 3))),
        stem=nn.Conv2d(1, width, 3, stride=2), branch=branch, head=nn.Linear(width, 4),
    )  # fmt: skip


def dense() -> nn.Module:
    return Net(
        lambda net, x: net.head(torch.cat([x := net.stem(x), net.more(net.norm(x).relu())], 1).amax((2, 3))),
        stem=nn.Conv2d(1, 4, 3, padding=1), norm=nn.BatchNorm2d(4), more=nn.Conv2d(4, 4, 3, padding=1),
        head=nn.Linear(8, 4),
    )  # fmt: skip


def inception() -> nn.Module:
    return Net(
        lambda net, x: net.head(torch.cat([net.one(x), net.three(x), net.pool(x)], 1).relu().mean((2, 3))),
        one=nn.Conv2d(1, 4, 1), three=nn.Conv2d(1, 4, 3, padding=1),
        pool=nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(1, 4, 1)), head=nn.Linear(12, 4),
    )  # fmt: skip


def recurrent(kind: type[nn.RNNBase], layers: int = 1, both: bool = False) -> nn.Module:
    body = kind(8, 12, layers, batch_first=True, bidirectional=both)
    return Net(lambda net, x: net.head(net.body(x)[0][:, -1]), body=body, head=nn.Linear(12 + 12 * both, 4))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return Net(lambda net, x: net.head(net.layer(x).mean(1)), layer=layer, head=nn.Linear(8, 4))


def attention() -> nn.Module:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    return Net(lambda net, x: net.head(net.layer(x, x, x)[0].mean(1)), layer=layer, head=nn.Linear(8, 4))


def embedding() -> nn.Module:
    return Net(
        lambda net, x: net.head(net.words(x.abs().long().clamp(max=4)).mean(1)),
        words=nn.Embedding(5, 3), head=nn.Linear(3, 4),
    )  # fmt: skip


def tied() -> nn.Module:
    net = Net(lambda net, x: net.head(net.b(net.a(x).tanh())), a=nn.Linear(10, 10), b=nn.Linear(10, 10))
    net.head, net.b.weight = nn.Linear(10, 4), net.a.weight
    return net


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(10, 7)), nn.Tanh(), nn.Linear(7, 4))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (plain, IMAGE), "normed": (normed, IMAGE), "residual": (residual, IMAGE), "dense": (dense, IMAGE),
    "inception": (inception, IMAGE), "lstm": (lambda: recurrent(nn.LSTM), SERIES),
    "gru": (lambda: recurrent(nn.GRU, 2, both=True), SERIES), "encoder": (encoder, SERIES),
    "attention": (attention, SERIES), "embedding": (embedding, TABLE), "tied": (tied, TABLE),
    "weight norm": (weight_normed, TABLE), "no buffer": (Flagged, TABLE),
}  # fmt: skip


def drawn(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Weights and running statistics at random, as after training."""
    torch.manual_seed(seed)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor, low, high in ((module.running_mean, -1, 1), (module.running_var, 0.5, 2)):
                tensor.uniform_(low, high)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return model


def samples(shape: tuple[int, ...], count: int = 70) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def expected(model: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(PREPROCESS(x)).numpy()


def answers(graph: onnx.ModelProto, x: Tensor) -> np.ndarray:
    return measure.logits(measure.open_session(graph.SerializeToString()), x)


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An empty cache, and a list that grows with every call of torch's exporter."""
    calls: list[str] = []
    original = onnx_export._torch_export

    def counted(deployed: onnx_export.Deployed, x: Tensor) -> object:
        calls.append(type(deployed.model).__name__)
        return original(deployed, x)

    monkeypatch.setattr(onnx_export, "_torch_export", counted)
    monkeypatch.setattr(onnx_export, "_skeletons", {})
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_other_weights_need_no_other_export_and_give_the_same_bytes(
    name: str, exports: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    make, shape = MODELS[name]
    x, models = samples(shape), [drawn(make, seed) for seed in range(2)]
    graphs = [onnx_export.export(model, PREPROCESS, x) for model in models]
    assert len(exports) == 1 and capfd.readouterr() == ("", "")
    for model, graph in zip(models, map(onnx_export.clean, graphs), strict=True):
        onnx.checker.check_model(graph)
        for batch in (x, x[:1], x[:33]):
            np.testing.assert_allclose(answers(graph, batch), expected(model, batch), rtol=1e-4, atol=1e-5)
    onnx_export._skeletons.clear()
    assert onnx_export.export(models[1], PREPROCESS, x).SerializeToString() == graphs[1].SerializeToString()


@pytest.mark.parametrize("make", [plain, normed, residual])
def test_other_widths_need_no_other_export_and_give_the_same_bytes(
    make: Callable[[int], nn.Module], exports: list[str]
) -> None:
    x, models = samples(IMAGE), [drawn(lambda width=width: make(width), 0) for width in (8, 5)]
    graphs = [onnx_export.export(model, PREPROCESS, x) for model in models]
    assert len(exports) == 1
    np.testing.assert_allclose(answers(graphs[1], x), expected(models[1], x), rtol=1e-4, atol=1e-5)
    onnx_export._skeletons.clear()
    assert onnx_export.export(models[1], PREPROCESS, x).SerializeToString() == graphs[1].SerializeToString()


FACTOR = 2.0


class Reads(nn.Module):
    """What a notebook may write: a global, a closure, a keyword, weights in the control flow, a width in a formula."""

    def __init__(self, how: str, closure: Callable[[Tensor], Tensor] = torch.relu, width: int = 6) -> None:
        super().__init__()
        self.how, self.closure, self.a, self.b = how, closure, nn.Linear(10, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.how == "global":
            x = x * FACTOR
        elif self.how == "closure":
            x = self.closure(x)
        elif self.how == "keyword":
            x = F.leaky_relu(x, negative_slope=self.closure)
        elif self.how == "item":
            x = x * self.a.weight.max().item()
        elif self.how == "width":
            x = x.clamp(max=0.01 * self.a.out_features)
        return self.b(x)


def bounded(limit: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x.clamp(max=limit)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: Flagged(100.0), lambda: Flagged(6.0)),
        (lambda: Flagged({"high": 100.0}), lambda: Flagged({"high": 6.0})),
        (lambda: Flagged(flag=False), lambda: Flagged(1000.0)),
        (lambda: Flagged(torch.tensor(100.0)), lambda: Flagged(torch.tensor(6.0))),
        (lambda: Reads("closure", bounded(100.0)), lambda: Reads("closure", bounded(6.0))),
        (lambda: Reads("keyword", 0.1), lambda: Reads("keyword", 0.100001)),
        (lambda: Reads("item"), lambda: Reads("item")),
        (lambda: Reads("width", width=6), lambda: Reads("width", width=900)),
    ],
)
def test_nothing_of_another_model_of_the_class_gets_into_a_file(
    one: Callable[[], nn.Module], other: Callable[[], nn.Module], exports: list[str]
) -> None:
    """Seen on small samples alone, so that neither comparing answers nor luck can tell them apart."""
    small, large = samples(TABLE) * 0.01, samples(TABLE) * 300
    for k, make in enumerate((one, other)):
        model = drawn(make, k)
        graph = onnx_export.export(model, PREPROCESS, small)
        np.testing.assert_allclose(answers(graph, large), expected(model, large), rtol=1e-4, atol=1e-3)
        assert len(exports) == k + 1


def test_a_constant_that_a_cell_has_changed_is_in_the_file(exports: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x, model = samples(TABLE), drawn(lambda: Reads("global"), 0)
    for value in (2.0, 2.00001):
        monkeypatch.setitem(globals(), "FACTOR", value)
        np.testing.assert_allclose(answers(onnx_export.export(model, PREPROCESS, x), x), expected(model, x), rtol=1e-4)
    assert len(exports) == 2


def test_a_graph_is_trusted_only_when_the_runtime_agrees_on_extreme_values(exports: list[str]) -> None:
    """A cached graph of another bound, put there by hand: of 700 samples one shows it, and is not among the drawn."""
    x, models = samples(TABLE, 700) * 0.01, [drawn(lambda limit=limit: Flagged(limit), 0) for limit in (100.0, 6.0)]
    x[1] *= 10_000
    onnx_export.export(models[0], PREPROCESS, x)
    [*keys], wrong = onnx_export._skeletons, next(iter(onnx_export._skeletons.values()))
    onnx_export._skeletons.clear()
    onnx_export.export(models[1], PREPROCESS, x)
    assert not set(keys) & set(onnx_export._skeletons)
    onnx_export._skeletons.update(dict.fromkeys(onnx_export._skeletons, wrong))
    np.testing.assert_allclose(
        answers(onnx_export.export(models[1], PREPROCESS, x), x), expected(models[1], x), rtol=1e-4
    )
    assert len(exports) == 3


class Refused(nn.Module):
    """Code that no graph can hold."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.body = how, nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "weights" and self.body.weight.sum() > 0:
            return self.body(x)
        if self.how == "batch" and len(x) > 5:
            return -self.body(x)
        if self.how == "operator":
            return self.body(torch.special.bessel_j0(x))
        return self.body(x) * 2


@pytest.mark.parametrize(
    ("how", "cause"),
    [("weights", "data-dependent"), ("batch", "batch"), ("operator", "bessel_j0")],
)
def test_what_torch_cannot_export_is_named_with_its_cause_in_one_line(
    how: str, cause: str, exports: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=f"^model Refused cannot be exported to ONNX: .*{cause}.*$") as raised:
        onnx_export.export(drawn(lambda: Refused(how), 0), PREPROCESS, samples(TABLE, 4))
    assert "\n" not in str(raised.value) and capfd.readouterr().err == ""


def test_the_cache_holds_no_weights(exports: list[str]) -> None:
    model = drawn(plain, 0)
    onnx_export.export(model, PREPROCESS, samples(IMAGE))
    kept = {name: value for one in onnx_export._skeletons.values() for name, value in one.graph.initializers.items()}
    assert {f"model.{name}" for name in model.state_dict()} <= kept.keys()
    assert all(value.const_value is None for name, value in kept.items() if "." in name)


def test_exporting_leaves_the_model_alone(exports: list[str]) -> None:
    model = drawn(normed, 0).train()
    before = copy.deepcopy(model.state_dict())
    onnx_export.export(model, PREPROCESS, samples(IMAGE))
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_file_has_the_shortest_names_and_its_size_is_that_of_its_tensors() -> None:
    graph = onnx_export.clean(onnx_export.export(drawn(plain, 0), PREPROCESS, samples(IMAGE)))
    [value] = graph.graph.output
    names = {name for node in graph.graph.node for name in (*node.input, *node.output)}
    assert names - {"x", "logits"} <= set("abcdefghijklmnopqrstuvw") and value.name == "logits"
    assert not any(node.name or node.doc_string or node.metadata_props for node in graph.graph.node)
    held = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
    assert held == 4 * (8 * 9 + 8 + 392 * 12 + 12 + 12 * 4 + 4 + 2) and graph.ByteSize() - held < 430
    assert onnx_export.clean(graph) == graph
