"""Payloads: error bounds, unbiasedness, exact lengths, error feedback, and what is refused."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlab_kit.wire import CODECS, Bits, Codec, PayloadError, codec, compensate, make, pack, unpack, unpack_all
from fedlab_kit.wire.bit_packing import (
    pack_count,
    pack_positions,
    pack_scales,
    unpack_count,
    unpack_positions,
    unpack_scales,
)
from fedlab_kit.wire.codecs import TopK

BUILT_IN = ("fp32", "fp16", "int8", "int4", "ternary", "sign", "topk", "stc")
DENSE = BUILT_IN[:6]
UNBIASED = ("int8", "int4", "ternary", "sign")
HEADER = 14


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(size: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(rng(seed).standard_normal(size, np.float32))


def there_and_back(one: Codec, vector: Tensor, seed: int = 0) -> Tensor:
    return one.decode(one.encode(vector, rng(seed)), len(vector))


def forge(one: Codec, body: bytes, *, flags: int = 0, samples: int = 1) -> bytes:
    """A frame with a right checksum around any body: what a hostile or broken client could send."""
    fields = struct.pack("<BBII", one.id, flags, samples, len(body))
    return fields + struct.pack("<I", zlib.crc32(fields + body)) + body


finite = st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=True)
vectors = st.one_of(
    st.lists(finite, min_size=1, max_size=40),
    st.sampled_from([1, 2, 7, 63, 64, 65, 128, 129]).flatmap(
        lambda size: st.tuples(st.integers(0, 2**32 - 1), st.integers(-140, 100)).map(
            lambda draw: (rng(draw[0]).standard_normal(size) * 2.0 ** draw[1]).tolist()
        )
    ),
).map(lambda values: torch.tensor(values, dtype=torch.float32))
codecs = st.builds(
    make,
    st.sampled_from(BUILT_IN),
    keep=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    bucket=st.sampled_from([1, 3, 64, 512]),
    rounding=st.sampled_from(["stochastic", "nearest"]),
    values=st.sampled_from(DENSE),
)


# --- values ---


def bound(one: Codec, vector: Tensor) -> Tensor:
    """The largest error that each entry can suffer, by the codec's definition; scales are read by torch."""
    size, nearest = vector.abs(), one.rounding == "nearest"
    if one.name == "fp32":
        return torch.zeros_like(vector)
    if one.name == "fp16":  # half a unit in the last of 11 bits, half the smallest number near zero, what is cut off
        return torch.maximum(size * 2**-11, torch.full_like(size, 2**-25)).maximum(size - 65504)
    if isinstance(one, TopK):  # what is not sent is lost
        chosen = torch.from_numpy(one._choose(vector.numpy()))
        if len(chosen):
            size[chosen] = bound(one.inner, vector[chosen])
        return size
    scales = bytearray(one.encode(vector, rng())[: 2 * -(-len(vector) // one.bucket)])
    each = torch.frombuffer(scales, dtype=torch.bfloat16).float()
    scale = each.repeat_interleave(min(one.bucket, len(vector)))[: len(vector)]
    if one.name == "sign":  # the nearer of plus and minus the scale, or the farther
        return (size - scale).abs() if nearest else size + scale
    levels = {"int8": 127, "int4": 7, "ternary": 1}[one.name]  # a step, or half of one; and float32's own rounding
    return scale * ((0.5 if nearest else 1) / levels + 2**-20) + levels * 2**-149


@settings(max_examples=1500, deadline=None)
@given(codecs, vectors, st.integers(0, 2**32 - 1), st.booleans())
def test_the_error_stays_within_the_stated_bound(one: Codec, vector: Tensor, seed: int, zstd: bool) -> None:
    payload = pack(one, vector, samples=3, rng=rng(seed), zstd=zstd)
    samples, (back,) = unpack(payload, one, size=len(vector))
    assert samples == 3
    assert back.dtype == torch.float32
    assert bool(((back - vector).abs() <= bound(one, vector)).all())


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize(
    "vector",
    [
        torch.zeros(513),
        torch.full((513,), -0.25),
        torch.cat([torch.full((512,), 1e-3), torch.tensor([1e30])]),
        torch.full((7,), 1e-42),
        torch.tensor([3e38, -3e38]),
    ],
    ids=["zeros", "constant", "outlier", "denormal", "huge"],
)
def test_awkward_vectors_obey_the_bound(name: str, rounding: str, vector: Tensor) -> None:
    one = make(name, keep=0.1, rounding=rounding)
    back = there_and_back(one, vector)
    assert bool(torch.isfinite(back).all())
    assert bool(((back - vector).abs() <= bound(one, vector)).all())
    if not vector.any():
        assert not back.any()


def test_bounds_mean_something() -> None:
    """Checked by hand: a bucket whose largest magnitude is 1 has steps of 1/127, 1/7 and 1."""
    vector = torch.tensor([1.0, -0.5, 0.3, 0.0])
    for name, levels in {"int8": 127, "int4": 7, "ternary": 1}.items():
        assert bound(make(name), vector).max() == pytest.approx(1 / levels, rel=1e-3)
        assert bound(make(name, rounding="nearest"), vector).max() == pytest.approx(0.5 / levels, rel=1e-3)
    assert there_and_back(make("ternary", rounding="nearest"), vector).tolist() == [1, 0, 0, 0]
    assert there_and_back(make("topk", keep=0.5), vector).tolist() == [1, -0.5, 0, 0]
    assert there_and_back(make("stc", keep=0.5), vector).tolist() == [0.75, -0.75, 0, 0]


@pytest.mark.parametrize("name", UNBIASED)
def test_stochastic_codecs_are_unbiased_over_10000_draws(name: str) -> None:
    x = torch.tensor([0.9, -0.31, 0.02, 0.0, -1e-4, 0.5, -0.77, 0.123])
    one = make(name, bucket=len(x))
    assert one.unbiased
    draws = there_and_back(one, x.repeat(10_000)).view(10_000, -1).double()
    allowed = 5 * draws.std(0) / 100 + 1e-6
    assert bool(((draws.mean(0) - x).abs() <= allowed).all())
    assert not make(name, rounding="nearest").unbiased


@pytest.mark.parametrize("name", ["ternary", "sign"])
def test_nearest_rounding_is_biased_which_the_test_above_would_see(name: str) -> None:
    one = make(name, bucket=4, rounding="nearest")
    assert there_and_back(one, torch.tensor([1.0, 0.1, 0.1, 0.1]))[1] != pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int4", "ternary", "topk", "stc"])
def test_zero_stays_zero_so_sparsity_survives(name: str, rounding: str) -> None:
    vector = noise(2000)
    vector[rng(1).random(2000) < 0.9] = 0
    back = there_and_back(make(name, keep=0.5, rounding=rounding), vector)
    assert not back[vector == 0].any()
    assert back.any()


def test_codes_do_not_wrap_around() -> None:
    """A code of 200 put into a signed byte would come back as -56."""
    ramp = torch.arange(-200.0, 201.0)
    back = there_and_back(make("int8", rounding="nearest"), ramp)
    assert back[-1] == pytest.approx(200, rel=0.01)
    assert back[0] == pytest.approx(-200, rel=0.01)
    assert bool((back.diff() >= 0).all())


class Highest:
    """A generator whose every draw is the largest below one: 127 plus it rounds to 128 in float32."""

    def random(self, size: int, dtype: type) -> np.ndarray:
        return np.full(size, np.nextafter(dtype(1), dtype(0)), dtype)


@pytest.mark.parametrize(("name", "bucket"), [("int8", 4), ("int4", 4), ("ternary", 4), ("sign", 4)])
def test_the_largest_entry_survives_the_unluckiest_draw(name: str, bucket: int) -> None:
    one, vector = make(name, bucket=bucket), torch.tensor([127.0, 1.0, 0.0, -127.0])
    back = one.decode(one.encode(vector, Highest()), 4)  # type: ignore[arg-type]
    assert bool(((back - vector).abs() <= bound(one, vector)).all())


@pytest.mark.parametrize("name", ["int8", "int4", "ternary"])
def test_the_largest_entry_is_right_on_average_though_its_scale_is_rounded(name: str) -> None:
    """100.2 lies between the scales 100 and 100.5: cut off at the nearer, it would be 100 in every draw."""
    one, rng, vector = make(name, bucket=2), np.random.default_rng(0), torch.tensor([100.2, 0.0] * 20_000)
    back = one.decode(one.encode(vector, rng), len(vector))[::2].double()
    assert float(back.mean()) == pytest.approx(100.2, abs=5 * float(back.std()) / 20_000**0.5)


def test_each_bucket_has_its_own_scale() -> None:
    vector = torch.cat([torch.full((64,), 1e-4), torch.full((64,), 100.0)])
    small = there_and_back(make("int8", bucket=64, rounding="nearest"), vector)[:64]
    assert torch.allclose(small, vector[:64], rtol=0.01)
    assert not there_and_back(make("int8", bucket=128, rounding="nearest"), vector)[:64].any()


def test_the_ternary_magnitude_is_the_mean_of_what_is_kept() -> None:
    vector = torch.zeros(1000)
    vector[:10] = torch.arange(1.0, 11.0)
    vector[10:20] = 1e-3
    back = there_and_back(make("stc", keep=0.01), vector)
    assert back[:10].tolist() == [5.5] * 10
    assert not back[10:].any()


@pytest.mark.parametrize("name", ["sign", "stc"])
def test_a_mean_magnitude_travels_as_the_nearest_bfloat16(name: str) -> None:
    """torch rounds to the nearest: cut off instead, every entry would be too small by 0.2 % on average."""
    one = make(name, keep=1.0, bucket=64, rounding="nearest")
    for seed in range(40):
        vector = noise(64, seed)
        assert set(there_and_back(one, vector).abs().tolist()) == {vector.abs().double().mean().bfloat16().item()}


def test_scales_are_torchs_bfloat16_to_the_nearest_and_the_next_one_up() -> None:
    scales = noise(10_000).abs() * 2.0 ** noise(10_000, seed=1).mul(20).round()
    nearest, up = (unpack_scales(pack_scales(scales.numpy(), up=up), len(scales)) for up in (False, True))
    assert np.array_equal(nearest, scales.bfloat16().float().numpy())
    assert (up >= scales.numpy()).all() and (up / scales.numpy() < 1 + 2**-7).all()
    exact = scales.bfloat16().float().numpy()
    assert np.array_equal(unpack_scales(pack_scales(exact, up=True), len(exact)), exact)


def test_top_k_keeps_the_largest() -> None:
    vector = noise(1000)
    kept = there_and_back(make("topk", keep=0.05, values="fp32"), vector)
    largest = vector.abs().topk(50).indices
    assert int((kept != 0).sum()) == 50
    assert torch.equal(kept[largest], vector[largest])


# --- lengths ---


@pytest.mark.parametrize("size", [1, 2, 5, 7, 512, 513, 21_840])
@pytest.mark.parametrize("zstd", [False, True])
def test_dense_payloads_are_as_long_as_the_formula_says(size: int, zstd: bool) -> None:
    scales = 2 * -(-size // 512)
    expected = {
        "fp32": 4 * size,
        "fp16": 2 * size,
        "int8": scales + size,
        "int4": scales + -(-size // 2),
        "ternary": scales + -(-size // 5),
        "sign": scales + -(-size // 8),
    }
    for name, length in expected.items():
        payload = pack(make(name), noise(size), samples=1, rng=rng(), zstd=zstd)
        assert len(payload) <= HEADER + length if zstd else len(payload) == HEADER + length


def test_zstd_shortens_packed_codes_and_never_lengthens() -> None:
    update = noise(20_000) ** 3
    for name in BUILT_IN:
        plain, packed = (pack(make(name), update, samples=1, rng=rng(), zstd=z) for z in (False, True))
        assert len(packed) <= len(plain)
        assert torch.equal(unpack(plain, make(name), size=20_000)[1][0], unpack(packed, make(name), size=20_000)[1][0])
    ternary = make("ternary", rounding="nearest")
    floats = there_and_back(ternary, update).numpy().tobytes()
    assert len(pack(ternary, update, samples=1, rng=rng(), zstd=True)) < len(zstandard.compress(floats))


@pytest.mark.parametrize("keep", [1 / 2, 1 / 10, 1 / 25, 1 / 100, 1 / 1000])
def test_positions_cost_little_more_than_their_entropy(keep: float) -> None:
    size = 100_000
    body = make("stc", keep=keep).encode(noise(size), rng())
    entropy = -size * (keep * np.log2(keep) + (1 - keep) * np.log2(1 - keep)) / 8
    signs = keep * size / 8
    assert entropy + signs < len(body) < 1.08 * entropy + signs + 10


def test_index_cost_eats_the_saving_of_a_half_dense_update_unless_packed() -> None:
    size = 10_000
    body = make("topk", keep=0.5, values="fp32").encode(noise(size), rng())
    naive = size // 2 * (4 + 4)
    assert naive == 4 * size
    assert len(body) <= 4 * size // 2 + size // 8 + 4


def test_clustered_and_spread_positions_choose_their_own_code() -> None:
    assert pack_positions(np.arange(800), 10_000)[0] == 0
    assert len(pack_positions(np.arange(800), 10_000)) == 1 + 100
    assert pack_positions(np.arange(0, 10_000, 100), 10_000)[0] >= 5


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))))
def test_positions_come_back(case: tuple[int, set[int]]) -> None:
    size, chosen = case
    positions = np.array(sorted(chosen))
    packed = pack_positions(positions, size)
    back, used = unpack_positions(packed + b"\xff\x00", len(positions), size)
    assert back.tolist() == positions.tolist()
    assert used == len(packed)


@pytest.mark.parametrize("count", [0, 1, 127, 128, 16_383, 16_384, 2**31])
def test_counts_come_back(count: int) -> None:
    packed = pack_count(count)
    assert unpack_count(packed + b"\x80", count) == (count, len(packed))
    with pytest.raises(PayloadError, match="at most"):
        unpack_count(packed, count - 1)


# --- error feedback ---


def feed(one: Codec, updates: list[Tensor], feedback: bool) -> tuple[Tensor, Tensor]:
    """Sum of what was decoded, and the last residual."""
    total, residual = torch.zeros_like(updates[0]), torch.zeros_like(updates[0])
    for step, update in enumerate(updates):
        payload, after = compensate(update, residual, one, rng(step), samples=1)
        total += unpack(payload, one, size=len(update))[1][0]
        residual = after if feedback else residual
    return total, residual


@pytest.mark.parametrize("name", ["topk", "stc", "sign", "ternary", "int4"])
def test_error_feedback_makes_the_sum_track_the_true_sum(name: str) -> None:
    drift = noise(400, seed=99) ** 3
    updates = [drift + noise(400, seed) for seed in range(200)]
    one, true = make(name, keep=0.05, rounding="nearest"), torch.stack(updates).sum(0)
    total, residual = feed(one, updates, feedback=True)
    assert torch.allclose(total + residual, true, rtol=1e-3, atol=1e-2)
    assert (true - total).norm() < 0.25 * true.norm()


def test_top_k_alone_loses_what_is_always_small() -> None:
    drift = torch.full((400,), 0.1)
    drift[:20] = 1.0
    updates = [drift] * 200
    one, true = make("topk", keep=0.05), 200 * drift
    alone, _ = feed(one, updates, feedback=False)
    compensated, _ = feed(one, updates, feedback=True)
    assert not alone[20:].any()
    assert (true - compensated).norm() < 0.2 * (true - alone).norm()


@pytest.mark.parametrize(("name", "growth"), [("ternary", 3), ("sign", 1e6)])
def test_error_feedback_and_one_bit_stochastic_rounding_do_not_mix(name: str, growth: float) -> None:
    """Right on average, but its error is larger than what it is given: the residual grows instead of shrinking."""
    updates = [noise(400, seed) for seed in range(40)]
    stochastic, nearest = (make(name, rounding=rounding) for rounding in ("stochastic", "nearest"))
    held = feed(nearest, updates, feedback=True)[1].norm()
    assert held < 2 * updates[0].norm()
    assert feed(stochastic, updates, feedback=True)[1].norm() > growth * held


def test_compensate_leaves_its_inputs_alone_so_each_client_keeps_its_own_residual() -> None:
    update, residual = noise(50), noise(50, seed=1)
    before = update.clone(), residual.clone()
    payload, after = compensate(update, residual, make("stc", keep=0.1), rng(), samples=4)
    assert torch.equal(update, before[0])
    assert torch.equal(residual, before[1])
    assert torch.allclose(unpack(payload, make("stc", keep=0.1), size=50)[1][0] + after, update + residual)


def test_int8_weights_lose_small_updates_that_int8_updates_keep() -> None:
    """The negative control: weights are large, one round changes them by less than a step of their grid."""
    weights, update = 5 * noise(512), 1e-3 * noise(512, seed=1)
    one = make("int8", rounding="nearest")
    of_weights = there_and_back(one, weights + update) - weights
    of_update = there_and_back(one, update)
    assert (of_weights - update).norm() > update.norm()
    assert (of_update - update).norm() < 0.05 * update.norm()


# --- codecs of one's own, settings ---


@pytest.fixture
def registry() -> object:
    before = dict(CODECS)
    yield
    CODECS.clear()
    CODECS.update(before)


def test_one_small_class_adds_a_codec(registry: object) -> None:
    @codec("halves")
    class Halves(Codec):
        def encode(self, vector: Tensor, rng: np.random.Generator) -> bytes:
            return (vector * 2).round().to(torch.int8).numpy().tobytes()

        def decode(self, body: bytes, size: int) -> Tensor:
            if len(body) != size:
                raise PayloadError("wrong length")
            return torch.frombuffer(bytearray(body), dtype=torch.int8) / 2

    payload = pack(make("halves"), torch.tensor([0.5, -1.0]), samples=2, rng=rng())
    assert unpack(payload, make("halves"), size=2)[1][0].tolist() == [0.5, -1.0]
    assert Halves.id >= 128
    assert len(payload) == HEADER + 2
    kept = make("topk", keep=0.5, values="halves")
    assert there_and_back(kept, torch.tensor([0.1, 3.0])).tolist() == [0, 3]


def test_a_built_in_name_is_not_replaced(registry: object) -> None:
    with pytest.raises(ValueError, match="codec 'int8' is built in"):
        codec("int8")(Codec)


def test_ids_are_distinct_and_part_of_the_format() -> None:
    assert [CODECS[name].id for name in BUILT_IN] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"name": "zip"}, "codec must be one of fp32, .*, got 'zip'"),
        ({"keep": 0}, "keep must be above 0 and at most 1, got 0"),
        ({"keep": 1.5}, "keep must be above 0 and at most 1, got 1.5"),
        ({"keep": float("nan")}, "keep must be above 0"),
        ({"bucket": 0}, "bucket must be a whole number, at least 1, got 0"),
        ({"rounding": "up"}, "rounding must be one of stochastic, nearest, got 'up'"),
        ({"values": "stc"}, "values must be one of fp32, .*, got 'stc'"),
    ],
)
def test_a_wrong_setting_is_named(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"name": "topk", **setting})


