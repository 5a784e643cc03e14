"""What combined techniques must keep: refused updates, liars, masks, state, threads, and a client's own layers."""

import itertools
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fedlab_kit as fk
from fedlab_kit.federation import rounds as loop
from fedlab_kit.federation.client import plan
from fedlab_kit.federation.devices import client_mask
from fedlab_kit.federation.messages import open_payload, pack_payload
from fedlab_kit.federation.server import start
from fedlab_kit.federation.setup import rng_for, task
from fedlab_kit.models import build
from fedlab_kit.runs import parents_of
from fedlab_kit.wire.frame import HEADER

SMALL = fk.Experiment(
    dataset="blobs", partition="dirichlet", model="mlp", clients=6, clients_per_round=4, rounds=4, lr=0.05
)


@fk.model
def normed(shape, classes):
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))


@fk.model
def cumulative(shape, classes):
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU(), nn.Linear(8, classes))


class Body(nn.Module):
    """A frozen body with a constant, dropout, and a head of which one part is tied to another."""

    def __init__(self, classes):
        super().__init__()
        self.body, self.norm = nn.Linear(6, 6).requires_grad_(False), nn.LayerNorm(6)
        self.again, self.head = nn.Linear(6, 6), nn.Linear(6, classes)
        self.twice = nn.Linear(6, 6)
        self.twice.weight = self.again.weight
        self.register_buffer("place", torch.linspace(0, 1, 6))

    def forward(self, x):
        x = torch.relu(self.norm(self.body(x) + self.place))
        return self.head(nn.functional.dropout(torch.relu(self.twice(self.again(x))), 0.3, self.training))


@fk.model
def body(shape, classes):
    return Body(classes)


def made(experiment):
    return task(experiment, parents_of(experiment))


def played(experiment, exchange=loop.in_process, clients=None):
    clients = {} if clients is None else clients
    return list(loop.play(start(made(experiment)), clients, exchange=exchange))


def forged(change):
    """An exchange in which `change(round, client, payload)` may replace what a client sent."""

    def exchange(job, round, broadcasts, kept):
        got = loop.in_process(job, round, broadcasts, kept)
        return got._replace(payloads={c: change(round, c, p) for c, p in got.payloads.items()})

    return exchange


HOW = [
    {},
    {"uplink": "topk", "uplink_keep": 0.1},
    {"uplink": "sign", "rounding": "nearest"},
    {"downlink": "int4"},
    {"strategy": "scaffold"},
    {"strategy": "fedadam"},
    {"strategy": "feddf"},
    {"strategy": "median"},
    {"mask_ratio": 0.6, "mask_schedule": "dynamic"},
]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("model", ["normed", "cumulative", "body"])
def test_state_travels_exactly_and_the_rest_stays(model, how):
    experiment = SMALL.replace(model=model, **how)
    run = fk.train(experiment)
    first = build(model, (6,), 3, experiment.seed)
    trained = run.model
    if model == "body":
        assert torch.equal(trained.place, torch.linspace(0, 1, 6)) and trained.again.weight is trained.twice.weight
        assert torch.equal(trained.body.weight, first.body.weight)
        assert not torch.equal(trained.head.weight, first.head.weight)
    else:
        norm = trained[1]
        assert bool((norm.running_var >= 0).all()) and norm.num_batches_tracked.dtype == torch.int64
        assert norm.num_batches_tracked > 0


@pytest.mark.parametrize("model", ["normed", "cumulative", "body"])
def test_runs_repeat_bit_for_bit_resumed_or_not(model, tmp_path, monkeypatch):
    experiment = SMALL.replace(model=model)
    whole = fk.train(experiment)
    monkeypatch.setenv("FEDLAB_RUNS", str(tmp_path / "other"))
    stop = threading.Event()
    fk.train(experiment, stop, lambda record: stop.set() if record.round == 2 else None)
    rest = fk.train(experiment)
    assert torch.equal(rest.weights, whole.weights) and torch.equal(rest.state, whole.state)


def test_state_is_the_weighted_mean_of_what_the_clients_had():
    experiment = SMALL.replace(model="normed", rounds=1, clients=3, clients_per_round=3)
    job = task(experiment)
    seen_states = {}

    def watch(job, round, broadcasts, kept):
        for client in broadcasts:
            got = loop.in_process(job, round, {client: broadcasts[client]}, {client: {}})
            seen_states[client] = job.model.state
        return loop.in_process(job, round, broadcasts, kept) if got else got

    state, _ = played(experiment, watch)[0]
    counts = torch.tensor([job.samples(c) for c in range(3)]).double()
    mean = sum(counts[c] * seen_states[c] for c in range(3)) / counts.sum()
    torch.testing.assert_close(state.state[:-1], mean[:-1], rtol=1e-6, atol=1e-6)
    assert state.state[-1] == mean[-1].round()


