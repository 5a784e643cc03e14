"""Differential privacy and secure aggregation: lengths, noise, epsilon against known values, masks that cancel."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from torch import Tensor, nn

from fedlab_kit.wire import CODECS, make
from fedlab_kit.wire.privacy import (
    COMPATIBLE,
    clip,
    epsilon,
    from_grid,
    gaussian,
    mask,
    noisy_mean,
    poisson_sample,
    private_gradient,
    spent,
    to_grid,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(size: int, seed: int = 0) -> Tensor:
    return gaussian(size, 1.0, rng(seed))


# --- client level ---


def test_clipping_shortens_long_updates_and_leaves_short_ones() -> None:
    assert clip(torch.tensor([3.0, 4.0]), 1.0).tolist() == pytest.approx([0.6, 0.8])
    assert clip(torch.tensor([0.3, 0.4]), 1.0).tolist() == pytest.approx([0.3, 0.4])
    assert clip(torch.zeros(2), 1.0).tolist() == [0, 0]


def test_the_denominator_is_fixed_whoever_comes() -> None:
    one = torch.tensor([1.0, 0.0])
    assert noisy_mean([one], 1.0, 0.0, 4.0, rng(), 2).tolist() == [0.25, 0]
    assert noisy_mean([one, one], 1.0, 0.0, 4.0, rng(), 2).tolist() == [0.5, 0]
    assert noisy_mean([], 1.0, 0.0, 4.0, rng(), 2).tolist() == [0, 0]


@pytest.mark.parametrize("codec", ["ternary", "sign"])
def test_no_client_moves_the_sum_by_more_than_the_clip_even_if_its_codec_lengthens(codec: str) -> None:
    sent = clip(noise(500), 1.0)
    one = make(codec)
    received = one.decode(one.encode(sent, rng()), 500)
    assert received.norm() > 1.3
    with_it, without = (noisy_mean(u, 1.0, 0.5, 1.0, rng(3), 500) for u in ([received], []))
    assert (with_it - without).norm() <= 1 + 1e-5


def test_the_noise_has_the_stated_deviation() -> None:
    mean = noisy_mean([], norm=2.0, noise_multiplier=3.0, expected=10.0, rng=rng(), size=200_000)
    assert mean.std() == pytest.approx(0.6, rel=0.01)
    assert mean.mean() == pytest.approx(0, abs=0.01)


def test_poisson_sampling_draws_each_on_its_own() -> None:
    draws = [poisson_sample(100, 0.1, rng(seed)) for seed in range(2000)]
    sizes = np.array([len(draw) for draw in draws])
    assert sizes.mean() == pytest.approx(10, abs=0.3)
    assert sizes.var() == pytest.approx(9, rel=0.15)
    assert all(len(set(draw)) == len(draw) for draw in draws)
    assert len(poisson_sample(5, 1.0, rng())) == 5


# --- epsilon ---


def test_epsilon_of_one_full_gaussian_matches_the_formula() -> None:
    """Rényi order a of one Gaussian costs a / (2 s^2); converted as in Canonne, Kamath and Steinke (2020)."""
    sigma, delta = 2.0, 1e-5
    a = np.linspace(1.1, 200, 100_000)
    best = (a / (2 * sigma**2) + np.log((a - 1) / a) - (np.log(delta) + np.log(a)) / (a - 1)).min()
    assert epsilon(sigma, 1.0, 1, delta) == pytest.approx(best, rel=0.01)


def test_epsilon_of_a_known_sampled_run() -> None:
    """A well-known setting: 60,000 records, batches of 256, 60 epochs, noise 1.1, delta 1e-5: about 3."""
    assert epsilon(1.1, 256 / 60_000, 60 * 60_000 // 256, 1e-5) == pytest.approx(3.0, abs=0.5)


def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise() -> None:
    base = epsilon(1.0, 0.01, 100, 1e-5)
    assert epsilon(1.0, 0.01, 200, 1e-5) > base
    assert epsilon(1.0, 0.02, 100, 1e-5) > base
    assert epsilon(2.0, 0.01, 100, 1e-5) < base
    assert epsilon(0.0, 0.01, 100, 1e-5) == float("inf")
    assert epsilon(0.0, 0.01, 0, 1e-5) == 0


def test_releases_of_all_kinds_are_composed_before_they_are_converted() -> None:
    ledger, accountant = [(1.0, 0.3, 4), (2.0, 1.0, 3), (1.0, 0.3, 2), (0.8, 0.01, 50), (0.0, 0.5, 0)], RDPAccountant()
    for sigma, rate, steps in ledger:
        for _ in range(steps):
            accountant.step(noise_multiplier=sigma, sample_rate=rate)
    together = spent(ledger, 1e-5)
    assert together == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)
    assert together < sum(spent([one], 1e-5) for one in ledger)
    assert spent([*ledger, (0.0, 0.5, 1)], 1e-5) == float("inf")
    assert spent([], 1e-5) == 0 and spent([(100.0, 0.001, 1)], 1e-1) >= 0


def test_epsilon_agrees_with_an_independent_accountant() -> None:
    from opacus.accountants import PRVAccountant

    other = PRVAccountant()
    other.history = [(1.0, 0.05, 200)]
    tight = other.get_epsilon(delta=1e-5)
    assert tight < epsilon(1.0, 0.05, 200, 1e-5) < 1.3 * tight


@pytest.mark.parametrize(("changes", "message"), [({"rate": 0.0}, "rate must be"), ({"delta": 1.0}, "delta must be")])
def test_impossible_settings_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        epsilon(**{"noise_multiplier": 1.0, "rate": 0.1, "steps": 1, "delta": 1e-5, **changes})


# --- record level ---


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    return noise(6 * count).view(count, 2, 3), torch.arange(count) % 3


def test_without_clipping_and_noise_it_is_the_plain_gradient() -> None:
    net, (x, y) = model(), batch()
    F.cross_entropy(net(x), y).backward()
    plain = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
    private = private_gradient(net, x, y, norm=1e9, noise_multiplier=0.0, expected=8, rng=rng())
    assert torch.allclose(private, plain, atol=1e-6)


def test_one_sample_moves_the_sum_by_at_most_the_norm() -> None:
    """All layers of a sample together, whichever of them its gradient reaches."""
    net, (x, y) = model(), batch()
    without, *with_one = (
        private_gradient(net, x[a:b], y[a:b], norm=0.1, noise_multiplier=1.0, expected=1, rng=rng(5))
        for a, b in [(0, 0), *((k, k + 1) for k in range(8))]
    )
    for moved in with_one:
        assert (moved - without).norm() == pytest.approx(0.1, rel=1e-4)


def test_an_empty_batch_is_noise_alone() -> None:
    net, (x, y) = model(), batch()
    empty = private_gradient(net, x[:0], y[:0], norm=2.0, noise_multiplier=0.5, expected=4, rng=rng(1))
    assert torch.equal(empty, gaussian(len(empty), 1.0, rng(1)) / 4)
    assert all(p.grad is None for p in net.parameters())


def test_a_layer_that_mixes_samples_is_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="without BatchNorm, got layer '2'"):
        private_gradient(net, *batch(), norm=1.0, noise_multiplier=1.0, expected=8, rng=rng())


class Shared(nn.Module):
    """A frozen layer, a weight that two layers share, and a head that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.unused, self.head = nn.Linear(4, 9), nn.Linear(4, 3)
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(self.frozen(x.flatten(1)))))))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2)),
        nn.Conv2d(1, 4, 2, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 3),
    )


