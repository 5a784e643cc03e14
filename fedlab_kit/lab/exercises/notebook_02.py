"""Exercises of notebooks/02_pruning.ipynb."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedlab_kit.compression.prune import prune
from fedlab_kit.data import load
from fedlab_kit.deployment.convert import convert
from fedlab_kit.deployment.onnx_export import export
from fedlab_kit.experiment import Recipe
from fedlab_kit.federation.setup import task
from fedlab_kit.lab.exercises import COURSE, Hint, call, exercise, number
from fedlab_kit.models import build
from fedlab_kit.runs import rounds
from fedlab_kit.wire.frame import HEADER

MASKED = COURSE.replace(model="cnn", mask_ratio=0.9, mask_schedule="fixed", clients_per_round=1, rounds=1)  # of 02-2
ROOM = 20_000  # bytes on the device of 02-3


@exercise("02-1")
def magnitude_mask(answer: Any) -> str:
    """A function (weights, ratio) -> bool mask of the same shape, False for the share `ratio` of smallest magnitude."""
    toy = torch.tensor([[0.1, -3.0], [2.0, -0.2]])
    layer = torch.randn(20, 30, generator=torch.Generator().manual_seed(2))
    for weights, ratio in ((toy, 0.5), (layer, 0.9), (layer, 0.0)):
        _judge(_mask(answer, weights, ratio), weights, round((1 - ratio) * weights.numel()))
    return "The smallest magnitudes go, whatever their sign, and their number is exact."


def _mask(answer: Any, weights: Tensor, ratio: float) -> Tensor:
    """Call the learner's function; 0 and 1 count as False and True."""
    found = call(answer, weights.clone(), ratio)
    try:
        mask = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        raise Hint(f"The mask must be a tensor, not a {type(found).__name__}.") from None
    if mask.shape != weights.shape:
        raise Hint(f"The mask must have the shape of the weights, {list(weights.shape)}, not {list(mask.shape)}.")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise Hint("Return the mask, True for what is kept, not the weights themselves.")
    return mask.bool()


def _judge(found: Tensor, weights: Tensor, kept: int) -> None:
    wanted = _largest(weights.abs(), kept)
    if torch.equal(found, wanted):
        return
    if torch.equal(found, ~wanted):
        raise Hint("That marks what is removed. True means kept.")
    if int(found.sum()) != kept:
        raise Hint(f"Of {weights.numel()} weights {kept} must stay, yours keeps {int(found.sum())}.")
    if torch.equal(found, _largest(weights, kept)):
        raise Hint("A weight of -3 matters as much as one of 3: compare magnitudes.")
    raise Hint("The number is right, but a kept weight has a smaller magnitude than a removed one.")


def _largest(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort(descending=True)[:count]] = True
    return mask.view_as(scores)


@exercise("02-2")
def masked_payload(answer: Any) -> str:
    """The bytes of one client's payload for `cnn` at mask ratio 0.9."""
    given = number(answer, "one whole number of bytes")
    truth = next(rounds(MASKED)).uplink_bytes
    size = task(MASKED).model.layout.size
    kept = (truth - HEADER.size) // 4
    if given == truth:
        return f"{HEADER.size} + 4 x {kept:,} bytes; the dense payload has {HEADER.size + 4 * size:,}."
    tenth, weights = 4 * round(0.1 * size), 4 * round(0.1 * 21_750)
    hints = {
        HEADER.size + 4 * size: "That is the dense payload: weights outside the mask are not sent.",
        truth - HEADER.size: f"Nearly. A payload begins with a header of {HEADER.size} bytes.",
        **dict.fromkeys((tenth, tenth + HEADER.size), "The mask covers weights alone: the 90 biases are all sent."),
        **dict.fromkeys((weights, weights + HEADER.size), "The 90 biases are not masked: they are sent as well."),
        **dict.fromkeys((8 * kept, 8 * kept + HEADER.size), "No positions are sent: both sides know the mask."),
        **dict.fromkeys((4 * (size - kept), 4 * (size - kept) + HEADER.size), "That counts what was removed."),
    }
    raise Hint(hints.get(int(given), "Count the numbers that are left, four bytes each, and add the header."))


@exercise("02-3")
def fits_the_device(answer: Any) -> str:
    """A recipe of dtype fp32 whose file of the default `cnn` fits in `ROOM` bytes, and removes no more than it must."""
    if not isinstance(answer, Recipe):
        raise Hint("Give a recipe: fk.Recipe(...) with the settings you chose.")
    if answer.dtype != "fp32":
        raise Hint("Leave dtype at fp32 here; the next notebook is about dtypes.")
    size = _file_bytes(answer)
    if size > ROOM and answer.prune == "weight" and answer.prune_ratio:
        raise Hint(f"The file still has {size:,} bytes: a zero takes as much room as any other number.")
    if size > ROOM:
        raise Hint(f"The file has {size:,} bytes and must fit in {ROOM:,}.")
    if size < 0.7 * ROOM:
        raise Hint(f"The file has {size:,} bytes: it fits, but with less removed it would still fit.")
    return f"The file has {size:,} bytes, of {ROOM:,}. What is left to do is fine-tuning."


def _file_bytes(recipe: Recipe) -> int:
    """The size of the file, which depends on the shapes alone, so untrained weights will do."""
    data = load("digits")
    model = build("cnn", data.shape, len(data.classes), seed=7)
    try:
        pruned, _ = prune(model, data.shape, recipe, "cnn")
    except ValueError as error:
        raise Hint(f"That recipe cannot be used: {error}") from None
    return len(convert(export(pruned, data.preprocess, data.validation.x[:8]), "fp32").SerializeToString())
