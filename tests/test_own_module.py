"""A trained module of one's own: any layers, no federation, never changed, and a row for whatever cannot be had."""

import copy
import json
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fedlab_kit as fk
from fedlab_kit.deployment import artifact as module
from fedlab_kit.deployment.artifact import load, recall
from fedlab_kit.deployment.evaluate import evaluate
from fedlab_kit.lab.bundle import export
from fedlab_kit.runs import history

INT8 = fk.Recipe(dtype="int8", quantization="dynamic")


def split(n: int, shape: tuple[int, ...], seed: int, whole: bool = False) -> fk.Split:
    """Two classes that lie apart, as they come: first the one, then the other."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) * 2 // max(1, n)
    x = torch.randn(n, *shape, generator=generator) + 2.0 * y.view(-1, *[1] * len(shape))
    return fk.Split((60 + 30 * x).clamp(0, 255).to(torch.uint8) if whole else x, y)


def dataset(*shape: int, sizes: tuple[int, ...] = (60, 40, 0, 20), whole: bool = False) -> fk.Dataset:
    splits = [split(n, shape, seed, whole) for seed, n in enumerate(sizes)]
    return fk.Dataset("mine", ("low", "high"), *splits, fk.Preprocess(90.0, 42.0) if whole else fk.Preprocess(1.0, 1.4))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


class Tied(nn.Module):
    """One matrix, there and back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.back, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.back.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.back(torch.relu(self.first(x)))))


def frozen_body() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    net[0].requires_grad_(False)
    return net


CASES: dict[str, tuple[Any, fk.Dataset]] = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), dataset(6)),
    "gru": (Recurrent, dataset(4, 3)),
    "frozen": (frozen_body, dataset(6)),
    "tied": (Tied, dataset(6)),
    "three channels": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)),
        dataset(3, 8, 8, whole=True),
    ),
    "five samples": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)),
        dataset(6, sizes=(5, 1, 0, 1)),
    ),
}


def trained(make: Any, data: fk.Dataset) -> nn.Module:
    """A module after two steps of training, left in the middle of it: gradients there, training mode on."""
    torch.manual_seed(0)
    net = make()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(data.preprocess(data.train.x)), data.train.y).backward()
        optimizer.step()
    return net


def answers(net: nn.Module, data: fk.Dataset, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return copy.deepcopy(net).eval()(data.preprocess(x)).numpy()


@pytest.mark.parametrize("name", CASES)
def test_the_file_answers_as_the_module_does(name: str, runs_folder: Path) -> None:
    data = CASES[name][1]
    net = trained(*CASES[name])
    artifact = fk.compress(net, fk.Recipe(), dataset=data)
    x = data.validation.x
    found = onnxruntime.InferenceSession(artifact.path).run(None, {"x": x.numpy()})[0]
    expected = answers(net, data, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert artifact.accuracy == (expected.argmax(1) == data.validation.y.numpy()).mean()
    assert artifact.path.is_relative_to(runs_folder / "modules") and artifact.bytes == artifact.path.stat().st_size
    assert artifact.test()[0] == (answers(net, data, data.test.x).argmax(1) == data.test.y.numpy()).mean()


def everything(net: nn.Module) -> dict[str, Any]:
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return {
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "places": {name: (t.data_ptr(), t.requires_grad, t.device, t.dtype) for name, t in tensors.items()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()},
        "modes": {name: m.training for name, m in net.named_modules()},
        "hooks": {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in net.named_modules()},
    }


@pytest.mark.parametrize("name", CASES)
def test_the_given_module_and_the_random_numbers_stay_as_they_were(name: str) -> None:
    net, data = trained(*CASES[name]), CASES[name][1]
    next(iter(net.children())).eval()  # a part that its owner keeps in evaluation mode
    before, drawn = everything(net), (torch.get_rng_state(), random.getstate())
    fk.compress(net, fk.Recipe(), dataset=data)
    fk.sweep(net, {"prune": ["weight", "channel"], "prune_ratio": [0.5], "dtype": ["fp32", "int8"]}, dataset=data)
    after = everything(net)
    for kind in ("places", "modes", "hooks"):
        assert after[kind] == before[kind]
    for kind in ("values", "gradients"):
        torch.testing.assert_close(after[kind], before[kind], rtol=0, atol=0)
    assert torch.equal(drawn[0], torch.get_rng_state()) and random.getstate() == drawn[1]


def test_a_module_that_draws_while_it_answers_moves_nobodys_random_numbers() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x))  # its author forgot `self.training`

    net, before = Noisy(6, 2), torch.get_rng_state()
    with pytest.raises(ValueError, match="model Noisy cannot be exported"):
        fk.compress(net, fk.Recipe(), dataset=dataset(6))
    assert torch.equal(before, torch.get_rng_state())


