"""Divergences between a student and a target, one value per row. Nothing is reduced.

All take `student` logits `[rows, classes]` and a target (`Dense` or a bare tensor of logits, `TopK`; where linear in
p also `Sampled`) and return values `[rows]` in nats, at least float32. p is the teacher (never differentiated), q the
student, both softmaxes of logits over `temperature`, one for all or `[rows]`. `tau_squared` multiplies by temperature²,
as Hinton et al. do and as TRL, DistiLLM and TAID do not; it is never inferred. A row that is no distribution (nan, +inf, all −inf) is an
`InputError` with its position; single −inf logits mean forbidden classes and follow 0 · log 0 = 0.

With `TopK`, `truncation="tail"` compares k + 1 buckets, the last of which holds all mass outside; `"renorm"`
renormalises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._kernels import alpha_beta_sum, head_share, kl, mix, tv, weighted
from understudy.losses._pairs import (
    Temperature,
    Truncation,
    as_target,
    check_temperature,
    checked,
    full,
    log_softmax,
    pair,
    same_temperature,
)
from understudy.targets import Sampled, Target, TopK


def forward_kl(
    student: Tensor,
    target: Target | Tensor,
    *,
    temperature: Temperature = 1.0,
    tau_squared: bool = False,
    truncation: Truncation = "tail",
) -> Tensor:
    """KL(p ‖ q) = Σ p (log p − log q). Mass covering. Gradient at temperature 1: q − p. +inf where q = 0 < p.

    With `Sampled` it is an unbiased estimate, in value and gradient. Source: Hinton et al. 2015; GKD at β = 0.
    """
    sampled = as_target(target)
    if isinstance(sampled, Sampled):
        log_q = _at_samples("forward_kl", student, sampled, temperature)
        values = (full(sampled.weights) * (full(sampled.log_probs) - log_q)).sum(-1)
    else:
        log_q, log_p = pair("forward_kl", student, target, temperature, truncation)
        values = kl(log_p, log_q)
    return _done("forward_kl", values, student, target, temperature, tau_squared)


def cross_entropy_soft(
    student: Tensor,
    target: Target | Tensor,
    *,
    temperature: Temperature = 1.0,
    tau_squared: bool = False,
    truncation: Truncation = "tail",
) -> Tensor:
    """−Σ p log q = KL(p ‖ q) + H(p): same gradient as `forward_kl`, different value. Accepts `Sampled`."""
    sampled = as_target(target)
    if isinstance(sampled, Sampled):
        log_q = _at_samples("cross_entropy_soft", student, sampled, temperature)
        values = -(full(sampled.weights) * log_q).sum(-1)
    else:
        log_q, log_p = pair("cross_entropy_soft", student, target, temperature, truncation)
        values = -weighted(log_p, log_q)
    return _done("cross_entropy_soft", values, student, target, temperature, tau_squared)


def reverse_kl(
    student: Tensor,
    target: Target | Tensor,
    *,
    temperature: Temperature = 1.0,
    tau_squared: bool = False,
    truncation: Truncation = "tail",
) -> Tensor:
    """KL(q ‖ p). Mode seeking. Gradient at temperature 1: q (log q − log p − KL(q ‖ p)). +inf where p = 0 < q."""
    log_q, log_p = pair("reverse_kl", student, target, temperature, truncation)
    return _done("reverse_kl", kl(log_q, log_p), student, target, temperature, tau_squared)


def jsd(
    student: Tensor,
    target: Target | Tensor,
    *,
    beta: float = 0.5,
    temperature: Temperature = 1.0,
    tau_squared: bool = False,
    truncation: Truncation = "tail",
) -> Tensor:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q (GKD, Eq. 1).

    At most the binary entropy of β. By convention β = 0 is `forward_kl` and β = 1 `reverse_kl`: the limits of
    jsd/β and jsd/(1 − β). The function itself goes to 0 there, so it jumps at its ends.
    """
    if not 0 <= beta <= 1:
        raise InputError(f"jsd: beta is {beta} and must lie in [0, 1].")
    log_q, log_p = pair("jsd", student, target, temperature, truncation)
    if beta == 0:
        values = kl(log_p, log_q)
    elif beta == 1:
        values = kl(log_q, log_p)
    else:
        log_m = mix(log_p, log_q, beta)
        values = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return _done("jsd", values, student, target, temperature, tau_squared)


