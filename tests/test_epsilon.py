"""What privacy costs and covers: steps counted by opacus as they are taken, earlier models, and all that leaves."""

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import worlds
from opacus.accountants import RDPAccountant

import fedlab_kit as fk
from fedlab_kit import catalog
from fedlab_kit.data import SPLITS, Dataset, Split, load
from fedlab_kit.federation import client, messages
from fedlab_kit.federation.server import RoundRecord, broadcast, start
from fedlab_kit.lab.bundle import measured
from fedlab_kit.lab.text import outcome
from fedlab_kit.partition import partition
from fedlab_kit.run import StoredRun
from fedlab_kit.wire import privacy

SMALL = fk.Experiment(
    dataset="blobs", partition="dirichlet", model="logistic", clients=3, clients_per_round=2, rounds=3, batch_size=9,
    alpha=5.0, privacy="record", noise_multiplier=1.3,
)  # fmt: skip
CLIENTS = SMALL.replace(privacy="client", clients=40, clients_per_round=8, partition="iid")
DELTA = 1e-4


def done(experiment: fk.Experiment, rounds: int | None = None) -> StoredRun:
    """A run that has made its rounds, nothing of which was trained."""
    record = RoundRecord(1, 0.5, 0.4, 0.6, 1.0, 0, 0, 0.0, (), (), (), ())
    records = (record,) * (experiment.rounds if rounds is None else rounds)
    return StoredRun(experiment, Path(), records, {"seconds": 1.0}, False)


def by_hand(*entries: tuple[float, float, int]) -> float:
    """Step opacus's own accountant."""
    accountant = RDPAccountant()
    for noise, rate, steps in entries:
        for _ in range(steps):
            accountant.step(noise_multiplier=noise, sample_rate=rate)
    return float(accountant.get_epsilon(DELTA))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[float]]:
    """The rate of every Poisson draw that is made while something trains, by how many it draws from."""
    draws: dict[int, list[float]] = {}
    honest = privacy.poisson_sample

    def watched(population: int, rate: float, rng: object) -> object:
        draws.setdefault(population, []).append(rate)
        return honest(population, rate, rng)

    for module in [m for name, m in sys.modules.items() if name.startswith("fedlab_kit")]:
        if getattr(module, "poisson_sample", None) is honest:
            monkeypatch.setattr(module, "poisson_sample", watched)
    return draws


@pytest.mark.parametrize(
    "experiment",
    [
        SMALL,
        SMALL.replace(local_epochs=3),
        SMALL.replace(batch_size=4),
        SMALL.replace(batch_size=1000),
        SMALL.replace(rounds=5, dropout=0.4),
        SMALL.replace(devices="unequal", deadline=1e-6),
        SMALL.replace(strategy="scaffold", mask_ratio=0.5),
        SMALL.replace(start=SMALL.replace(rounds=2, local_epochs=2, noise_multiplier=0.9)),
        CLIENTS,
        CLIENTS.replace(clients_per_round=20, rounds=5),
        CLIENTS.replace(devices="unequal", deadline=1e-6, dropout=0.9),
        CLIENTS.replace(local_epochs=3, teacher=CLIENTS.replace(rounds=4), start=CLIENTS.replace(rounds=4)),
        CLIENTS.replace(start=CLIENTS.replace(rounds=1, start=CLIENTS.replace(rounds=2, local_epochs=2))),
        SMALL.replace(start=SMALL),  # the same releases twice are twice as many
        CLIENTS.replace(start=CLIENTS),
        CLIENTS.replace(lr=0.2, start=CLIENTS, teacher=CLIENTS.replace(lr=0.3)),
    ],
)
def test_epsilon_is_what_opacus_counts_while_it_trains(experiment: fk.Experiment, taken: dict) -> None:
    noises = {experiment.noise_multiplier} | {parent.noise_multiplier for parent in experiment.parents}
    if len(noises) == 1:
        run = fk.train(experiment)
        steps = {n: [(*noises, rate, 1) for rate in rates] for n, rates in taken.items()}
    else:
        fk.train(experiment.start)
        steps = {n: [(experiment.start.noise_multiplier, rate, 1) for rate in rates] for n, rates in taken.items()}
        taken.clear()
        run = fk.train(experiment)
        for n, rates in taken.items():
            steps.setdefault(n, []).extend((experiment.noise_multiplier, rate, 1) for rate in rates)
    sizes = [len(shard) for shard in run.shards]
    assert experiment.privacy == "client" or len(set(sizes)) == len(sizes)  # so a size tells whose draw it is
    assert run.epsilon(DELTA) == pytest.approx(max(by_hand(*entries) for entries in steps.values()), rel=1e-6)
    if experiment.deadline:
        assert not any(record.answered for record in run.records) and run.epsilon(DELTA) > 0