def module_of(job, name, weights, state):
    """A client's model by torch alone: `weights` [P] and `state` [S] lie in the order of parameters and buffers."""
    net = build(name, (6,), 3, job.experiment.seed)
    vector_to_parameters(weights.clone(), net.parameters())
    for buffer, part in zip(net.buffers(), state.split([b.numel() for b in net.buffers()]), strict=True):
        buffer.copy_(part.view_as(buffer))
    return net.eval()


def listening(answers):
    """An exchange that also opens what the clients of round one send."""

    def exchange(job, round, broadcasts, kept):
        got = loop.in_process(job, round, broadcasts, kept)
        answers.update({c: open_payload(job, round, payload, None) for c, payload in got.payloads.items()})
        return got

    return exchange


@pytest.mark.parametrize("clients", [3, 4])
def test_the_state_of_a_median_is_the_median_of_the_states(clients):
    experiment = SMALL.replace(model="normed", strategy="median", rounds=1, clients_per_round=clients)
    answers = {}
    state, _ = played(experiment, listening(answers))[0]
    middle = np.median(torch.stack([answer.state for answer in answers.values()]).numpy(), axis=0)
    np.testing.assert_allclose(state.state[:-1].numpy(), middle[:-1], rtol=1e-6, atol=1e-6)
    assert state.state[-1] == np.rint(middle[-1]) and len(answers) == clients


@pytest.mark.parametrize("place", range(8, 16))
def test_a_running_variance_below_zero_is_refused(place):
    """It would make every later answer NaN; a mean may be below zero, and is in the honest state."""
    experiment = SMALL.replace(model="normed", rounds=2)
    job = task(experiment)

    def bent(round, client, payload):
        answer = open_payload(job, round, payload, None)
        assert bool((answer.state[:8] < 0).any())
        answer.state[place] = -1e-6
        return pack_payload(job, round, client, answer, None, {})[0] if round == 1 else payload

    (state, record), (_, after) = played(experiment, forged(bent))
    assert {why for _, why in record.refused} == {"a running variance below zero"} and not record.answered
    assert torch.equal(state.state, job.initial_state) and not after.refused


@pytest.mark.parametrize("size", [7, 19])
@pytest.mark.parametrize("model", ["normed", "cumulative"])
def test_a_batch_of_one_sample_is_normalized_by_what_was_seen_before(model, size):
    """Batch by batch in torch: a last batch of one has no variance, so BatchNorm is in evaluation mode for it."""
    experiment = SMALL.replace(model=model, partition="iid", rounds=1, clients_per_round=6, batch_size=size, clients=6)
    job, answers, alone = task(experiment), {}, 0
    played(experiment, listening(answers))
    for client, answer in answers.items():
        net = module_of(job, model, job.initial, job.initial_state).train()
        for batch in plan(job, 1, client):
            index = torch.from_numpy(batch[batch >= 0])
            net[1].train(len(index) > 1)
            alone += len(index) == 1
            net.zero_grad()
            nn.functional.cross_entropy(net(job.inputs(index)), job.y[index]).backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= experiment.lr * parameter.grad
        torch.testing.assert_close(job.initial + answer.update, parameters_to_vector(net.parameters()).detach())
        buffers = torch.cat([buffer.double().reshape(-1) for buffer in net.buffers()])
        torch.testing.assert_close(answer.state, buffers, rtol=1e-5, atol=1e-6)
    assert len(answers) == 6 and alone == (6 if size == 19 else 0)


@pytest.mark.parametrize("model", ["normed", "cumulative"])
def test_the_members_of_an_ensemble_answer_with_statistics_of_their_own(model):
    """FedDF by hand: what the average learns is said by each client's weights together with that client's buffers."""
    experiment = SMALL.replace(model=model, strategy="feddf", rounds=1, temperature=2.0, server_epochs=2, lr=0.3)
    job, answers = task(experiment), {}
    state, _ = played(experiment, listening(answers))[0]
    x, n = job.dataset.preprocess(job.dataset.public.x), sum(a.samples for a in answers.values())
    with torch.no_grad():
        members = [module_of(job, model, job.initial + a.update, a.state)(x) for a in answers.values()]
        wanted = torch.stack(members).mean(0)
    average = module_of(job, model, job.initial + sum(a.samples / n * a.update for a in answers.values()), state.state)
    optimizer = torch.optim.SGD(average.parameters(), lr=experiment.lr)
    for epoch in range(2):
        for index in torch.from_numpy(rng_for(experiment, "public", 1, epoch).permutation(len(x))).split(20):
            optimizer.zero_grad()
            told, given = ((logits[index] / 2).log_softmax(1) for logits in (wanted, average(x)))
            (4 * nn.functional.kl_div(given, told, reduction="batchmean", log_target=True)).backward()
            optimizer.step()
    torch.testing.assert_close(state.weights, parameters_to_vector(average.parameters()).detach(), rtol=0, atol=1e-5)


