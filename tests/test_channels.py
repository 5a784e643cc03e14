"""Channel pruning: torch-pruning called plainly, zeroed channels in the whole network, and what it must leave alone."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import ROUND_HALF_UP, Decimal

import pytest
import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn

from fedlab_kit.compression.channels import ChannelPlan, plan_channels, prune_channels
from fedlab_kit.compression.prune import prune
from fedlab_kit.experiment import Recipe
from fedlab_kit.models import build

SHAPE = (1, 28, 28)


class Of(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, forward: Callable[["Of", Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
    return [depthwise, nn.BatchNorm2d(inputs), nn.ReLU6(), nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs)]


def mobile() -> nn.Module:
    body = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), *separable(16, 32, 1), nn.ReLU(), *separable(32, 64, 2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))


def residual() -> nn.Module:
    def forward(net: Of, x: Tensor) -> Tensor:
        x = F.relu(net.norm(net.stem(x)))
        x = F.relu(x + net.second(F.relu(net.first(x))))
        return net.head((net.skip(x) + net.third(x)).mean((2, 3)))

    conv = {"stem": nn.Conv2d(3, 16, 3), "first": nn.Conv2d(16, 24, 3, padding=1)}
    more = {"second": nn.Conv2d(24, 16, 1), "skip": nn.Conv2d(16, 40, 1), "third": nn.Conv2d(16, 40, 1)}
    return Of(forward, norm=nn.BatchNorm2d(16), head=nn.Linear(40, 4), **conv, **more)


def dense_net() -> nn.Module:
    def forward(net: Of, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = torch.cat([x, net.a(F.relu(net.norm(x)))], 1)
        x = torch.cat([x, net.b(F.relu(x))], 1)
        return net.head(F.avg_pool2d(F.relu(x), 3).flatten(1))

    conv = {"stem": nn.Conv2d(3, 16, 3), "a": nn.Conv2d(16, 8, 3, padding=1), "b": nn.Conv2d(24, 8, 3, padding=1)}
    return Of(forward, norm=nn.BatchNorm2d(16), head=nn.Linear(32 * 4, 4), **conv)


def inputs_joined() -> nn.Module:
    def forward(net: Of, x: Tensor) -> Tensor:
        x = torch.cat([x, F.relu(net.a(x))], 1)
        return net.head(torch.cat(tensors=[F.relu(net.b(x)), x], dim=1))

    return Of(forward, a=nn.Linear(10, 16), b=nn.Linear(26, 12), head=nn.Linear(38, 4))


def inception() -> nn.Module:
    def forward(net: Of, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        x = torch.cat([net.one(x), net.three(F.relu(net.narrow(x))), net.pool(F.max_pool2d(x, 3, 1, 1))], 1)
        return net.head(F.adaptive_avg_pool2d(F.relu(x), 2).flatten(1))

    conv = {"stem": nn.Conv2d(3, 16, 3), "one": nn.Conv2d(16, 16, 1), "narrow": nn.Conv2d(16, 8, 1)}
    more = {"three": nn.Conv2d(8, 24, 3, padding=1), "pool": nn.Conv2d(16, 8, 1)}
    return Of(forward, head=nn.Linear(48 * 4, 4), **conv, **more)


def gated() -> nn.Module:
    def forward(net: Of, x: Tensor) -> Tensor:
        value, gate = net.both(x).chunk(2, 1)
        return net.head(F.relu(net.next(value * torch.sigmoid(gate))))

    return Of(forward, both=nn.Linear(10, 48), next=nn.Linear(24, 20), head=nn.Linear(20, 4))


def grouped() -> nn.Module:
    body = [nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=4), nn.PReLU(24), nn.Conv2d(24, 16, 1)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(16 * 36, 4))


def transposed() -> nn.Module:
    body = [nn.Conv2d(3, 12, 3, 2), nn.ReLU(), nn.ConvTranspose2d(12, 16, 3), nn.InstanceNorm2d(16, affine=True)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4))


def words() -> nn.Module:
    def forward(net: Of, x: Tensor) -> Tensor:
        return net.head(F.relu(net.hidden(net.table(x.abs().long() % 20).mean(1))))

    return Of(forward, table=nn.Embedding(20, 16), hidden=nn.Linear(16, 24), head=nn.Linear(24, 4))


def series(kind: type[nn.RNNBase], state: bool = False, both: bool = False, layers: int = 1) -> Callable[[], nn.Module]:
    def forward(net: Of, x: Tensor) -> Tensor:
        output, final = net.r(net.before(x))
        if state:
            output = (final[0] if isinstance(final, tuple) else final)[-1][:, None]
        return net.head(F.relu(net.after(output[:, -1])))

    def made() -> nn.Module:
        recurrent = kind(12, 16, batch_first=True, bidirectional=both, num_layers=layers)
        after = nn.Linear(32 if both and not state else 16, 20)
        return Of(forward, before=nn.Linear(6, 12), r=recurrent, after=after, head=nn.Linear(20, 4))

    made.__name__ = f"{kind.__name__}{layers}{'-state' if state else ''}{'-both' if both else ''}"
    return made


def attention() -> nn.Module:
    def forward(net: Of, x: Tensor) -> Tensor:
        first = net.token.expand(len(x), -1, -1)
        x = torch.cat([first, net.first(x)], 1) + net.places
        return net.head(net.layer(x)[:, 0])

    layer = nn.TransformerEncoderLayer(32, 4, 40, batch_first=True)
    net = Of(forward, first=nn.Linear(6, 32), layer=layer, head=nn.Linear(32, 4))
    net.token, net.places = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 8, 32))
    return net


def positions() -> nn.Module:
    """Positions in a buffer, as in PyTorch's tutorial, and two layers."""
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 40), 2, enable_nested_tensor=False)
    net = Of(
        lambda net, x: net.head(net.layers(net.first(x.transpose(0, 1)) + net.places[: x.shape[1]]).mean(0)),
        first=nn.Linear(6, 32), layers=layers, head=nn.Linear(32, 4),
    )  # fmt: skip
    net.register_buffer("places", torch.randn(20, 1, 32))
    return net


