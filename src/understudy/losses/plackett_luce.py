"""List-wise losses that treat a teacher's scores as a ranking. Values `[rows]`, nothing is reduced."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import check_temperature, checked, full, log_softmax, need_dense
from understudy.losses.classification import check_labels
from understudy.targets import Target

Weights = Literal["teacher", "uniform", "position", "first"]


def teacher_permutation(teacher: Tensor, labels: Tensor) -> Tensor:
    """The ranking of classes to learn: the label first, the others by descending teacher logit.

    Ties go to the lower class index. The label is moved to the front by a stable sort on "is the label", not by adding
    a constant to its logit, which would lose order in half precision. Source: PLD, Section 3.

    Args:
        teacher: `[rows, classes]`.
        labels: `[rows]`.

    Returns:
        `[rows, classes]`, int64.
    """
    order = full(teacher).sort(dim=-1, descending=True, stable=True).indices
    is_label = (order == labels[:, None]).to(torch.int8)
    return order.gather(-1, is_label.sort(dim=-1, descending=True, stable=True).indices)


def plackett_luce(student: Tensor, permutation: Tensor, weights: Tensor) -> Tensor:
    """Σ_k weights_k · (logsumexp(s[π_k …]) − s[π_k]): the weighted negative log-likelihood of a ranking.

    A rank with weight 0 and the last rank contribute exactly 0, also where the student's logit is −inf.

    Args:
        student: scores `[rows, items]`.
        permutation: `[rows, items]`, best first.
        weights: `[rows, items]`, by rank.
    """
    ranked = full(student).gather(-1, permutation)
    tails = _tail_logsumexp(ranked)
    off = weights == 0
    off[..., -1] |= ranked[..., -1] == -math.inf  # where no item is left to lose to
    return (weights * (tails - ranked).masked_fill(off, 0.0)).sum(-1)


def _tail_logsumexp(ranked: Tensor) -> Tensor:
    """logsumexp over each suffix. Suffixes that are all −inf give −inf and do not affect the gradient of the others."""
    absent = ranked == -math.inf
    if absent.any():
        # exp(−inf) adds nothing to a sum; the lowest finite number does the same and has a gradient.
        ranked = ranked.masked_fill(absent, torch.finfo(ranked.dtype).min / 4)
    return ranked.flip(-1).logcumsumexp(-1).flip(-1)


def plackett_luce_distillation(
    student: Tensor, target: Target | Tensor, labels: Tensor, *, temperature: float = 1.0, weights: Weights = "teacher"
) -> Tensor:
    """The list-wise distillation loss of PLD (2025, Section 3).

    Args:
        student: logits `[rows, classes]`.
        target: `Dense` teacher logits.
        labels: `[rows]`.
        temperature: of the teacher's softmax from which the weights come; it does not apply to the student.
        weights: `teacher` softmax(t/τ)[π_k]; `uniform` 1/C (ListMLE / C); `position` ∝ 2^(C−k) − 1 (p-ListMLE);
            `first` (1, 0, …): plain cross-entropy.

    Limits: C = 2 gives p_label · CE; `first` is CE; a student equal to the teacher is *not* a stationary point.
    """
    name = "plackett_luce_distillation"
    check_temperature(name, temperature)
    teacher = need_dense(name, target, student.shape[-1])
    check_labels(name, labels, student.shape[-1])
    for side, logits in (("student", student), ("teacher", teacher)):
        wrong = (logits.isnan() | (logits == math.inf)).any(-1).nonzero()
        if len(wrong):
            row = int(wrong[0, 0])
            what = "nan" if bool(logits[row].isnan().any()) else "+inf"
            raise InputError(f"{name}: row {row} is not a distribution: the {side} has {what} logits.")
    permutation = teacher_permutation(teacher, labels)
    values = plackett_luce(student, permutation, _weights(weights, teacher, permutation, temperature))
    return checked(name, values, student, target)


def _weights(kind: Weights, teacher: Tensor, permutation: Tensor, temperature: float) -> Tensor:
    classes = teacher.shape[-1]
    if kind == "teacher":
        return log_softmax(teacher, temperature).exp().gather(-1, permutation)
    if kind == "uniform":
        return torch.full_like(teacher, 1 / classes)
    if kind == "position":
        return position_weights(classes, teacher.dtype).to(teacher.device).expand_as(teacher)
    if kind == "first":
        return torch.zeros_like(teacher).index_fill(-1, torch.zeros(1, dtype=torch.long, device=teacher.device), 1.0)
    raise InputError(f"Unknown weights {kind!r}. Known: teacher, uniform, position, first.")


def position_weights(classes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """2^(C−k) − 1 for k = 1 … C, normalised in the log domain, since 2^C overflows float32 beyond 127 classes."""
    if classes == 1:
        return torch.ones(1, dtype=dtype)
    power = torch.arange(classes - 1, -1, -1, dtype=torch.float64) * math.log(2)
    log_w = power + torch.log(-torch.expm1(-power))
    return torch.softmax(log_w, 0).to(dtype)
