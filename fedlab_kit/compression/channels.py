"""Channel pruning: which channels go from which layers, and the smaller network, checked against the whole one.

torch-pruning finds out which layers hang together. What it gets wrong is found by running the pruned network; such
layers keep their channels, and the plan says so.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch_pruning import importance

from fedlab_kit.compression.dependency import CONV, LAST_AXIS, dependencies, parts_of, squares, without
from fedlab_kit.models import Draws, as_batch

# Measured in onnxruntime: layers of 32 channels or more run in blocks, and with counts between the blocks a pruned
# resnet is up to 1.7 times slower than the unpruned one; below that, rounding gains nothing.
WIDE, MULTIPLE = 32, 8

TURN = RLock()  # torch's exporter and pruner follow a model through state of the process: one thread at a time

WIDTHS = {  # the layers that have channels of their own, and how many
    CONV: "out_channels",
    nn.Linear: "out_features",
    nn.Embedding: "embedding_dim",
    nn.MultiheadAttention: "embed_dim",
    nn.RNNBase: "hidden_size",
}


class Cut(NamedTuple):
    """Channels that go from a layer by `remove(layer, channels)`, or from the axis `axis` of a parameter."""

    name: str
    remove: Callable[[Any, list[int]], Any]
    axis: int
    channels: list[int]


class Group(NamedTuple):
    """Layers that lose the same of `width` channels by `cuts`, as many from each of `parts`, or none, by a `fault`."""

    layers: list[str]
    width: int
    parts: int = 1
    cuts: tuple[Cut, ...] = ()
    fault: str = ""


@dataclass(frozen=True)
class ChannelPlan:
    """What channel pruning is about to do: (layer, channels before, channels after) in the order of the network.

    `broken` are the layers that keep their channels because torch-pruning would break the network there, `alike` other
    steps of the ratio's knob that leave the same numbers, `cuts` what goes from each layer and from its readers.
    """

    ratio: float
    rows: tuple[tuple[str, int, int], ...]
    broken: tuple[str, ...] = ()
    alike: tuple[float, ...] = ()
    cuts: tuple[Cut, ...] = field(default=(), repr=False)

    @property
    def removed(self) -> float:
        """The share of channels that really goes, after rounding."""
        before = sum(before for _, before, _ in self.rows)
        after = sum(after for _, _, after in self.rows)
        return 1 - after / before if before else 0.0

    @property
    def note(self) -> str:
        """Say so when nothing goes, when torch-pruning leaves layers alone, and when other ratios give the same."""
        if not self.cuts:
            return "channel pruning removed nothing: too few channels outside the class outputs"
        kept = "they keep their channels, prune='weight' reaches them"
        broken = f"torch-pruning would break {_some(self.broken)}: {kept}" if self.broken else ""
        ratios = sorted([self.ratio, *self.alike])
        alike = f"any prune_ratio from {ratios[0]:g} to {ratios[-1]:g} leaves the same widths" if self.alike else ""
        return "; ".join(filter(None, [broken, alike]))

    def __str__(self) -> str:
        lines = [f"{name:24} {before:5} -> {after:4} channels" for name, before, after in self.rows]
        asked = f"asked {self.ratio:.2f}, removes {self.removed:.2f} of the channels"
        return "\n".join([*lines, asked, *filter(None, [self.note])])


def plan_channels(
    model: nn.Module, inputs: Tensor | Sequence[int], ratio: float, multiple: int = MULTIPLE, name: str = ""
) -> ChannelPlan:
    """Plan the removal of the share `ratio` of channels from every layer but those that give the class outputs.

    By group magnitude, p = 2, the least important go, and all that depends on them. What is left of a layer of 32
    channels or more is rounded to the nearest `multiple`, the runtime's blocks of channels (1: no rounding); groups and
    heads keep their number. `inputs` is a preprocessed batch [n, ...] or a sample's shape, `name` what errors call the
    model. Raises ValueError when a layer would lose all its channels, and when any cut would break the network.
    """
    sample = as_batch(inputs)[:2]
    sample = sample.to(next(model.parameters(), sample).device)
    remedy = f"prune must be 'weight' for model {name or type(model).__name__!r}, got 'channel': torch-pruning"
    with TURN:
        try:
            groups = list(_groups(model, sample, ratio, multiple))[::-1]
        except Exception as error:  # whatever a library that follows autograd's graph may stumble on
            raise ValueError(f"{remedy} cannot follow it ({first_line(error)})") from error
        for group in groups:
            if group.cuts and _kept(group, ratio, multiple) == 0:
                lost = f"all {group.width} channels of layer {group.layers[0]!r}"
                raise ValueError(f"prune_ratio {ratio:g} would remove {lost}; choose a smaller one")
        groups = _sound(model, sample, groups)
    faults = {layer: group.fault for group in groups for layer in group.layers if group.fault}
    cuts = tuple(cut for group in groups for cut in group.cuts)
    if faults and not cuts:
        raise ValueError(f"{remedy} breaks {_some(tuple(faults))} ({next(iter(faults.values()))})")

    knob = [step / 20 for step in range(1, 20)]
    pruned = [group for group in groups if not group.fault]
    widths = {each: [_kept(group, each, multiple) for group in pruned] for each in (ratio, *knob)}
    alike = tuple(other for other in knob if other != ratio and widths[other] == widths[ratio])
    plan = ChannelPlan(ratio, (), tuple(faults), alike, cuts)
    return replace(plan, rows=_rows(model, prune_channels(model, plan), groups))


def prune_channels(model: nn.Module, plan: ChannelPlan) -> nn.Module:
    """Return a copy without the planned channels, of the model planned for or of one with other weights."""
    small = copy.deepcopy(model)
    together: dict[tuple[str, Callable[[Any, list[int]], Any], int], set[int]] = {}
    for name, remove, axis, channels in plan.cuts:  # from each layer all at once: they are numbered as in the whole one
        together.setdefault((name, remove, axis), set()).update(channels)
    layers = dict(small.named_modules())
    for (name, remove, axis), gone in together.items():
        if name in layers:
            remove(layers[name], sorted(gone))
        else:
            owner, _, last = name.rpartition(".")
            setattr(layers[owner], last, without(getattr(layers[owner], last), sorted(gone), axis))
    _as_before(small, model)
    return small


def _as_before(small: nn.Module, model: nn.Module) -> None:
    """Freeze again what was frozen and tie again what was tied, which the library forgets."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied = small.get_parameter(first[id(parameter)])
        if not torch.equal(tied, small.get_parameter(name)):
            raise ValueError(f"tied weights {first[id(parameter)]} and {name} would differ")
        owner, _, last = name.rpartition(".")
        setattr(small.get_submodule(owner), last, tied.requires_grad_(parameter.requires_grad))