def skew_kl(
    student: Tensor,
    target: Target | Tensor,
    *,
    alpha: float = 0.1,
    temperature: Temperature = 1.0,
    tau_squared: bool = False,
    truncation: Truncation = "tail",
) -> Tensor:
    """KL(p ‖ α p + (1 − α) q), at most −log α (DistiLLM, Eq. 4). α → 0 is `forward_kl`."""
    _check_alpha("skew_kl", alpha)
    log_q, log_p = pair("skew_kl", student, target, temperature, truncation)
    return _done("skew_kl", kl(log_p, mix(log_p, log_q, alpha)), student, target, temperature, tau_squared)


def skew_reverse_kl(
    student: Tensor,
    target: Target | Tensor,
    *,
    alpha: float = 0.1,
    temperature: Temperature = 1.0,
    tau_squared: bool = False,
    truncation: Truncation = "tail",
) -> Tensor:
    """KL(q ‖ α q + (1 − α) p), at most −log α (DistiLLM). α → 0 is `reverse_kl`."""
    _check_alpha("skew_reverse_kl", alpha)
    log_q, log_p = pair("skew_reverse_kl", student, target, temperature, truncation)
    values = kl(log_q, mix(log_q, log_p, alpha))
    return _done("skew_reverse_kl", values, student, target, temperature, tau_squared)


def total_variation(
    student: Tensor,
    target: Target | Tensor,
    *,
    temperature: Temperature = 1.0,
    tau_squared: bool = False,
    truncation: Truncation = "tail",
) -> Tensor:
    """½ Σ |p − q|, at most 1. The subgradient at p = q is 0."""
    log_q, log_p = pair("total_variation", student, target, temperature, truncation)
    return _done("total_variation", tv(log_p, log_q), student, target, temperature, tau_squared)


def alpha_beta(
    student: Tensor,
    target: Target | Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: Temperature = 1.0,
    tau_squared: bool = False,
    truncation: Truncation = "tail",
) -> Tensor:
    """The α-β divergence −1/(αβ) Σ [p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)] (ABKD), with its true limits.

    (1, 0) is `forward_kl`, (0, 1) `reverse_kl`, (1, 1) half the squared distance, (½, ½) 4 (1 − Σ √(pq)).
    """
    log_q, log_p = pair("alpha_beta", student, target, temperature, truncation)
    return _done("alpha_beta", alpha_beta_sum(log_p, log_q, alpha, beta), student, target, temperature, tau_squared)


def adaptive_kl(
    student: Tensor,
    target: Target | Tensor,
    *,
    mu: float = 0.5,
    temperature: Temperature = 1.0,
    tau_squared: bool = False,
    truncation: Truncation = "tail",
) -> Tensor:
    """w KL(p ‖ q) + (1 − w) KL(q ‖ p), with w the head's share of Σ |p − q| (AKL). w has no gradient.

    The head are the fewest most probable classes of the teacher that hold `mu` of its probability, of equal ones the lower
    class first. μ = 1 is `forward_kl` where p > 0. With `TopK` and `"tail"` the bucket of all other classes is no part of the
    head. Source: Wu et al. 2024 (arXiv 2404.02657), Sec. 4.3; the released code ends the head before the class that
    reaches μ.
    """
    if not 0 < mu <= 1:
        raise InputError(f"adaptive_kl: mu is {mu} and must lie in (0, 1].")
    log_q, log_p = pair("adaptive_kl", student, target, temperature, truncation)
    bucket = isinstance(as_target(target), TopK) and truncation == "tail"
    share = head_share(log_p, log_q.detach(), mu, classes=log_p.shape[-1] - bucket)
    # A side of weight 0 is left out, for it may be +inf.
    parts = ((share, kl(log_p, log_q)), (1 - share, kl(log_q, log_p)))
    values = sum((torch.where(w == 0, 0.0, w * part) for w, part in parts), start=torch.zeros_like(share))
    return _done("adaptive_kl", values, student, target, temperature, tau_squared)


def entropy(logits: Tensor, *, temperature: Temperature = 1.0) -> Tensor:
    """−Σ p log p of each row, in nats."""
    check_temperature("entropy", temperature)
    log_p = log_softmax(logits, temperature)
    return -weighted(log_p, log_p)


def _at_samples(loss: str, student: Tensor, target: Sampled, temperature: Temperature) -> Tensor:
    check_temperature(loss, temperature)
    same_temperature(loss, target.temperature, temperature)
    return log_softmax(student, temperature).gather(-1, target.ids)


def _check_alpha(loss: str, alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise InputError(f"{loss}: alpha is {alpha} and must lie in [0, 1).")


def _done(
    loss: str, values: Tensor, student: Tensor, target: Target | Tensor, temperature: Temperature, tau_squared: bool
) -> Tensor:
    values = checked(loss, values, student, target)
    return values * temperature**2 if tau_squared else values