def two_recurrent() -> nn.Module:
    def forward(net: Of, x: Tensor) -> Tensor:
        x = net.table(x.abs().long()[..., 0] % 20)
        return net.head(net.second(net.first(x)[0])[0].mean(1))

    recurrent = {"first": nn.LSTM(16, 24, batch_first=True), "second": nn.GRU(24, 20, batch_first=True)}
    return Of(forward, table=nn.Embedding(20, 16), head=nn.Linear(20, 4), **recurrent)


def group_norms() -> nn.Module:
    def forward(net: Of, x: Tensor) -> Tensor:
        x = F.relu(net.norm(torch.cat([net.a(x), net.b(x)], 1)))
        return net.head(net.last(net.c(x)).mean((2, 3)))

    conv = {"a": nn.Conv2d(3, 16, 3), "b": nn.Conv2d(3, 16, 3), "c": nn.Conv2d(32, 24, 1)}
    return Of(forward, norm=nn.GroupNorm(8, 32), last=nn.GroupNorm(6, 24), head=nn.Linear(24, 4), **conv)


IMAGES, ROWS, TIMES = (3, 8, 8), (10,), (7, 6)
PLAIN = [  # no normalization over channels, so that zeroed ones are as good as none
    (mobile, IMAGES), (residual, IMAGES), (dense_net, IMAGES), (inputs_joined, ROWS), (inception, IMAGES),
    (gated, ROWS), (grouped, IMAGES), (transposed, IMAGES), (words, ROWS),
    (series(nn.LSTM), TIMES), (series(nn.GRU), TIMES), (series(nn.RNN, layers=2), TIMES),
    (series(nn.LSTM, state=True), TIMES), (series(nn.GRU, state=True, layers=2), TIMES),
    (two_recurrent, TIMES),
    (series(nn.LSTM, both=True), TIMES), (series(nn.GRU, both=True), TIMES), (series(nn.GRU, True, True), TIMES),
]  # fmt: skip
OTHERS = [(attention, TIMES), (positions, TIMES), (group_norms, IMAGES)]