def _kept(group: Group, ratio: float, multiple: int) -> int:
    """How many of a layer's channels stay: rounded to blocks where it is wide, as many in each part everywhere."""
    left, blocks = group.width * (1 - ratio), math.lcm(multiple, group.parts)
    step = blocks if group.width >= WIDE and group.width > blocks and left >= blocks / 2 else group.parts
    return min(group.width, max(math.floor(left / step + 0.5) * step, group.parts if left >= 0.5 else 0))


def _groups(model: nn.Module, sample: Tensor, ratio: float, multiple: int) -> Iterator[Group]:
    """Propose what to remove from each group of layers that hang together, the last to run first."""
    graph, entry, names = dependencies(model, sample)
    seen: set[nn.Module] = {entry}
    for root in [node for node in graph.module2node if isinstance(node, tuple(WIDTHS))]:
        pruner = graph.get_pruner_of_module(root)
        width = pruner.get_out_channels(root)
        if root in seen or not width:
            continue
        group = Group([names[root]], width)
        try:
            whole = graph.get_pruning_group(root, pruner.prune_out_channels, list(range(width)))
            shrinking = [dep for dep, _ in whole if graph.is_out_channel_pruning_fn(dep.pruning_fn)]
            seen |= {dep.layer for dep in shrinking if isinstance(dep.layer, nn.Module)}
            if not all(dep.target.outputs for dep in shrinking):
                continue  # the class outputs
            own = [dep.layer for dep in shrinking if isinstance(dep.layer, tuple(WIDTHS))]
            group = group._replace(layers=[names[layer] for layer in own])
            joined = any(dep.layer is entry for dep in shrinking)  # added to the inputs, which stay as they are
            group = group._replace(width=0) if joined else _proposal(graph, whole, names, group, ratio, multiple)
        except Exception as error:
            group = group._replace(fault=first_line(error))
        yield group


