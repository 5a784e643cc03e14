"""What is wrong with data, splits, constants, devices and codecs is said in one line that names it, before training."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import fedlab_kit as fk
from fedlab_kit import catalog
from fedlab_kit.clients import client_accuracy, mean_over
from fedlab_kit.data import SPLITS, Dataset, Preprocess, Split, load
from fedlab_kit.deployment.evaluate import evaluate, side_by_side
from fedlab_kit.deployment.score import Model
from fedlab_kit.federation.server import RoundRecord
from fedlab_kit.lab.client_figures import accuracy_of_each
from fedlab_kit.lab.client_figures import client_accuracy as draw
from fedlab_kit.lab.leaderboard import worst_client
from fedlab_kit.lab.plot import to_figure
from fedlab_kit.lab.text import comparison, outcome
from fedlab_kit.run import absent
from fedlab_kit.wire import CODECS, NotFinite, PayloadError, compensate, make, pack, unpack

SMALL = fk.Experiment(
    dataset="blobs", partition="dirichlet", model="logistic", clients=4, clients_per_round=4, rounds=2
)
SITES = SMALL.replace(dataset="blobs_at_sites", partition="site", clients=3, clients_per_round=3)
NONE = Split(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))


@pytest.fixture(autouse=True)
def registry():
    """What a test registers is gone after it."""
    tables = catalog.DATASETS, catalog.MODELS, CODECS
    saved = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, saved, strict=True):
        table.clear()
        table.update(before)


def registered(name: str, base: str = "blobs", **changes: object) -> str:
    """The name of a data set that is another one with some fields changed."""
    catalog.dataset(name)(lambda: replace(load(base), name=name, **changes))
    return name


# gaps in the data


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gap_is_named_by_split_row_and_column(split, value):
    part = getattr(load("clinics"), split)
    x = part.x.clone()
    x[3, 1] = value
    message = rf"^dataset 'gap', split {split}: x must be finite, row 3, column dose is {value}: fill it in or "
    with pytest.raises(ValueError, match=message):
        load(registered("gap", "clinics", **{split: replace(part, x=x)}))
    with pytest.raises(ValueError, match=message):
        fk.train(SMALL.replace(dataset="gap"))


def test_a_gap_in_a_series_and_in_a_table_without_names_is_named_by_its_place():
    x = torch.zeros(4, 3, 5)
    x[2, 1, 4] = float("nan")
    y = torch.zeros(4, dtype=torch.int64)
    for values, where in ((x, r"sample 2, place \[1, 4\]"), (x[:, 1], "row 2, column 4")):
        with pytest.raises(ValueError, match=f"split train: x must be finite, {where} is nan"):
            Dataset("gap", ("a",), *[Split(values, y)] * 4, Preprocess(0.0, 1.0))


def test_numbers_whose_sum_is_too_large_are_no_gap():
    split = Split(torch.full((4, 2), 3e38), torch.zeros(4, dtype=torch.int64))
    assert Dataset("large", ("a",), *[split] * 4, Preprocess(0.0, 1.0)).shape == (2,)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ((float("nan"), 1.0), "mean must be a finite number or a row of them, got nan"),
        (((0.0, float("inf")), 1.0), r"mean must be a finite number or a row of them, got \(0.0, inf\)"),
        ((0.0, float("inf")), "std must be a finite number or a row of them, got inf"),
        ((0.0, 1e-60), "std must be above 0, got 1e-60"),
        ((1e60, 1.0), r"mean must be a finite number or a row of them, got 1e\+60"),
        (((0.0, 0.0), (1.0, 1.0, 1.0)), "mean and std must be as many numbers, got 2 and 3"),
        ((((0.0, 0.0), (0.0, 0.0)), 1.0), "mean must be a finite number or a row"),
    ],
)
def test_constants_that_no_float_can_hold_are_refused(constants, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Preprocess(*constants)


def test_what_the_functions_of_a_data_set_and_a_model_do_wrong_bears_their_names():
    @catalog.dataset("broken")
    def broken():
        return {}["age"]

    with pytest.raises(ValueError, match=r"^dataset 'broken' could not be made: KeyError: 'age'$"):
        fk.train(SMALL.replace(dataset="broken"))

    @catalog.model("poisoned")
    def poisoned(shape, classes):
        layer = torch.nn.Linear(6, classes)
        layer.weight.data[0, 0] = float("nan")
        return layer

    with pytest.raises(ValueError, match=r"^model 'poisoned' must begin with finite weights, weight holds NaN"):
        fk.train(SMALL.replace(model="poisoned"))


# empty splits


@pytest.mark.parametrize(("split", "changes"), [("train", {}), ("validation", {}), ("public", {"strategy": "feddf"})])
def test_an_empty_split_is_named_where_training_needs_it(split, changes):
    registered("empty", **{split: NONE})
    for play in (fk.train, lambda experiment: next(fk.rounds(experiment))):
        with pytest.raises(ValueError, match=rf"^dataset 'empty': split {split} must have at least one sample here"):
            play(SMALL.replace(dataset="empty", **changes))


def test_an_empty_split_that_nobody_needs_is_allowed_and_named_where_it_is_opened():
    run = fk.train(SMALL.replace(dataset=registered("spare", public=NONE, test=NONE)))
    artifact = fk.compress(run, fk.Recipe(dtype="int8"))
    for opened in (run.test, artifact.test):
        with pytest.raises(ValueError, match=r"^dataset 'spare': split test must have at least one sample here"):
            opened()


def test_an_empty_split_of_sites_is_named_in_the_evaluation():
    nobody = replace(load("clinics").test, x=torch.zeros(0, 4), y=NONE.y, site=NONE.y)
    run = fk.train(SITES.replace(dataset=registered("unseen", "clinics", test=nobody)))
    with pytest.raises(ValueError, match=r"^dataset 'unseen': split test must"):
        evaluate(fk.compress(run, fk.Recipe()), split="test")


# clients that cannot be measured


def record(correct: tuple[int, ...], total: tuple[int, ...], answered: tuple[int, ...] = ()) -> RoundRecord:
    clients, hits = {"cohort": answered, "answered": answered}, {"correct": correct, "total": total}
    return RoundRecord(1, 0.5, 0.4, 0.6, 1.0, 0, 0, 0.0, **clients, **hits)


def test_accuracy_is_the_mean_over_the_classes_that_were_measured():
    mix = np.array([[0.25, 0.75, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]])
    mean, known = mean_over(mix, np.array([8, 3, 0]), np.array([10, 6, 0]))
    assert known == pytest.approx([1, 0.5, 0])
    assert mean[:2] == pytest.approx([0.25 * 0.8 + 0.75 * 0.5, (0.2 * 0.8 + 0.3 * 0.5) / 0.5]) and np.isnan(mean[2])


def test_the_interval_leaves_open_what_was_not_measured():
    """Whatever the model does on the class that nobody held out, the truth is inside; nothing known, no figure."""
    e = SMALL.replace(partition="shards", clients=6, clients_per_round=4)
    mean, low, high = client_accuracy(e, record((500, 500, 0), (1000, 1000, 0)))
    for client, shard in enumerate(fk.train(e).shards):
        other = float((load("blobs").train.y[shard] == 2).double().mean())
        if other == 1:
            assert np.isnan([mean[client], low[client], high[client]]).all()
        else:
            assert mean[client] == pytest.approx(0.5)
            for there in (0.0, 1.0):
                assert low[client] - 1e-9 <= 0.5 * (1 - other) + other * there <= high[client] + 1e-9


@pytest.mark.parametrize(("total", "truth"), [(2, (0.7, 0.9, 0.5)), (5, (0.9, 0.95, 0.8)), (20, (0.97, 0.9, 0.95))])
def test_the_interval_of_a_client_holds_the_true_accuracy_as_often_as_it_says(total, truth, monkeypatch):
    mix = np.array([[0.4, 0.3, 0.3], [0.2, 0.2, 0.6]])
    monkeypatch.setattr("fedlab_kit.clients.client_mix", lambda e, count: mix)
    rng, held = np.random.default_rng(4), np.zeros(2)
    for _ in range(1000):
        _, low, high = client_accuracy(SMALL, record(tuple(rng.binomial(total, truth)), (total,) * 3))
        held += (low <= mix @ truth) & (mix @ truth <= high)
    assert (held >= 940).all()


def test_readers_of_client_accuracy_pass_over_those_who_have_none():
    shown = draw([float("nan"), 0.5, 0.75], [float("nan"), 0.4, 0.7], [float("nan"), 0.6, 0.8])
    assert shown.alt == (
        "Accuracy of each of 3 clients: mean 62.5 %, worst client 1 with 50.0 %. Not estimable: 1 of them."
    )
    [axes] = to_figure(shown).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]
    assert axes.get_xlabel() == "Client, worst first (1 of 3 not estimable)"
    assert "not estimable" in accuracy_of_each(SMALL, record((0, 0, 0), (0, 0, 0)))


def test_sites_without_held_out_samples_are_not_estimable_anywhere():
    known = load("blobs_at_sites")
    part = known.validation
    seen = Split(part.x[part.site != 0], part.y[part.site != 0], part.site[part.site != 0])
    run = fk.train(SITES.replace(dataset=registered("unseen", "blobs_at_sites", validation=seen, test=seen)))
    mean, low, high = run.client_accuracy()
    assert np.isnan([mean[0], low[0], high[0]]).all() and not np.isnan(mean[1:]).any()
    table = side_by_side(run.experiment)
    assert table.patients.iloc[0] == 0 and table.iloc[0, 1:].isna().all() and not table.iloc[1:].isna().any(axis=None)
    shown = comparison(run, run, ("one", "other"))
    assert f"{known.sites[1 + int(mean[1:].argmin())]}: {100 * mean[1:].min():.1f} %" in shown
    assert "1 not estimable" in shown
    right = seen.site.numpy() != 2
    assert worst_client(run.experiment, right) == 0.0 and worst_client(run.experiment, right | True) == 1.0


# clients that never took part


def test_who_never_took_part_is_named_in_few_words():
    e = SMALL.replace(rounds=1)
    for clients, answered, said in (
        (4, (0, 1, 2, 3), ""),
        (4, (0, 1, 2), "client 3 never took part"),
        (8, (0, 1, 2, 4, 5, 6), "clients 3 and 7 never took part"),
        (6, (0, 4, 5), "clients 1, 2 and 3 never took part"),
        (1200, (0,), "1,199 of 1,200 clients never took part"),
    ):
        assert absent(e.replace(clients=clients, clients_per_round=1), [record((1,), (1,), answered)]) == said
    assert absent(SMALL, [record((1,), (1,), (0,))]) == ""  # a run that is not over


def test_a_client_that_is_always_late_is_in_the_note_and_in_the_words_of_the_bench():
    run = fk.train(SMALL.replace(devices="unequal", deadline=0.2, model="mlp", rounds=3))
    silent = set(range(4)) - {client for r in run.records for client in r.answered}
    assert 0 < len(silent) < 4 and all(client in r.cohort for client in silent for r in run.records)
    assert "never took part" in run.note and all(str(client) in run.note for client in silent)
    assert outcome(run).endswith(f"{run.note[0].upper()}{run.note[1:]}.")
    assert fk.train(SMALL).note == "" and "took part" not in outcome(fk.train(SMALL))


# the device


def test_a_missing_gpu_is_named_and_the_experiment_stays_readable(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elsewhere = fk.Experiment(**{**SMALL.changes(), "device": "cuda"})
    for play in (fk.train, lambda experiment: next(fk.rounds(experiment))):
        with pytest.raises(ValueError, match=r"^device must be cpu on this machine: .* got 'cuda'$"):
            play(elsewhere)
    bench = fk.Bench(elsewhere)
    bench.run(block=True)
    assert "device must be cpu on this machine" in bench.status


# normalization per channel


def toy(x: Tensor, *constants: object) -> Dataset:
    y = torch.arange(len(x)) % 2
    return Dataset("toy", ("no", "yes"), *[Split(x, y)] * 4, Preprocess(*constants))


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 3, 3), (8, 8), (4, 9), (1, 5, 5), (5,)])
def test_constants_go_along_the_first_axis_of_a_sample(shape):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (6, *shape)).astype(np.float32)
    mean, std = rng.uniform(0, 100, shape[0]), rng.uniform(1, 9, shape[0])
    expected = np.stack([(raw[:, c] - np.float32(mean[c])) / np.float32(std[c]) for c in range(shape[0])], axis=1)
    for given in (tuple, list, np.asarray, torch.tensor):
        known = toy(torch.from_numpy(raw), given(mean.tolist()), given(std.tolist()))
        assert np.allclose(known.preprocess(known.train.x).numpy(), expected, rtol=1e-6, atol=1e-6)
        assert Preprocess.from_dict(json.loads(json.dumps(known.preprocess.to_dict()))) == known.preprocess


@pytest.mark.parametrize(("shape", "count"), [((3, 8, 8), 8), ((4, 9), 9), ((5,), 1), ((5,), 4), ((2, 3, 4), 1)])
def test_constants_that_fit_nothing_are_refused(shape, count):
    message = rf"^dataset 'toy': preprocess must have one number, .* samples \[{shape[0]}.*\], got {count} numbers$"
    for constants in (((0.0,) * count, 1.0), (0.0, (1.0,) * count)):
        with pytest.raises(ValueError, match=message):
            toy(torch.zeros(4, *shape), *constants)


@pytest.mark.parametrize(("shape", "dtype"), [((3, 8, 8), torch.uint8), ((8, 8), torch.float32)])
def test_an_exported_file_normalizes_per_channel(shape, dtype):
    """Against numpy: one linear layer, so that the whole file can be computed by hand."""
    rng = np.random.default_rng(1)
    scale = 1.0 + np.arange(shape[0])
    raw = rng.integers(0, 50, (60, *shape)) * scale.reshape(-1, *[1] * (len(shape) - 1))
    mean, std = tuple(25 * scale), tuple(14 * scale)
    catalog.dataset("colour")(lambda: replace(toy(torch.from_numpy(raw).to(dtype), mean, std), name="colour"))
    run = fk.train(SMALL.replace(dataset="colour"))
    artifact = fk.compress(run, fk.Recipe())
    x = raw.astype(np.uint8 if dtype == torch.uint8 else np.float32)
    prepared = np.stack([(x[:, c] - mean[c]) / std[c] for c in range(shape[0])], axis=1).reshape(60, -1)
    weight, bias = (p.detach().numpy().astype(np.float64) for p in run.model.parameters())
    logits = prepared @ weight.T + bias
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.allclose(artifact.predict(x), expected, atol=1e-5)
    scored = Model(artifact.path).score(x)
    assert [row["problem"] for row in scored] == [""] * 60
    assert np.allclose([row["probability"] for row in scored], expected.max(1), atol=1e-5)


# a codec of the user's


def codec_of(encode=None, decode=None, unbiased: bool = False, **more: object) -> None:
    """Register "mine": plain float32, apart from what is given."""
    plain = {
        "encode": encode or (lambda self, vector, rng: vector.numpy().tobytes()),
        "decode": decode or (lambda self, body, size: torch.from_numpy(np.frombuffer(body, np.float32).copy())),
        "unbiased": property(lambda self: unbiased),
    }
    fk.codec("mine")(type("Mine", (fk.Codec,), {**plain, **more}))


def numbers(body: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(body, np.float32).copy())


def fails(*_: object) -> None:
    raise KeyError("scale")


DECODES = {
    "an array": (lambda self, body, size: np.frombuffer(body, np.float32), "got ndarray"),
    "doubles": (lambda self, body, size: numbers(body).double(), "got torch.float64 on cpu"),
    "halves": (lambda self, body, size: numbers(body).half(), "got torch.float16 on cpu"),
    "nothing": (lambda self, body, size: None, "got NoneType"),
    "text": (lambda self, body, size: "1, 2", "got str"),
    "a list": (lambda self, body, size: numbers(body).tolist(), "got list"),
    "too few": (lambda self, body, size: numbers(body)[:-1], r"got \[20\]"),
    "too many": (lambda self, body, size: torch.cat([numbers(body), torch.zeros(1)]), r"got \[22\]"),
    "a column": (lambda self, body, size: numbers(body)[:, None], r"got \[21, 1\]"),
    "elsewhere": (lambda self, body, size: numbers(body).to("meta"), "got torch.float32 on meta"),
    "a gradient": (lambda self, body, size: numbers(body).requires_grad_(), "requires a gradient"),
    "sparse": (lambda self, body, size: numbers(body).to_sparse(), "got one that is sparse"),
    "NaN": (lambda self, body, size: numbers(body) * float("nan"), "decode gave NaN or infinity"),
    "infinity": (lambda self, body, size: numbers(body) + float("inf"), "decode gave NaN or infinity"),
    "an exception": (fails, "decode raised KeyError on what encode gave: 'scale'"),
    "a refusal": (lambda self, body, size: make("int8").decode(body, size), "raised PayloadError on what encode"),
}  # fmt: skip
ENCODES = {
    "text": (lambda self, vector, rng: str(vector.tolist()), "encode must give bytes, got str"),
    "a bytearray": (lambda self, vector, rng: bytearray(vector.numpy().tobytes()), "must give bytes, got bytearray"),
    "an array": (lambda self, vector, rng: vector.numpy(), "encode must give bytes, got ndarray"),
    "nothing": (lambda self, vector, rng: None, "encode must give bytes, got NoneType"),
    "too much": (lambda self, vector, rng: bytes(9 * len(vector) + 64), "encode gave 253 bytes for 21 numbers, limit"),
    "an exception": (fails, "encode raised KeyError: 'scale'"),
}


@pytest.mark.parametrize("unbiased", [False, True])  # with a residual, which decodes at the client, and without
@pytest.mark.parametrize("way", ["uplink", "downlink"])
@pytest.mark.parametrize("wrong", [("encode", name) for name in ENCODES] + [("decode", name) for name in DECODES])
def test_a_codec_is_blamed_by_name_and_method(wrong, way, unbiased):
    method, name = wrong
    function, message = {"encode": ENCODES, "decode": DECODES}[method][name]
    codec_of(**{method: function}, unbiased=unbiased)
    with pytest.raises(ValueError, match=rf"^codec 'mine': .*{message}") as caught:
        fk.train(SMALL.replace(**{way: "mine"}))
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)


def test_a_right_codec_of_the_users_gives_the_run_of_the_built_in_one():
    codec_of(unbiased=True)
    own, plain = (fk.train(SMALL.replace(uplink=name)) for name in ("mine", "fp32"))
    assert own.weights.equal(plain.weights) and not any(r.refused for r in own.records)


def test_what_a_codec_writes_into_its_argument_changes_nothing():
    def greedy(self, vector: Tensor, rng: np.random.Generator) -> bytes:
        body = vector.numpy().tobytes()
        vector.zero_()
        return body

    codec_of(greedy)
    update, rng = torch.arange(5.0), np.random.default_rng(0)
    _, residual = compensate(update, torch.zeros(5), make("mine"), rng, samples=1)
    assert residual.tolist() == [0.0] * 5 and update.tolist() == [0, 1, 2, 3, 4]


def test_damage_from_outside_stays_a_refused_payload_and_divergence_a_divergence():
    codec_of()
    mine, rng = make("mine"), np.random.default_rng(0)
    payload = pack(mine, torch.arange(3.0), samples=1, rng=rng)
    assert unpack(payload, mine, size=3)[1][0].tolist() == [0, 1, 2]
    for body in (b"12345", np.float32([1, 2]).tobytes(), np.float32([1, np.nan, 2]).tobytes()):
        codec_of(lambda self, vector, rng, body=body: body, lambda self, body, size: torch.zeros(size))
        forged = pack(make("mine"), torch.zeros(3), samples=1, rng=rng)
        with pytest.raises(PayloadError):
            unpack(forged, mine, size=3)
    with pytest.raises(NotFinite):
        pack(mine, torch.tensor([1.0, float("nan")]), samples=1, rng=rng)


def test_what_is_no_codec_or_does_not_take_the_settings_is_named():
    with pytest.raises(ValueError, match=r"^codec 'plain' must be a subclass of fk.Codec, got <class"):
        fk.codec("plain")(type("Plain", (), {}))
    codec_of(__init__=lambda self: None)
    with pytest.raises(ValueError, match=r"^codec 'mine' must take the settings of fk.Codec: .*keep"):
        fk.train(SMALL.replace(uplink="mine"))