def names(case: object) -> str:
    return getattr(case, "__name__", "")


def made(function: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """A model with running statistics and weights of its own, and a batch."""
    torch.manual_seed(0)
    model, x = function(), 3 * torch.randn(16, *shape)
    model.train()(x)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval(), x


def silenced(model: nn.Module, plan: ChannelPlan) -> nn.Module:
    """The whole network, whose layers read zeros from all channels that the plan removes."""
    model = copy.deepcopy(model)
    for name, remove, _, gone in plan.cuts:
        layer = model.get_submodule(name)
        if "in_channels" not in remove.__name__ and not isinstance(layer, nn.RNNBase):
            continue
        axis = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
        if "in_channels" in remove.__name__:
            layer.register_forward_pre_hook(lambda _, args, axis=axis, gone=gone: args[0].index_fill(
                axis, torch.tensor(gone), 0))  # fmt: skip
        else:  # a unit whose gates get nothing stays at zero
            rows = [gate + unit for gate in range(0, len(layer.weight_hh_l0), layer.hidden_size) for unit in gone]
            for parameter in layer.parameters():
                parameter.data[rows] = 0
    return model


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize(("function", "shape"), PLAIN, ids=names)
def test_the_pruned_network_answers_as_the_whole_one_that_reads_zeros(function, shape, ratio) -> None:
    model, x = made(function, shape)
    plan = plan_channels(model, x, ratio)
    small = prune_channels(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(small(x), silenced(model, plan)(x), rtol=1e-4, atol=1e-4)
    assert not plan.broken
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    for (name, before), after in zip(model.named_parameters(), small.parameters(), strict=True):
        assert set(after.flatten().tolist()) <= set(before.flatten().tolist()), name


@pytest.mark.parametrize("ratio", [0.5, 0.8])
@pytest.mark.parametrize(("function", "shape"), OTHERS, ids=names)
def test_attention_and_normalization_lose_channels_too(function, shape, ratio) -> None:
    model, x = made(function, shape)
    plan = plan_channels(model, x, ratio)
    small = prune_channels(model, plan)
    assert not plan.broken and small(x).shape == (16, 4) and small(x).isfinite().all()
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())


def test_layer_norms_keep_the_scales_of_their_own_channels() -> None:
    """Of a set of few numbers torch-pruning takes the order for granted."""
    model = nn.Sequential(nn.Linear(5, 256), nn.LayerNorm(256), nn.RMSNorm(256), nn.ReLU(), nn.Linear(256, 4))
    for layer in model[1:3]:
        layer.weight.data = 1 + torch.arange(256.0)
    plan = plan_channels(model, (5,), 0.9)
    small = prune_channels(model, plan)
    [gone] = [cut.channels for cut in plan.cuts if cut.name == "0"]
    kept = [1 + channel for channel in range(256) if channel not in gone]
    assert small[1].weight.tolist() == small[2].weight.tolist() == kept and len(kept) == 24
    assert small[1].normalized_shape == (24,) and small(torch.rand(2, 5)).shape == (2, 4)


@pytest.mark.parametrize(("function", "shape", "last"), [(mobile, IMAGES, "15"), (residual, IMAGES, "head")])
def test_where_torch_pruning_is_right_the_answer_is_its_own(function, shape, last) -> None:
    model, x = made(function, shape)
    small = prune_channels(model, plan_channels(model, x, 0.5, multiple=1))
    torch_pruning.pruner.BasePruner(
        model, x, torch_pruning.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=[model.get_submodule(last)],
    ).step()  # fmt: skip
    for (name, theirs), ours in zip(model.state_dict().items(), small.state_dict().values(), strict=True):
        assert torch.equal(theirs, ours), name


@pytest.mark.parametrize(("function", "shape"), PLAIN + OTHERS, ids=names)
def test_the_plan_says_what_really_goes(function, shape) -> None:
    model, x = made(function, shape)
    plan = plan_channels(model, x, 0.4)
    small = prune_channels(model, plan)
    told = {name: (before, after) for name, before, after in plan.rows}
    last = list(model.named_modules())[-1][0] if isinstance(model, nn.Sequential) else "head"
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) and name != last and not name.endswith("out_proj"):
            width = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
            assert told[name] == (getattr(layer, width), getattr(small.get_submodule(name), width))
    assert last not in told
    assert list(told) == [name for name, _ in model.named_modules() if name in told]