def _proposal(graph: Any, whole: Any, names: dict[Any, str], group: Group, ratio: float, multiple: int) -> Group:
    """Return the group with the cuts by which the least important channels go, at the same places in each part."""
    group = group._replace(parts=math.lcm(*(parts_of(dep.layer) for dep, _ in whole)))
    size, gone = group.width // group.parts, group.width - _kept(group, ratio, multiple)
    if not gone:
        return group
    root = whole[0].dep
    scores = importance.GroupMagnitudeImportance(p=2)(whole)
    scores = squares(root.layer) if scores is None else scores
    places = scores.view(group.parts, size).mean(0).argsort(stable=True)[: gone // group.parts].tolist()
    channels = [part * size + place for part in range(group.parts) for place in places]
    found = graph.get_pruning_group(root.layer, root.pruning_fn, sorted(channels))
    cuts = [Cut(names[d.layer], d.pruning_fn, d.target.pruning_dim, gone) for d, gone in found if d.layer in names]
    return group._replace(cuts=tuple(cuts))


def _sound(model: nn.Module, sample: Tensor, groups: list[Group]) -> list[Group]:
    """Return the groups without the cuts that break the network: all are tried together, and else one by one."""
    if not any(group.cuts for group in groups) or not _fault(model, sample, groups):
        return groups
    tried: list[Group] = []
    for group in groups:
        fault = _fault(model, sample, [*tried, group]) if group.cuts else group.fault
        tried.append(group._replace(cuts=(), fault=fault) if fault else group)
    return tried


@torch.no_grad()
def _fault(model: nn.Module, sample: Tensor, groups: list[Group]) -> str:
    """Say what is wrong with the network that the cuts leave, or return "".

    It must answer like the whole one whose removed weights are zero. Both get noise, since a layer of zeros would hide
    what is wrong behind it, and stand-ins for what depends on how many channels there are.
    """
    plan = ChannelPlan(0, (), cuts=tuple(cut for group in groups for cut in group.cuts))
    whole = copy.deepcopy(model).eval()
    draw = torch.Generator().manual_seed(0)
    for parameter in whole.parameters():
        noise = torch.randn(parameter.shape, generator=draw).to(parameter)
        parameter.add_(noise / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.1 * noise * parameter)
    for layer in whole.modules():
        if isinstance(layer, (nn.GroupNorm, *LAST_AXIS)):
            layer.register_forward_hook(_affine)
    try:
        small = prune_channels(whole, plan)
        _blank(whole, plan)
        for layer, smaller in zip(whole.modules(), small.modules(), strict=True):
            if isinstance(layer, nn.MultiheadAttention) and smaller.embed_dim < layer.embed_dim:
                for name, parameter in smaller.named_parameters(recurse=False):
                    if name.startswith("in_proj"):  # the queries come first
                        parameter[: smaller.embed_dim] *= math.sqrt(smaller.embed_dim / layer.embed_dim)
        with Draws(0).inside():
            expected = whole(sample.clone())
        with Draws(0).inside():
            found = small(sample.clone())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    except AssertionError:
        return "it answers something else"
    except Exception as error:
        return first_line(error)
    return ""


def _blank(whole: nn.Module, plan: ChannelPlan) -> None:
    """Set every weight to zero that the plan removes: what is left of weights that tell their places tells which."""
    places = copy.deepcopy(whole).double()
    for parameter in places.parameters():
        parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
    left = prune_channels(places, plan)
    for name, parameter in whole.named_parameters():
        mask = torch.zeros(parameter.numel(), device=parameter.device)
        mask[left.get_parameter(name).flatten().long()] = 1
        parameter.mul_(mask.view_as(parameter))


def _affine(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Stand in for a normalization: its scale and bias alone, and for groups of channels a factor that tells which."""
    x, parts = args[0], isinstance(layer, nn.GroupNorm)
    axes = (1, -1, *[1] * (x.ndim - 2)) if parts else (-1,)
    x = x if layer.weight is None else x * layer.weight.reshape(axes)
    x = x if getattr(layer, "bias", None) is None else x + layer.bias.reshape(axes)
    number = torch.arange(1, layer.num_groups + 1, device=x.device) if parts else None
    return x if number is None else x * number.repeat_interleave(x.shape[1] // len(number)).reshape(axes)


def _rows(model: nn.Module, small: nn.Module, groups: list[Group]) -> tuple[tuple[str, int, int], ...]:
    meant = {layer for group in groups for layer in group.layers}
    before, after = (
        {
            name: getattr(layer, width)
            for name, layer in network.named_modules()
            for kind, width in WIDTHS.items()
            if name in meant and isinstance(layer, kind)
        }
        for network in (model, small)
    )
    return tuple((name, width, after[name]) for name, width in before.items())


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """Return the first line of another library's complaint, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
