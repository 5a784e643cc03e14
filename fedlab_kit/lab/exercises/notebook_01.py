"""Exercises of notebooks/01_federated_learning.ipynb."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedlab_kit.data import load
from fedlab_kit.federation.client import cohort_step
from fedlab_kit.federation.messages import open_payload
from fedlab_kit.federation.server import broadcast, select, server_step, start
from fedlab_kit.federation.setup import task
from fedlab_kit.lab.exercises import COURSE, Hint, call, exercise, number
from fedlab_kit.partition import label_counts, partition
from fedlab_kit.runs import rounds
from fedlab_kit.wire.frame import HEADER

LABELS = (3, 5)  # what 01-1 asks for
SCAFFOLD = COURSE.replace(model="half_mlp", strategy="scaffold", clients_per_round=5, rounds=1)  # what 01-3 asks about
ANSWERED = 3


@exercise("01-1")
def labels_per_client(answer: Any) -> str:
    """An alpha at which the median client of the default experiment holds samples of three to five labels."""
    alpha = number(answer, "one number, an alpha")
    if not 0 < alpha <= 1000:
        raise Hint(f"alpha must be above 0 and at most 1000, got {alpha:g}.")
    usual, data = COURSE, load(COURSE.dataset)
    shards = partition(data, "dirichlet", usual.clients, alpha, usual.seed)
    held = (label_counts(data.train.y, shards, len(data.classes)) > 0).sum(1)
    median = int(held.median())
    said = f"At alpha {alpha:g} the clients hold {int(held.min())} to {int(held.max())} labels, the median is {median}."
    if median > LABELS[1]:
        raise Hint(f"{said} Try a smaller alpha: more skew, fewer labels.")
    if median < LABELS[0]:
        raise Hint(f"{said} Try a larger alpha: less skew, more labels.")
    return said


@exercise("01-2")
def weighted_mean(answer: Any) -> str:
    """A function (updates [clients, P], samples) -> [P] that gives the step the server takes in FedAvg."""
    updates, samples, truth = _a_real_round()
    found = call(answer, updates.clone(), list(samples))
    found = found if isinstance(found, Tensor) else torch.as_tensor(_array(found))
    if found.shape != truth.shape:
        raise Hint(f"The mean must have the shape of one update, {list(truth.shape)}, yours has {list(found.shape)}.")
    if _close(found, truth):
        return "It gives the server's own step, for the updates of a real round."
    if _close(found, updates.mean(0)):
        raise Hint("That is the plain mean: every client counts the same, however many samples stand behind it.")
    if _close(found, truth * sum(samples)):
        raise Hint("The weights must add up to 1: divide by the sum of all samples.")
    if _close(found, truth * sum(samples) / len(samples)):
        raise Hint("You divide by the number of clients; the weights then add up to much more than 1.")
    raise Hint("Not the server's step. Each update counts by its client's share of all samples in the cohort.")


@exercise("01-3")
def bytes_of_a_round(answer: Any) -> str:
    """The bytes of one SCAFFOLD round in both directions: five clients are sent the model, three of them answer."""
    given = number(answer, "one whole number of bytes")
    record = next(rounds(SCAFFOLD))
    sent, received = len(record.cohort), record.downlink_bytes // len(record.cohort)
    up = record.uplink_bytes // sent * ANSWERED
    numbers = 4 * task(SCAFFOLD).model.layout.size
    if given == up + received * sent:
        return f"{received * sent:,} bytes down to five clients, {up:,} bytes up from three."
    hints = {
        up: "That is the uplink alone: the model came down first.",
        received * sent: "That is the downlink alone: three clients also send something.",
        up + received * ANSWERED: "Those who drop out were sent the model before they did.",
        up // ANSWERED * sent + received * sent: "Two of the five never answer: what they would have sent is not sent.",
        (up + received * sent + sent) // 2: "SCAFFOLD sends two vectors each way: the model and a control variate.",
        2 * numbers * (sent + ANSWERED): "Nearly. Every frame begins with a header, and each broadcast with one byte.",
        up + (received - 1) * sent: "Nearly. Each broadcast begins with one byte that says which parts follow.",
    }
    frame = numbers + HEADER.size
    advice = f"One frame is {HEADER.size} + 4 x 52,650 = {frame:,} bytes. Count the frames each way."
    raise Hint(hints.get(int(given), advice))


def _a_real_round() -> tuple[Tensor, list[int], Tensor]:
    """Return updates [clients, P], samples, and the server's step [P] from one round of a small experiment."""
    experiment = COURSE.replace(model="logistic", clients_per_round=4, rounds=1)
    before = start(experiment)
    messages = broadcast(before, select(experiment, 1))
    payloads, _ = cohort_step(experiment, 1, messages, {client: {} for client in messages})
    answers = [open_payload(task(experiment), 1, payload, None) for payload in payloads.values()]
    after, _ = server_step(before, messages, payloads)
    updates = torch.stack([answer.update for answer in answers])
    return updates, [answer.samples for answer in answers], after.weights - before.weights


def _array(found: Any) -> Any:
    """Return what a function gave as something with a shape, or say that it has none."""
    import numpy as np

    try:
        return np.asarray(found, dtype=np.float32)
    except (TypeError, ValueError, RuntimeError):
        raise Hint(f"The mean must be a tensor of the shape of one update, not a {type(found).__name__}.") from None


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-6 * float(b.abs().max()) + 1e-9)