def shuffled() -> nn.Module:
    def forward(net: Of, x: Tensor) -> Tensor:
        x = net.b(F.relu(net.a(x))).unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)
        return net.head(F.relu(net.c(x)).mean((2, 3)))

    conv = {"a": nn.Conv2d(3, 16, 1), "b": nn.Conv2d(16, 16, 3, groups=4), "c": nn.Conv2d(16, 24, 1, groups=4)}
    return Of(forward, head=nn.Linear(24, 4), **conv)


def test_a_layer_that_would_be_scrambled_keeps_its_channels_and_the_plan_says_so() -> None:
    model, x = made(shuffled, IMAGES)  # shapes fit, but the channels behind the shuffle would be others
    plan = plan_channels(model, x, 0.5)
    assert plan.rows == (("a", 16, 8), ("b", 16, 16), ("c", 24, 12)) and plan.broken == ("b",)
    assert "torch-pruning would break b: they keep their channels, prune='weight'" in plan.note
    assert plan.note in str(plan)
    with torch.no_grad():
        torch.testing.assert_close(prune_channels(model, plan)(x), silenced(model, plan)(x))


def test_a_network_that_breaks_everywhere_is_refused_in_one_line() -> None:
    def tied() -> nn.Module:
        net = Of(lambda net, x: net.head(F.relu(net.b(F.relu(net.a(x))))), a=nn.Linear(10, 10), b=nn.Linear(10, 10))
        net.head, net.b.weight = nn.Linear(10, 4), net.a.weight
        return net

    def sizes() -> nn.Module:
        return Of(lambda net, x: net.head(net.a(x).view(-1, 16)), a=nn.Linear(10, 16), head=nn.Linear(16, 4))

    for function, layer in ((tied, "a, b"), (sizes, "a")):
        model, x = made(function, ROWS)
        with pytest.raises(ValueError, match=f"prune must be 'weight' for model 'mine'.* breaks {layer} ") as error:
            prune(model, x, Recipe(prune="channel", prune_ratio=0.5), "mine")
        assert "\n" not in str(error.value)


def test_what_cannot_be_followed_is_refused_in_one_line() -> None:
    net = Of(lambda net, x: net.b(torch.from_numpy(net.a(x).numpy())), a=nn.Linear(3, 8), b=nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"prune must be 'weight' for model 'Of', .*cannot follow it \(.*\)$"):
        plan_channels(net, (3,), 0.5)