def test_the_card_says_that_no_federation_trained_it(runs_folder: Path, tmp_path: Path) -> None:
    net, data = trained(*CASES["tied"]), CASES["tied"][1]
    artifact = fk.compress(net, INT8, tmp_path, dataset=data)
    card = json.loads((tmp_path / f"{artifact.path.name}.json").read_text())
    assert card["experiment"] is card["run"] is card["training"] is None
    assert card["module"]["class"] == "Tied" and "no federation" in card["module"]["origin"]
    assert card["privacy"]["level"] == "unknown" and card["privacy"]["epsilon"] is None
    assert card["input"]["name"] == "x" and card["input"]["batch"] == "any" and card["input"]["dtype"] == "float32"
    assert card["zstd_level"] == 18
    assert not runs_folder.exists() or not list(runs_folder.glob("modules/*/artifacts/*"))
    again = load(artifact.path)
    assert again.predict(data.test.x[:3]).shape == (3, 2)
    with pytest.raises(ValueError, match=r"was measured on dataset 'mine': register that with fk.dataset first"):
        again.test()
    table = evaluate(artifact)
    assert table["uplink_bytes"].isna().all() and table["accuracy"].notna().all()


def test_stored_modules_are_nobodys_runs(runs_folder: Path) -> None:
    net, data = trained(*CASES["tied"]), CASES["tied"][1]
    fk.compress(net, fk.Recipe(), dataset=data)
    assert history() == ((), [])
    run = fk.train(
        fk.Experiment(dataset="blobs", partition="dirichlet", model="mlp", clients=4, clients_per_round=2, rounds=1)
    )
    assert len(history()[0]) == 1
    with pytest.raises(ValueError, match="must be of the run it is exported with"):
        export(runs_folder / "home", fk.compress(net, fk.Recipe(), dataset=data), run, [])


def test_a_team_without_a_federation_has_a_size_and_no_round(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    artifact = fk.compress(net, fk.Recipe(), tmp_path / "team", dataset="blobs")
    room = fk.Experiment(dataset="blobs", partition="dirichlet", model="mlp", clients=4, clients_per_round=2)
    (tmp_path / "team" / f"{artifact.path.name}.zst").unlink()
    by_size = fk.leaderboard(tmp_path, experiment=room).iloc[0]
    assert by_size["rank"] == 1 and by_size["zstd_bytes"] == artifact.zstd_bytes
    assert "comes from no federation" in fk.leaderboard(tmp_path, "round", experiment=room).iloc[0]["remark"]


def test_two_threads_and_a_second_time_give_the_same_file(tmp_path: Path) -> None:
    net, data = trained(*CASES["batch norm"]), CASES["batch norm"][1]
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda n: fk.compress(net, INT8, tmp_path / str(n), dataset=data), range(2)))
    again = fk.compress(net, INT8, tmp_path / "again", dataset=data)
    assert len({one.path.read_bytes() for one in (*made, again)}) == 1


