"""Artifacts: opened without the package, the same bytes everywhere, every number from the file, every error named."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import zstandard
from torch import Tensor, nn

import fedlab_kit as fk
from fedlab_kit.compression.quantize import grid_codes
from fedlab_kit.data import Preprocess
from fedlab_kit.deployment import artifact as artifact_module
from fedlab_kit.deployment import calibration, convert, measure, onnx_export
from fedlab_kit.deployment.artifact import compress, load, slug
from fedlab_kit.statistics import paired_loss

RECIPES = [
    fk.Recipe(),
    fk.Recipe(prune="weight", prune_ratio=0.6),
    fk.Recipe(prune="channel", prune_ratio=0.5),
    fk.Recipe(dtype="fp16"),
    fk.Recipe(dtype="int8", quantization="dynamic"),
    fk.Recipe(dtype="int8", quantization="static"),
    fk.Recipe(dtype="int4"),
    fk.Recipe(dtype="int2", keep="ends"),
    fk.Recipe(prune="channel", prune_ratio=0.25, dtype="int8", quantization="static"),
]
EXPERIMENT = fk.Experiment(
    dataset="digits", model="cnn", partition="dirichlet", clients=4, clients_per_round=4, rounds=2
)


@pytest.fixture(scope="module")
def run() -> fk.Run:
    return fk.train(EXPERIMENT)


def stand_in(run: fk.Run, model: nn.Module) -> Any:
    """A run with another model."""
    names = ("experiment", "dataset", "shards", "records", "uplink_bytes", "downlink_bytes", "privacy")
    same = {name: getattr(run, name) for name in names}
    return SimpleNamespace(model=model.eval(), key="0" * 20, path=run.path.with_name("0" * 20), **same)


@pytest.mark.parametrize("recipe", RECIPES, ids=slug)
def test_plain_onnxruntime_on_raw_test_pixels_gives_the_accuracy_on_the_card(
    run: fk.Run, recipe: fk.Recipe, tmp_path: Path
) -> None:
    artifact = compress(run, recipe, tmp_path)
    artifact.test()
    np.savez(tmp_path / "test.npz", x=run.dataset.test.x.numpy(), y=run.dataset.test.y.numpy())
    script = (
        "import sys, numpy, onnxruntime; data = numpy.load(sys.argv[2])\n"
        "logits = onnxruntime.InferenceSession(sys.argv[1]).run(None, {'x': data['x']})[0]\n"
        "assert 'torch' not in sys.modules and 'fedlab_kit' not in sys.modules\n"
        "print((logits.argmax(1) == data['y']).mean())"
    )
    arguments = [sys.executable, "-c", script, str(artifact.path), str(tmp_path / "test.npz")]
    printed = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    card = json.loads((tmp_path / f"{artifact.path.name}.json").read_text())
    assert float(printed) == card["test"]["accuracy"]
    onnx.checker.check_model(str(artifact.path))


def test_sizes_digest_and_card_are_those_of_the_files(run: fk.Run) -> None:
    artifact = compress(run, RECIPES[5])
    content = artifact.path.read_bytes()
    assert artifact.path.parent == run.path / "artifacts"
    assert artifact.bytes == len(content) == os.path.getsize(artifact.path)
    compressed = artifact.path.with_name(artifact.path.name + ".zst").read_bytes()
    assert artifact.zstd_bytes == len(compressed) < artifact.bytes
    assert zstandard.decompress(compressed) == content
    assert artifact.digest == hashlib.sha256(content).hexdigest()
    assert artifact.card["experiment"] == EXPERIMENT.model_dump(mode="json")
    assert artifact.card["recipe"]["dtype"] == "int8"
    assert artifact.card["parameters_before"] == artifact.parameters == 21_840
    assert "test" not in artifact.card  # nobody asked
    assert artifact.card["when"].endswith("+00:00") and "cores" in artifact.card["machine"]
    assert artifact.threads == 1
    assert artifact.card["zstd_level"] == 18
    assert artifact.card["runtime"] == {"onnxruntime": f">={measure.oldest_runtime(onnx.load(artifact.path))}"}
    [taken] = measure.open_session(content).get_inputs()
    said = artifact.card["input"]
    assert said["name"] == taken.name and taken.type == f"tensor({said['dtype']})" and said["batch"] == "any"
    assert isinstance(taken.shape[0], str) and taken.shape[1:] == said["shape"]
    assert artifact.latency_ms > 0
    assert artifact.throughput > 0
    assert artifact.interval[0] < artifact.accuracy < artifact.interval[1]


def test_a_large_file_is_packed_at_the_quick_level_and_says_so(
    run: fk.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = compress(run, RECIPES[1], tmp_path)
    monkeypatch.setattr(measure, "LARGE", small.bytes - 1)
    large = compress(run, RECIPES[1], tmp_path)
    assert (small.card["zstd_level"], large.card["zstd_level"]) == (18, 3) and large.bytes == small.bytes
    packed = large.path.with_name(large.path.name + ".zst").read_bytes()
    assert packed == zstandard.ZstdCompressor(level=3).compress(large.path.read_bytes())
    assert large.zstd_bytes == len(packed) > small.zstd_bytes


@pytest.mark.parametrize("count", [1000, 200_000])
def test_a_packed_file_is_as_small_as_the_best_level_makes_it(count: int) -> None:
    weights = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    content = np.where(np.abs(weights) < 0.8, np.float32(0), weights).tobytes()
    packed, level = artifact_module.squeeze(content)
    best = zstandard.ZstdCompressor(level=18).compress(content)
    assert zstandard.decompress(packed) == content and level == 18
    assert len(packed) <= 1.003 * len(best) if count > 1000 else packed == best


def test_figures_of_speed_are_those_that_were_timed(
    run: fk.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "latencies", lambda sessions, x: [measure.Timing(0.25 * len(x), 0.002)])
    artifact = compress(run, RECIPES[0], tmp_path)
    assert (artifact.latency_ms, artifact.latency_spread_ms, artifact.throughput) == (250.0, 2.0, 4.0)


def test_the_float_file_agrees_with_torch(run: fk.Run, tmp_path: Path) -> None:
    artifact = compress(run, fk.Recipe(), tmp_path)
    x = run.dataset.validation.x
    with torch.no_grad():
        expected = run.model(run.dataset.preprocess(x)).softmax(1).numpy()
    np.testing.assert_allclose(artifact.predict(x), expected, rtol=1e-4, atol=1e-5)
    assert artifact.accuracy == pytest.approx(run.accuracy, abs=0.006)  # one sample of 197 may be a tie


def test_recipes_do_to_the_file_what_they_say(run: fk.Run, tmp_path: Path) -> None:
    plain, weight, channel, half, dynamic, static, four, two, both = (compress(run, r, tmp_path) for r in RECIPES)
    assert weight.bytes == plain.bytes
    assert weight.zstd_bytes < 0.6 * plain.zstd_bytes
    assert weight.sparsity == pytest.approx(0.6, abs=1e-4)
    assert weight.parameters == plain.parameters
    assert channel.parameters < 0.3 * plain.parameters
    assert channel.flops < 0.4 * plain.flops
    assert 0.5 < half.bytes / plain.bytes < 0.53
    assert two.bytes < four.bytes < 0.6 * min(static.bytes, dynamic.bytes)
    assert max(static.bytes, dynamic.bytes) < 0.6 * half.bytes
    assert both.bytes < static.bytes
    assert not any(artifact.note for artifact in (plain, weight, channel, half, dynamic, static, four, two, both))


def test_the_card_says_what_channel_pruning_left_alone(run: fk.Run, tmp_path: Path) -> None:
    shuffle = [nn.Conv2d(16, 16, 3, groups=4), nn.ChannelShuffle(4), nn.Conv2d(16, 24, 1, groups=4)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)]
    other = stand_in(run, nn.Sequential(nn.Conv2d(1, 16, 9, 4), nn.ReLU(), *shuffle, *head))
    channel = compress(other, fk.Recipe(prune="channel", prune_ratio=0.5), tmp_path)
    assert "torch-pruning would break 2: they keep their channels, prune='weight' reaches them" in channel.note
    assert channel.note == load(channel.path).note == channel.card["measured"]["note"]
    assert channel.parameters == 8 * 81 + 8 + 16 * 2 * 9 + 16 + 12 * 4 + 12 + 12 * 10 + 10
    twice = compress(other, fk.Recipe(prune="channel", prune_ratio=0.5), tmp_path / "again")
    assert twice.path.read_bytes() == channel.path.read_bytes()


def test_pruned_zeros_survive_quantization(run: fk.Run, tmp_path: Path) -> None:
    for dtype in ("fp16", "int8", "int4", "int2"):
        artifact = compress(run, fk.Recipe(prune="weight", prune_ratio=0.7, dtype=dtype), tmp_path)
        assert artifact.sparsity >= 0.6999


@pytest.mark.parametrize("recipe", RECIPES, ids=slug)
def test_the_same_recipe_gives_the_same_bytes(run: fk.Run, recipe: fk.Recipe, tmp_path: Path) -> None:
    first = compress(run, recipe, tmp_path / "first").path.read_bytes()
    if recipe.prune_ratio:
        onnx_export._skeletons.clear()  # the pruned shape is now exported itself instead of filled into the dense graph
    assert compress(run, recipe, tmp_path / "again").path.read_bytes() == first


def test_another_process_writes_the_same_bytes_and_no_path_of_this_machine(run: fk.Run, tmp_path: Path) -> None:
    script = (
        "import sys, torch; torch.set_num_threads(1); import fedlab_kit as fk\n"
        "from fedlab_kit.deployment.artifact import compress\n"
        f"run = fk.train(fk.Experiment(**{EXPERIMENT.changes()!r}))\n"
        "print(compress(run, fk.Recipe(prune='channel', prune_ratio=0.25, dtype='int8'), sys.argv[1]).digest)"
    )
    environment = {**os.environ, "FEDLAB_RUNS": str(run.path.parent)}
    arguments = [sys.executable, "-c", script, str(tmp_path / "there")]
    printed = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout
    here = compress(run, RECIPES[8], tmp_path / "here")
    assert printed.strip() == here.digest
    content = here.path.read_bytes()
    assert not any(word in content for word in (b"site-packages", b"torch", b"pytorch", str(tmp_path).encode()))


def test_a_swapped_graph_is_never_trusted_blindly(run: fk.Run, tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor  # a constant of the graph that no description of the module shows
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * self.body(x)

    x = run.dataset.validation.x[:8]
    for factor in (1.0, 2.0):
        model = Scaled(factor).eval()
        graph = onnx_export.export(model, run.dataset.preprocess, x)
        found = measure.open_session(graph.SerializeToString()).run(None, {"x": x.numpy()})[0]
        np.testing.assert_allclose(found, model(run.dataset.preprocess(x)).detach().numpy(), rtol=1e-3, atol=1e-4)


def test_the_exported_codes_are_those_of_the_grid(run: fk.Run) -> None:
    graph = onnx_export.export(run.model, run.dataset.preprocess, run.dataset.validation.x[:8])
    ranges = calibration.calibrate(graph, [run.dataset.train.x[shard] for shard in run.shards])
    files = {
        "int8 static": convert.convert(graph, "int8", ranges),
        **{dtype: convert.convert(graph, dtype) for dtype in ("int8", "int4", "int2")},
    }
    weights = [weight for weight in run.model.state_dict().values() if weight.ndim > 1]
    for kind, file in files.items():
        for stored, weight in zip(measure.stored_weights(file).values(), weights, strict=True):
            codes = grid_codes(weight, kind.split()[0]).codes.numpy()
            turned = kind == "int8" and weight.ndim == 2  # Gemm has become MatMul
            assert np.array_equal(stored.astype(int), codes.T if turned else codes)


def test_ends_that_are_all_of_a_network_are_named(run: fk.Run, tmp_path: Path) -> None:
    layers = [nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10)]
    for dtype in ("int4", "int2"):
        ends = fk.Recipe(dtype=dtype, keep="ends")
        two = compress(stand_in(run, nn.Sequential(*layers[:3], layers[5])), ends, tmp_path)
        assert two.note == f"keep='ends' leaves no layer for {dtype}: all weights are in int8"
        assert not compress(stand_in(run, nn.Sequential(*layers)), ends, tmp_path).note


def test_weights_that_a_dtype_cannot_hold_are_named(run: fk.Run, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 30, 28), nn.Flatten(), nn.Linear(30, 10))
    with torch.no_grad():
        model[2].weight[0] = 1e6  # 300 of 23,820 weights are in a matrix that half precision cannot hold
    half = compress(stand_in(run, model), fk.Recipe(dtype="fp16"), tmp_path)
    assert "1.3% of the weights stay fp32: their values are too large or too small for fp16" in half.note
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["measured"]["note"] == half.note
    for recipe in (fk.Recipe(dtype="int4"), fk.Recipe(dtype="int2"), fk.Recipe(dtype="int8", quantization="dynamic")):
        assert not compress(stand_in(run, model), recipe, tmp_path).note


def test_what_a_file_lost_is_counted_on_the_same_pictures(run: fk.Run, tmp_path: Path) -> None:
    def right(artifact: fk.Artifact) -> tuple[np.ndarray, np.ndarray]:
        x, y = run.dataset.validation.x.numpy(), run.dataset.validation.y.numpy()
        classes = onnxruntime.InferenceSession(artifact.path).run(None, {"x": x})[0].argmax(1)
        return classes, classes == y

    low = compress(run, fk.Recipe(dtype="int2", prune="weight", prune_ratio=0.5), tmp_path)  # makes its baseline itself
    plain = compress(run, fk.Recipe(), tmp_path)
    (before, was), (after, still) = right(plain), right(low)
    assert low.changed == (before != after).sum() > 0
    assert low.lost == pytest.approx(100 * (was.mean() - still.mean())) != 0
    assert low.lost_interval == pytest.approx([100 * end for end in paired_loss(was, still)[1:3]])
    assert np.array_equal(low.answers, after) and np.array_equal(load(low.path).answers, after)
    assert (plain.lost, plain.changed) == (0, 0) and plain.lost_interval[0] == -plain.lost_interval[1]
    assert compress(run, fk.Recipe(prune="channel"), tmp_path).lost == 0  # nothing is pruned at a ratio of 0
    [row] = fk.sweep(EXPERIMENT, {"dtype": ["int2"]}, fk.Recipe(prune_ratio=0.5)).to_dict("records")
    assert [row[name] for name in ("lost", "lost_low", "lost_high")] == [low.lost, *low.lost_interval]


def test_the_baseline_is_that_of_the_weights_in_the_model(run: fk.Run, tmp_path: Path) -> None:
    compress(run, fk.Recipe())  # the run's own baseline is stored
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    half = compress(stand_in(run, model), fk.Recipe(dtype="fp16"), tmp_path)
    assert half.changed <= 2 and abs(half.lost) <= 2  # beside the run's own model nearly all answers would differ


def test_channel_pruning_without_channels_says_so(run: fk.Run, tmp_path: Path) -> None:
    single = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    artifact = compress(stand_in(run, single), fk.Recipe(prune="channel", prune_ratio=0.5), tmp_path)
    assert artifact.parameters == 7850
    assert "removed nothing" in artifact.note


def test_predict_refuses_what_is_not_raw(run: fk.Run, tmp_path: Path) -> None:
    artifact = compress(run, fk.Recipe(), tmp_path)
    assert artifact.predict(run.dataset.test.x[:3]).sum(axis=1) == pytest.approx([1, 1, 1])
    with pytest.raises(ValueError, match=r"x must be raw uint8 \[n, 1, 28, 28\].*got float32 \[3, 1, 28, 28\]"):
        artifact.predict(run.dataset.preprocess(run.dataset.test.x[:3]))
    with pytest.raises(ValueError, match=r"got uint8 \[1, 28, 28\]"):
        artifact.predict(run.dataset.test.x[0])


@pytest.mark.parametrize("damage", ["cut", "flipped", "card lost", "card broken"])
def test_a_damaged_artifact_is_refused_by_name(run: fk.Run, tmp_path: Path, damage: str) -> None:
    artifact = compress(run, fk.Recipe(), tmp_path)
    assert load(artifact.path).accuracy == artifact.accuracy
    content = bytearray(artifact.path.read_bytes())
    card = artifact.path.with_name(artifact.path.name + ".json")
    if damage == "cut":
        artifact.path.write_bytes(content[:-1])
    elif damage == "flipped":
        content[5000] ^= 1
        artifact.path.write_bytes(content)
    elif damage == "card lost":
        card.unlink()
    else:
        card.write_text("{}")
    with pytest.raises(OSError, match=artifact.path.name):
        load(artifact.path)


def test_a_full_disk_leaves_nothing(run: fk.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if ".zst" in path.name:
            raise OSError(28, "No space left on device")
        return written(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"cannot write .*\.zst: No space left on device"):
        compress(run, fk.Recipe(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_exported_is_named(run: fk.Run, tmp_path: Path) -> None:
    class Moody(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :10] if x.sum() > 0 else x.flatten(1)[:, 10:20]

    with pytest.raises(ValueError, match="model Moody cannot be exported to ONNX"):
        compress(stand_in(run, Moody()), fk.Recipe(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_dtype_is_named(run: fk.Run) -> None:
    graph = onnx_export.export(run.model, run.dataset.preprocess, run.dataset.validation.x[:8])
    with pytest.raises(ValueError, match="dtype must be one of fp32, fp16, int8, int4, int2, got 'int3'"):
        convert.convert(graph, "int3")


def test_features_keep_their_range_in_half_precision() -> None:
    model = nn.Linear(2, 3).eval()
    raw = torch.tensor([[1e6, 0.5], [2e6, -0.5]])  # 1e6 is no float16
    graph = convert.convert(onnx_export.export(model, Preprocess((1.5e6, 0.0), (5e5, 1.0)), raw), "fp16")
    found = measure.open_session(graph.SerializeToString()).run(None, {"x": raw.numpy()})[0]
    expected = model(torch.tensor([[-1.0, 0.5], [1.0, -0.5]])).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_quantizers_leave_logging_as_it_was(run: fk.Run, tmp_path: Path) -> None:
    """In a fresh process, where the quantizer is imported for the first time."""
    script = (
        "import logging, torch, fedlab_kit as fk; from fedlab_kit.deployment.convert import convert\n"
        "from fedlab_kit.deployment.onnx_export import export; from fedlab_kit.models import build\n"
        "graph = export(build('mlp', (4,), 2, 0).eval(), fk.Preprocess(0.0, 1.0), torch.zeros(2, 4))\n"
        "[convert(graph, dtype) for dtype in ('int8', 'int4')]\n"
        "print(logging.getLogger().level, logging.getLogger().handlers)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "30 []" and not done.stderr
