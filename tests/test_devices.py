"""Clients of unequal strength: slices by hand and against a narrow model, lateness, and who comes and goes."""

from __future__ import annotations

from math import exp

import pytest
import torch
from torch import nn

from fedlab_kit import Experiment, rounds
from fedlab_kit.federation import devices
from fedlab_kit.federation.aggregate import mean_of_slices
from fedlab_kit.federation.client import cohort_step
from fedlab_kit.federation.devices import DEVICES, Device, client_mask, lateness, seconds, slice_mask, width
from fedlab_kit.federation.messages import open_payload
from fedlab_kit.federation.server import broadcast, server_step, start
from fedlab_kit.federation.setup import rng_for, task
from fedlab_kit.wire.links import LINKS

SITES = Experiment(
    dataset="blobs_at_sites", model="mlp", clients=3, clients_per_round=3, partition="site", rounds=4, lr=0.05
)
SLICED = SITES.replace(devices="sliced")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices for three sites: the first holds everything, the second half of each layer, the third a quarter."""
    memory = (1e9, 60e3, 20e3)
    monkeypatch.setattr(
        devices,
        "DEVICES",
        tuple(
            Device(f"d{k}", 1e6, m, link, 0.0) for k, (m, link) in enumerate(zip(memory, LINKS.values(), strict=True))
        ),
    )


def round_of(experiment: Experiment, ids: list[int]) -> tuple[dict[int, bytes], dict[int, bytes]]:
    messages = broadcast(start(experiment), ids)
    payloads, _ = cohort_step(experiment, 1, messages, {key: {} for key in ids})
    return messages, payloads


# slices


def test_a_slice_by_hand() -> None:
    """A 2-4-3 network at half width: two hidden units, all inputs, all three outputs."""
    mask = slice_mask(((4, 2), (4,), (3, 4), (3,)), 0.5).int()
    hidden, bias, output, last = mask.split([8, 4, 12, 3])
    assert hidden.view(4, 2).tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]
    assert bias.tolist() == [1, 1, 0, 0]
    assert output.view(3, 4).tolist() == [[1, 1, 0, 0]] * 3
    assert last.tolist() == [1, 1, 1]


def test_a_flattened_channel_is_a_run_of_columns() -> None:
    """One channel of two stays; each has 4 pixels, so the linear layer keeps its first 4 columns of 8."""
    mask = slice_mask(((2, 1, 3, 3), (2,), (5, 8), (5,)), 0.5).int()
    kernel, bias, linear, last = mask.split([18, 2, 40, 5])
    assert kernel.view(2, 9).tolist() == [[1] * 9, [0] * 9] and bias.tolist() == [1, 0]
    assert linear.view(5, 8).tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]] * 5 and last.tolist() == [1] * 5


def test_a_model_of_one_layer_has_no_narrow_slice() -> None:
    assert slice_mask(((2, 6), (2,)), 0.125).all()


def test_slices_are_averaged_by_hand() -> None:
    """Entry 0 is held by both (1 and 3 samples), entry 1 by the second alone, entry 2 by nobody."""
    updates = [torch.tensor([4.0, 0, 0]), torch.tensor([8.0, 6, 0])]
    views = [torch.tensor([1, 0, 0]).bool(), torch.tensor([1, 1, 0]).bool()]
    mean, held = mean_of_slices(updates, [1, 3], views)
    assert mean.tolist() == [7.0, 6.0, 0.0] and held.tolist() == [True, True, False]


@pytest.mark.usefixtures("small")
def test_a_slice_trains_as_the_narrow_model_would() -> None:
    """Against plain PyTorch: the mlp's first 64 and 32 units as a network of their own, same batches, same steps."""
    job, client = task(SLICED), 1
    mask = client_mask(job, client, None)
    assert width(job, client) == 0.5 and mask is not None
    narrow = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    parts = job.initial[mask].split([p.numel() for p in narrow.parameters()])
    with torch.no_grad():
        for parameter, values in zip(narrow.parameters(), parts, strict=True):
            parameter.copy_(values.view_as(parameter))
    from fedlab_kit.federation.client import plan

    optimizer = torch.optim.SGD(narrow.parameters(), lr=SLICED.lr)
    for batch in plan(job, 1, client):
        index = torch.from_numpy(batch[batch >= 0])
        optimizer.zero_grad()
        nn.functional.cross_entropy(narrow(job.inputs(index)), job.y[index]).backward()
        optimizer.step()
    _, payloads = round_of(SLICED, [client])
    answer = open_payload(job, 1, payloads[client], mask)
    trained = torch.cat([p.detach().reshape(-1) for p in narrow.parameters()])
    assert torch.allclose(job.initial[mask] + answer.update[mask], trained, atol=1e-6)
    assert not answer.update[~mask].any()


