"""Distillation: the loss by which a small model learns from a large one's answers, and its gradient.

Hinton, Vinyals and Dean 2015: soft answers `softmax(logits / T)` say which wrong classes are close to the right one.
The gradient of the soft part shrinks with 1 / T^2, so it is multiplied by T^2 to keep its share at every temperature.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float, weight: float) -> Tensor:
    """Return the mean of `(1 - weight) * CE(labels) + weight * T^2 * KL(teacher || student)` over the batch, in nats.

    `logits` and `teacher` are [n, classes], `labels` [n]; no gradient flows into the teacher. `temperature` is
    above 0, `weight` in 0..1. The soft part is computed in float64: T^2 would magnify float32's rounding at high T.
    """
    hard = F.cross_entropy(logits, labels)
    given, wanted = ((each.double() / temperature).log_softmax(-1) for each in (logits, teacher.detach()))
    soft = temperature**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)
    return (1 - weight) * hard + weight * soft.to(hard.dtype)


def distillation_gradient(logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float, weight: float) -> Tensor:
    """Return the gradient of each sample's loss with respect to its logits, [..., classes], not divided by n.

    The closed form of `distillation_loss`: `(1 - weight) (p - y) + weight T (p_T - q_T)`.
    """
    gradient = hard_gradient(logits, labels).mul_(1 - weight)
    soft = (logits / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    return gradient.add_(soft, alpha=weight * temperature)


def hard_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of each sample's cross entropy with respect to its logits: `p - y`, [..., classes]."""
    gradient = logits.softmax(-1)
    return gradient.scatter_add_(-1, labels[..., None], torch.full_like(gradient[..., :1], -1))


def centred_mse(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared distance of logits [n, classes], each sample's mean removed.

    Half of it, divided by the number of classes inside the mean, is what `T^2 KL` tends to as T grows (Hinton et al.
    2015, section 2.1): at high temperature distillation is regression on logits, up to a constant per sample.
    """
    difference = logits - teacher
    return (difference - difference.mean(-1, keepdim=True)).pow(2).mean()
