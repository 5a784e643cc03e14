from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlab_kit import catalog
from fedlab_kit.models import Block, build

BUILT_IN = ("2nn", "cnn", "half_mlp", "logistic", "mlp", "resnet", "student")
IMAGE = (1, 28, 28)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("logistic", 784 * 10 + 10),
        ("mlp", 785 * 128 + 129 * 64 + 65 * 10),
        ("half_mlp", 785 * 64 + 65 * 32 + 33 * 10),
        ("student", 26 * 6 + 151 * 12 + 193 * 10),
        ("2nn", 199_210),
        ("cnn", 21_840),
    ],
)
def test_parameter_counts(name: str, count: int) -> None:
    assert parameters(build(name, IMAGE, 10, 0)) == count


def test_the_resnet_has_about_700_000_parameters_and_no_normalization() -> None:
    model = build("resnet", IMAGE, 10, 0)
    assert 650_000 < parameters(model) < 750_000
    assert not list(model.buffers())
    kinds = {type(module) for module in model.modules() if not list(module.children())}
    assert kinds <= {nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.Identity}


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 20), (1, 16, 16)])
def test_output_shape_on_images(name: str, shape: tuple[int, ...]) -> None:
    model = build(name, shape, 7, 0)
    assert model(torch.randn(3, *shape)).shape == (3, 7)
    assert model.training


@pytest.mark.parametrize("name", ["2nn", "half_mlp", "logistic", "mlp"])
def test_dense_models_take_tables(name: str) -> None:
    assert build(name, (13,), 2, 0)(torch.randn(4, 13)).shape == (4, 2)


@pytest.mark.parametrize("name", ["2nn", "cnn", "half_mlp", "logistic", "mlp", "student"])
def test_what_the_fast_path_relies_on(name: str) -> None:
    model = build(name, IMAGE, 10, 0)
    assert type(model) is nn.Sequential
    assert {type(layer) for layer in model} <= {nn.Flatten, nn.Linear, nn.ReLU, nn.Conv2d, nn.MaxPool2d}


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_seed_alone_decides_and_the_global_generator_is_left_alone(name: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = build(name, IMAGE, 10, seed=1)
    assert torch.equal(torch.rand(1), expected)
    again, other = build(name, IMAGE, 10, seed=1), build(name, IMAGE, 10, seed=2)
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_a_block_starts_as_its_skip() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(Block(8, 8)(x), torch.relu(x))
    block = Block(8, 12)
    assert torch.equal(block(x), torch.relu(block.skip(x)))


def test_every_parameter_learns_after_two_steps() -> None:
    """Zero branches and the zero head stop a gradient once, not for good."""
    model = build("resnet", IMAGE, 10, 0)
    x, y = torch.randn(10, *IMAGE), torch.arange(10)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(3):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    assert all(not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("cnn", (13,), r"samples must be images \[channels, 16 or more, 16 or more\], got \[13\]"),
        ("cnn", (1, 28, 15), r"samples must be images \[channels, 16 or more, 16 or more\], got \[1, 28, 15\]"),
        ("resnet", (1, 7, 28), r"samples must be images \[channels, 8 or more, 8 or more\], got \[1, 7, 28\]"),
        ("vgg", IMAGE, r"model must be one of .*cnn.*, got .vgg."),
    ],
)
def test_a_shape_or_name_that_does_not_fit(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, shape, 10, 0)


def test_a_users_model_is_checked_when_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    makers = {
        "none": lambda shape, classes: None,
        "wrong shape": lambda shape, classes: nn.Linear(5, classes),
        "wrong classes": lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(784, classes + 1)),
        "tuple": lambda shape, classes: nn.Sequential(nn.Flatten(1, 2), nn.GRU(28, classes)),
        "indices": lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Embedding(7, 3)),
    }
    for name, maker in makers.items():
        monkeypatch.setitem(catalog.MODELS, name, maker)
    with pytest.raises(ValueError, match=r"model 'none' must be a torch\.nn\.Module, got NoneType"):
        build("none", IMAGE, 10, 0)
    with pytest.raises(ValueError, match=r"model 'wrong shape' does not take samples of shape \[1, 28, 28\]"):
        build("wrong shape", IMAGE, 10, 0)
    with pytest.raises(
        ValueError, match=r"model 'wrong classes' must map \[2, 1, 28, 28\] to \[2, 10\], got \[2, 11\]"
    ):
        build("wrong classes", IMAGE, 10, 0)
    with pytest.raises(ValueError, match=r"model .tuple. must return one tensor of logits, got a tuple: let forward"):
        build("tuple", IMAGE, 10, 0)
    with pytest.raises(ValueError, match=r"^model 'indices' does not take samples of shape \[1, 28, 28\], [^\n]+$"):
        build("indices", IMAGE, 10, 0)


def test_building_does_not_move_running_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        catalog.MODELS, "norm", lambda shape, classes: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    )
    model = build("norm", (3,), 2, 0)
    assert int(model[0].num_batches_tracked) == 0 and model.training


@pytest.mark.filterwarnings("ignore")  # torch's exporter warns of its own internals
def test_the_resnet_prunes_by_channels_and_exports(tmp_path: object) -> None:
    """Half the channels gone, a batch of any size in onnxruntime, and the same numbers as PyTorch."""
    import onnxruntime
    import torch_pruning

    model = build("resnet", IMAGE, 10, 0)
    torch.manual_seed(0)
    nn.init.normal_(model.head.weight, std=0.01)
    before = parameters(model)
    example = torch.randn(1, *IMAGE)
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    pruner = torch_pruning.pruner.BasePruner(model, example, importance, pruning_ratio=0.5, ignored_layers=[model.head])
    pruner.step()
    assert 0.2 < parameters(model) / before < 0.3
    path = f"{tmp_path}/resnet.onnx"
    torch.onnx.export(
        model.eval(), (torch.randn(2, *IMAGE),), path, dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=["x"], external_data=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 5):
        x = torch.randn(batch, *IMAGE)
        found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        assert torch.allclose(found, model(x), atol=1e-4)