@pytest.mark.usefixtures("small")
def test_a_payload_holds_the_slice_alone() -> None:
    job = task(SLICED)
    messages, payloads = round_of(SLICED, [0, 1, 2])
    for client in range(3):
        mask = client_mask(job, client, None)
        held = job.model.layout.size if mask is None else int(mask.sum())
        assert len(payloads[client]) == 14 + 4 * held and len(messages[client]) == 15 + 4 * held
    record = next(rounds(SLICED))
    assert record.uplinks == tuple(len(payloads[client]) for client in range(3))
    assert record.uplink_bytes == sum(record.uplinks) and record.downlink_bytes == sum(record.downlinks)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam"])
def test_the_server_keeps_its_own_value_where_nobody_contributed(strategy: str) -> None:
    """Round one by all, round two by the narrow client alone: what it does not hold stays, momentum or not."""
    experiment = SLICED.replace(strategy=strategy)
    job, state = task(experiment), start(experiment)
    for ids in ([0, 1, 2], [2]):
        before = state.weights
        messages = broadcast(state, ids)
        payloads, _ = cohort_step(experiment, state.round + 1, messages, {key: {} for key in ids})
        state, _ = server_step(state, messages, payloads)
    mask = client_mask(job, 2, None)
    assert mask is not None
    assert torch.equal(state.weights[~mask], before[~mask]) and not torch.equal(state.weights[mask], before[mask])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("codecs", [{"uplink": "stc", "uplink_keep": 0.1}, {"downlink": "int8", "zstd": True}])
def test_slices_travel_through_lossy_codecs(codecs: dict[str, object]) -> None:
    records = list(rounds(SLICED.replace(rounds=8, lr=0.1, **codecs)))
    assert records[-1].loss < records[0].loss and not records[-1].refused  # type: ignore[operator]


def test_sliced_devices_that_all_hold_the_model_give_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "DEVICES", DEVICES[:1])
    whole, sliced = (list(rounds(e)) for e in (SITES, SLICED))
    assert [r.loss for r in sliced] == pytest.approx([r.loss for r in whole], abs=1e-5)


def test_unequal_devices_without_a_deadline_change_nothing() -> None:
    plain, unequal = (list(rounds(e)) for e in (SITES, SITES.replace(devices="unequal")))
    assert [r.loss for r in plain] == [r.loss for r in unequal]


def test_a_model_that_is_no_chain_cannot_be_sliced() -> None:
    with pytest.raises(ValueError, match="devices must be equal or unequal for a model that is not a plain chain"):
        list(rounds(SLICED.replace(model="wrapped")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "scaffold"}, "strategy must be a mean of updates for sliced devices, got 'scaffold'"),
        ({"mask_ratio": 0.5}, "devices must be equal or unequal with a mask or client-level privacy, got 'sliced'"),
        ({"privacy": "client"}, "devices must be equal or unequal with a mask or client-level privacy, got 'sliced'"),
        ({"deadline": -1.0}, "deadline must be at least 0 and at most 1000000.0, got -1.0"),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLICED.replace(**changes)


# time


def by_hand(client: int, down: int, up: int) -> float:
    """Without load: 3 forwards of 40 samples at 1 MFLOP/s, and the bytes each way on the client's link."""
    work = 3 * 40 * 2 * (6 * 128 + 128 * 64 + 64 * 3) / 1e6
    latency, towards, away = ((0.005, 100e6, 100e6), (0.025, 30e6, 10e6), (0.02, 5e6, 0.6e6))[client]
    return work + 2 * latency + 8 * down / towards + 8 * up / away


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("client", [0, 1, 2])
@pytest.mark.parametrize(("down", "up"), [(1000, 1000), (50_000, 0), (0, 50_000), (40_000, 3000)])
def test_seconds_by_hand(client: int, down: int, up: int) -> None:
    assert seconds(task(SITES.replace(devices="unequal")), 1, client, down, up) == pytest.approx(
        by_hand(client, down, up)
    )
    assert seconds(task(SITES), 1, client, down, up) == 0