@pytest.mark.parametrize("entry", [(1.3, 0.2, 3), (0.9, 1.0, 1), (1.0, 0.05, 40)])
def test_the_same_release_again_costs_as_much_again(entry: tuple[float, float, int]) -> None:
    for times in (1, 2, 3):
        assert privacy.spent([entry] * times, DELTA) == pytest.approx(by_hand(*[entry] * times), rel=1e-6)


def test_the_round_under_way_counts_and_the_one_that_diverged() -> None:
    full = done(CLIENTS)
    bad = dataclasses.replace(full.records[0], loss=None)
    worth = by_hand((1.3, 0.2, 2))
    assert done(CLIENTS, 1).epsilon(DELTA) == pytest.approx(worth)  # one round and a broken one
    diverged = dataclasses.replace(full, records=(full.records[0], bad))
    assert diverged.status == "diverged" and diverged.epsilon(DELTA) == pytest.approx(worth)


def test_a_sample_pays_at_each_client_that_ever_held_it() -> None:
    """The start dealt the samples out otherwise: for each sample, the costs at its two clients, stepped by hand."""
    first = SMALL.replace(clients=2, rounds=2, seed=8, batch_size=20)
    child = SMALL.replace(clients=2, start=first)

    def costs(e: fk.Experiment) -> dict[int, tuple[float, float, int]]:
        shards = partition(load(e.dataset), e.partition, e.clients, e.alpha, e.seed)
        steps = {k: math.ceil(len(s) / e.batch_size) * e.rounds for k, s in enumerate(shards)}
        return {
            int(i): (e.noise_multiplier, min(1, e.batch_size / len(s)), steps[k])
            for k, s in enumerate(shards)
            for i in s
        }

    pairs = {(costs(first)[i], costs(child)[i]) for i in range(120)}
    assert len(pairs) == 4
    assert done(child).epsilon(DELTA) == pytest.approx(max(by_hand(*pair) for pair in pairs), rel=1e-6)


def shared(name: str, rows: slice, seed: int = 77) -> str:
    """Register a data set whose training samples are new, but for those of the blobs in `rows`."""
    old, fresh = load("blobs"), worlds._split(120, seed)
    train = Split(torch.cat([old.train.x[rows], fresh.x]), torch.cat([old.train.y[rows], fresh.y]))
    made = Dataset(name, old.classes, train, old.validation, old.public, old.test, old.preprocess)

    def maker() -> Dataset:
        return made

    maker.__name__ = name
    catalog.dataset(maker)
    return name


OFF = SMALL.replace(privacy="off")


@pytest.mark.parametrize(
    ("experiment", "why"),
    [
        (OFF, "privacy is off"),
        (SMALL.replace(noise_multiplier=0.0), "noise_multiplier 0 hides nothing"),
        (SMALL.replace(start=OFF), "saw the same samples without privacy"),
        (SMALL.replace(start=SMALL.replace(start=OFF.replace(seed=9))), "saw the same samples without privacy"),
        (SMALL.replace(start=SMALL.replace(noise_multiplier=0.0)), "noise_multiplier 0 hides nothing"),
        (SMALL.replace(start=SMALL.replace(privacy="client")), "saw the same samples with client-level privacy"),
        (CLIENTS.replace(teacher=CLIENTS.replace(privacy="off")), "saw the same samples without privacy"),
        (CLIENTS.replace(start=CLIENTS.replace(privacy="record")), "saw the same samples with record-level privacy"),
        (CLIENTS.replace(start=CLIENTS.replace(seed=8)), "dealt the same samples to other clients"),
        (
            CLIENTS.replace(dataset="blobs_at_sites", start=CLIENTS.replace(clients=20)),
            "dealt the same samples to other clients",
        ),
    ],
)
def test_an_infinite_epsilon_says_why(experiment: fk.Experiment, why: str) -> None:
    worth = done(experiment).privacy()
    assert worth.epsilon == math.inf and why in worth.why
    assert done(experiment).epsilon() == math.inf


def test_one_patient_in_common_is_enough() -> None:
    """Whatever the data sets are called, and however they store a number."""
    one, none = shared("one_old_patient", slice(7, 8)), shared("new_patients", slice(0, 0))
    assert done(SMALL.replace(dataset=one, start=OFF)).epsilon() == math.inf
    fresh = SMALL.replace(dataset=none)
    assert done(fresh.replace(start=OFF)).epsilon(DELTA) == done(fresh).epsilon(DELTA) < math.inf
    old, child = load("tiny_images"), SMALL.replace(model="mlp")

    def the_same_as_floats() -> Dataset:
        splits = {name: getattr(old, name) for name in SPLITS}
        return dataclasses.replace(old, **{name: Split(split.x.float(), split.y) for name, split in splits.items()})

    catalog.dataset(the_same_as_floats)
    parent = child.replace(dataset="tiny_images", privacy="off")
    assert done(child.replace(dataset="the_same_as_floats", start=parent)).epsilon() == math.inf