@pytest.mark.parametrize("norm", [0.05, 0.5, 1e6])
@pytest.mark.parametrize("make_net", [model, convolutions, Shared])
def test_it_clips_what_opacus_calls_the_gradient_of_a_sample(make_net: Callable[[], nn.Module], norm: float) -> None:
    torch.manual_seed(1)
    net, (x, y) = make_net(), batch(12)
    ours = private_gradient(net, x, y, norm=norm, noise_multiplier=0.0, expected=5, rng=rng())
    trained = [p for p in net.parameters() if p.requires_grad]
    watched = GradSampleModule(net, loss_reduction="sum", strict=False)
    F.cross_entropy(watched(x.requires_grad_()), y, reduction="sum").backward()
    rows = [
        torch.zeros(12, p.numel()) if getattr(p, "grad_sample", None) is None else p.grad_sample.reshape(12, -1)
        for p in trained
    ]
    each = torch.cat(rows, 1).detach()
    factor = (norm / each.norm(dim=1)).clamp(max=1)
    assert norm == 0.5 or (factor < 1).all() or (factor == 1).all()
    torch.testing.assert_close(ours, (factor[:, None] * each).sum(0) / 5, rtol=1e-4, atol=1e-7)


def test_noise_goes_to_what_is_trained_once_and_nowhere_else() -> None:
    net, (x, y) = Shared(), batch()
    size = 4 * 4 + 4 + 4 + 4 * 9 + 9 + 4 * 3 + 3  # first with its weight, second's bias, unused, head; not frozen
    assert len(private_gradient(net, x, y, norm=1.0, noise_multiplier=1.0, expected=8, rng=rng())) == size
    draws = [private_gradient(net, x[:0], y[:0], 0.5, 3.0, 4.0, rng(seed)) for seed in range(400)]
    spread = torch.stack(draws).std(0)
    assert spread.shape == (size,) and (spread / (3.0 * 0.5 / 4.0) - 1).abs().max() < 0.2
    assert torch.stack(draws).std() == pytest.approx(3.0 * 0.5 / 4.0, rel=0.01)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e18, 1e38, float("inf"), float("nan")])