def test_the_same_generator_gives_the_same_payload() -> None:
    for name in BUILT_IN:
        first, second = (pack(make(name), noise(100), samples=1, rng=rng(5)) for _ in range(2))
        assert first == second


# --- what is refused ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_update_that_is_not_finite_is_not_sent(value: float) -> None:
    update = torch.tensor([1.0, value])
    with pytest.raises(ValueError, match="NaN or infinity"):
        pack(make("topk"), update, samples=1, rng=rng())
    with pytest.raises(ValueError, match="NaN or infinity"):
        compensate(update, torch.zeros(2), make("topk"), rng(), samples=1)


@pytest.mark.parametrize("name", ["fp32", "fp16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_payload_that_is_not_finite_is_refused(name: str, value: float) -> None:
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[name]
    body = torch.tensor([1.0, value], dtype=dtype).numpy().tobytes()
    with pytest.raises(PayloadError, match="NaN or infinity"):
        unpack(forge(make(name), body), make(name), size=2)


def test_a_scale_that_is_not_finite_is_refused() -> None:
    for scale in (b"\x80\x7f", b"\xc0\x7f", b"\x80\xbf"):  # infinity, NaN, -1 as bfloat16
        with pytest.raises(PayloadError, match="scale"):
            unpack(forge(make("int8"), scale + b"\x00"), make("int8"), size=1)


def test_damage_and_strangers_are_refused_with_a_reason() -> None:
    one = make("int8")
    good = pack(one, noise(100), samples=9, rng=rng())
    cases = {
        "truncated: 0 bytes are left": b"",
        "truncated: 13 bytes are left": good[:13],
        "truncated: 102 bytes announced, 101 came": good[:-1],
        "1 bytes follow the last frame": good + b"\0",
        "the checksum does not match": good[:-1] + bytes([good[-1] ^ 1]),
        r"codec 1 with flags 0 came, int8 \(3\) was agreed": pack(make("fp32"), noise(100), samples=9, rng=rng()),
        "oversized: a body of 204 bytes, 102 is the most": pack(
            make("int8", bucket=1), noise(68), samples=9, rng=rng()
        ),
        "99 bytes of values must come|bytes of values": forge(one, good[14:-1]),
    }
    for reason, payload in cases.items():
        with pytest.raises(PayloadError, match=reason):
            unpack(payload, one, size=100)


def test_bits_come_whole_and_with_padding_of_zeros() -> None:
    mask = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 0, 1, 1])
    body = Bits().encode(mask, rng())
    assert body == bytes([0b10011010, 0b11000000]) and torch.equal(Bits().decode(body, 10), mask)
    for wrong, reason in ((b"\x9a\xc1", "padding"), (b"\x9a", "2 bytes"), (body + b"\0", "2 bytes")):
        with pytest.raises(PayloadError, match=reason):
            Bits().decode(wrong, 10)
    with pytest.raises(PayloadError, match="padding"):
        make("sign").decode(pack_scales(np.ones(1, np.float32), up=True) + b"\x9a\xc1", 10)