def test_work_grows_with_epochs_and_other_work_comes_anew_for_each_client_and_round() -> None:
    """The table's own devices: three epochs take thrice as long, and the rest is log-normal with their load."""
    one, three = (task(SITES.replace(devices="unequal", local_epochs=n)) for n in (1, 3))
    latency, work = (0.005, 0.005, 0.025), 3 * 40 * 2 * (6 * 128 + 128 * 64 + 64 * 3)
    flops, load, drawn = (20e9, 5e9, 1e9), (0.1, 0.3, 0.5), []
    for number in (1, 2, 3):
        for client in range(3):
            idle = 2 * latency[client]
            busy = (seconds(one, number, client, 0, 0) - idle) * flops[client] / work
            assert seconds(three, number, client, 0, 0) - idle == pytest.approx(3 * busy * work / flops[client])
            normal = rng_for(SITES, "load", number, client).standard_normal()
            assert busy == pytest.approx(exp(load[client] * normal), rel=1e-6)
            drawn.append(normal)
    assert len(set(drawn)) == 9


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("codecs", [{}, {"uplink": "topk", "uplink_keep": 0.05}, {"downlink": "int8"}])
def test_the_deadline_is_about_the_bytes_of_each_way(codecs: dict[str, object]) -> None:
    experiment = SITES.replace(devices="unequal", rounds=1, **codecs)
    free = next(rounds(experiment))
    slowest = max(by_hand(*sizes) for sizes in zip(free.cohort, free.downlinks, free.uplinks, strict=True))
    assert next(rounds(experiment.replace(deadline=slowest + 0.01))).answered == (0, 1, 2)
    assert next(rounds(experiment.replace(deadline=slowest - 0.01))).answered == (0, 1)


@pytest.mark.usefixtures("small")
def test_a_narrow_slice_takes_less_time() -> None:
    whole, sliced = task(SITES.replace(devices="unequal")), task(SLICED)
    assert seconds(sliced, 1, 2, 0, 0) < 0.15 * seconds(whole, 1, 2, 0, 0)
    all_of_it = 6 * 128 + 128 + 128 * 64 + 64 + 64 * 3 + 3
    for client, (first, second) in enumerate(((128, 64), (64, 32), (32, 16))):  # work as the share of weights held
        held = 6 * first + first + first * second + second + second * 3 + 3
        idle = 2 * (0.005, 0.025, 0.02)[client]
        busy = by_hand(client, 0, 0) - idle
        assert seconds(sliced, 1, client, 0, 0) - idle == pytest.approx(busy * held / all_of_it)


@pytest.mark.usefixtures("small")
def test_who_is_late_is_left_out_and_the_others_go_on() -> None:
    experiment = SITES.replace(devices="unequal", deadline=2.5)
    records = list(rounds(experiment))
    for record in records:
        assert record.answered == (0, 1)
        assert [client for client, _ in record.refused] == [2]
        assert record.refused[0][1].startswith("late: ") and record.refused[0][1].endswith("the deadline is 2.5 s")
        assert all(record.uplinks)  # what came late has travelled all the same
    assert records[-1].loss < records[0].loss  # type: ignore[operator]


def test_if_all_are_late_the_model_stays_as_it_was() -> None:
    experiment = SITES.replace(devices="unequal", deadline=1e-6, rounds=2)
    first, second = rounds(experiment)
    assert first.loss == second.loss and second.note == "nobody answered: the model stays as it was"


def test_the_same_round_takes_the_same_time_everywhere() -> None:
    job = task(SITES.replace(devices="unequal"))
    assert seconds(job, 3, 1, 0, 0) == seconds(job, 3, 1, 0, 0) != seconds(job, 4, 1, 0, 0)
    assert not lateness(job, 3, 1, 0, 0)


# coming and going


def test_a_hospital_may_join_late_and_another_leave() -> None:
    """South joins in round three, north leaves after round four: each round is made of those who are there."""
    state, kept = start(SITES.replace(rounds=6)), {client: {} for client in range(3)}
    for present in ([0, 2], [0, 2], [0, 1, 2], [0, 1, 2], [1, 2], [1, 2]):
        messages = broadcast(state, present)
        payloads, after = cohort_step(state.experiment, state.round + 1, messages, kept)
        kept |= after
        state, record = server_step(state, messages, payloads)
        assert record.answered == tuple(present) and record.loss is not None
    assert record.accuracy > 0.6
