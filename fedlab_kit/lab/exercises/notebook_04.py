"""Exercises of notebooks/04_distillation.ipynb."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlab_kit.compression.distill import distillation_loss
from fedlab_kit.federation.server import select
from fedlab_kit.federation.setup import task
from fedlab_kit.lab.exercises import COURSE, Hint, call, exercise, number
from fedlab_kit.wire.frame import HEADER

TAUGHT = COURSE.replace(model="half_mlp", rounds=8, teacher=COURSE.replace(model="mlp"))  # what 04-3 asks about


@exercise("04-1")
def loss_by_hand(answer: Any) -> str:
    """The distillation loss at T = 2 and distill weight 1 of logits (0, 0) for a teacher with (ln 3, 0)."""
    given = number(answer, "one number, the loss")
    student, wise = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
    truth = _loss(student, wise, 2.0)
    if abs(given - truth) < 0.0006:
        return f"{truth:.4f}: the KL is {truth / 4:.4f}, and T^2 makes it four times that."
    hints = {
        truth / 4: "That is the KL. Its gradient has shrunk by T^2, so the loss multiplies it by T^2.",
        truth / 2: "Nearly. The factor is T squared; or did you take the mean over the two classes?",
        truth / 8: "That is the mean over two classes, without T^2. The KL is their sum.",
        _loss(wise, student, 2.0): "That is KL(student || teacher), times T^2. The teacher comes first.",
        _loss(wise, student, 2.0) / 4: "That is KL(student || teacher). The teacher comes first, and T^2 is missing.",
        _loss(student, wise, 1.0): "That is the loss at T = 1. Divide all logits by 2 first.",
        4 * _loss(student, wise, 1.0): "You multiplied by T^2 without dividing the logits by T.",
    }
    near = [hint for value, hint in hints.items() if abs(given - value) < 0.0006]
    raise Hint(near[0] if near else "Soften both answers first, then take the KL, then multiply it by T^2.")


def _loss(student: Tensor, teacher: Tensor, temperature: float) -> float:
    label = torch.zeros(1, dtype=torch.int64)
    return float(distillation_loss(student, teacher, label, temperature, 1.0))


@exercise("04-2")
def right_loss(answer: Any) -> str:
    """A function (logits, teacher, labels, T, w) that gives the distillation loss."""
    logits, teacher = torch.randn(2, 8, 10, generator=torch.Generator().manual_seed(4))
    labels = torch.arange(8)
    hard, soft = _values(answer, logits, teacher, labels, 0.0), _values(answer, logits, teacher, labels, 1.0)
    ce = float(F.cross_entropy(logits, labels))
    if abs(hard[0] - ce) > 1e-3 * ce:
        swapped = abs(soft[0] - ce) < 1e-3 * ce
        raise Hint("w is the share of the teacher; yours is the share of the label." if swapped else _HARD)
    right = [float(distillation_loss(logits, teacher, labels, T, 1.0)) for T in TEMPERATURES]
    if all(abs(a - b) < 1e-3 * b for a, b in zip(soft, right, strict=True)):
        mixed = _values(answer, logits, teacher, labels, 0.3)[1]
        if abs(mixed - 0.7 * ce - 0.3 * right[1]) < 1e-3:
            return "At T = 1 and at T = 5, with every weight that was tried."
        raise Hint("Each part alone is right; together they should be (1 - w) times the one plus w times the other.")
    raise Hint(_what_is_wrong([a / b for a, b in zip(soft, right, strict=True)]))


TEMPERATURES = (1.0, 5.0)
_HARD = "With w = 0 the loss should be the cross entropy with the labels, its mean over the samples."


def _values(answer: Any, logits: Tensor, teacher: Tensor, labels: Tensor, weight: float) -> list[float]:
    """Call the learner's function at each temperature; PyTorch's advice on the reduction is ours to give."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [call(answer, logits.clone(), teacher.clone(), labels, T, weight) for T in TEMPERATURES]
    try:
        return [float(value) for value in found]
    except (TypeError, ValueError, RuntimeError):
        raise Hint("The loss must be one number, the mean over the batch.") from None


def _what_is_wrong(ratio: list[float]) -> str:
    """Name the fault from how the soft part compares with the right one at the two temperatures."""
    first, second = ratio
    if abs(first - 0.1) < 1e-3 or abs(second - 0.1) < 1e-3 or abs(second - 0.1 / 25) < 1e-4:
        return (
            "At T = 1 the soft part is a tenth of what it should be: the default reduction divides by the classes too."
        )
    if abs(first - 1) < 1e-3 and abs(second - 1 / 25) < 1e-3:
        return "Right at T = 1, 25 times too small at T = 5: T^2 is missing."
    if abs(first - 1) < 1e-3:
        return "Right at T = 1 and wrong at T = 5: both sides are divided by T, and the KL is multiplied by T^2."
    return "Wrong at T = 1 already: kl_div takes log-softmax of the student first, softmax of the teacher second."


@exercise("04-3")
def bytes_of_the_teacher(answer: Any) -> str:
    """The bytes that the teacher adds to the downlink of the whole run."""
    given = number(answer, "one whole number of bytes")
    met = {client for round in range(1, TAUGHT.rounds + 1) for client in select(TAUGHT, round)}
    sizes = [task(e).model.layout.size for e in (COURSE.replace(model="mlp"), TAUGHT.replace(teacher=None))]
    frame, student = (HEADER.size + 4 * size for size in sizes)
    truth = len(met) * frame
    if given == truth:
        return f"{len(met)} clients, {frame:,} bytes each; a client that comes again is not charged again."
    sent = TAUGHT.rounds * TAUGHT.clients_per_round
    hints = {
        frame: "That is one client's copy.",
        sent * frame: "The teacher is sent once to each client, not in every round.",
        TAUGHT.clients_per_round * frame: "Ten clients meet it in round 1; the others come later.",
        TAUGHT.rounds * frame: "It is sent to each client once, not once a round.",
        len(met) * 4 * sizes[0]: f"Nearly. Every frame begins with a header of {HEADER.size} bytes.",
        len(met) * student: "That is the student's size. The teacher has 109,386 numbers.",
        truth + sent * (1 + student): "That is the whole downlink. The student's share was there before.",
    }
    raise Hint(hints.get(int(given), f"One frame of the teacher has {frame:,} bytes. To how many clients does it go?"))