def test_frames_follow_one_another() -> None:
    one = make("fp32")
    first, second = (pack(one, noise(10, seed), samples=6, rng=rng()) for seed in (1, 2))
    samples, vectors = unpack_all(first + second, [(one, 10)] * 2)
    assert samples == 6
    assert torch.equal(torch.stack(vectors), torch.stack([noise(10, 1), noise(10, 2)]))
    for payload, count in ((first, 2), (first + second, 1), (first + second, 3)):
        with pytest.raises(PayloadError):
            unpack_all(payload, [(one, 10)] * count)
    other = pack(one, noise(10), samples=7, rng=rng())
    with pytest.raises(PayloadError, match="6 and 7 samples"):
        unpack_all(first + other, [(one, 10)] * 2)


def bombs() -> dict[str, bytes]:
    zeros = zstandard.compress(bytes(2**26))
    streamed = zstandard.ZstdCompressor().compressobj()
    unsaid = streamed.compress(bytes(2**26)) + streamed.flush()
    lying = zstandard.MAGIC_NUMBER.to_bytes(4, "little") + b"\xe0" + (2**62).to_bytes(8, "little") + b"\x01\0\0"
    good = zstandard.compress(bytes(400))
    return {
        "declared": zeros,
        "size unsaid": unsaid,
        "lying": lying,
        "not zstd": b"\x01" * 20,
        "empty": b"",
        "two frames": good + good,
        "trailing": good + b"\0",
        "too few": zstandard.compress(bytes(399)),
    }