NEWS = [  # what a client is told once, and not again when it has answered
    {"teacher": SMALL.replace(seed=3, rounds=1)},
    {"start": SMALL.replace(rounds=1), "start_recipe": fk.Recipe(prune_ratio=0.5)},
    {"mask_ratio": 0.6, "mask_schedule": "one-shot", "rounds": 3},
]


@pytest.mark.parametrize("when", [1, 2])
@pytest.mark.parametrize("how", [h for h in HOW + NEWS if h.get("strategy") != "median"])
def test_what_was_refused_did_not_happen(how, when):
    """A damaged payload leaves server and client as if that client had dropped out."""
    experiment = SMALL.replace(clients=4, clients_per_round=4, **how)

    def absent(job, round, broadcasts, kept):
        asked = {c: b for c, b in broadcasts.items() if (round, c) != (when, 1)}
        return loop.in_process(job, round, asked, kept)

    there, here = {}, {}
    damaged = played(experiment, forged(lambda r, c, p: p[:-3] if (r, c) == (when, 1) else p), there)
    missing = played(experiment, absent, here)
    assert [record.refused[0][0] for _, record in damaged if record.refused] == [1]
    assert 1 not in damaged[when - 1][1].answered
    sent = [[record.downlink_bytes for _, record in states] for states in (damaged, missing)]
    assert sent[0] == sent[1] if when == 1 else sum(sent[0]) >= sum(sent[1])  # what it may not have is told again
    assert torch.equal(damaged[-1][0].weights, missing[-1][0].weights)
    assert {c: set(m) for c, m in there.items()} == {c: set(m) for c, m in here.items()}
    assert all(torch.equal(there[c][name], here[c][name]) for c in there for name in there[c])
    copies = damaged[-1][0].copies  # what the server takes each client to hold is what it holds
    assert all(torch.equal(there[c]["copy"], copies[c]["copy"]) for c in there if "copy" in there[c])


def test_a_payload_of_nobodys_client_is_refused():
    def stranger(job, round, broadcasts, kept):
        got = loop.in_process(job, round, broadcasts, kept)
        other = next(c for c in range(6) if c not in broadcasts)
        return got._replace(payloads={**got.payloads, other: next(iter(got.payloads.values()))})

    honest, with_stranger = played(SMALL), played(SMALL, stranger)
    assert torch.equal(honest[-1][0].weights, with_stranger[-1][0].weights)
    assert "nobody asked it" in with_stranger[0][1].refused[0][1]


def claiming(payload, samples):
    from zlib import crc32

    number, flags, _, length, _ = HEADER.unpack_from(payload)
    fields = HEADER.pack(number, flags, samples, length, 0)[:-4]
    return fields + crc32(payload[HEADER.size :], crc32(fields)).to_bytes(4, "little") + payload[HEADER.size :]


def test_nobody_owns_the_average_by_claiming_samples():
    states = played(SMALL, forged(lambda r, c, p: claiming(p, 4_000_000_000) if r == 1 else p))
    assert len(states[0][1].refused) == 4 and "it claims 4,000,000,000 samples and has" in states[0][1].refused[0][1]
    assert torch.equal(states[0][0].weights, task(SMALL).initial)


def times(payload, factor):
    """The same payload, of one fp32 frame, with every number larger."""
    body = np.frombuffer(payload[HEADER.size :], np.float32) * np.float32(factor)
    number, flags, samples, length, _ = HEADER.unpack_from(payload)
    return claiming(HEADER.pack(number, flags, samples, length, 0) + body.tobytes(), samples)


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "scaffold"])
def test_an_absurd_update_is_refused_by_name_and_the_run_goes_on(strategy):
    def huge(round, client, payload):
        return times(payload, 1e6) if (round, client) == (1, victim) else payload

    experiment = SMALL.replace(strategy=strategy if strategy != "scaffold" else "fedavgm")
    victim = played(experiment.replace(rounds=1))[0][1].cohort[0]
    records = [record for _, record in played(experiment, forged(huge))]
    assert records[0].refused[0][0] == victim and "times as long as the median" in records[0].refused[0][1]
    assert len(records) == experiment.rounds and not records[-1].diverged