def test_another_weight_attribute_or_data_set_is_another_home() -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.body, self.factor = nn.Linear(6, 2), factor
            nn.init.ones_(self.body.weight)
            nn.init.zeros_(self.body.bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * self.body(x)

    data, nets = dataset(6), [Scaled(1.0), Scaled(2.0), Scaled(1.0)]
    with torch.no_grad():
        nets[2].body.bias[0] = 0.5
    paths = [fk.compress(net, fk.Recipe(), dataset=data).path for net in (*nets, Scaled(1.0).train())]
    other = fk.compress(nets[0], fk.Recipe(), dataset=dataset(6, sizes=(60, 39, 0, 20))).path
    assert len({*paths, other}) == 4 and paths[0] == paths[3]


REFUSED: dict[str, tuple[Any, str]] = {
    "double": (lambda: nn.Linear(6, 2).double(), r"model Linear must be float32, weight is float64: .*\.float\(\)"),
    "half": (lambda: nn.Linear(6, 2).half(), r"model Linear must be float32, weight is float16: .*\.float\(\)"),
    "meta": (lambda: nn.Linear(6, 2, device="meta"), "weight is on the meta device: load trained weights first"),
    "lazy": (lambda: nn.LazyLinear(2), "weight has no shape yet, pass one batch through it"),
    "empty": (lambda: nn.Flatten(), "model Flatten must have parameters, it has none"),
    "infinite": (lambda: nn.Linear(6, 2).apply(lambda m: m.bias.data.fill_(torch.inf)), "bias holds NaN or infinity"),
    "input": (lambda: nn.Linear(5, 2), r"model Linear does not take samples of shape \[6\], build it for them: "),
    "classes": (
        lambda: nn.Linear(6, 3),
        r"model Linear must map \[2, 6\] to \[2, 2\], got \[2, 3\]: one logit a class",
    ),
    "tuple": (lambda: Wrapped(lambda y: (y, y)), "one tensor of logits, got a tuple: let forward return them alone"),
    "dict": (lambda: Wrapped(lambda y: {"logits": y, "aux": y}), "got a dict of 'logits', 'aux': let forward return"),
    "squeezed": (lambda: Wrapped(torch.squeeze), r"model Wrapped must map \[1, 6\] to \[1, 2\], got \[2\]"),
    "long": (lambda: Wrapped(lambda y: y.double()), r"got \[2, 2\] of torch.float64"),
    "no leaf": (lambda: Wrapped(lambda y: y, True), "model Wrapped cannot be copied"),
}


class Wrapped(nn.Module):
    def __init__(self, last: Any, product: bool = False) -> None:
        super().__init__()
        self.body, self.last = nn.Linear(6, 2), last
        if product:
            self.kept = self.body.weight * 2

    def forward(self, x: Tensor) -> Any:
        return self.last(self.body(x))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compressed_is_answered_in_one_line(name: str, runs_folder: Path) -> None:
    make, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as error:
        fk.compress(make(), fk.Recipe(), dataset=dataset(6))
    assert "\n" not in str(error.value) and not runs_folder.exists()


class Words(nn.Module):
    """A layer on whole numbers [n, 6], or on a series [n, 3, 2], and one logit a class."""

    def __init__(self, layer: nn.Module, run: Any) -> None:
        super().__init__()
        self.layer, self.head, self.run = layer, nn.LazyLinear(2), run
        self.eval()(torch.zeros(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.layer, x).flatten(1))


STUMBLES: dict[str, tuple[Any, str]] = {
    "bag": (
        lambda: Words(nn.EmbeddingBag(9, 4), lambda bag, x: bag(x.long().clamp(0, 8))),
        "cannot be exported to ONNX: .*; layer is an EmbeddingBag: put an nn.Embedding and a mean there$",
    ),
    "projection": (
        lambda: Words(nn.LSTM(2, 6, proj_size=3), lambda lstm, x: lstm(x.view(-1, 3, 2))[0]),
        "cannot be exported to ONNX: .*; layer has a proj_size: leave that out$",
    ),
    "mask": (
        lambda: Words(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(2, 1, 4, batch_first=True), 1),
            lambda encoder, x: encoder(x.view(-1, 3, 2), mask=torch.ones(3, 3).triu(1).bool()),
        ),
        "cannot be exported to ONNX: .*; layer may take a mask: call it with is_causal= beside mask=$",
    ),
    "script": (
        lambda: Words(torch.jit.script(nn.Linear(6, 4)), lambda layer, x: layer(x)),
        "; layer is scripted: put the module itself in its place$",
    ),
    "weight norm": (
        lambda: Words(nn.utils.weight_norm(nn.Linear(6, 4)), lambda layer, x: layer(x)),
        "cannot be copied; layer has torch's old weight_norm: use torch.nn.utils.parametrizations.weight_norm$",
    ),
}


