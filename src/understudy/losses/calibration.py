"""A teacher's most probable classes, calibrated before a student learns them (FIRST). Nothing is reduced."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._kernels import kl
from understudy.losses._pairs import Truncation, as_target, checked, full, log_softmax, renormalised, same_temperature
from understudy.losses.divergences import forward_kl
from understudy.targets import Dense, Target, TopK, top_k

Recalibration = Literal["temperature", "label_smoothing", "none"]


def most_probable(target: Target | Tensor, k: int, classes: int) -> TopK:
    """The k most probable classes of a target at temperature 1, the most probable first, and the mass of all others.

    Args:
        target: `Dense` logits, or `TopK` of at least k ids (of all classes, where there are fewer). classes: of the student.

    Raises:
        InputError: a target of another kind, temperature or class set, too few ids, an id twice, or more mass than 1.
    """
    target = as_target(target)
    k = min(k, classes)
    if isinstance(target, Dense):
        if target.classes != classes:
            raise InputError(
                f"The student has {classes} classes and the teacher {target.classes}: choose models of one set."
            )
        return top_k(target.logits, k)
    if not isinstance(target, TopK):
        raise InputError(
            f"The {k} most probable classes are not in {type(target).__name__} targets: capture with support scored:{k} or "
            f"top_k:{k}, or give a live teacher."
        )
    same_temperature("most_probable", target.temperature, 1.0)
    if target.ids.shape[-1] < k:
        raise InputError(
            f"The teacher keeps {target.ids.shape[-1]} classes a row and k is {k}: capture more, or lower k."
        )
    if target.rows and int(target.ids.max()) >= classes:
        raise InputError(f"The teacher names class {int(target.ids.max())} and the student has {classes} classes.")
    ids = target.ids.sort(-1).values
    if bool(((ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] >= 0)).any()):
        raise InputError("A row of the teacher's classes names one class twice: capture it again.")
    log_probs = full(target.log_probs.detach())
    if bool((log_probs.logsumexp(-1) > math.log(1 + 1e-3)).any()):
        raise InputError("Probabilities of a row of the teacher's classes sum to more than 1: capture it again.")
    order = log_probs.sort(dim=-1, descending=True, stable=True).indices
    ids, log_probs = target.ids.gather(-1, order), log_probs.gather(-1, order)
    rest = torch.cat([log_probs[..., k:], full(target.log_tail.detach())], -1)
    return TopK(ids[..., :k], log_probs[..., :k], rest.logsumexp(-1, keepdim=True))


def recalibrate(
    probs: Tensor,
    how: Recalibration,
    *,
    c: float = 0.3,
    delta: float = 0.1,
    epsilon: float = 1e-6,
    present: Tensor | None = None,
) -> Tensor:
    """Log-probabilities `[..., k]`, summing to 1 over the k classes, of probabilities P `[..., k]` (FIRST, Section 3).

    `temperature`: softmax(P / c), of probabilities and not of logits; c → 0 is one-hot, c → ∞ uniform. `label_smoothing`: of
    (P + ε) / Σ(P + ε), δ is taken from the first and given to the others in equal parts; what falls below 0 becomes 0.
    `none`: (P + ε) / Σ(P + ε).

    Args:
        probs: for `label_smoothing` the largest first. present: `[..., k]`, which classes a row has; all unless given.

    Raises:
        InputError: c that is not above 0, δ outside of 0 … 1, or P that are negative, sum to more than 1,
            or are not in the order that smoothing needs.
    """
    if not c > 0:
        raise InputError(f"recalibrate: c is {c} and must be above 0.")
    if not 0 <= delta <= 1:
        raise InputError(f"recalibrate: delta is {delta} and must lie in [0, 1].")
    there = torch.ones_like(probs, dtype=torch.bool) if present is None else present
    probs = probs.masked_fill(~there, 0.0)
    _check_probabilities(probs, ordered=how == "label_smoothing")
    if how == "temperature":  # less the largest first, so that a small c cannot overflow
        scores = (probs - probs.amax(-1, keepdim=True)) / c
    elif how == "label_smoothing":
        share = (probs + epsilon).masked_fill(~there, 0.0)
        share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(probs.dtype).tiny)
        others = there.sum(-1, keepdim=True).to(probs.dtype) - 1
        moved = torch.where(others > 0, delta / others.clamp(min=1), 0.0).expand_as(share).clone()
        moved[..., :1] = -delta * (others > 0).to(share.dtype)
        scores = (share + moved).clamp(min=0).log()
    else:
        scores = (probs + epsilon).log()
    return renormalised(scores.masked_fill(~there, -torch.inf))


def _check_probabilities(probs: Tensor, *, ordered: bool) -> None:
    wrong = (probs < 0).any(-1) | (probs.sum(-1) > 1 + 1e-3)
    if ordered:
        wrong = wrong | (probs[..., 1:] > probs[..., :-1]).any(-1)
    if bool(wrong.any()):
        row = [round(p, 4) for p in probs[wrong][0].tolist()]
        raise InputError(
            f"recalibrate: {row} are no probabilities{', the largest first' * ordered}: give those of a row's classes."
        )


def top_k_kl(
    student: Tensor,
    target: Target | Tensor,
    *,
    k: int = 5,
    recalibration: Recalibration = "temperature",
    c: float = 0.3,
    delta: float = 0.1,
    epsilon: float = 1e-6,
    student_c: float | None = None,
    truncation: Truncation = "renorm",
) -> Tensor:
    """KL(P′ ‖ Q′) over the teacher's k most probable classes, P′ recalibrated (FIRST, knowledge matching).

    With Q the student's softmax over all classes, Q′ = (Q + ε) / Σ(Q + ε) on the k classes. With ε = 0 the gradient is
    Q′ − P′ on the k classes and 0 elsewhere.

    Args:
        student: logits `[rows, classes]`. target: as `most_probable` takes it.
        student_c: softmax(Q / student_c) in place of Q′, as the released code has it: it bounds the student's ratios.
        truncation: `tail` compares P and Q themselves on k + 1 buckets, the last with all other mass; nothing is recalibrated.

    Returns:
        `[rows]`, in nats.
    """
    teacher = most_probable(target, k, student.shape[-1])
    if truncation == "tail":
        return forward_kl(student, teacher, truncation="tail")
    present = teacher.ids >= 0
    options = {"c": c, "delta": delta, "epsilon": epsilon}
    log_p = recalibrate(full(teacher.log_probs).exp(), recalibration, **options, present=present)
    kept = log_softmax(student, 1.0).gather(-1, teacher.ids.clamp(min=0))
    if student_c is not None:
        log_q = recalibrate(kept.exp(), "temperature", c=student_c, present=present)
    else:
        raised = torch.logaddexp(kept, kept.new_tensor(math.log(epsilon))) if epsilon else kept
        log_q = renormalised(raised.masked_fill(~present, -torch.inf))
    return checked("top_k_kl", kl(log_p, log_q), student, target)