def test_under_client_level_privacy_an_absurd_update_is_clipped_and_heard():
    """Whether one is absurd hangs on the others, so refusing it would tell of them: it moves the sum by the clip."""
    experiment = SMALL.replace(
        clients_per_round=5, privacy="client", clip_norm=0.01, noise_multiplier=0.0, rounds=1, local_epochs=3
    )
    honest, record = played(experiment)[0]
    assert len(record.answered) >= 3
    for victim in record.answered:
        state, heard = played(experiment, forged(lambda r, c, p, v=victim: times(p, 1e6) if c == v else p))[0]
        assert not heard.refused and heard.answered == record.answered
        torch.testing.assert_close(state.weights, honest.weights, rtol=0, atol=1e-6)


def test_unlike_clients_are_not_called_liars():
    experiment = SMALL.replace(clients=40, clients_per_round=20, alpha=0.05, local_epochs=10, rounds=6)
    assert min(len(shard) for shard in task(experiment).shards) == 1
    for strategy in ("fedavg", "scaffold"):
        assert not any(record.refused for _, record in played(experiment.replace(strategy=strategy)))


@pytest.mark.parametrize("schedule", ["gradual", "one-shot", "fixed"])
@pytest.mark.parametrize("more", [{}, {"strategy": "fedavgm"}, {"privacy": "client", "noise_multiplier": 1.0}])
def test_masks_only_grow_together(schedule, more):
    begun = SMALL.replace(start=SMALL, start_recipe=fk.Recipe(prune_ratio=0.5), mask_ratio=0.8, mask_schedule=schedule,
                          rounds=6, **more)  # fmt: skip
    states = played(begun)
    masks = [start(made(begun)).optimizer["mask"], *(state.optimizer["mask"] for state, _ in states)]
    for before, after in itertools.pairwise(masks):
        assert not bool((after & ~before).any())
    for state, _ in states:
        assert not bool(state.weights[~state.optimizer["mask"]].any())
    where = torch.cat([torch.full((p.numel(),), p.ndim > 1) for p in states[0][0].task.model.module.parameters()])
    assert int((~masks[-1] & where).sum()) == round(0.8 * int(where.sum()))


def test_a_sparse_start_stays_sparse_without_being_asked():
    parent = SMALL.replace(mask_ratio=0.7)
    child = fk.train(SMALL.replace(start=parent))
    gone = fk.train(parent).weights == 0
    assert int(gone.sum()) > 0 and not bool(child.weights[gone].any())
    with pytest.raises(ValueError, match=r"^mask_ratio must be 0 or at least 0\.7, "):
        SMALL.replace(start=parent, mask_ratio=0.5)


def test_a_clients_control_is_cut_where_the_mask_cuts():
    clients = {}
    states = played(SMALL.replace(strategy="scaffold", mask_ratio=0.7, clients_per_round=6, rounds=6), clients=clients)
    mask = states[-1][0].optimizer["mask"]
    held = client_mask(states[-1][0].task, 0, mask)
    assert all(not bool(memory["control"][~held].any()) for memory in clients.values())


def test_parents_are_treated_alike_by_rounds_and_train():
    wild = SMALL.replace(lr=10.0, rounds=60, local_epochs=20)
    for way in (fk.train, lambda experiment: list(fk.rounds(experiment))):
        with pytest.raises(ValueError, match="the experiment that this one needs has diverged"):
            way(SMALL.replace(teacher=wild))
    student = SMALL.replace(teacher=SMALL.replace(seed=3))
    assert [replace(r, seconds=0) for r in fk.rounds(student)] == [
        replace(r, seconds=0) for r in fk.train(student).records
    ]


