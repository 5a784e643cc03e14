"""Every strategy and technique against one textbook loop, written here from the papers with autograd and nothing else.

From the package the loop takes the data, the shards, the first weights, each round's cohort and the streams of random
numbers; what is done with them is written below, one client after the other, on one vector of weights.
"""

import contextlib
import functools
import itertools
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fedlab_kit as fk
from fedlab_kit.data import load
from fedlab_kit.federation.fast_path import Stack
from fedlab_kit.federation.setup import rng_for  # the only thing that is not public: who draws what from which seed
from fedlab_kit.models import build


class Skipping(nn.Module):
    """No `nn.Sequential`, so it takes the general path: a normalized, smooth layer with a way around it."""

    def __init__(self, inputs, classes):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(inputs, 12), nn.LayerNorm(12), nn.Linear(12, classes)
        self.around = nn.Linear(inputs, classes, bias=False)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x)))) + self.around(x)


@fk.model
def skipping(shape, classes):
    return Skipping(shape[0], classes)


@fk.model
def dropping(shape, classes):
    """Draws from torch's own generator while it trains."""
    return nn.Sequential(nn.Linear(shape[0], 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, classes), nn.Dropout(0.1))


@fk.model
def small(shape, classes):
    """So small that no two entries of an update are nearly equal: a codec's choice does not hang on rounding."""
    return nn.Sequential(nn.Linear(shape[0], 8), nn.ReLU(), nn.Linear(8, classes))


BASE = fk.Experiment(
    dataset="blobs", model="small", clients=6, clients_per_round=3, partition="dirichlet", alpha=1.0, rounds=4,
    local_epochs=2, batch_size=7, lr=0.05,
)  # fmt: skip


