"""Rounds against a plain PyTorch loop, and the fast path against the general one."""

import copy
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedlab_kit import Experiment, rounds
from fedlab_kit.federation import rounds as loop
from fedlab_kit.federation.client import client_step, cohort_step, plan
from fedlab_kit.federation.server import answering, broadcast, select, server_step, start
from fedlab_kit.federation.setup import rng_for, task

SMALL = Experiment(
    dataset="blobs", partition="dirichlet", model="mlp", clients=6, clients_per_round=4, rounds=3, lr=0.05, batch_size=7
)


def weights_after(experiment: Experiment) -> torch.Tensor:
    for state, _ in loop.play(start(experiment), {}):
        last = state
    return last.weights


def plain_fedavg(experiment: Experiment, mu: float = 0.0) -> torch.Tensor:
    """The textbook: deepcopy, torch.optim.SGD, autograd, a weighted mean of the weights."""
    job = task(experiment)
    model = copy.deepcopy(job.model.module)
    torch.nn.utils.vector_to_parameters(job.initial.clone(), model.parameters())
    for number in range(1, experiment.rounds + 1):
        cohort = select(experiment, number)
        total, mean = sum(map(job.samples, cohort)), {}
        for client in cohort:
            local = copy.deepcopy(model).train()
            optimizer = torch.optim.SGD(local.parameters(), lr=experiment.lr)
            for batch in plan(job, number, client):
                index = torch.from_numpy(batch[batch >= 0])
                optimizer.zero_grad()
                loss = F.cross_entropy(local(job.inputs(index)), job.y[index])
                for p, q in zip(local.parameters(), model.parameters(), strict=True):
                    loss = loss + mu / 2 * (p - q.detach()).pow(2).sum()
                loss.backward()
                optimizer.step()
            for name, p in local.named_parameters():
                mean[name] = mean.get(name, 0) + p.detach() * job.samples(client) / total
        model.load_state_dict(mean)
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("model", ["mlp", "wrapped"])
def test_fedavg_equals_the_textbook_loop(model):
    experiment = SMALL.replace(model=model, local_epochs=2)
    torch.testing.assert_close(weights_after(experiment), plain_fedavg(experiment), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", ["mlp", "wrapped"])
def test_fedprox_equals_the_textbook_loop(model):
    experiment = SMALL.replace(model=model, strategy="fedprox", proximal_mu=0.5)
    expected = plain_fedavg(experiment, mu=0.5)
    torch.testing.assert_close(weights_after(experiment), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(expected, plain_fedavg(experiment), atol=1e-4)


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedavgm", "fedadam", "scaffold"])
@pytest.mark.parametrize(
    ("dataset", "fast", "general"), [("blobs", "mlp", "wrapped"), ("tiny_images", "tiny_cnn", "wrapped_cnn")]
)
def test_fast_and_general_paths_agree(strategy, dataset, fast, general):
    experiment = SMALL.replace(dataset=dataset, model=fast, strategy=strategy, local_epochs=2)
    assert task(experiment).model.stack is not None and task(experiment.replace(model=general)).model.stack is None
    found, expected = weights_after(experiment), weights_after(experiment.replace(model=general))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_client_alone_equals_the_same_client_in_its_cohort():
    state, experiment = start(SMALL), SMALL
    messages = broadcast(state, select(experiment, 1))
    together, _ = cohort_step(experiment, 1, messages, {c: {} for c in messages})
    for client, message in messages.items():
        alone, _ = client_step(experiment, 1, client, message, {})
        assert len(alone) == len(together[client])
        a, b = (np.frombuffer(p[14:], np.float32) for p in (alone, together[client]))
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("model", ["mlp", "norm_net"])
def test_same_seed_same_bits_whatever_the_global_generator(model):
    first = weights_after(SMALL.replace(model=model))
    torch.manual_seed(123)
    np.random.seed(4)  # noqa: NPY002 - the point is that nobody listens to it
    torch.set_num_threads(2)
    again = weights_after(SMALL.replace(model=model))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, weights_after(SMALL.replace(model=model, seed=8)))


def test_select_depends_on_seed_and_round_alone():
    assert select(SMALL, 2) == select(SMALL.replace(lr=0.2, strategy="fedadam"), 2)
    seen = {client for number in range(50) for client in select(SMALL, number)}
    assert seen == set(range(6))
    assert all(len(set(select(SMALL, number))) == 4 for number in range(50))


def test_plan_uses_every_sample_once_an_epoch():
    experiment = SMALL.replace(local_epochs=3)
    job = task(experiment)
    for client in range(6):
        epochs = plan(job, 1, client).reshape(3, -1)
        for epoch in epochs:
            assert sorted(epoch[epoch >= 0]) == sorted(job.shards[client].tolist())
        assert job.samples(client) < 2 or not np.array_equal(epochs[0], epochs[1])


def test_ledger_counts_every_byte_both_ways():
    p = task(SMALL).model.layout.size
    frame = 14 + 4 * p
    record = next(rounds(SMALL))
    assert (record.uplink_bytes, record.downlink_bytes) == (4 * frame, 4 * (1 + frame))
    record = next(rounds(SMALL.replace(strategy="scaffold")))
    assert (record.uplink_bytes, record.downlink_bytes) == (8 * frame, 4 * (1 + 2 * frame))


def test_drop_outs_receive_but_do_not_send():
    experiment = SMALL.replace(dropout=0.5, rounds=12)
    records = list(rounds(experiment))
    frame = 14 + 4 * task(experiment).model.layout.size
    for record in records:
        assert record.answered == tuple(answering(experiment, record.round, list(record.cohort)))
        assert record.uplink_bytes == len(record.answered) * frame
        assert record.downlink_bytes == 4 * (1 + frame)
    assert 0 < sum(len(r.answered) for r in records) < 48


def test_a_round_that_nobody_answers_leaves_the_model():
    experiment = SMALL.replace(dropout=0.999, rounds=1)
    state, record = next(loop.play(start(experiment), {}))
    assert record.answered == () and record.uplink_bytes == 0
    assert "nobody answered" in record.note and not record.diverged
    assert torch.equal(state.weights, task(experiment).initial)


def test_stop_before_a_batch_leaves_no_record():
    stop = threading.Event()
    seen = []
    for record in rounds(SMALL, stop):
        seen.append(record.round)
        if record.round == 2:
            stop.set()
    assert seen == [1, 2]


@pytest.mark.parametrize("model", ["mlp", "wrapped"])
def test_divergence_ends_the_run_with_a_clear_word(model):
    records = list(rounds(SMALL.replace(model=model, lr=10.0, rounds=50, local_epochs=20)))
    last = records[-1]
    assert last.diverged and last.loss is None and len(records) < 50
    assert last.note.startswith("diverged") and "learning rate below 10" in last.note
    assert all(record.loss is not None for record in records[:-1])


def test_a_damaged_payload_is_refused_by_client_and_reason():
    state = start(SMALL)
    messages = broadcast(state, select(SMALL, 1))
    payloads, _ = cohort_step(SMALL, 1, messages, {c: {} for c in messages})
    bad, *good = sorted(payloads)
    flipped = bytearray(payloads[bad])
    flipped[40] ^= 1
    after, record = server_step(state, messages, {**payloads, bad: bytes(flipped)})
    assert record.refused == ((bad, "the checksum does not match"),)
    assert record.answered == tuple(good)
    expected, _ = server_step(state, messages, {client: payloads[client] for client in good})
    assert torch.equal(after.weights, expected.weights)


def test_records_survive_json():
    import json

    from fedlab_kit import RoundRecord

    for record in rounds(SMALL):
        assert RoundRecord.from_json(json.dumps([record.to_dict()]).encode()) == [record]
        assert sum(record.total) == 60 and record.accuracy == sum(record.correct) / 60
        assert record.low <= record.accuracy <= record.high


def test_scaffold_controls_follow_the_paper():
    """After one round from zero, a client's control is its mean gradient: (start - end) / (steps * lr)."""
    experiment = SMALL.replace(strategy="scaffold", rounds=1)
    clients: dict = {}
    state, record = next(loop.play(start(experiment), clients))
    job = task(experiment)
    for client in record.cohort:
        plain, _ = client_step(SMALL, 1, client, broadcast(start(SMALL), [client])[client], {})
        update = torch.from_numpy(np.frombuffer(plain[14:], np.float32).copy())
        steps = len(plan(job, 1, client))
        torch.testing.assert_close(clients[client]["control"], -update / (steps * 0.05), rtol=1e-3, atol=1e-5)
    expected = sum(memory["control"] for memory in clients.values()) / experiment.clients
    torch.testing.assert_close(state.optimizer["control"], expected)


def test_server_optimizers_take_the_published_first_step():
    mean = weights_after(SMALL.replace(rounds=1)) - task(SMALL).initial
    moved = weights_after(SMALL.replace(rounds=1, strategy="fedavgm", server_lr=0.5)) - task(SMALL).initial
    torch.testing.assert_close(moved, 0.5 * mean)
    moved = weights_after(SMALL.replace(rounds=1, strategy="fedadam", adam_lr=0.01)) - task(SMALL).initial
    expected = 0.01 * 0.1 * mean / ((0.01 * mean**2).sqrt() + 1e-3)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-7)


def test_chance_tells_purposes_rounds_and_clients_apart():
    draws = {
        rng_for(SMALL, purpose, *where).integers(2**60)
        for purpose in ("batches", "encode")
        for where in [(1, 2), (2, 1), (1,), (2,)]
    }
    assert len(draws) == 8


def test_batch_norm_statistics_travel_with_the_model():
    experiment = SMALL.replace(model="norm_net")
    job = task(experiment)
    state, _ = next(loop.play(start(experiment), {}))
    assert job.model.state_layout.names == ("2.running_mean", "2.running_var", "2.num_batches_tracked")
    assert not torch.equal(state.state, job.initial_state) and state.state[-1] == state.state[-1].round() > 0


def test_unknown_names_and_impossible_partitions():
    with pytest.raises(ValueError, match=r"model must be one of .*mlp.*got 'nope'"):
        next(rounds(SMALL.replace(model="nope")))
    with pytest.raises(ValueError, match=r"dataset must be one of .*digits.*got 'nope'"):
        next(rounds(SMALL.replace(dataset="nope")))
    with pytest.raises(ValueError, match="clients must be 1 to 120"):
        next(rounds(SMALL.replace(clients=121)))
