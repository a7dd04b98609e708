"""Losses on raw logits, class by class. Values `[rows]`, nothing is reduced."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._kernels import kl
from understudy.losses._pairs import (
    check_temperature,
    checked,
    full,
    log_softmax,
    logsumexp,
    need_dense,
    renormalised,
    softplus,
)
from understudy.losses.classification import check_labels
from understudy.targets import Target


def binary_kl(student: Tensor, target: Target | Tensor, *, temperature: float = 2.0) -> Tensor:
    """τ² Σ_k KL(Bernoulli(σ(t_k/τ)) ‖ Bernoulli(σ(v_k/τ))) (DHKD, BinaryKL). Gradient τ (σ(v/τ) − σ(t/τ)).

    Args:
        student: logits v `[rows, classes]`.
        target: `Dense` teacher logits t.

    By design it is not invariant to a constant added to all of v.
    """
    check_temperature("binary_kl", temperature)
    teacher = _finite("binary_kl", target, student) / temperature
    v = full(student) / temperature
    p = torch.sigmoid(teacher)
    cross = p * softplus(-v) + (1 - p) * softplus(v)
    own = p * softplus(-teacher) + (1 - p) * softplus(teacher)
    return checked("binary_kl", temperature**2 * (cross - own).sum(-1), student, target)


def binary_kl_norm(student: Tensor, target: Target | Tensor, *, temperature: float = 2.0) -> Tensor:
    """τ² Σ_k log cosh((v_k − t_k) / 2τ) (DHKD, BinaryKL-Norm in closed form).

    It is KL(Bernoulli(½) ‖ Bernoulli(σ((v − t)/τ))) without the clamp that overflows. Even in v − t, grows linearly,
    and its gradient τ/2 · tanh((v − t)/2τ) is bounded by τ/2. τ → ∞: Σ (v − t)² / 8.
    """
    check_temperature("binary_kl_norm", temperature)
    teacher = _finite("binary_kl_norm", target, student)
    x = ((full(student) - teacher) / (2 * temperature)).abs()
    small = x.clamp(max=1.0)  # where the other form, which never overflows, cancels
    log_cosh = torch.where(x < 1, torch.log1p(2 * torch.sinh(small / 2).square()), x + softplus(-2 * x) - math.log(2))
    return checked("binary_kl_norm", temperature**2 * log_cosh.sum(-1), student, target)


def decoupled_kl(
    student: Tensor,
    target: Target | Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    tau_squared: bool = True,
) -> Tensor:
    """α KL(b_p ‖ b_q) + β KL(p̂ ‖ q̂), `[rows]`: label against the rest, and the classes without the label among themselves.

    b is (p[label], 1 − p[label]), p̂ the other classes' probabilities divided by their sum. With α = 1 and β = 1 − p[label]
    (an example's own) it is `forward_kl`. With two classes the second part is 0.

    Args:
        student: logits `[rows, classes]`. target: `Dense` teacher logits. labels: `[rows]`, int64 in `0 … classes − 1`.
        alpha, beta: weights of the two parts. temperature: of both softmaxes. tau_squared: multiply by temperature².

    Source: Zhao et al. 2022 (DKD), Eqs. 6 and 7.
    """
    check_labels("decoupled_kl", labels, student.shape[-1])
    check_temperature("decoupled_kl", temperature)
    teacher = need_dense("decoupled_kl", target, student.shape[-1])
    log_q, log_p = log_softmax(student, temperature), log_softmax(teacher, temperature)
    at = labels[:, None]
    rest_q, rest_p = (x.scatter(-1, at, -torch.inf) for x in (log_q, log_p))
    side_q, side_p = (torch.cat([x.gather(-1, at), logsumexp(r)], -1) for x, r in ((log_q, rest_q), (log_p, rest_p)))
    values = alpha * kl(side_p, side_q) + beta * kl(renormalised(rest_p), renormalised(rest_q))
    return checked("decoupled_kl", temperature**2 * values if tau_squared else values, student, target)


def _finite(loss: str, target: Target | Tensor, student: Tensor) -> Tensor:
    teacher = need_dense(loss, target, student.shape[-1])
    if not torch.isfinite(teacher).all():
        row = int((~torch.isfinite(teacher)).any(-1).nonzero()[0, 0])
        raise InputError(f"{loss}: the teacher's logits of row {row} are not finite, and this loss reads raw logits.")
    return teacher