def test_no_sample_and_no_client_moves_the_result_by_more_than_its_share(scale: float) -> None:
    """However large one is, the sum moves by the norm at most, over a number that does not depend on who came."""
    net, (x, y) = model(), batch()
    x[0] *= scale
    sums = [private_gradient(net, x[k:], y[k:], 0.1, 1.0, 4.0, rng(5)) for k in (0, 1)]
    assert (sums[0] - sums[1]).norm() <= 0.1 / 4 * (1 + 1e-4)
    if np.isfinite(scale):
        update = scale * noise(500)
        means = [noisy_mean(u, 0.1, 1.0, 4.0, rng(5), 500) for u in ([update], [])]
        assert (means[0] - means[1]).norm() <= 0.1 / 4 * (1 + 1e-4)


# --- secure aggregation ---

STEP = 2.0**-10
COHORT = [2, 3, 7, 11]


def masked_sum(words: list[np.ndarray], cohort: list[int] = COHORT) -> np.ndarray:
    sent = [mask(w, client, cohort, 1, b"secret") for w, client in zip(words, cohort, strict=True)]
    return np.add.reduce(sent, dtype=np.uint32)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6, unique=True), st.integers(0, 1000))
def test_masks_cancel_exactly_in_the_sum(cohort: list[int], seed: int) -> None:
    words = [rng(seed + c).integers(2**32, size=20, dtype=np.uint32) for c in cohort]
    assert masked_sum(words, cohort).tolist() == np.add.reduce(words, dtype=np.uint32).tolist()


def test_a_masked_payload_looks_random_and_a_missing_one_leaves_noise() -> None:
    words = [np.zeros(20_000, np.uint32)] * 4
    sent = [mask(w, client, COHORT, 1, b"secret") for w, client in zip(words, COHORT, strict=True)]
    bits = np.unpackbits(sent[0].view(np.uint8))
    assert bits.mean() == pytest.approx(0.5, abs=0.005)
    assert not np.add.reduce(sent, dtype=np.uint32).any()
    assert np.count_nonzero(np.add.reduce(sent[1:], dtype=np.uint32)) > 19_900