@pytest.mark.parametrize(("kind", "body"), bombs().items())
def test_a_decompression_bomb_allocates_nothing(kind: str, body: bytes) -> None:
    one, payload = make("fp32"), b""
    payload = forge(one, body[:400], flags=1) if kind in ("declared", "size unsaid") else forge(one, body, flags=1)
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError):
            unpack(payload, one, size=100)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_whole_bomb_that_is_short_enough_is_refused_by_what_it_declares() -> None:
    one, body = make("fp32"), zstandard.compress(bytes(2**26))
    size = len(body) // 4 + 1
    with pytest.raises(PayloadError, match=f"declares {2**26} bytes, {4 * size} is the most"):
        unpack(forge(one, body, flags=1), one, size=size)


# --- fuzzing: a PayloadError or finite numbers of the right shape, never anything else ---

SIZE = 60
SETTINGS = settings(max_examples=3000, deadline=None, derandomize=True)


def survives(payload: bytes, one: Codec) -> list[Tensor] | None:
    try:
        _, vectors = unpack(payload, one, size=SIZE)
    except PayloadError as error:
        assert str(error)
        return None
    assert all(v.shape == (SIZE,) and v.dtype == torch.float32 and torch.isfinite(v).all() for v in vectors)
    return vectors


@SETTINGS
@given(st.sampled_from(BUILT_IN), st.binary(max_size=300))
def test_random_bytes_are_refused(name: str, payload: bytes) -> None:
    assert survives(payload, make(name, keep=0.2)) is None