@pytest.mark.filterwarnings("ignore")  # torch itself warns of what is old
@pytest.mark.parametrize("name", STUMBLES)
def test_a_layer_that_others_stumble_over_is_named_with_what_to_do(name: str) -> None:
    make, words = STUMBLES[name]
    with pytest.raises(ValueError, match=words) as error:
        fk.compress(make(), fk.Recipe(), dataset=dataset(6))
    assert "\n" not in str(error.value)


def test_wrong_arguments_are_named() -> None:
    pair = fk.Experiment(
        dataset="blobs", partition="dirichlet", model="logistic", clients=2, rounds=1, clients_per_round=2
    )
    net, run = nn.Linear(6, 2), fk.train(pair)
    with pytest.raises(ValueError, match=r"dataset must be a registered name or an fk.Dataset for a module.*got None"):
        fk.compress(net, fk.Recipe())
    with pytest.raises(ValueError, match=r"dataset must be one of .*, got 'nowhere'"):
        fk.compress(net, fk.Recipe(), dataset="nowhere")
    with pytest.raises(ValueError, match=r"dataset must be .* got list"):
        fk.compress(net, fk.Recipe(), dataset=[1, 2])
    with pytest.raises(ValueError, match="client must be None for a module of one's own, got 3"):
        fk.compress(net, fk.Recipe(), client=3, dataset=dataset(6))
    with pytest.raises(ValueError, match="dataset must be None for a run"):
        fk.compress(run, fk.Recipe(), dataset="blobs")
    with pytest.raises(ValueError, match=r"model must be a Run or a trained torch.nn.Module, got OrderedDict"):
        fk.compress(net.state_dict(), fk.Recipe(), dataset="blobs")
    with pytest.raises(ValueError, match="split validation must have at least one sample"):
        fk.compress(net, fk.Recipe(), dataset=dataset(6, sizes=(5, 0, 0, 1)))
    with pytest.raises(ValueError, match="split train must have at least one sample"):
        fk.compress(net, fk.Recipe(dtype="int8"), dataset=dataset(6, sizes=(0, 5, 0, 1)))
    with pytest.raises(ValueError, match="dataset must be None for an experiment"):
        fk.sweep(run.experiment, {"dtype": ["fp32"]}, dataset="blobs")
    with pytest.raises(ValueError, match="grid must name fields of Recipe alone for a module of one's own, got 'seed'"):
        fk.sweep(net, {"seed": [1, 2]}, dataset=dataset(6))


def test_static_ranges_are_of_all_training_samples_wherever_they_lie() -> None:
    """Sorted by class, as here, the first 256 of 600 are of one class alone."""
    data = dataset(6, sizes=(600, 40, 0, 20))
    [raw] = module.subject_of(nn.Linear(6, 2), dataset=data).calibration()
    taken = [int((data.train.x == row).all(1).nonzero()[0]) for row in raw]
    assert 128 < len(raw) <= 256 and {int(data.train.y[t]) for t in taken} == {0, 1} and taken[-1] > 590