def test_two_rounds_under_one_secret_do_not_tell_their_difference() -> None:
    """The same masks twice would be a two-time pad: who subtracts the messages reads the difference of the words."""
    first, second = (rng(seed).integers(2**32, size=5_000, dtype=np.uint32) for seed in (1, 2))
    sent = [mask(words, 2, COHORT, round, b"secret") for round, words in ((1, first), (2, second))]
    assert np.count_nonzero((sent[1] - sent[0]) == (second - first)) < 5
    assert np.array_equal(sent[0], mask(first, 2, COHORT, 1, b"secret"))
    for round in (2, 3):
        total = sum(mask(first, client, COHORT, round, b"secret") for client in COHORT)
        assert np.array_equal(total, np.uint32(len(COHORT)) * first)


def test_every_pair_has_a_mask_of_its_own() -> None:
    pairs = list(itertools.combinations(COHORT, 2))
    masks = [mask(np.zeros(50, np.uint32), a, [a, b], 1, secret) for secret in (b"one", b"two") for a, b in pairs]
    assert len({words.tobytes() for words in masks}) == 2 * len(pairs)


def test_a_shared_grid_works() -> None:
    updates = [noise(300, seed) for seed in range(4)]
    total = from_grid(masked_sum([to_grid(u, STEP, rng(k)) for k, u in enumerate(updates)]), STEP)
    assert COMPATIBLE["shared grid"].works
    assert (total - torch.stack(updates).sum(0)).abs().max() <= 4 * STEP


def test_the_shared_grid_is_unbiased() -> None:
    back = from_grid(to_grid(torch.full((10_000,), -0.3), 1.0, rng()), 1.0)
    assert back.mean() == pytest.approx(-0.3, abs=0.02)
    assert set(back.tolist()) == {0.0, -1.0}


@pytest.mark.parametrize("name", ["int8", "int4", "ternary", "sign"])
def test_own_scales_do_not_add_up(name: str) -> None:
    """No scale reads the sum of two clients' codes if one's updates are ten times as large; on one scale it works."""
    one, update = make(name, rounding="nearest"), noise(400)

    def misread(other: Tensor) -> float:
        decoded = [one.decode(one.encode(u, rng()), 400) for u in (update, other)]
        codes = sum((d / d[d != 0].abs().min()).round() for d in decoded)
        true = decoded[0] + decoded[1]
        return float((true - (true @ codes) / (codes @ codes) * codes).norm() / true.norm())

    assert not COMPATIBLE[name].works
    assert misread(update.flip(0)) < 1e-5
    assert misread(10 * update.flip(0)) > 0.4


@pytest.mark.parametrize("name", ["topk", "stc"])
def test_own_positions_do_not_line_up(name: str) -> None:
    updates = [noise(400, seed) for seed in range(2)]
    one = make(name, keep=0.1)
    places = [one.decode(one.encode(u, rng()), 400).nonzero().view(-1).tolist() for u in updates]
    assert not COMPATIBLE[name].works
    assert len(places[0]) == len(places[1]) == 40
    assert sum(a == b for a, b in zip(*places, strict=True)) < 10


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_float_masks_do_not_cancel(name: str, dtype: torch.dtype) -> None:
    update, veil = 1e-3 * noise(400).to(dtype), (1e4 * noise(400, seed=1)).to(dtype)
    assert not COMPATIBLE[name].works
    assert ((update + veil - veil) - update).norm() > 0.1 * update.norm()


def test_there_is_nothing_to_compress_in_masked_words() -> None:
    words = mask(np.zeros(5_000, np.uint32), 2, COHORT, 1, b"secret").tobytes()
    assert not COMPATIBLE["zstd"].works
    assert len(zstandard.compress(words)) >= len(words)


def test_every_built_in_codec_is_in_the_table() -> None:
    built_in = {name for name, cls in CODECS.items() if cls.id < 128}
    assert built_in | {"zstd", "shared grid"} == set(COMPATIBLE)
    assert all(entry.why for entry in COMPATIBLE.values())