@SETTINGS
@given(st.sampled_from(BUILT_IN), st.binary(max_size=270), st.sampled_from([0, 0, 0, 1, 2]))
def test_random_bodies_with_a_right_checksum_do_no_harm(name: str, body: bytes, flags: int) -> None:
    one = make(name, keep=0.2, bucket=16)
    survives(forge(one, body[: one.limit(SIZE)], flags=flags), one)


@SETTINGS
@given(st.sampled_from(BUILT_IN), st.integers(0, 9), st.booleans(), st.data())
def test_a_damaged_payload_is_refused(name: str, seed: int, zstd: bool, data: st.DataObject) -> None:
    one = make(name, keep=0.2, bucket=16)
    good = pack(one, noise(SIZE, seed).round(), samples=5, rng=rng(seed), zstd=zstd)
    assert survives(good, one) is not None
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    flipped = bytearray(good)
    flipped[bit // 8] ^= 1 << bit % 8
    cut = data.draw(st.integers(0, len(good) - 1))
    for damaged in (bytes(flipped), good[:cut], good + good[:cut] + b"\0"):
        assert survives(damaged, one) is None


@SETTINGS
@given(st.sampled_from(BUILT_IN), st.integers(0, 9), st.booleans(), st.data())
def test_a_damaged_body_with_a_right_checksum_does_no_harm(
    name: str, seed: int, zstd: bool, data: st.DataObject
) -> None:
    one = make(name, keep=0.2, bucket=16)
    good = pack(one, noise(SIZE, seed).round(), samples=5, rng=rng(seed), zstd=zstd)
    body = bytearray(good[HEADER:])
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    survives(forge(one, bytes(body[: data.draw(st.integers(0, len(body)))]), flags=good[1]), one)
    survives(forge(one, bytes(body), flags=good[1]), one)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(st.sampled_from(BUILT_IN), st.sampled_from(BUILT_IN), st.integers(1, 80))
def test_another_codec_or_another_size_is_refused(sent: str, agreed: str, size: int) -> None:
    payload = pack(make(sent, keep=0.5), noise(size), samples=5, rng=rng())
    if sent != agreed or (size != SIZE and sent in ("fp32", "fp16")):
        assert survives(payload, make(agreed, keep=0.5)) is None
    elif size == SIZE:
        assert survives(payload, make(agreed, keep=0.5)) is not None