def test_a_sweep_of_a_module_has_a_row_for_every_recipe_and_is_answered_from_its_cards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, data = trained(*CASES["batch norm"]), CASES["batch norm"][1]
    grid = {"prune_ratio": np.linspace(0, 0.5, 2), "dtype": ["fp32", "int8"], "prune": ["weight", "channel"]}
    table = fk.sweep(net, grid, INT8, dataset=data)
    assert len(table) == 8 and table["front"].any() and table["accuracy"].notna().all()
    assert table[["uplink_bytes", "downlink_bytes", "seconds"]].isna().all(axis=None)
    assert all(row.path.stat().st_size == row.bytes for row in table.itertuples())
    monkeypatch.setattr(module, "_compress", None)
    again = fk.sweep(copy.deepcopy(net).train(), grid, INT8, dataset=data)
    assert again.equals(table)
    assert fk.choose(table, bytes=10**6)["accuracy"] == table["accuracy"].max()


def test_a_module_that_nobody_can_tell_again_is_made_each_time() -> None:
    net = nn.Sequential(nn.Linear(6, 2))
    net.draws = (n for n in range(3))  # a generator has no value
    with pytest.raises(ValueError, match="cannot be copied"):  # torch copies no generator either
        fk.compress(net, fk.Recipe(), dataset=dataset(6))
    del net.draws
    net[0].register_forward_hook(lambda layer, given, out: eval("out"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fk.compress(net, fk.Recipe(), dataset=dataset(6)).accuracy > 0
    assert recall(net, fk.Recipe(), dataset=dataset(6)) is None


def made_up(shape, classes):
    splits = (fk.Split(torch.rand(n, *shape), torch.arange(n) % classes) for n in (20, 20, 4, 4))
    return fk.Dataset("made up", tuple("abc"[:classes]), *splits, fk.Preprocess(0.5, 1.0))


def test_a_graph_of_another_width_that_does_not_fit_is_made_anew(tmp_path):
    """A BatchNorm without weights of its own: the cached graph of eight channels cannot be filled with six."""
    data = made_up((3, 8, 8), 2)

    def made(width):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, width, 3),
            nn.BatchNorm2d(width, affine=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * 36, 2),
        ).eval()

    for width in (8, 6, 8):
        net = made(width)
        found = fk.compress(net, fk.Recipe(), tmp_path, dataset=data).session.run(
            None, {"x": data.validation.x.numpy()}
        )[0]
        assert torch.allclose(torch.from_numpy(found), net(data.preprocess(data.validation.x)), atol=1e-5)


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        return torch.einsum("btd,tdk->bk", x, self.v)


def test_weights_out_of_reach_are_named_and_answers_that_are_no_numbers_refused(tmp_path):
    data = made_up((6, 5), 3)
    for recipe in (fk.Recipe(dtype="int4"), fk.Recipe(dtype="fp16"), fk.Recipe(prune_ratio=0.5)):
        found = fk.compress(Product(), recipe, tmp_path, dataset=data)
        assert found.note.startswith("100.0% of the weights are not seen in the file")
    assert not fk.compress(Product(), fk.Recipe(), tmp_path, dataset=data).note
    wild = nn.Sequential(nn.Flatten(), nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    with torch.no_grad():
        wild[1].weight.mul_(1e30)
        wild[3].weight.mul_(1e30)
    with pytest.raises(ValueError, match=r"logits must be numbers, they are NaN for \d+ of 20 samples"):
        fk.compress(wild, fk.Recipe(), tmp_path, dataset=data)


def test_a_mask_may_be_infinite(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(5, 3)
            self.register_buffer("mask", torch.triu(torch.full((6, 6), float("-inf")), 1))

        def forward(self, x):
            return self.head(torch.softmax(x @ x.transpose(1, 2) + self.mask, -1) @ x).mean(1)

    data = made_up((6, 5), 3)
    net = Masked().eval()
    found = fk.compress(net, fk.Recipe(), tmp_path, dataset=data).session.run(None, {"x": data.validation.x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(found), net(data.preprocess(data.validation.x)), atol=1e-5)