def test_class_outputs_are_kept_wherever_they_come_from() -> None:
    """Two heads that are added, one that runs before a layer nobody reads, an output behind a scale of its own."""

    def sums(net: Of, x: Tensor) -> Tensor:
        return net.head(F.relu(net.a(x))) + net.other(net.a(x))

    def early(net: Of, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        logits = net.head(x)
        net.other(x)
        return logits.log_softmax(1)

    def scaled(net: Of, x: Tensor) -> Tensor:
        return net.other(net.head(F.relu(net.a(x))))

    def split(net: Of, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        return torch.cat([net.head(x), net.other(x)], 1)

    for forward, other in ((sums, (16, 4)), (early, (16, 9)), (scaled, None), (split, (16, 2))):
        layers = {"a": nn.Linear(10, 16), "head": nn.Linear(16, 4)}
        net = Of(forward, **layers, other=nn.Linear(*other) if other else nn.BatchNorm1d(4))
        plan = plan_channels(net, ROWS, 0.5)
        assert plan.rows == (("a", 16, 8),) and not plan.broken
        assert prune_channels(net, plan)(torch.rand(3, 10)).shape == (3, 6 if forward is split else 4)


def test_what_is_added_to_the_inputs_keeps_their_channels() -> None:
    def forward(net: Of, x: Tensor) -> Tensor:
        x = x + F.relu(net.a(x))
        return net.head(x + net.c(F.relu(net.b(x))))

    net = Of(forward, a=nn.Linear(10, 10), b=nn.Linear(10, 32), c=nn.Linear(32, 10), head=nn.Linear(10, 4))
    plan = plan_channels(net, ROWS, 0.5)
    assert plan.rows == (("a", 10, 10), ("b", 32, 16), ("c", 10, 10)) and not plan.broken
    assert plan.removed == pytest.approx(16 / 52)


def test_planning_changes_nothing_and_pruning_only_the_copy() -> None:
    model, x = made(mobile, IMAGES)
    model.train()
    model[3].eval()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    model.append(nn.Dropout())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    generator, batch = torch.get_rng_state(), x.clone()
    small = prune_channels(model, plan_channels(model, x, 0.5))
    assert torch.equal(torch.get_rng_state(), generator) and torch.equal(x, batch)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()] and not model[3].training
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]


def test_whole_numbers_are_fed_as_they_are() -> None:
    def forward(net: Of, x: Tensor) -> Tensor:
        return net.head(F.relu(net.hidden(net.table(x).mean(1))))

    net = Of(forward, table=nn.Embedding(20, 16), hidden=nn.Linear(16, 24), head=nn.Linear(24, 4))
    plan = plan_channels(net, torch.randint(0, 20, (8, 7)), 0.5)
    assert plan.rows == (("table", 16, 8), ("hidden", 24, 12)) and not plan.broken


def test_two_threads_plan_as_one() -> None:
    cases = [made(function, shape) for function, shape in (*PLAIN[:6], *OTHERS)]

    def plan(case: tuple[nn.Module, Tensor]) -> object:
        found = plan_channels(*case, 0.5)
        return found.rows, found.broken, [(cut.name, cut.channels) for cut in found.cuts]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(plan, cases)) == [plan(case) for case in cases]


def test_ratios_that_leave_the_same_widths_are_named() -> None:
    net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 4))
    plan = plan_channels(net, ROWS, 0.5)  # 32 channels by 8: 12 to 20 left are all rounded to 16
    assert plan.alike == (0.4, 0.45, 0.55, 0.6)
    assert "any prune_ratio from 0.4 to 0.6 leaves the same widths" in str(plan)
    for ratio in (0.3, *plan.alike, 0.65):
        same = [row for (*row,) in plan_channels(net, ROWS, ratio).rows] == [row for (*row,) in plan.rows]
        assert same == (ratio in plan.alike)
    assert not plan_channels(net, ROWS, 0.5, multiple=1).note
    assert plan_channels(nn.Sequential(nn.Linear(10, 50), nn.Linear(50, 4)), ROWS, 0.02).alike == (0.05, 0.1)  # not 0


def test_nothing_to_remove_is_noted() -> None:
    model = build("logistic", SHAPE, 10, seed=0)
    same, note = prune(model, SHAPE, Recipe(prune="channel", prune_ratio=0.5), "logistic")
    assert note == "channel pruning removed nothing: too few channels outside the class outputs"
    assert sum(p.numel() for p in same.parameters()) == 7850


