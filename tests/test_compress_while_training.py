"""Masks, grids, teachers and codecs inside the rounds: what is trained, what is sent, what it costs."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fedlab_kit as fk
from fedlab_kit.compression.distill import centred_mse, distillation_gradient, distillation_loss
from fedlab_kit.compression.quantize import quantized
from fedlab_kit.federation import rounds as loop
from fedlab_kit.federation.masking import adjusts, first_mask
from fedlab_kit.federation.server import start
from fedlab_kit.federation.setup import task
from fedlab_kit.runs import parents_of
from fedlab_kit.wire import make

SMALL = fk.Experiment(
    dataset="blobs",
    partition="dirichlet",
    model="mlp",
    clients=6,
    clients_per_round=4,
    rounds=10,
    lr=0.05,
    batch_size=7,
)


def made(experiment):
    return task(experiment, parents_of(experiment))


def play(experiment):
    clients: dict = {}
    states = loop.play(start(made(experiment)), clients)
    return [(state, record, copy.deepcopy(clients)) for state, record in states]


def prunable(experiment):
    return made(experiment).model.prunable


# ---- masks


@pytest.mark.parametrize("schedule", ["gradual", "one-shot", "dynamic", "fixed"])
@pytest.mark.parametrize("model", ["mlp", "wrapped"])
def test_the_final_model_has_exactly_the_asked_share_of_zeros(schedule, model):
    experiment = SMALL.replace(mask_ratio=0.8, mask_schedule=schedule, model=model)
    state, _, _ = play(experiment)[-1]
    weights = state.weights[prunable(experiment)]
    assert int((weights == 0).sum()) >= round(0.8 * len(weights))
    assert int((~state.optimizer["mask"]).sum()) == round(0.8 * len(weights))
    assert not state.weights[~state.optimizer["mask"]].any()


def test_when_masks_change():
    def changes(schedule, rounds=20):
        experiment = SMALL.replace(rounds=rounds, mask_ratio=0.5, mask_schedule=schedule)
        return [r for r in range(1, rounds + 1) if adjusts(experiment, r)]

    assert changes("one-shot") == [10]
    assert changes("gradual") == [2, 4, 6, 8, 10, 12]
    assert changes("dynamic") == [2, 4, 6, 8, 10, 12, 14, 15]
    assert changes("fixed") == []
    assert not any(adjusts(SMALL, r) for r in range(20))
    few = (1, 2, 3, 7)  # shares of few or odd rounds are rounded upwards: of one round, the first is the last
    assert [changes("one-shot", rounds) for rounds in few] == [[1], [1], [2], [4]]
    assert [changes("gradual", rounds)[-1] for rounds in few] == [1, 2, 2, 5]
    assert [changes("dynamic", rounds)[-1] for rounds in few] == [1, 2, 3, 6]


@pytest.mark.parametrize("rounds", [1, 3, 8])
@pytest.mark.parametrize("schedule", ["gradual", "one-shot", "dynamic"])
def test_however_few_the_rounds_the_mask_comes_in_time(schedule, rounds):
    experiment = SMALL.replace(mask_ratio=0.8, mask_schedule=schedule, rounds=rounds)
    state, _, _ = play(experiment)[-1]
    assert int((~state.optimizer["mask"]).sum()) == round(0.8 * int(prunable(experiment).sum()))


PRUNED = SMALL.replace(rounds=2, mask_ratio=0.5)


@pytest.mark.parametrize(
    "begun", [{"start": SMALL.replace(rounds=2), "start_recipe": fk.Recipe(prune_ratio=0.5)}, {"start": PRUNED}]
)
def test_gradual_pruning_goes_on_from_what_a_start_has_lost(begun):
    experiment = SMALL.replace(mask_ratio=0.9, rounds=10, **begun)
    total = int(prunable(experiment).sum())
    gone = [total - int((s.optimizer["mask"] & prunable(experiment)).sum()) for s, _, _ in play(experiment)]
    before = round(0.5 * total) / total
    assert gone == [round((0.9 - (0.9 - before) * (1 - min(n, 6) / 6) ** 3) * total) for n in range(1, 11)]


def test_a_dynamic_mask_after_a_pruned_start_lacks_the_smallest_weights():
    begun = {"start": SMALL.replace(rounds=2), "start_recipe": fk.Recipe(prune_ratio=0.5)}
    job = made(SMALL.replace(mask_ratio=0.8, mask_schedule="dynamic", **begun))
    where = prunable(job.experiment)
    size = job.initial.abs()[where]
    largest = size.topk(len(size) - round(0.8 * len(size))).indices
    assert torch.equal(torch.nonzero(first_mask(job)[where])[:, 0], largest.sort().values)
    assert first_mask(job)[~where].all()


@pytest.mark.parametrize(
    "drawn",
    [
        {"mask_schedule": "fixed"},
        {"mask_schedule": "dynamic"},
        {"mask_schedule": "fixed", "start": SMALL.replace(rounds=1), "start_recipe": fk.Recipe(prune_ratio=0.2)},
    ],
)
def test_another_seed_draws_another_random_mask(drawn):
    """Two masks drawn apart, of half of the weights each, share no more than chance has them share."""
    experiment = SMALL.replace(mask_ratio=0.5, **drawn)
    where = prunable(experiment)
    masks = [first_mask(made(experiment.replace(seed=seed)))[where] for seed in range(3)]
    chance = 0.5**2 / (0.8 if "start" in drawn else 1.0)
    for one, other in itertools.combinations(masks, 2):
        assert (one & other).double().mean().item() == pytest.approx(chance, abs=0.02)
    assert torch.equal(masks[1], first_mask(made(experiment.replace(seed=1, lr=0.01)))[where])


@pytest.mark.parametrize("ratio", [0.5, 0.8])
@pytest.mark.parametrize("rounds", [5, 10])
def test_a_dynamic_mask_exchanges_by_a_cosine_that_ends_after_the_last_exchange(ratio, rounds):
    """FedDST: alpha / 2 (1 + cos(pi t / T)) of the kept weights, alpha 0.2; every exchange exchanges something."""
    experiment = SMALL.replace(mask_ratio=ratio, mask_schedule="dynamic", rounds=rounds)
    total = int(prunable(experiment).sum())
    masks = [first_mask(made(experiment))] + [s.optimizer["mask"] for s, _, _ in play(experiment)]
    gone = [int((before & ~after).sum()) for before, after in itertools.pairwise(masks)]
    last = -(-3 * rounds // 4)
    kept = total - round(ratio * total)
    asked = [round(0.1 * (1 + np.cos(np.pi * t / (last + 1))) * kept) for t in range(1, last + 1)]
    assert gone == asked + [0] * (rounds - last) and gone[last - 1] > 0


def test_gradual_pruning_never_lets_go_of_a_zero_and_follows_the_cubic():
    experiment = SMALL.replace(mask_ratio=0.9, rounds=10)
    history = [(s.round, s.optimizer.get("mask")) for s, _, _ in play(experiment)]
    total = int(prunable(experiment).sum())
    previous = torch.ones(made(experiment).model.layout.size, dtype=torch.bool)
    for number, mask in history:
        assert mask is not None and not (mask & ~previous).any()
        previous = mask
        asked = 0.9 * (1 - (1 - min(number, 6) / 6) ** 3)
        assert int((~mask).sum()) == round(asked * total)


def test_a_dynamic_mask_exchanges_weights_and_keeps_their_number():
    experiment = SMALL.replace(mask_ratio=0.8, mask_schedule="dynamic")
    masks = [first_mask(made(experiment))] + [s.optimizer["mask"] for s, _, _ in play(experiment)]
    counts = {int(mask.sum()) for mask in masks}
    assert len(counts) == 1
    assert (masks[0] != masks[-1]).any()
    fixed = [s.optimizer["mask"] for s, _, _ in play(experiment.replace(mask_schedule="fixed"))]
    assert all(torch.equal(mask, masks[0]) for mask in fixed)


def test_masked_payloads_hold_the_kept_weights_and_a_bitmap_when_it_is_news():
    experiment = SMALL.replace(mask_ratio=0.5, mask_schedule="one-shot", dropout=0.0, rounds=10)
    size, total = made(experiment).model.layout.size, int(prunable(experiment).sum())
    kept = size - round(0.5 * total)
    whole, sparse, bitmap = 14 + 4 * size, 14 + 4 * kept, 14 + -(-size // 8)
    told: set[int] = set()
    for _, record, _ in play(experiment):
        if record.round <= 5:
            assert record.uplink_bytes == 4 * whole and record.downlink_bytes == 4 * (1 + whole)
            continue
        news = sum(client not in told for client in record.cohort)
        told |= set(record.cohort)
        assert record.uplink_bytes == 4 * sparse
        assert record.downlink_bytes == 4 * (1 + sparse) + news * bitmap


def test_a_random_mask_follows_from_the_seed_and_is_never_sent():
    experiment = SMALL.replace(mask_ratio=0.5, mask_schedule="fixed")
    size, total = made(experiment).model.layout.size, int(prunable(experiment).sum())
    sparse = 14 + 4 * (size - round(0.5 * total))
    for _, record, _ in play(experiment):
        assert (record.uplink_bytes, record.downlink_bytes) == (4 * sparse, 4 * (1 + sparse))


def test_growth_is_paid_for():
    experiment = SMALL.replace(mask_ratio=0.8, mask_schedule="dynamic")
    records = [record for _, record, _ in play(experiment)]
    plain = records[1 - 1].uplink_bytes  # every = 1 here: round 1 adjusts too
    quiet = records[-1].uplink_bytes
    assert plain > quiet


def test_clients_who_dropped_out_are_told_the_mask_later():
    experiment = SMALL.replace(mask_ratio=0.7, dropout=0.5, rounds=10)
    state, _record, _clients = play(experiment)[-1]
    assert not any(record.refused for _, record, _ in play(experiment))
    assert not state.weights[~state.optimizer["mask"]].any()


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam", "scaffold"])
def test_what_the_strategy_remembers_is_cut_with_the_mask(strategy):
    experiment = SMALL.replace(mask_ratio=0.8, mask_schedule="one-shot", strategy=strategy)
    for state, _, _ in play(experiment):
        for name in ("velocity", "first", "second", "control"):
            if name in state.optimizer and "mask" in state.optimizer and state.round == 5:
                assert not state.optimizer[name][~state.optimizer["mask"]].any()


# ---- start: the next experiment


@pytest.mark.parametrize("path", ["train", "rounds"])
def test_fine_tuning_keeps_the_zeros_it_starts_from(path):
    recipe = fk.Recipe(prune_ratio=0.7)
    experiment = SMALL.replace(start=SMALL, start_recipe=recipe, rounds=3)
    if path == "train":
        run = fk.train(experiment)
        before, after = fk.train(SMALL).weights, run.weights
        assert run.model(torch.zeros(1, 6)).shape == (1, 3)
    else:
        list(fk.rounds(experiment))
        after, before = play(experiment)[-1][0].weights, play(SMALL)[-1][0].weights
    where = prunable(SMALL)
    assert int((after[where] == 0).sum()) == round(0.7 * int(where.sum()))
    gone = where & (after == 0)
    assert before[gone].abs().max() <= before[where & ~gone].abs().min()


def test_a_model_goes_on_with_newer_data_of_the_same_shape():
    here = SMALL.replace(dataset="blobs")
    there = here.replace(dataset="blobs_at_sites", start=here, partition="iid")
    fk.train(there)  # trains its start first
    assert torch.equal(made(there).initial, fk.train(here).weights)
    with pytest.raises(
        ValueError, match=r"^start must be trained on samples of shape \[1, 12, 12\] in 2 classes, got "
    ):
        fk.train(there.replace(dataset="tiny_images"))


def test_channels_that_are_gone_make_rounds_smaller():
    base = fk.Experiment(
        dataset="tiny_images", partition="dirichlet", model="tiny_cnn", clients=4, clients_per_round=2, rounds=3
    )
    pruned = base.replace(start=base, start_recipe=fk.Recipe(prune="channel", prune_ratio=0.5))
    run, first = fk.train(pruned), fk.train(base)
    assert len(run.weights) < 0.6 * len(first.weights)
    assert run.records[0].uplink_bytes == 2 * (14 + 4 * len(run.weights))
    assert made(pruned).model.stack is not None  # still on the fast path
    assert run.model(torch.zeros(2, 1, 12, 12)).shape == (2, 2)


# ---- quantization-aware training


@pytest.mark.parametrize(("dtype", "model"), [("int8", "mlp"), ("int4", "mlp"), ("int2", "tiny_cnn")])
def test_qat_equals_autograd_through_a_straight_estimator(dtype, model):
    """One client, one step: forward and backward with rounded weights, the step on the real ones."""
    data = "tiny_images" if model == "tiny_cnn" else "blobs"
    experiment = SMALL.replace(
        dataset=data, model=model, qat=dtype, clients=1, clients_per_round=1, batch_size=200, rounds=1
    )
    job = made(experiment)
    module = copy.deepcopy(job.model.module)
    torch.nn.utils.vector_to_parameters(job.initial.clone(), module.parameters())
    rounded = {n: quantized(p.detach(), dtype if p.ndim > 1 else "bf16").requires_grad_()
               for n, p in module.named_parameters()}  # fmt: skip
    x, y = job.inputs(job.shards[0]), job.y[job.shards[0]]
    F.cross_entropy(torch.func.functional_call(module, rounded, (x,)), y).backward()
    expected = torch.cat([
        (p.detach() - experiment.lr * rounded[n].grad).reshape(-1) for n, p in module.named_parameters()
    ])  # fmt: skip
    torch.testing.assert_close(play(experiment)[-1][0].weights, expected, rtol=1e-4, atol=1e-6)


def test_qat_agrees_on_both_paths_and_is_evaluated_on_its_grid():
    experiment = SMALL.replace(qat="int4", rounds=3)
    fast, general = play(experiment)[-1], play(experiment.replace(model="wrapped"))[-1]
    torch.testing.assert_close(fast[0].weights, general[0].weights, rtol=1e-3, atol=1e-5)
    job = made(experiment)
    on_grid = job.on_grid(fast[0].weights)
    for name, tensor in job.model.layout.tensors(on_grid).items():
        original = job.model.layout.tensors(fast[0].weights)[name]
        assert torch.equal(tensor, quantized(original, "int4" if original.ndim > 1 else "bf16"))
    logits = job.logits(on_grid, job.dataset.validation)
    assert (logits.argmax(1) == job.dataset.validation.y).double().mean().item() == fast[1].accuracy


@fk.model
def half_frozen(shape, classes):
    """A recurrent layer that learns, behind a Linear one that does not."""
    return HalfFrozen(shape[0], classes)


class HalfFrozen(torch.nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.fixed = torch.nn.Linear(inputs, 8).requires_grad_(False)
        self.gru, self.norm = torch.nn.GRU(8, 6, batch_first=True, bidirectional=True), torch.nn.LayerNorm(12)
        self.head = torch.nn.Linear(12, classes)

    def forward(self, x):
        return self.head(self.norm(self.gru(self.fixed(x)[:, None])[0][:, 0]))


def test_frozen_weights_are_on_the_grid_of_qat():
    experiment = SMALL.replace(model="half_frozen", qat="int2", rounds=2)
    job, before = made(experiment), made(experiment.replace(qat="off")).model.module.fixed
    frozen = job.model.module.fixed
    assert torch.equal(frozen.weight, quantized(before.weight, "int2"))
    assert torch.equal(frozen.bias, quantized(before.bias, "bf16"))
    assert not torch.equal(frozen.weight, before.weight)
    state, record = play(experiment)[-1][:2]
    with torch.no_grad():
        job.model.load(job.on_grid(state.weights), state.state)
        right = job.model.module.eval()(job.dataset.preprocess(job.dataset.validation.x)).argmax(1)
    assert (right == job.dataset.validation.y).double().mean().item() == record.accuracy


def test_qat_keeps_the_ends_and_leaves_normalization():
    job = made(SMALL.replace(model="half_frozen", qat="int2", qat_keep="ends"))
    before = job.model.layout.tensors(job.initial)
    after = job.model.layout.tensors(job.on_grid(torch.stack([job.initial, 2 * job.initial]))[1] / 2)
    for name, tensor in after.items():
        bias, end = "bias" in name, name == "head.weight"  # the other end is frozen
        dtype = "fp32" if "norm" in name else "bf16" if bias else "int8" if end else "int2"
        assert torch.equal(tensor, quantized(before[name], dtype))
        assert torch.equal(tensor, before[name]) == ("norm" in name)


# ---- distillation


def test_distillation_loss_by_hand():
    # p = (1/2, 1/2), q = (3/4, 1/4) at T = 1: KL(q || p) = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.13081
    logits, teacher, label = (
        torch.zeros(1, 2),
        torch.tensor([[np.log(3.0), 0.0]], dtype=torch.float32),
        torch.tensor([0]),
    )
    assert distillation_loss(logits, teacher, label, 1.0, 1.0).item() == pytest.approx(0.130812, abs=1e-5)
    assert distillation_loss(logits, teacher, label, 1.0, 0.0).item() == pytest.approx(np.log(2))
    # T = 2: q_T = (sqrt 3, 1) / (1 + sqrt 3); loss is T^2 times the KL
    q = np.array([3**0.5, 1]) / (1 + 3**0.5)
    kl = (q * np.log(2 * q)).sum()
    assert distillation_loss(logits, teacher, label, 2.0, 1.0).item() == pytest.approx(4 * kl, rel=1e-5)


@given(st.floats(0.5, 20), st.floats(0, 1), st.integers(0, 100))
def test_distillation_gradient_is_the_gradient_and_spares_the_teacher(temperature, weight, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (4,), generator=generator)
    distillation_loss(logits, teacher, labels, temperature, weight).backward()
    expected = distillation_gradient(logits.detach(), teacher.detach(), labels, temperature, weight) / 4
    torch.testing.assert_close(logits.grad, expected)
    assert teacher.grad is None


@pytest.mark.parametrize(("temperature", "near"), [(1e3, 1e-2), (1e5, 1e-4)])
def test_high_temperature_is_half_the_mse_of_centred_logits(temperature, near):
    logits, teacher = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(6, dtype=torch.int64)
    soft = distillation_loss(logits, teacher, labels, temperature, 1.0)
    assert soft.item() == pytest.approx(0.5 * centred_mse(logits, teacher).item(), rel=near)


@pytest.mark.parametrize("model", ["mlp", "wrapped"])
def test_a_student_step_equals_autograd(model):
    teacher = SMALL.replace(rounds=4)
    experiment = SMALL.replace(
        model=model, teacher=teacher, temperature=3.0, distill_weight=0.7, clients=1, clients_per_round=1,
        batch_size=200, rounds=1,
    )  # fmt: skip
    list(fk.rounds(experiment))
    job = made(experiment)
    module = copy.deepcopy(job.model.module)
    torch.nn.utils.vector_to_parameters(job.initial.clone(), module.parameters())
    x, y = job.inputs(job.shards[0]), job.y[job.shards[0]]
    soft = made(teacher).logits(play(teacher)[-1][0].weights, job.dataset.train)[job.shards[0]]
    distillation_loss(module(x), soft, y, 3.0, 0.7).backward()
    expected = torch.cat([(p.detach() - experiment.lr * p.grad).reshape(-1) for p in module.parameters()])
    torch.testing.assert_close(play(experiment)[-1][0].weights, expected, rtol=1e-4, atol=1e-6)


def test_the_teacher_is_charged_once_to_each_client():
    teacher = SMALL.replace(rounds=2)
    experiment = SMALL.replace(model="logistic", teacher=teacher, rounds=8)
    fk.train(experiment)
    large, small = (14 + 4 * made(e).model.layout.size for e in (teacher, experiment))
    met: set[int] = set()
    for _, record, _ in play(experiment):
        new = set(record.cohort) - met
        met |= new
        assert record.downlink_bytes == 4 * (1 + small) + len(new) * large


def test_feddf_moves_the_average_towards_the_ensemble():
    experiment = SMALL.replace(strategy="feddf", rounds=1, local_epochs=5, server_epochs=20)
    job = made(experiment)
    averaged = play(experiment.replace(strategy="fedavg"))[-1][0].weights
    distilled = play(experiment)[-1][0].weights
    assert not torch.equal(averaged, distilled)
    from fedlab_kit.federation.client import cohort_step
    from fedlab_kit.federation.messages import open_payload
    from fedlab_kit.federation.server import broadcast, select

    state = start(experiment)
    messages = broadcast(state, select(experiment, 1))
    payloads, _ = cohort_step(experiment, 1, messages, {c: {} for c in messages})
    clients = [state.weights + open_payload(job, 1, p, None).update for p in payloads.values()]
    public = job.dataset.public
    target = torch.stack([job.logits(c, public) for c in clients]).mean(0)
    labels = torch.zeros(len(public), dtype=torch.int64)

    def distance(weights):
        return distillation_loss(job.logits(weights, public), target, labels, 4.0, 1.0).item()

    assert distance(distilled) < distance(averaged)


# ---- codecs


@pytest.mark.parametrize("name", ["fp16", "int8", "int4", "ternary", "sign", "topk", "stc"])
@pytest.mark.parametrize("zstd", [False, True])
def test_every_uplink_codec_trains_and_is_counted(name, zstd):
    experiment = SMALL.replace(uplink=name, uplink_keep=0.1, zstd=zstd, rounds=3)
    history = play(experiment)
    whole = 14 + 4 * made(experiment).model.layout.size
    for _, record, _clients in history:
        assert 0 < record.uplink_bytes < 0.55 * 4 * whole
        assert not record.refused
    seen = {client for _, record, _ in history for client in record.cohort}
    biased = name in ("topk", "stc")
    assert set(history[-1][2]) == (seen if biased else set())
    assert all(set(memory) == {"residual"} for memory in history[-1][2].values())


def test_nearest_rounding_is_biased_and_keeps_what_it_lost():
    _, _, clients = play(SMALL.replace(uplink="ternary", rounding="nearest", rounds=2))[-1]
    assert clients and all(memory["residual"].any() for memory in clients.values())


def test_what_clients_keep_on_disk_is_reported_apart():
    run = fk.train(SMALL.replace(uplink="stc", rounds=2))
    clients = {client for record in run.records for client in record.cohort}
    assert run.client_bytes >= len(clients) * 4 * made(SMALL).model.layout.size
    assert fk.train(SMALL.replace(rounds=2)).client_bytes == 0


def test_residual_is_what_the_codec_lost_and_waits_for_its_client():
    experiment = SMALL.replace(uplink="topk", uplink_keep=0.1, rounds=6)
    history = play(experiment)
    for (_, _, before), (_, record, after) in itertools.pairwise(history):
        for client in set(before) - set(record.cohort):
            assert torch.equal(before[client]["residual"], after[client]["residual"])
    residual = history[0][2][history[0][1].cohort[0]]["residual"]
    kept = int((residual == 0).sum())
    assert kept >= 0.09 * len(residual)


def test_without_error_feedback_nothing_is_kept():
    assert play(SMALL.replace(uplink="topk", error_feedback=False))[-1][2] == {}


@pytest.mark.parametrize("name", ["fp16", "int8", "topk", "stc"])
def test_a_lossy_downlink_sends_differences_and_client_and_server_agree(name):
    experiment = SMALL.replace(downlink=name, downlink_keep=0.2, rounds=6, dropout=0.3)
    history = play(experiment)
    whole = 14 + 4 * made(experiment).model.layout.size
    for _, record, _ in history:
        assert record.downlink_bytes < 0.55 * 4 * whole and not record.refused
    state, _, clients = history[-1]
    for client, memory in clients.items():
        assert set(memory) == {"copy"} and torch.equal(memory["copy"], state.copies[client]["copy"])


def test_a_client_that_starts_from_another_run_is_sent_it_whole_once():
    experiment = SMALL.replace(start=SMALL.replace(rounds=2), downlink="stc", downlink_keep=0.05, rounds=6)
    list(fk.rounds(experiment))
    whole = 1 + 14 + 4 * made(experiment).model.layout.size
    met: set[int] = set()
    for _, record, _ in play(experiment):
        new = set(record.cohort) - met
        met |= new
        assert len(new) * whole <= record.downlink_bytes <= len(new) * whole + (4 - len(new)) * whole / 4


@pytest.mark.parametrize(
    "extra",
    [
        {"mask_ratio": 0.7},
        {"mask_ratio": 0.7, "strategy": "fedavgm"},
        {"strategy": "scaffold"},
        {"mask_ratio": 0.7, "mask_schedule": "dynamic"},
        {"teacher": SMALL.replace(seed=3, rounds=1), "clients": 12},  # some are told of it later
    ],
)
def test_a_compressed_run_that_was_stopped_goes_on_to_the_same_weights(extra, monkeypatch, tmp_path):
    import threading

    experiment = SMALL.replace(uplink="stc", uplink_keep=0.1, downlink="int8", rounds=8, **extra)
    whole = fk.train(experiment)
    monkeypatch.setenv("FEDLAB_RUNS", str(tmp_path / "other"))
    stop = threading.Event()
    fk.train(experiment, stop, lambda record: stop.set() if record.round == 4 else None)
    rest = fk.train(experiment)
    assert torch.equal(whole.weights, rest.weights)
    same = [dataclasses.replace(r, seconds=0) for r in whole.records]
    assert same == [dataclasses.replace(r, seconds=0) for r in rest.records]


def test_ones_own_codec_from_a_notebook():
    @fk.codec("halves")
    class Halves(fk.Codec):
        def encode(self, vector, rng):
            return (vector * 2).round().clamp(-127, 127).to(torch.int8).numpy().tobytes()

        def decode(self, body, size):
            return torch.from_numpy(np.frombuffer(body, np.int8).astype(np.float32) / 2)

    run = fk.train(SMALL.replace(uplink="halves", rounds=2))
    assert run.records[0].uplink_bytes == 4 * (14 + made(SMALL).model.layout.size)
    assert make("halves").name == "halves"


# ---- privacy and poison


def test_client_level_privacy_draws_by_poisson_and_divides_by_a_fixed_number():
    experiment = SMALL.replace(privacy="client", clip_norm=0.1, noise_multiplier=0.0, rounds=8)
    history = play(experiment)
    assert len({len(record.cohort) for _, record, _ in history}) > 1
    before = made(experiment).initial
    for state, record, _ in history:
        step = state.weights - before
        assert step.norm() <= len(record.answered) * 0.1 / experiment.clients_per_round + 1e-6
        before = state.weights


def test_client_level_noise_has_the_stated_size():
    experiment = SMALL.replace(privacy="client", clip_norm=0.5, noise_multiplier=2.0, rounds=1)
    noisy = play(experiment)[-1][0].weights
    plain = play(experiment.replace(noise_multiplier=0.0))[-1][0].weights
    assert (noisy - plain).std().item() == pytest.approx(2.0 * 0.5 / 4, rel=0.05)


def test_record_level_privacy_is_dp_sgd():
    """One client whose clip norm never bites and no noise: plain SGD on Poisson batches, whatever the path."""
    experiment = SMALL.replace(
        model="logistic", privacy="record", clip_norm=1000.0, noise_multiplier=0.0, clients=1, clients_per_round=1,
        batch_size=120, rounds=1,
    )  # fmt: skip
    private = play(experiment)[-1][0].weights
    plain = play(experiment.replace(privacy="off"))[-1][0].weights
    torch.testing.assert_close(private, plain, rtol=1e-4, atol=1e-6)  # batch 120 of 120 is everybody: no chance left
    tight = play(experiment.replace(clip_norm=0.001))[-1][0].weights
    assert (tight - made(experiment).initial).norm() <= experiment.lr * 0.001 * 1.01


def test_epsilon_of_a_run():
    from fedlab_kit.wire.privacy import epsilon

    run = fk.train(SMALL.replace(privacy="client", rounds=3))
    assert run.epsilon(1e-3) == pytest.approx(epsilon(1.0, 4 / 6, 3, 1e-3))
    assert fk.train(SMALL.replace(rounds=3)).epsilon() == float("inf")
    run = fk.train(SMALL.replace(privacy="record", rounds=3, model="logistic"))
    assert 0 < run.epsilon(1e-3) < float("inf")


def test_a_poisoned_update_moves_the_mean_and_not_the_median():
    from fedlab_kit.federation.aggregate import mean, median

    honest = [
        torch.tensor([1.0, -1.0]),
        torch.tensor([1.2, -0.8]),
        torch.tensor([0.8, -1.2]),
        torch.tensor([1.1, -1.0]),
    ]
    poisoned = [*honest, torch.tensor([-1e6, 1e6])]
    assert mean(poisoned, [1] * 5)[0] < -1e5
    assert median(poisoned).tolist() == [pytest.approx(1.0), pytest.approx(-1.0)]
    assert median(honest).tolist() == [pytest.approx(1.05), pytest.approx(-1.0)]
    assert play(SMALL.replace(strategy="median", rounds=2))[-1][1].loss is not None


def test_settings_that_privacy_cannot_keep():
    with pytest.raises(ValueError, match="strategy must be a plain mean for client-level privacy, got 'median'"):
        SMALL.replace(privacy="client", strategy="median")
    with pytest.raises(ValueError, match="privacy must be off or client together with a teacher or qat"):
        SMALL.replace(privacy="record", qat="int8")
