"""Losses against hard labels. Values `[rows]`, nothing is reduced."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import checked, full, log_softmax, softplus


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """−log q[label].

    Args:
        student: logits `[rows, classes]`.
        labels: `[rows]`, int64 in `0 … classes − 1`.
    """
    check_labels("cross_entropy", labels, student.shape[-1])
    return checked("cross_entropy", F.nll_loss(log_softmax(student, 1.0), labels, reduction="none"), student, None)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−y log σ(v) − (1 − y) log(1 − σ(v)), from the logit: no log of 0, however large v is (paper 11's critic).

    Args:
        logits: v `[rows]`.
        targets: y `[rows]`, labels 0 and 1 or probabilities. Gradient σ(v) − y.
    """
    if logits.shape != targets.shape or logits.dim() != 1:
        raise InputError(
            f"binary_cross_entropy: logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must both be [rows]."
        )
    y = targets.to(full(logits).dtype)
    if y.numel() and not ((y >= 0) & (y <= 1)).all():
        raise InputError(f"binary_cross_entropy: target {float(y[~((y >= 0) & (y <= 1))][0])} is outside 0 … 1.")
    v = full(logits)
    return y * softplus(-v) + (1 - y) * softplus(v)


def probability_mse(student: Tensor, target: Tensor) -> Tensor:
    """Mean over classes of (softmax(v) − p)². Its gradient vanishes where the student is sure, also of a wrong class.

    Args:
        student: logits v `[rows, classes]`. target: probabilities p `[rows, classes]`, a teacher's or one-hot labels.

    Source: Borup & Andersen 2021, the networks' loss.
    """
    if student.shape != target.shape:
        raise InputError(
            f"probability_mse: student {tuple(student.shape)} and target {tuple(target.shape)} differ in shape."
        )
    q = log_softmax(student, 1.0).exp()
    return checked("probability_mse", (q - target.detach().to(q.dtype)).square().mean(-1), student, None)


def check_labels(loss: str, labels: Tensor, classes: int) -> None:
    """Raise an error that names the first label outside `0 … classes − 1`. Ignored rows are removed before a loss is
    called."""
    if labels.numel() == 0:
        return
    low, high = map(int, torch.aminmax(labels))
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        if wrong == -1:
            raise InputError(
                f"{loss} needs labels and there is an example without one (label -1): use a method without."
            )
        raise InputError(f"{loss}: label {wrong} is outside 0 … {classes - 1}. Check the label column.")
