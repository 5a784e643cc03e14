"""Floating-point operations, each counted by hand: a multiply-add is two."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlab_kit.models import build, flops

T, D, H = 12, 8, 32  # steps, features, units


class Only(nn.Module):
    """One layer, called as it wants to be."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


def itself(weights: bool = True, mask: bool = False) -> Callable[[nn.Module, Tensor], Tensor]:
    def call(layer: nn.Module, x: Tensor) -> Tensor:
        past = torch.ones(x.shape[1], x.shape[1]).triu(1).bool() if mask else None
        return layer(x, x, x, need_weights=weights, attn_mask=past)[0]

    return call


def shared(x: Tensor) -> Tensor:
    """Four heads of queries, two of keys and values."""
    query, key = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in (x, x[..., :16]))
    return F.scaled_dot_product_attention(query, key, key, enable_gqa=True)


def recurrent(kind: type[nn.RNNBase], **more: int | bool) -> nn.Module:
    return kind(D, H, batch_first=True, **more)


ATTENTION = 2 * T * (3 * H * H + H * H) + 2 * 2 * T * T * H  # four projections, queries by keys, shares by values
ENCODER = ATTENTION + 2 * T * 2 * H * 64
BY_HAND = {
    "linear": (nn.Linear(3, 2), (3,), 2 * 3 * 2),
    "linear at each step": (nn.Linear(D, 5), (T, D), 2 * T * D * 5),
    "conv": (nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 9, 9), 2 * 5 * 5 * 8 * 3 * 9),
    "conv1d": (nn.Conv1d(4, 6, 5, bias=False), (4, 10), 2 * 6 * 6 * 4 * 5),
    "grouped": (nn.Conv2d(8, 12, 3, groups=4), (8, 6, 6), 2 * 4 * 4 * 12 * 2 * 9),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8, padding=1), (8, 6, 6), 2 * 6 * 6 * 8 * 9),
    "dilated": (nn.Conv2d(2, 3, 3, dilation=2), (2, 7, 7), 2 * 3 * 3 * 3 * 2 * 9),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2), (6, 5, 5), 2 * 5 * 5 * 6 * 4 * 9),
    "transposed, grouped": (nn.ConvTranspose2d(6, 4, 3, groups=2), (6, 5, 5), 2 * 5 * 5 * 6 * 2 * 9),
    "embedding": (Only(nn.Embedding(9, D), lambda layer, x: layer(x.long())), (T,), 0),
    "norms": (nn.Sequential(nn.BatchNorm1d(D), nn.LayerNorm(D), nn.ReLU()), (D,), 0),
    "rnn": (recurrent(nn.RNN), (T, D), 2 * T * (D * H + H * H)),
    "gru": (recurrent(nn.GRU), (T, D), 2 * T * 3 * (D * H + H * H)),
    "lstm": (recurrent(nn.LSTM), (T, D), 2 * T * 4 * (D * H + H * H)),
    "lstm, time first": (Only(nn.LSTM(D, H), lambda layer, x: layer(x.transpose(0, 1))[0]), (T, D), 122_880),
    "two layers": (recurrent(nn.LSTM, num_layers=2), (T, D), 2 * T * 4 * (D * H + H * H + 2 * H * H)),
    "both ways": (recurrent(nn.LSTM, bidirectional=True), (T, D), 2 * 2 * T * 4 * (D * H + H * H)),
    "projected": (recurrent(nn.LSTM, proj_size=5), (T, D), 2 * T * (4 * (D * H + 5 * H) + 5 * H)),
    "lstm cell": (Only(nn.LSTMCell(D, H), lambda layer, x: layer(x)[0]), (D,), 2 * 4 * (D * H + H * H)),
    "attention": (Only(nn.MultiheadAttention(H, 4, batch_first=True), itself()), (T, H), ATTENTION),
    "attention, fused": (Only(nn.MultiheadAttention(H, 4, batch_first=True), itself(False)), (T, H), ATTENTION),
    "attention, masked": (Only(nn.MultiheadAttention(H, 4, batch_first=True), itself(False, True)), (T, H), ATTENTION),
    "encoder layer": (nn.TransformerEncoderLayer(H, 4, 64, batch_first=True), (T, H), ENCODER),
    "encoder, norm first": (
        nn.TransformerEncoderLayer(H, 4, 64, batch_first=True, norm_first=True, activation="gelu"), (T, H), ENCODER),
    "bilinear": (Only(nn.Bilinear(3, 5, 4), lambda layer, x: layer(x[:, :3], x)), (5,), 2 * 3 * 5 * 4),
    "a vector": (Only(nn.ParameterList([torch.ones(D)]), lambda layer, x: x @ layer[0]), (T, D), 2 * T * D),
    "grouped queries": (Only(nn.Identity(), lambda _, x: shared(x)), (T, H), 2 * 2 * T * T * H),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("what", BY_HAND)
@pytest.mark.parametrize("frozen", [False, True])
def test_flops_are_those_counted_by_hand(what: str, frozen: bool) -> None:
    layer, shape, expected = BY_HAND[what]
    layer = copy.deepcopy(layer).requires_grad_(not frozen)
    assert flops(layer, shape) == flops(layer.eval(), shape) == expected
    assert flops(layer, torch.rand(5, *shape)) == expected  # of one sample, whatever the batch


def test_flops_of_the_built_in_models() -> None:
    """Simulated seconds hang on them. The cnn by hand: two convolutions and two matrices."""
    assert flops(build("cnn", (1, 28, 28), 10, 0), (1, 28, 28)) == 2 * (
        24 * 24 * 10 * 25 + 8 * 8 * 20 * 10 * 25 + 320 * 50 + 50 * 10
    )
    student = 24 * 24 * 6 * 25 + 8 * 8 * 12 * 6 * 25 + 192 * 10
    assert flops(build("student", (1, 28, 28), 10, 0), (1, 28, 28)) == 2 * student
    expected = {"logistic": 15_680, "mlp": 218_368, "half_mlp": 105_088, "2nn": 397_600, "resnet": 30_785_024}
    assert {name: flops(build(name, (1, 28, 28), 10, 0), (1, 28, 28)) for name in expected} == expected


def test_counting_leaves_the_model_and_the_generator_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten(), nn.Linear(8 * 36, 4))
    model[1].eval()
    before, flags = copy.deepcopy(model.state_dict()), [layer.training for layer in model.modules()]
    x = torch.rand(2, 3, 8, 8)
    generator = torch.get_rng_state()
    noisy = Only(model, lambda layer, x: layer(x.mul_(2) + torch.randn_like(x)))
    kept = x.clone()
    assert flops(noisy, x) == 2 * (36 * 8 * 27 + 8 * 36 * 4)
    assert torch.equal(torch.get_rng_state(), generator) and torch.equal(x, kept)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [layer.training for layer in model.modules()] == flags
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_other_threads_compute_is_not_counted() -> None:
    model, other = nn.Linear(64, 64), nn.Linear(256, 256)
    with ThreadPoolExecutor(2) as pool:
        busy = pool.submit(lambda: [other(torch.rand(64, 256)) for _ in range(200)])
        assert {flops(model, (64,)) for _ in range(50)} == {2 * 64 * 64}
        busy.result()
