"""Losses against hard labels. Values `[rows]`, nothing is reduced."""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import checked, log_softmax


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """−log q[label].

    Args:
        student: logits `[rows, classes]`.
        labels: `[rows]`, int64 in `0 … classes − 1`.
    """
    check_labels("cross_entropy", labels, student.shape[-1])
    log_q = log_softmax(student, 1.0)
    return checked("cross_entropy", -log_q.gather(-1, labels[:, None])[:, 0], student, None)


def check_labels(loss: str, labels: Tensor, classes: int) -> None:
    """Refuse a label outside the classes, naming it. Ignored rows are removed before a loss is called."""
    if labels.numel() == 0:
        return
    low, high = torch.aminmax(labels)
    if low < 0 or high >= classes:
        wrong = int(low if low < 0 else high)
        if wrong == -1:
            raise InputError(
                f"{loss} needs labels and there is an example without one (label -1): use a method without."
            )
        raise InputError(f"{loss}: label {wrong} is outside 0 … {classes - 1}. Check the label column.")