class Textbook:
    """Plays an experiment's rounds by hand; `w` [P] is the global model, `kept[what, client]` what a client keeps."""

    def __init__(self, run):
        self.e, self.data, self.shards = run.experiment, run.dataset, [shard.numpy() for shard in run.shards]
        self.x, self.y = self.data.preprocess(self.data.train.x), self.data.train.y
        self.model = fk.train(self.e.start).model if self.e.start else build(*self._architecture())
        self.w = parameters_to_vector(self.model.parameters()).detach().clone()
        matrix = [torch.full((p.numel(),), p.ndim >= 2) for p in self.model.parameters()]
        self.matrices, self.mask = torch.cat(matrix), torch.ones(len(self.w), dtype=torch.bool)
        self.kept = defaultdict(lambda: torch.zeros_like(self.w))
        self.velocity = self.first = self.second = self.control = torch.zeros_like(self.w)
        self.teacher = fk.train(self.e.teacher).model if self.e.teacher else None
        if self.e.start_recipe:
            self.prune(self.e.start_recipe.prune_ratio, self.w.abs())
        if self.e.mask_ratio and self.e.mask_schedule in ("dynamic", "fixed"):
            draws = torch.rand(len(self.w), generator=torch.Generator().manual_seed(self.e.seed))
            self.prune(self.e.mask_ratio, draws)

    def _architecture(self):
        return self.e.model, self.data.shape, len(self.data.classes), self.e.seed

    def play(self, records):
        for record in records:
            updates = {client: self.client(record.round, client) for client in record.answered}
            if updates or self.e.privacy == "client":
                self.server(record.round, updates)
        return self.w

    # ---- what a client does

    def client(self, round, client):
        e, view = self.e, self.view(client)
        start = self.receive(round, client) * view
        c, own = self.control, self.kept["control", client] * self.mask  # of what is cut it learns when it is asked
        w, steps = start, 0
        with self.training(round, client):
            for gradient in (self.dp_sgd if e.privacy == "record" else self.sgd)(round, client):
                slope = gradient(w)
                if e.strategy == "fedprox":
                    slope = slope + e.proximal_mu * (w - start)
                if e.strategy == "scaffold":
                    slope = slope + c - own
                w, steps = (w - e.lr * slope) * view, steps + 1
        update = w - start
        if e.strategy == "scaffold":  # option II
            new = own - c + (start - w) / (steps * e.lr)
            self.kept["control", client], self.kept["change", client] = new, new - own
        if e.privacy == "client":
            update = clip(update, e.clip_norm)
        if self.exchanged(round):
            self.kept["growth", client] = self.growth(round, client, w)
        return self.send(round, client, update)

    @contextlib.contextmanager
    def training(self, round, client):
        """The model's own chance is of this client and this round; elsewhere it leaves nothing to chance."""
        with torch.random.fork_rng():
            torch.manual_seed(int(rng_for(self.e, "module", round, client).integers(2**63)))
            self.model.train()
            yield
        self.model.eval()

    def growth(self, round, client, w):
        """The gradient where the mask has cut, of the whole shard: as many of its largest entries as will grow."""
        gone = torch.nonzero(self.matrices & ~self.mask)[:, 0]
        slope = self.gradient(w, torch.from_numpy(self.shards[client]))[gone]
        largest = slope.abs().argsort(descending=True)[: self.exchanged(round)]
        return torch.zeros_like(w).index_put((gone[largest],), slope[largest].half().float())

    def sgd(self, round, client):
        """One function from weights to gradient for each batch: every epoch a new order, the last batch shorter."""
        shard, rng = self.shards[client], rng_for(self.e, "batches", round, client)
        for _ in range(self.e.local_epochs):
            order = torch.from_numpy(rng.permutation(shard))
            for index in order.split(self.e.batch_size):
                yield functools.partial(self.gradient, index=index)

    def dp_sgd(self, round, client):
        """Abadi et al. 2016: Poisson batches, each sample's gradient clipped, noise on the sum, a fixed divisor."""
        e, shard, rng = self.e, self.shards[client], rng_for(self.e, "private", round, client)
        batch = min(e.batch_size, len(shard))
        for _ in range(e.local_epochs * -(-len(shard) // e.batch_size)):
            drawn = torch.from_numpy(shard[rng.random(len(shard)) < batch / len(shard)])
            noise = torch.from_numpy(rng.standard_normal(len(self.w), np.float32)) * e.noise_multiplier * e.clip_norm

            def gradient(w, drawn=drawn, noise=noise):
                return sum((clip(self.gradient(w, one), e.clip_norm) for one in drawn.split(1)), noise) / batch

            yield gradient

    def gradient(self, w, index):
        vector_to_parameters(self.on_grid(w), self.model.parameters())
        logits, y = self.model(self.x[index]), self.y[index]
        loss = F.cross_entropy(logits, y)
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(self.x[index])
            loss = (1 - self.e.distill_weight) * loss + self.e.distill_weight * self.soft(logits, wanted)
        return flat(torch.autograd.grad(loss, list(self.model.parameters())))

    def soft(self, logits, wanted):
        """T^2 KL(teacher || student), Hinton et al. 2015."""
        q, p = (wanted / self.e.temperature).softmax(1), (logits / self.e.temperature).softmax(1)
        return self.e.temperature**2 * (q * (q.log() - p.log())).sum(1).mean()

    def on_grid(self, w):
        """Each row of a matrix to whole multiples of a step, the gradient passes unchanged.

        A step is the row's largest magnitude / 127, in bfloat16, as are biases; normalization stays as it is.
        """
        if self.e.qat == "off":
            return w
        vector_to_parameters(w, self.model.parameters())
        rounded = []
        for name, p in self.model.named_parameters():
            p = p.detach()
            step = (p.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
            bias = p if name.startswith("norm") else p.bfloat16().float()
            rounded.append((p / step).round() * step if p.ndim == 2 else bias)
        return flat(rounded)

    # ---- what travels

    def receive(self, round, client):
        """The model; with a lossy downlink the client's own copy, brought nearer to it."""
        if self.e.downlink == "fp32":
            return self.w
        copy = self.kept.get(("copy", client), self.initial)
        rng = rng_for(self.e, "broadcast", round, client)
        copy = (copy + self.squeezed(self.e.downlink, self.w - copy, self.e.downlink_keep, rng)) * self.mask
        self.kept["copy", client] = copy
        return copy

    @functools.cached_property
    def initial(self):
        return parameters_to_vector(build(*self._architecture()).parameters()).detach()

    def send(self, round, client, update):
        """The update through its codec; a biased one owes the client what it left out (Karimireddy et al. 2019)."""
        e, rng = self.e, rng_for(self.e, "encode", round, client)
        if e.uplink != "topk":
            return self.squeezed(e.uplink, update, rng=rng)
        wanted = update + self.kept["residual", client] * self.mask * e.error_feedback
        sent = self.squeezed("topk", wanted, e.uplink_keep)
        self.kept["residual", client] = wanted - sent
        return sent

    def squeezed(self, codec, vector, keep=1.0, rng=None):
        """The entries that the mask keeps as the receiver sees them."""
        x, sent = vector[self.mask], torch.zeros_like(vector)
        if codec == "topk":
            largest = x.abs().argsort(descending=True)[: max(1, round(keep * len(x)))]
            x = torch.zeros_like(x).index_put((largest,), x[largest].half().float())
        elif codec == "int8":
            draws = torch.from_numpy(rng.random(len(x), np.float32))
            parts = zip(x.split(self.e.bucket), draws.split(self.e.bucket), strict=True)
            x = torch.cat([qsgd(part, draw, 127) for part, draw in parts])
        sent[self.mask] = x
        return sent

    def view(self, client):
        """The weights a client trains; sliced: on the fourth kind of device half of each hidden layer's units."""
        if self.e.devices != "sliced" or client % 4 != 3:
            return self.mask
        views, before = [], 1.0
        for p in self.model.parameters():
            last = len(p) == len(self.data.classes)
            part, view = len(p) if last else len(p) // 2, torch.zeros_like(p, dtype=torch.bool)
            if p.ndim == 2:
                view[:part, : int(p.shape[1] * before)] = True
                before = 0.5
            else:
                view[:part] = True
            views.append(view)
        return flat(views)

    # ---- what the server does

    def server(self, round, updates):
        e, n = self.e, {client: len(self.shards[client]) for client in updates}
        held = torch.ones_like(self.mask)
        if e.privacy == "client":  # McMahan et al. 2018: a fixed divisor, no weights
            noise = torch.from_numpy(rng_for(e, "noise", round).standard_normal(len(self.w), np.float32))
            clipped = sum(clip(update, e.clip_norm) for update in updates.values())
            delta = (clipped + noise * e.noise_multiplier * e.clip_norm) / e.clients_per_round
        elif e.strategy == "median":
            delta = torch.from_numpy(np.median(torch.stack(list(updates.values())).numpy(), axis=0))
        else:  # by samples, over those who hold the entry
            weight = sum(n[client] * self.view(client) for client in updates)
            held = weight > 0
            delta = sum(n[client] * update for client, update in updates.items()) / weight.clamp(min=1)
        clients = [self.w + update for update in updates.values()]
        self.w = (self.w + self.step(delta) * held) * self.mask  # noise falls on what is cut, too
        if e.strategy == "scaffold":
            self.control = self.control + sum(self.kept["change", client] for client in updates) / e.clients
        if e.strategy == "feddf":
            self.fuse(round, clients)
        self.prune_on_schedule(round)
        if many := self.exchanged(round):
            self.exchange(many, sum(n[client] * self.kept["growth", client] for client in n))

    def step(self, delta):
        e = self.e
        if e.strategy == "fedavgm":
            self.velocity = e.server_momentum * self.velocity + delta
            return e.server_lr * self.velocity
        if e.strategy == "fedadam":
            self.first, self.second = 0.9 * self.first + 0.1 * delta, 0.99 * self.second + 0.01 * delta**2
            return e.adam_lr * self.first / (self.second.sqrt() + 1e-3)
        return e.server_lr * delta

    def fuse(self, round, clients):
        """Lin et al. 2020: SGD on the public samples towards the mean of the clients' logits."""
        x = self.data.preprocess(self.data.public.x)
        with torch.no_grad():
            wanted = torch.stack([self.answer(client, x) for client in clients]).mean(0)
        for epoch in range(self.e.server_epochs):
            order = torch.from_numpy(rng_for(self.e, "public", round, epoch).permutation(len(x)))
            for index in order.split(20):
                loss = self.soft(self.answer(self.w, x[index]), wanted[index])
                slope = flat(torch.autograd.grad(loss, list(self.model.parameters())))
                self.w = (self.w - self.e.lr * slope) * self.mask

    def answer(self, w, x):
        vector_to_parameters(w, self.model.parameters())
        return self.model(x)

    def prune_on_schedule(self, round):
        e, last = self.e, -(-6 * self.e.rounds // 10)
        if e.mask_ratio and e.mask_schedule == "one-shot" and round == -(-e.rounds // 2):
            self.prune(e.mask_ratio, self.w.abs())
        if e.mask_ratio and e.mask_schedule == "gradual" and round <= last:
            self.prune(e.mask_ratio * (1 - (1 - round / last) ** 3), self.w.abs())  # Zhu and Gupta 2017

    def exchanged(self, round):
        """How many weights a dynamic mask exchanges: a fifth of the kept at first, less by a cosine (FedDST)."""
        last = -(-3 * self.e.rounds // 4)
        if not self.e.mask_ratio or self.e.mask_schedule != "dynamic" or round > last:
            return 0
        kept = int((self.matrices & self.mask).sum())
        return int(np.rint(0.1 * (1 + np.cos(np.pi * round / (last + 1))) * kept))

    def exchange(self, many, slope):
        """The smallest kept magnitudes go, and where the clients' mean gradient is steepest as many come.

        What came in the last round may still be zero: of equals the first go, as the package says.
        """
        kept, gone = (torch.nonzero(self.matrices & where)[:, 0] for where in (self.mask, ~self.mask))
        go = self.w[kept].abs().argsort(stable=True)[:many]
        come = slope[gone].abs().argsort(stable=True, descending=True)[:many]
        self.mask = self.mask.index_fill(0, kept[go], False).index_fill(0, gone[come], True)
        self.cut()

    def prune(self, ratio, scores):
        """The lowest scores of all matrices together go."""
        candidates = torch.nonzero(self.matrices)[:, 0]
        lowest = scores[candidates].argsort()[: round(ratio * len(candidates))]
        self.mask = torch.ones_like(self.mask)
        self.mask[candidates[lowest]] = False
        self.cut()

    def cut(self):
        """What the mask takes, the server no longer has nor remembers."""
        for name in ("w", "velocity", "first", "second", "control"):
            setattr(self, name, getattr(self, name) * self.mask)


def flat(tensors) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def clip(vector, norm):
    return vector * (norm / vector.norm()).clamp(max=1)


def qsgd(x, draws, levels):
    """Alistarh et al. 2017: to one of the two nearest multiples of the step, right on average."""
    scale = x.abs().max()
    if not scale:
        return x
    as_sent = scale.bfloat16()
    if as_sent.float() < scale:  # the scale travels in bfloat16, rounded upwards
        as_sent = torch.nextafter(as_sent, torch.tensor(torch.inf, dtype=torch.bfloat16))
    scale = as_sent.float()
    return torch.floor(x / scale * levels + draws).clamp(-levels, levels) * (scale / levels)


def agree(experiment, tolerance=1e-5):
    """Train, play the same by hand, compare; returns the run."""
    run = fk.train(experiment)
    assert len(run.records) == experiment.rounds and not any(record.refused for record in run.records)
    book = Textbook(run)
    first = book.w.clone()
    torch.testing.assert_close(run.weights, book.play(run.records), rtol=0, atol=tolerance)
    assert (run.weights - first).abs().max() > 1e-3  # something was learned, so agreeing means something
    torch.testing.assert_close(parameters_to_vector(run.model.parameters()).detach(), run.weights, rtol=0, atol=0)
    return run


def test_the_world_of_these_tests_is_uneven():
    sizes = [len(shard) for shard in fk.train(BASE).shards]
    assert len(set(sizes)) > 3 and any(size % BASE.batch_size for size in sizes) and sum(sizes) == 120


STRATEGIES = {
    "fedavg": {"server_lr": 0.8},
    "fedprox": {"proximal_mu": 0.7, "server_lr": 1.3},
    "fedavgm": {"server_lr": 0.6, "server_momentum": 0.7},
    "fedadam": {"adam_lr": 0.02},
    "scaffold": {"server_lr": 0.9},
    "feddf": {"temperature": 3.0, "server_epochs": 3, "server_lr": 0.9},
    "median": {"server_lr": 0.7},
}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("model", ["mlp", "skipping"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy(strategy, model, dropout):
    run = agree(BASE.replace(strategy=strategy, model=model, dropout=dropout, **STRATEGIES[strategy]))
    lost = [len(record.cohort) - len(record.answered) for record in run.records]
    assert any(lost) == (dropout > 0) and all(len(record.cohort) == 3 for record in run.records)


@pytest.mark.parametrize("more", [{}, {"mask_ratio": 0.6, "mask_schedule": "dynamic"}, {"privacy": "record"}])
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "feddf"])
def test_what_a_model_leaves_to_chance_is_drawn_anew_for_each_client_and_round(strategy, more):
    if strategy != "feddf" or "privacy" not in more:
        agree(BASE.replace(model="dropping", strategy=strategy, **more))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_with_its_defaults(strategy):
    agree(BASE.replace(strategy=strategy))


TECHNIQUES = {
    "a teacher at 2": {"teacher": BASE.replace(model="mlp", seed=1), "temperature": 2.0, "distill_weight": 0.3},
    "a teacher at 5": {"teacher": BASE.replace(model="mlp", seed=1), "temperature": 5.0, "distill_weight": 0.3},
    "the teacher alone": {"teacher": BASE.replace(model="mlp", seed=1), "distill_weight": 1.0},
    "a start": {"start": BASE.replace(seed=2)},
    "a pruned start": {"start": BASE.replace(seed=2), "start_recipe": fk.Recipe(prune_ratio=0.4)},
    "topk": {"uplink": "topk", "uplink_keep": 0.15},
    "topk without feedback": {"uplink": "topk", "uplink_keep": 0.15, "error_feedback": False},
    "int8": {"uplink": "int8", "bucket": 16},
    "topk downwards": {"downlink": "topk", "downlink_keep": 0.3},
    "int8 downwards": {"downlink": "int8", "bucket": 16},
    "int8 both ways": {"uplink": "int8", "downlink": "int8", "bucket": 16},
    "topk both ways": {"uplink": "topk", "uplink_keep": 0.2, "downlink": "topk", "downlink_keep": 0.3},
    "a gradual mask": {"mask_ratio": 0.6},
    "a mask at half time": {"mask_ratio": 0.6, "mask_schedule": "one-shot"},
    "momentum under a mask": {"mask_ratio": 0.6, "strategy": "fedavgm"},
    "moments under a mask": {"mask_ratio": 0.6, "strategy": "fedadam"},
    "controls under a mask": {"mask_ratio": 0.6, "strategy": "scaffold", "mask_schedule": "one-shot"},
    "a fixed mask": {"mask_ratio": 0.6, "mask_schedule": "fixed"},
    "a dynamic mask": {"mask_ratio": 0.6, "mask_schedule": "dynamic"},
    "momentum under a dynamic mask": {"mask_ratio": 0.6, "mask_schedule": "dynamic", "strategy": "fedavgm"},
    "residuals under a dynamic mask": {
        "mask_ratio": 0.6, "mask_schedule": "dynamic", "uplink": "topk", "uplink_keep": 0.2,
    },
    "controls under a dynamic mask": {"mask_ratio": 0.6, "mask_schedule": "dynamic", "strategy": "scaffold"},
    "an ensemble under a mask": {"mask_ratio": 0.6, "strategy": "feddf"},
    "residuals under a mask": {"mask_ratio": 0.6, "uplink": "topk", "uplink_keep": 0.2},
    "int8 on its grid": {"qat": "int8"},
    "a teacher, its grid and a mask": {
        "teacher": BASE.replace(model="mlp", seed=1), "qat": "int8", "mask_ratio": 0.5, "strategy": "fedprox",
    },
    "clipped clients": {"privacy": "client", "clip_norm": 0.05, "noise_multiplier": 0.0},
    "clipped, noisy clients": {"privacy": "client", "clip_norm": 0.05, "noise_multiplier": 0.3, "server_lr": 0.5},
    "momentum of clipped clients": {
        "privacy": "client", "clip_norm": 0.05, "noise_multiplier": 0.0, "strategy": "fedavgm", "dropout": 0.4,
    },
    "clipped clients owe": {
        "privacy": "client", "clip_norm": 0.05, "noise_multiplier": 0.0, "uplink": "topk", "uplink_keep": 0.2,
    },
    "clipped records": {"privacy": "record", "clip_norm": 0.3, "noise_multiplier": 0.0},
    "clipped, noisy records": {"privacy": "record", "clip_norm": 0.3, "noise_multiplier": 0.5},
    "clipped records of few": {"privacy": "record", "clip_norm": 0.3, "noise_multiplier": 0.5, "batch_size": 25},
    "controls of records": {"privacy": "record", "clip_norm": 0.3, "noise_multiplier": 0.5, "strategy": "scaffold"},
}  # fmt: skip


@pytest.mark.parametrize("model", ["small", "skipping"])
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_every_technique(technique, model):
    changes = dict(TECHNIQUES[technique])
    if "start" in changes:
        changes["start"] = changes["start"].replace(model=model)
    agree(BASE.replace(model=model, **changes))


@pytest.mark.parametrize("technique", ["topk", "int8", "a gradual mask", "a dynamic mask", "a teacher at 2"])
def test_techniques_with_drop_outs(technique):
    agree(BASE.replace(dropout=0.4, rounds=6, **TECHNIQUES[technique]))


@pytest.mark.parametrize("more", [{}, {"strategy": "fedavgm"}, {"mask_ratio": 0.6, "strategy": "fedavgm"}])
def test_noise_and_masks_come_in_time_though_nobody_does(more):
    """Client-level privacy: that nobody came must not show, so noise is added and the mask falls due all the same."""
    run = agree(BASE.replace(privacy="client", clip_norm=0.05, noise_multiplier=0.3, clients_per_round=1, rounds=9,
                             dropout=0.7, **more))  # fmt: skip
    nobody = [record for record in run.records[:6] if not record.answered]
    assert nobody and {record.note for record in nobody} == {"nobody answered: the model was given noise alone"}
    assert len({record.loss for record in run.records}) == 9


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm"])
def test_slices_are_averaged_over_those_who_hold_them(strategy):
    run = agree(
        BASE.replace(
            model="mlp", strategy=strategy, devices="sliced", clients=4, clients_per_round=2, dropout=0.5, seed=5
        )
    )
    narrow = [{client % 4 == 3 for client in record.answered} for record in run.records]
    assert {True} in narrow and {True, False} in narrow and {False} in narrow


PER_CLIENT = {  # what each client of a stack has of its own while it trains
    "controls": {"strategy": "scaffold"},
    "starts": {"strategy": "fedprox", "proximal_mu": 0.7, "downlink": "topk", "downlink_keep": 0.3},
    "slices": {"model": "mlp", "devices": "sliced"},
    "grids": {"qat": "int8", "mask_ratio": 0.5},
    "lessons": {"teacher": BASE.replace(model="mlp", seed=1), "strategy": "fedprox"},
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("own", PER_CLIENT)
def test_a_cohort_that_is_larger_than_a_stack_is_trained_in_several(own, size, monkeypatch):
    kept = property(lambda stack: size, lambda stack, usual: vars(stack).update(stack_size=usual))  # for later tests
    monkeypatch.setattr(Stack, "stack_size", kept, raising=False)
    run = agree(BASE.replace(clients_per_round=5, **PER_CLIENT[own]))
    assert run.task.model.stack is not None and run.task.model.stack.stack_size == size


def test_epsilon_counts_every_step_of_the_client_that_fared_worst():
    from opacus.accountants import RDPAccountant

    run = fk.train(BASE.replace(privacy="record", local_epochs=3, clients_per_round=4))
    spent = []
    for client, size in enumerate(map(len, run.shards)):
        accountant = RDPAccountant()
        rounds = sum(client in record.answered for record in run.records)
        steps = rounds * 3 * -(-size // 7)
        accountant.history = [(1.0, min(1.0, 7 / size), steps)] * (steps > 0)
        spent.append(accountant.get_epsilon(1e-3) if steps else 0.0)
    assert run.epsilon(1e-3) == pytest.approx(max(spent), rel=0.02)


# ---- chance: what is drawn anew, and from what


def who(experiment, which):
    return [getattr(record, which) for record in fk.rounds(experiment)]


def test_cohorts_and_drop_outs_are_drawn_anew_each_round_from_the_seed_alone():
    experiment = BASE.replace(rounds=12, dropout=0.5, clients_per_round=5, local_epochs=1)
    cohorts, answered = who(experiment, "cohort"), who(experiment, "answered")
    assert len(set(cohorts)) > 3
    places = [tuple(client in there for client in cohort) for cohort, there in zip(cohorts, answered, strict=True)]
    assert len(set(places)) > 6  # who drops out is no matter of the place in the cohort
    for change in ({"lr": 0.01}, {"strategy": "fedadam"}, {"uplink": "int8"}, {"model": "skipping"}, {"alpha": 3.0}):
        assert who(experiment.replace(**change), "cohort") == cohorts
        assert who(experiment.replace(**change), "answered") == answered
    other = experiment.replace(seed=8)
    assert who(other, "cohort") != cohorts
    assert [len(there) for there in who(other, "answered")] != [len(there) for there in answered]
    assert who(experiment.replace(rounds=5), "answered") == answered[:5]


def batches(experiment):
    """Return the samples of each training batch, in the order in which the model saw them."""
    data, seen = load(experiment.dataset), []
    known = {tuple(row.tolist()): number for number, row in enumerate(data.preprocess(data.train.x))}

    def look(module, arguments):
        if isinstance(module, Skipping) and module.training and torch.is_grad_enabled():
            seen.append([known[tuple(row.tolist())] for row in arguments[0]])

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        list(fk.rounds(experiment))
    finally:
        hook.remove()
    return seen


def test_batches_are_drawn_anew_for_each_epoch_client_and_round():
    """All clients hold 20 samples: an order of places tells epochs, clients and rounds apart."""
    experiment = BASE.replace(
        model="skipping", partition="iid", clients_per_round=6, batch_size=20, rounds=3, local_epochs=2
    )
    seen = batches(experiment)
    assert len(seen) == 3 * 6 * 2 and all(len(set(batch)) == 20 for batch in seen)
    orders = {tuple(np.argsort(batch).tolist()) for batch in seen}  # places within the sorted shard
    assert len(orders) == len(seen)
    assert batches(experiment) == seen
    assert all(len({tuple(sorted(batch)) for batch in pair}) == 1 for pair in zip(seen[::2], seen[1::2], strict=True))
    assert sorted(itertools.chain(*seen[:12:2])) == list(range(120))


def test_another_seed_draws_everything_anew():
    first, second = (fk.train(BASE.replace(seed=seed, model="skipping", dropout=0.4)) for seed in (1, 2))
    assert [r.cohort for r in first.records] != [r.cohort for r in second.records]
    assert not any(torch.equal(a, b) for a, b in zip(first.shards, second.shards, strict=True))
    assert not (first.weights == second.weights).all()
    one, two = (build("small", (6,), 3, seed) for seed in (1, 2))
    assert not torch.equal(one[0].weight, two[0].weight)
    for purpose in ("batches", "encode", "noise", "private", "public", "select", "dropout"):
        draws = {rng_for(BASE.replace(seed=seed), purpose, 1, 2).integers(2**60) for seed in range(5)}
        assert len(draws) == 5
    everybody = BASE.replace(model="skipping", partition="iid", clients_per_round=6, rounds=1, batch_size=20)
    places = [{tuple(np.argsort(b)) for b in batches(everybody.replace(seed=seed))} for seed in (1, 2)]
    assert not places[0] & places[1]
