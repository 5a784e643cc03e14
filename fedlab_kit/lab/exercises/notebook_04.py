"""Exercises of notebooks/04_distillation.ipynb."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlab_kit.compression.distill import distillation_gradient, distillation_loss
from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.server import select
from fedlab_kit.federation.setup import task
from fedlab_kit.lab.exercises import Hint, call, exercise, number
from fedlab_kit.wire.frame import HEADER

TAUGHT = Experiment(  # what 04-3 asks about
    dataset="mnist_5k", partition="hands", clients=10, clients_per_round=3, rounds=12, seed=1,
    model="student", teacher=Experiment(dataset="mnist_5k", model="cnn"),
)  # fmt: skip


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
        if abs(mixed - 0.7 * ce - 0.3 * right[1]) > 1e-3:
            raise Hint("Each part alone is right; together they should be (1 - w) times one plus w times the other.")
        _check_gradient(answer, logits, teacher, labels)
        return "At T = 1 and at T = 5, with every weight that was tried, and the student can learn from its gradient."
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


def _check_gradient(answer: Any, logits: Tensor, teacher: Tensor, labels: Tensor) -> None:
    """Raise Hint unless the gradient that flows back to the student's logits is that of the loss."""
    given = logits.clone().requires_grad_()
    loss = call(answer, given, teacher.clone(), labels, 5.0, 0.3)
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise Hint("The number is right, but no gradient flows from it: return the tensor itself, not detached.")
    (found,) = call(lambda: torch.autograd.grad(loss, given, allow_unused=True))
    right = distillation_gradient(logits, teacher, labels, 5.0, 0.3) / len(logits)
    if found is None or not torch.allclose(found, right, rtol=1e-2, atol=1e-5):
        raise Hint("The number is right, its gradient is not: is a part of the student's side detached?")


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
    sizes = [task(TAUGHT.replace(model=name, teacher=None)).model.layout.size for name in ("cnn", "student")]
    frame, student = (HEADER.size + 4 * size for size in sizes)
    truth = len(met) * frame
    if given == truth:
        return f"{len(met)} clients, {frame:,} bytes each; a client that comes again is not charged again."
    sent = TAUGHT.rounds * TAUGHT.clients_per_round
    hints = {
        frame: "That is one client's copy.",
        sent * frame: "The teacher is sent once to each client, not in every round.",
        TAUGHT.clients_per_round * frame: "Three clients meet it in round 1; the others come later.",
        TAUGHT.rounds * frame: "It is sent to each client once, not once a round.",
        len(met) * 4 * sizes[0]: f"Nearly. Every frame begins with a header of {HEADER.size} bytes.",
        len(met) * student: "That is the student's size. The teacher has 21,840 numbers.",
        truth + sent * (1 + student): "That is the whole downlink. The student's share was there before.",
    }
    raise Hint(hints.get(int(given), f"One frame of the teacher has {frame:,} bytes. To how many clients does it go?"))


@exercise("04-4")
def aligned_answers(answer: Any) -> str:
    """A function (teacher, x, y, epochs) that gives batches (pictures, labels, the teacher's answers to them)."""
    many, epochs, asked = 230, 3, []
    y = torch.arange(many)
    x = torch.randn(many, 4, generator=torch.Generator().manual_seed(4))
    x[:, 0] = y  # so that a picture says which one it is

    def teacher(pictures: Tensor) -> Tensor:
        asked.append(len(pictures))
        return pictures.cumsum(1)

    given = call(answer, teacher, x, y, epochs)
    order, labels, soft = call(_joined, given, 10 * epochs * many)
    epoch = [tuple(part.tolist()) for part in order.split(many)]
    if len(epoch) != epochs or any(len(set(part)) < many for part in epoch):
        raise Hint(f"Each of {epochs} epochs should give each of {many} pictures once, in batches (x, y, answers).")
    if not torch.equal(labels, order):
        raise Hint("The labels no longer belong to their pictures.")
    right = x.cumsum(1)[order]
    if soft.shape != right.shape or (wrong := int((soft != right).any(1).sum())):
        number = f"{wrong} of {len(right)}" if soft.shape == right.shape else "The"
        raise Hint(f"{number} pictures do not come with the teacher's own answer to them.")
    if len(set(epoch)) < epochs:
        raise Hint("The answers fit, but epochs have the same order now. Keep the shuffling.")
    if sum(asked) != many:
        raise Hint(
            f"The answers fit, but the teacher was asked {sum(asked)} times for {many} pictures: keep its answers."
        )
    return f"All {len(right)} answers belong to their pictures, and the teacher was asked {many} times."


def _joined(batches: Any, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return which pictures came, their labels and the answers to them, of `most` batches at most."""
    pictures, labels, soft = map(torch.cat, zip(*islice(batches, most), strict=True))
    return pictures[:, 0].long(), labels, soft
