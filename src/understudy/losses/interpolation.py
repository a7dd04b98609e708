"""Losses against targets that interpolate between student and teacher. Values `[rows]`, nothing is reduced."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from understudy.errors import InputError
from understudy.losses._kernels import kl, weighted
from understudy.losses._pairs import checked, full, log_softmax, need_dense
from understudy.targets import Target


def interpolate_logits(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    """(1 − t) · S + t · U in logit space (TAID, Eq. 3); at t = 0 or 1 one side alone. A class that either side forbids
    (−inf) is forbidden in the result.

    Args:
        student, teacher: logits `[rows, classes]`; pass the student detached.
        t: in [0, 1].
    """
    if not 0 <= t <= 1:
        raise InputError(f"interpolate_logits: t is {t} and must lie in [0, 1].")
    if t == 0:
        return student
    return teacher if t == 1 else (1 - t) * student + t * teacher


def interpolated_kl(
    student: Tensor, target: Target | Tensor, *, t: float, value: Literal["cross_entropy", "kl"] = "kl"
) -> Tensor:
    """KL(p_t ‖ q) with p_t = softmax((1 − t) sg(S) + t U), or its cross-entropy form, which adds H(p_t).

    Both have the gradient q − p_t: the student's part of the target is detached. Source: TAID, Eq. 4.

    Args:
        student: logits S `[rows, classes]`.
        target: `Dense` teacher logits U.
    """
    teacher = need_dense("interpolated_kl", target, student.shape[-1])
    log_p = log_softmax(interpolate_logits(full(student.detach()), teacher, t), 1.0)
    log_q = log_softmax(student, 1.0)
    values = kl(log_p, log_q) if value == "kl" else -weighted(log_p, log_q)
    return checked("interpolated_kl", values, student, target)