def test_parts_keep_their_number_and_lose_the_same_places() -> None:
    model, x = made(group_norms, IMAGES)
    small = prune_channels(model, plan_channels(model, x, 0.5))
    assert (small.norm.num_groups, small.norm.num_channels, small.last.num_channels) == (8, 16, 12)
    for before, after, size in ((model.norm, small.norm, 4), (model.last, small.last, 4)):
        where = [before.weight.tolist().index(scale) for scale in after.weight.tolist()]
        assert [channel // size for channel in where] == [n // 2 for n in range(len(where))]
    narrow = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(8, 16), nn.Flatten(), nn.Linear(576, 4))
    assert plan_channels(narrow, IMAGES, 0.8).rows == (("0", 16, 8),)  # one channel of each group stays


def test_a_plan_rounds_wide_layers_to_blocks_and_prints_itself() -> None:
    plan = plan_channels(build("cnn", SHAPE, 10, seed=0), SHAPE, 0.3)
    assert plan.rows == (("0", 10, 7), ("3", 20, 14), ("7", 50, 32))  # 35 of 50 are left, 32 is a block
    assert plan.removed == pytest.approx(1 - 53 / 80)
    assert "3                           20 ->   14 channels" in str(plan)
    assert str(plan).endswith("asked 0.30, removes 0.34 of the channels")
    assert plan_channels(build("cnn", SHAPE, 10, seed=0), SHAPE, 0.3, multiple=1).rows[2] == ("7", 50, 35)


@pytest.mark.parametrize("name", ["cnn", "mlp", "resnet", "logistic"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_channels_go_as_planned_and_the_classes_stay(name: str, ratio: float) -> None:
    model = build(name, SHAPE, 10, seed=0).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = plan_channels(model, SHAPE, ratio)
    pruned = prune_channels(model, plan)
    widths = {key: module.weight.shape[0] for key, module in pruned.named_modules() if hasattr(module, "weight")}
    assert {key: after for key, _, after in plan.rows}.items() <= widths.items()
    assert pruned(torch.rand(3, *SHAPE)).shape == (3, 10)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert abs(plan.removed - ratio) < 0.1 or not plan.rows


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_halves_of_a_channel_and_of_a_block_stay(ratio: float, multiple: int) -> None:
    """Rounded as at school, 2.5 blocks to 3 and 4.5 to 5: of 40 channels pruned by half stay 24, of 72 stay 40."""
    for width in (2, 5, 6, 7, 9, 10, 14, 18, 30, 40, 48, 56, 72, 80, 88, 104):
        model = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))
        step = multiple if width >= 32 else 1
        blocks = (Decimal(width) * Decimal(1 - ratio) / step).quantize(Decimal(1), ROUND_HALF_UP)
        assert plan_channels(model, (2,), ratio, multiple).rows == (("0", width, max(1, int(blocks)) * step),)


def test_the_channels_that_go_are_those_of_smallest_norm() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0] * 3, [9.0] * 3, [2.0] * 3, [8.0] * 3]))
        model[0].bias.zero_()
        model[2].weight.fill_(1.0)
    pruned = prune_channels(model, plan_channels(model, (3,), 0.5))
    assert pruned[0].weight[:, 0].tolist() == [9.0, 8.0]
    assert pruned[2].weight.shape == (2, 2)


def test_group_norm_keeps_its_groups() -> None:
    model = nn.Sequential(nn.Conv2d(1, 48, 3), nn.GroupNorm(6, 48), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 4, 2))
    plan = plan_channels(model, (1, 4, 4), 0.4)
    assert plan.rows == (("0", 48, 24),)  # 28.8 rounded to a multiple of 8 and of 6
    assert prune_channels(model, plan)(torch.rand(2, 1, 4, 4)).shape == (2, 2)


def test_a_ratio_without_a_channel_left_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"prune_ratio 0\.96 would remove all 10 channels of layer '0'"):
        plan_channels(build("cnn", SHAPE, 10, seed=0), SHAPE, 0.96)


def test_an_empty_plan_removes_nothing() -> None:
    assert ChannelPlan(0.5, ()).removed == 0