def test_a_site_that_took_part_before_is_the_same_client_whatever_its_samples() -> None:
    sites = SMALL.replace(dataset="blobs_at_sites", partition="site", privacy="client")
    assert done(sites.replace(start=sites.replace(rounds=1))).epsilon(DELTA) == pytest.approx(by_hand((1.3, 2 / 3, 4)))
    old = load("blobs_at_sites")

    def next_year() -> Dataset:
        return dataclasses.replace(old, name="next_year", train=worlds._split(120, 55, sites=True))

    catalog.dataset(next_year)
    assert "other clients" in done(sites.replace(dataset="next_year", start=sites)).privacy().why


@pytest.mark.parametrize(
    ("experiment", "delta", "message"),
    [
        (SMALL, 1 / 120, r"delta must be above 0 and below 1 / 120 \(one over the samples\), got 0.008"),
        (CLIENTS, 0.025, r"delta must be above 0 and below 1 / 40 \(one over the clients\), got 0.025"),
        (CLIENTS.replace(dataset="digits", clients=200), 0.01, r"1 / 200 .* got 0.01"),
        (SMALL, 0.0, "got 0.0"),
        (SMALL, -1e-5, "got -1e-05"),
    ],
)
def test_a_delta_that_lets_one_be_told_in_full_is_refused(
    experiment: fk.Experiment, delta: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        done(experiment).epsilon(delta)
    assert done(experiment).privacy().delta == 1e-5


def test_of_many_clients_delta_goes_down_by_itself() -> None:
    many = CLIENTS.replace(clients=1_000_000, clients_per_round=1000)
    assert done(many).privacy().delta == pytest.approx(1e-7)
    with pytest.raises(ValueError, match="below 1 / 1000000"):
        done(many).epsilon(1e-5)


# ---- what leaves a client


def combinations() -> list[fk.Experiment]:
    """Every combination of what decides over frames that an Experiment accepts."""
    axes = {
        "privacy": ("off", "client", "record"),
        "strategy": ("fedavg", "fedprox", "fedavgm", "fedadam", "scaffold", "feddf", "median"),
        "mask_schedule": (None, "gradual", "one-shot", "dynamic", "fixed"),
        "devices": ("equal", "unequal", "sliced"),
        "uplink": ("fp32", "int8", "topk"),
    }
    base, found = SMALL.replace(model="mlp", rounds=2, clip_norm=1e-9, noise_multiplier=0.0), []
    for values in itertools.product(*axes.values()):
        fields = dict(zip(axes, values, strict=True))
        fields["zstd"] = fields["uplink"] == "topk"
        if fields["mask_schedule"] is None:
            del fields["mask_schedule"]
        else:
            fields["mask_ratio"] = 0.5
        try:
            found.append(base.replace(**fields))
        except ValueError:
            continue
    return found


def sent(experiment: fk.Experiment, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Train one client for a round and return the vector of each frame that it sends."""
    message = broadcast(start(experiment), [0])[0]
    frames: list[torch.Tensor] = []
    pack, compensate = messages.pack, messages.compensate
    with monkeypatch.context() as patch:
        patch.setattr(
            messages, "pack", lambda codec, vector, **how: frames.append(vector) or pack(codec, vector, **how)
        )
        patch.setattr(
            messages, "compensate", lambda update, *a, **how: frames.append(update) or compensate(update, *a, **how)
        )
        payload, _ = client.client_step(experiment, 1, 0, message, {})
    assert payload
    return frames


def test_every_frame_that_leaves_is_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clip norm of nothing and no noise, what is clipped vanishes: whatever is left would leave as it is."""
    tried = combinations()
    assert len(tried) > 150
    for experiment in tried:
        listed = [one for one in privacy.LEAVES if one.frame and one.when(experiment, fk.Recipe())]
        frames = sent(experiment, monkeypatch)
        assert len(frames) == len(listed), f"{experiment} sends {len(frames)} frames, the table has {listed}"
        if experiment.privacy != "off":
            assert all(float(frame.abs().max()) <= 1e-6 for frame in frames), experiment


def test_what_the_table_refuses_no_experiment_can_ask_for() -> None:
    for experiment in combinations():
        if experiment.privacy != "off":
            asked = [one for one in privacy.LEAVES if one.when(experiment, fk.Recipe())]
            assert privacy.REFUSED not in {getattr(one, experiment.privacy) for one in asked}, experiment
    for level, changes in itertools.product(
        ("client", "record"), ({"strategy": "scaffold"}, {"mask_ratio": 0.5, "mask_schedule": "dynamic"})
    ):
        (item,) = [
            one
            for one in privacy.LEAVES
            if one.frame and one.when(OFF.replace(**changes), fk.Recipe()) and not one.when(OFF, fk.Recipe())
        ]
        if getattr(item, level) == privacy.REFUSED:
            with pytest.raises(ValueError, match="must"):
                SMALL.replace(privacy=level, **changes)


def test_every_figure_of_a_round_and_of_an_answer_is_in_the_table() -> None:
    """A new field of either is a new number that leaves: it needs a line in the table, and one here."""
    names = {one.name for one in privacy.LEAVES}
    told = {
        **dict.fromkeys(
            ("accuracy", "low", "high", "loss", "correct", "total", "recall"), "validation hits and losses"
        ),
        **dict.fromkeys(("uplink_bytes", "downlink_bytes", "uplinks", "downlinks"), "payload lengths"),
        **dict.fromkeys(("answered", "refused", "note"), "who answered"),
        "seconds": "shard sizes",
        "cohort": "the seed of noise and cohorts",
        "round": None,
    }
    answer = {
        "samples": "sample counts", "update": "update", "control": "control change", "growth": "gradient to grow by",
        "state": "running statistics",
    }  # fmt: skip
    assert set(told) == {field.name for field in dataclasses.fields(RoundRecord)}
    assert set(answer) == set(messages.ClientUpdate._fields)
    assert {*told.values(), *answer.values()} - {None} <= names


def test_what_is_outside_is_named_for_what_was_asked() -> None:
    always = {"shard sizes", "label counts", "who answered", "validation hits and losses", "normalization constants"}
    always |= {"the choice among runs", "the seed of noise and cohorts"}
    assert set(privacy.outside(SMALL)) == always | {"sample counts"}
    assert set(privacy.outside(CLIENTS)) == always | {"payload lengths"}
    assert privacy.outside(OFF) == ()
    static, dynamic = (fk.Recipe(dtype="int8", quantization=how) for how in ("static", "dynamic"))
    assert set(privacy.outside(SMALL, static)) - set(privacy.outside(SMALL, dynamic)) == {"calibration ranges"}
    counted = static.replace(calibration="entropy")
    assert set(privacy.outside(SMALL, counted)) - set(privacy.outside(SMALL, static)) == {"calibration histograms"}
    assert privacy.outside(SMALL, dynamic.replace(calibration="entropy")) == privacy.outside(SMALL, dynamic)
    sites = SMALL.replace(dataset="blobs_at_sites", partition="site", strategy="feddf")
    more = {"sites' sums and squares", "local baselines", "public samples"}
    assert set(privacy.outside(sites)) == always | {"sample counts"} | more


def test_it_stands_on_the_screen_in_the_card_and_in_the_report() -> None:
    run = fk.train(SMALL)
    artifact = fk.compress(run, fk.Recipe(dtype="int8"))
    card = json.loads(artifact.path.with_name(f"{artifact.path.name}.json").read_text())["privacy"]
    assert card["level"] == "record" and card["epsilon"] == run.epsilon() and card["delta"] == 1e-5
    assert card["why"] == "" and "calibration ranges" in card["outside"] and "sample counts" in card["outside"]
    said = f"record-level epsilon {run.epsilon():.1f} at delta 1e-05; outside it: sample counts, shard sizes"
    assert said in outcome(run)
    artifact.test()
    assert said in measured(artifact, run)["Privacy"] and "calibration ranges" in measured(artifact, run)["Privacy"]


def test_an_infinite_epsilon_is_null_in_the_card_and_said_with_its_reason() -> None:
    run = fk.train(SMALL.replace(noise_multiplier=0.0))
    text = (path := fk.compress(run, fk.Recipe()).path).with_name(f"{path.name}.json").read_text()
    card = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["privacy"]
    assert card["epsilon"] is None and card["why"] == "noise_multiplier 0 hides nothing"
    assert "epsilon infinite (noise_multiplier 0 hides nothing)" in outcome(run)
    assert "epsilon" not in outcome(fk.train(OFF))


def test_the_table_can_be_read() -> None:
    fates = {privacy.NOISED, privacy.DERIVED, privacy.TRUSTED, privacy.REFUSED, privacy.OUTSIDE}
    assert len({one.name for one in privacy.LEAVES}) == len(privacy.LEAVES)
    assert all({one.client, one.record} <= fates for one in privacy.LEAVES)
