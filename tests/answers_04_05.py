"""Right and wrong answers to the exercises on distillation and communication; test_exercises.py tries them."""

import math

import numpy as np
import torch
import torch.nn.functional as F

import fedlab_kit as fk

TEACHER = 14 + 4 * 109_386  # bytes of one frame of mlp, of student
STUDENT = 14 + 4 * 52_650


def distil(logits, teacher, labels, T, w, *, reduction="batchmean", power=2, one_side=False, swapped=False):
    """The right loss, or one with a fault."""
    student, target = (logits / T).log_softmax(1), (teacher / (1 if one_side else T)).log_softmax(1)
    first, second = (target, student) if swapped else (student, target)
    soft = F.kl_div(first, second.exp(), reduction=reduction)
    return (1 - w) * F.cross_entropy(logits, labels) + w * T**power * soft


def faulty(**fault):
    return lambda logits, teacher, labels, T, w: distil(logits, teacher, labels, T, w, **fault)


def by_hand(logits, teacher, labels, T, w):
    q, p = (teacher / T).softmax(1), (logits / T).softmax(1)
    hard = -logits.log_softmax(1)[range(len(labels)), labels].mean()
    return float((1 - w) * hard + w * T * T * (q * (q / p).log()).sum(1).mean())


def of_hard_alone(logits, teacher, labels, T, w):
    return distil(logits, teacher, labels, T, w) if w in (0.0, 1.0) else F.cross_entropy(logits, labels)


Q = 3**0.5 / (1 + 3**0.5)
KL = Q * math.log(2 * Q) + (1 - Q) * math.log(2 * (1 - Q))
REVERSE = -0.5 * math.log(2 * Q) - 0.5 * math.log(2 * (1 - Q))


class OneByte(fk.Codec):
    """One scale for all; what is wrong with it, if anything, says the class attribute."""

    fault = ""

    def encode(self, vector, rng):
        scale = np.float32(max(float(vector.abs().max()) / (32 if self.fault == "coarse" else 127), 1e-30))
        scale = scale / np.float32(2) if self.fault == "wraps" else scale
        if self.fault == "divides":
            scale = np.float32(float(vector.abs().max()) / 127)
        with np.errstate(invalid="ignore"):
            codes = np.rint(vector.numpy() / scale).astype(np.int32)
        codes = codes if self.fault == "long" else codes.astype(np.int8)
        body = scale.tobytes() + codes.tobytes()
        return {"list": list(body), "array": codes}.get(self.fault, body)

    def decode(self, body, size):
        scale, codes = np.frombuffer(body, np.float32, count=1), np.frombuffer(body, np.int8, offset=4)
        found = torch.from_numpy(codes * scale + np.float32(self.fault == "shifts" and not codes.any()))
        with np.errstate(invalid="ignore", divide="ignore"):
            found = found * torch.from_numpy(scale / scale) if self.fault == "divides" else found
        return {"numpy": found.numpy(), "double": found.double(), "short": found[1:]}.get(self.fault, found)


def broken(fault):
    return type("Broken", (OneByte,), {"fault": fault})


class Unwritten(fk.Codec):
    def encode(self, vector, rng):
        return ...


class Forgetful(OneByte):
    def decode(self, body, size):
        return None


class Wrong(OneByte):
    def encode(self, vector):
        return b""


RIGHT = {
    "04-1": [4 * KL, 0.1454, 0.145, torch.tensor(0.1454)],
    "04-2": [distil, by_hand, faulty()],
    "04-3": [20 * TEACHER, float(20 * TEACHER)],
    "05-1": [503_922, float(503_922)],
    "05-2": [OneByte, OneByte(), broken("")],
}
WRONG = {
    "04-1": [
        (KL, "multiplies it by T^2"),
        (2 * KL, "T squared"),
        (KL / 2, "mean over two classes"),
        (4 * REVERSE, "The teacher comes first"),
        (REVERSE, "T^2 is missing"),
        (0.1308, "loss at T = 1"),
        (4 * 0.1308, "without dividing"),
        (7, "Soften both answers first"),
        ("0.1454", "one number, the loss"),
        (float("nan"), "one number, the loss"),
    ],
    "04-2": [
        (faulty(reduction="mean"), "a tenth of what it should be"),
        (faulty(reduction="mean", power=0), "a tenth of what it should be"),
        (faulty(power=0), "T^2 is missing"),
        (faulty(one_side=True), "Right at T = 1 and wrong at T = 5"),
        (faulty(swapped=True), "log-softmax of the student first"),
        (lambda logits, teacher, labels, T, w: distil(logits, teacher, labels, T, 1 - w), "share of the teacher"),
        (lambda logits, teacher, labels, T, w: distil(2 * logits, teacher, labels, T, w), "With w = 0"),
        (of_hard_alone, "together they should be"),
        (lambda logits, teacher, labels, T, w: logits - teacher, "must be one number"),
        (lambda logits, teacher, labels, T, w: None, "returns nothing yet"),
        (lambda logits, teacher: logits, "raised TypeError"),
        (0.5, "Give the function itself"),
    ],
    "04-3": [
        (TEACHER, "one client's copy"),
        (80 * TEACHER, "once to each client, not in every round"),
        (10 * TEACHER, "the others come later"),
        (8 * TEACHER, "not once a round"),
        (20 * 4 * 109_386, "Every frame begins with a header"),
        (20 * STUDENT, "the student's size"),
        (20 * TEACHER + 80 * (1 + STUDENT), "the whole downlink"),
        (1, "To how many clients"),
        ("many", "one whole number of bytes, not a str"),
    ],
    "05-1": [
        (500_000, "the codes alone"),
        (503_908, "begins with a header"),
        (500_014, "Each bucket of 512"),
        (503_920, "the last bucket".capitalize()),
        (503_906, "and there is a header"),
        (501_968, "A scale takes two bytes"),
        (1_003_922, "share a byte"),
        (8 * 503_922, "in bits"),
        (4_000_014, "Add half a byte"),
        (float("inf"), "one whole number of bytes"),
        (b"int4", "one whole number of bytes"),
    ],
    "05-2": [
        (broken("coarse"), "of the largest magnitude; 1 % is allowed"),
        (broken("wraps"), "wrap around"),
        (broken("divides"), "NaN or infinity"),
        (broken("shifts"), "must come back as zeros"),
        (broken("long"), "1000 numbers became 4004 bytes; 1004 are allowed"),
        (broken("list"), "must return bytes, not a list"),
        (broken("array"), "must return bytes, not a ndarray"),
        (broken("numpy"), "a float32 tensor, not ndarray"),
        (broken("double"), "a float32 tensor, not torch.float64"),
        (broken("short"), "[999] came out"),
        (Unwritten, "returns nothing yet"),
        (Forgetful, "returns nothing yet"),
        (Wrong, "raised TypeError"),
        (fk.Codec, "raised NotImplementedError"),
        (int, "Hand in the class itself"),
        (127, "Hand in the class itself"),
    ],
}