def test_own_normalization_never_leaves_a_client():
    experiment = SMALL.replace(model="normed", dataset="blobs_at_sites", partition="site", clients=3,
                               clients_per_round=3, normalization="own")  # fmt: skip
    run, shared = fk.train(experiment), fk.train(experiment.replace(normalization="shared"))
    linear, norm = 6 * 8 + 8 + 8 * 3 + 3, 2 * 8
    assert run.records[0].uplink_bytes == 3 * (14 + 4 * linear)
    assert shared.records[0].uplink_bytes == 3 * (14 + 4 * (linear + norm) + 14 + 4 * norm + 8)
    models = [run.client_model(client) for client in range(3)]
    assert not torch.equal(models[0][1].running_mean, models[1][1].running_mean)
    assert torch.equal(models[0][0].weight, models[1][0].weight)
    held = run.dataset.validation
    for client, model in enumerate(models):
        mine = held.site == client
        with torch.no_grad():
            right = model(run.dataset.preprocess(held.x[mine])).argmax(1) == held.y[mine]
        assert run.records[-1].correct[client] == int(right.sum()) and run.records[-1].total[client] == int(mine.sum())
        assert run.client_accuracy()[0][client] == pytest.approx(float(right.double().mean()))
    artifact = fk.compress(run, fk.Recipe(), client=1)
    assert artifact.accuracy == pytest.approx(run.client_accuracy()[0][1])
    with pytest.raises(ValueError, match="client must be 0 to 2 where each has a model of its own"):
        fk.compress(run, fk.Recipe())
    with pytest.raises(ValueError, match="normalization must be shared for model 'mlp'"):
        fk.train(SMALL.replace(normalization="own"))


@pytest.mark.parametrize("how", [h for h in HOW if "mask_ratio" not in h])
def test_own_normalization_goes_with_every_strategy_and_codec(how):
    """What is not shared stays as it began in the global model, and no frame has room for it."""
    experiment = SMALL.replace(model="normed", normalization="own", **how)
    states = played(experiment)
    job, linear = states[0][0].task, 6 * 8 + 8 + 8 * 3 + 3
    assert int(job.shared.sum()) == linear
    for state, record in states:
        assert not record.refused and record.loss is not None
        assert torch.equal(state.weights[~job.shared], job.initial[~job.shared])
        assert not torch.equal(state.weights[job.shared], job.initial[job.shared])
        if "uplink" not in how:
            assert set(record.uplinks) == {(14 + 4 * linear) * (2 if how.get("strategy") == "scaffold" else 1)}


def test_statistics_of_samples_do_not_leave_under_privacy():
    for level in ("client", "record"):
        with pytest.raises(ValueError, match=r"^privacy must be off for model 'normed', got .*BatchNorm.*GroupNorm"):
            fk.train(SMALL.replace(model="normed", privacy=level))


def test_threads_that_compress_get_what_one_alone_gets(tmp_path):
    runs = [fk.train(SMALL.replace(model=model, rounds=1)) for model in ("mlp", "normed", "body", "logistic")]
    alone = [fk.compress(run, fk.Recipe(dtype="int8"), tmp_path / "alone").digest for run in runs]
    fk.deployment.onnx_export._skeletons.clear()
    barrier, found = threading.Barrier(len(runs)), {}

    def work(k):
        barrier.wait()
        found[k] = fk.compress(runs[k], fk.Recipe(dtype="int8"), tmp_path / "together").digest

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(k) for k in range(len(runs))] == alone


def test_cells_answer_beside_a_bench_that_works(tmp_path):
    """Whatever a notebook calls while a bench trains and exports gives what it gives alone, and so does the bench."""
    run = fk.train(SMALL.replace(model="normed", rounds=1))
    grid = {"prune_ratio": [0.0, 0.3], "dtype": ["fp32", "int8"]}
    cells = {
        "compress": lambda: fk.compress(run, fk.Recipe(prune="channel", prune_ratio=0.25), tmp_path / "own").digest,
        "sweep": lambda: fk.sweep(run.experiment, grid)[["accuracy", "bytes", "note"]].to_dict(),
        "check": lambda: fk.check("02-3", fk.Recipe(prune="channel", prune_ratio=0.6)),
        "train": lambda: fk.train(SMALL.replace(model="body", rounds=2, seed=3)).accuracy,
    }
    alone = {name: cell() for name, cell in cells.items()}
    together = {}
    shutil.rmtree(run.path)
    bench = fk.Bench(SMALL.replace(model="normed", rounds=3), fk.Recipe(prune_ratio=0.5, dtype="fp16"))
    bench.run()
    threads = [threading.Thread(target=lambda n=name: together.update({n: cells[n]()})) for name in cells]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bench.run(block=True)
    assert together == alone
    assert bench.artifact.sparsity > 0.3 and "Error" not in bench.status


def test_no_noise_falls_on_layers_that_do_not_travel():
    run = fk.train(SMALL.replace(model="normed", normalization="own", privacy="client", rounds=2))
    moved = (run.weights - run.task.initial).abs()
    assert (moved[~run.task.shared] == 0).all() and (moved[run.task.shared] > 0).all()
