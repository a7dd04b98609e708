"""Divergences between a student and a target, row by row. Nothing is reduced.

All take `student` logits `[rows, classes]` and a target (`Dense` or a bare tensor of logits, `TopK`; where linear in
p also `Sampled`) and return values `[rows]` in nats, at least float32. p is the teacher (never differentiated), q the
student, both softmaxes of logits over `temperature`. `tau_squared` multiplies by temperature², as Hinton et al. do
and as TRL, DistiLLM and TAID do not; it is never inferred. A row that is no distribution (nan, +inf, all −inf) is an
`InputError` with its position; single −inf logits mean forbidden classes and follow 0 · log 0 = 0.

With `TopK`, `truncation="tail"` compares k + 1 buckets, the last holding all mass outside; `"renorm"` renormalises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import (
    Truncation,
    as_target,
    bucketed,
    check_temperature,
    checked,
    full,
    log_softmax,
    pair,
    same_temperature,
)
from understudy.targets import Sampled, Target

_INF = float("inf")


def forward_kl(
    student: Tensor,
    target: Target | Tensor,
    *,
    temperature: float = 1.0,
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
        values = _kl(log_p, log_q)
    return _done("forward_kl", values, student, target, temperature, tau_squared)


def cross_entropy_soft(
    student: Tensor,
    target: Target | Tensor,
    *,
    temperature: float = 1.0,
    tau_squared: bool = False,
    truncation: Truncation = "tail",
) -> Tensor:
    """−Σ p log q = KL(p ‖ q) + H(p): the gradient of `forward_kl`, another value. Accepts `Sampled`."""
    sampled = as_target(target)
    if isinstance(sampled, Sampled):
        log_q = _at_samples("cross_entropy_soft", student, sampled, temperature)
        values = -(full(sampled.weights) * log_q).sum(-1)
    else:
        log_q, log_p = pair("cross_entropy_soft", student, target, temperature, truncation)
        values = -_weighted(log_p, log_q)
    return _done("cross_entropy_soft", values, student, target, temperature, tau_squared)


def reverse_kl(
    student: Tensor,
    target: Target | Tensor,
    *,
    temperature: float = 1.0,
    tau_squared: bool = False,
    truncation: Truncation = "tail",
) -> Tensor:
    """KL(q ‖ p). Mode seeking. Gradient at temperature 1: q (log q − log p − KL(q ‖ p)). +inf where p = 0 < q."""
    log_q, log_p = pair("reverse_kl", student, target, temperature, truncation)
    return _done("reverse_kl", _kl(log_q, log_p), student, target, temperature, tau_squared)


def jsd(
    student: Tensor,
    target: Target | Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
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
        values = _kl(log_p, log_q)
    elif beta == 1:
        values = _kl(log_q, log_p)
    else:
        log_m = _mix(log_p, log_q, beta)
        values = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return _done("jsd", values, student, target, temperature, tau_squared)


def skew_kl(
    student: Tensor,
    target: Target | Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    tau_squared: bool = False,
    truncation: Truncation = "tail",
) -> Tensor:
    """KL(p ‖ α p + (1 − α) q), at most −log α (DistiLLM, Eq. 4). α → 0 is `forward_kl`."""
    _check_alpha("skew_kl", alpha)
    log_q, log_p = pair("skew_kl", student, target, temperature, truncation)
    return _done("skew_kl", _kl(log_p, _mix(log_p, log_q, alpha)), student, target, temperature, tau_squared)


def skew_reverse_kl(
    student: Tensor,
    target: Target | Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    tau_squared: bool = False,
    truncation: Truncation = "tail",
) -> Tensor:
    """KL(q ‖ α q + (1 − α) p), at most −log α (DistiLLM). α → 0 is `reverse_kl`."""
    _check_alpha("skew_reverse_kl", alpha)
    log_q, log_p = pair("skew_reverse_kl", student, target, temperature, truncation)
    values = _kl(log_q, _mix(log_q, log_p, alpha))
    return _done("skew_reverse_kl", values, student, target, temperature, tau_squared)


def total_variation(
    student: Tensor,
    target: Target | Tensor,
    *,
    temperature: float = 1.0,
    tau_squared: bool = False,
    truncation: Truncation = "tail",
) -> Tensor:
    """½ Σ |p − q|, at most 1. The subgradient at p = q is 0."""
    log_q, log_p = pair("total_variation", student, target, temperature, truncation)
    return _done("total_variation", _tv(log_p, log_q), student, target, temperature, tau_squared)


def alpha_beta(
    student: Tensor,
    target: Target | Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float = 1.0,
    tau_squared: bool = False,
    truncation: Truncation = "tail",
) -> Tensor:
    """The α-β divergence −1/(αβ) Σ [p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)] (ABKD), with its true limits.

    (1, 0) is `forward_kl`, (0, 1) `reverse_kl`, (1, 1) half the squared distance, (½, ½) 4 (1 − Σ √(pq)).
    """
    log_q, log_p = pair("alpha_beta", student, target, temperature, truncation)
    return _done("alpha_beta", _alpha_beta(log_p, log_q, alpha, beta), student, target, temperature, tau_squared)


def _alpha_beta(log_p: Tensor, log_q: Tensor, a: float, b: float) -> Tensor:
    if a == 0 and b == 0:
        return 0.5 * (log_p - log_q).square().sum(-1)
    if b == 0:
        return _one_sided(log_p, log_q, a)
    if a == 0:
        return _one_sided(log_q, log_p, b)
    if a + b == 0:
        ratio = a * (log_p - log_q)  # log (p/q)^a
        return (torch.expm1(ratio) - ratio).sum(-1) / a**2
    cross, left, right = _power(a * log_p + b * log_q), _power((a + b) * log_p), _power((a + b) * log_q)
    return -(cross - a / (a + b) * left - b / (a + b) * right).sum(-1) / (a * b)


def _one_sided(log_x: Tensor, log_y: Tensor, a: float) -> Tensor:
    """1/a² Σ [x^a log(x^a / y^a) − x^a + y^a]: the limit of the divergence where the other exponent is 0."""
    x, y = _power(a * log_x), _power(a * log_y)
    absent = log_x == -_INF
    ratio = torch.where(absent, torch.zeros_like(log_x), a * (log_x.masked_fill(absent, 0.0) - log_y))
    return (x * ratio - x + y).sum(-1) / a**2


def _power(exponent: Tensor) -> Tensor:
    return exponent.exp()


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """−Σ p log p of each row, in nats."""
    check_temperature("entropy", temperature)
    log_p = log_softmax(logits, temperature)
    return -_weighted(log_p, log_p)


def truncate(
    divergence: str,
    student: Tensor,
    teacher: Tensor,
    k: int,
    *,
    support: Literal["teacher", "student", "union"] = "teacher",
    truncation: Truncation = "tail",
    temperature: float = 1.0,
    **options: float,
) -> Tensor:
    """A divergence on the k most probable classes of one side or of both, where both sides' logits are known.

    Ties go to the lowest class index. GKD truncates forward KL to the teacher's support, reverse KL to the student's,
    everything else to the union. Values `[rows]`, not reduced.
    """
    if k < 1:
        raise InputError(f"truncate: k is {k} and must be at least 1.")
    log_q, log_p = pair("truncate", student, teacher, temperature, truncation)
    if support != "union":
        side = log_p if support == "teacher" else log_q
        ids = side.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
        if k < student.shape[-1]:
            log_q, log_p = bucketed(log_q, ids, truncation), bucketed(log_p, ids, truncation)
    elif k < student.shape[-1]:
        keep = torch.zeros_like(log_p, dtype=torch.bool)
        for log_x in (log_p, log_q):
            ids = log_x.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
            keep = keep.scatter(-1, ids, True)
        log_q, log_p = (_on_support(x, keep, truncation) for x in (log_q, log_p))
    return checked(divergence, _KERNELS[divergence](log_p, log_q, **options), student, teacher)


def _on_support(log_x: Tensor, keep: Tensor, truncation: Truncation) -> Tensor:
    """As `bucketed`, for supports whose size differs from row to row: classes left out become −inf."""
    kept = log_x.masked_fill(~keep, -_INF)
    if truncation == "renorm":
        return torch.log_softmax(kept, dim=-1)
    width = torch.arange(log_x.shape[-1], device=log_x.device).expand_as(log_x)
    tail = bucketed(log_x.masked_fill(keep, -_INF), width[..., :0], "tail")
    return torch.cat([kept, tail], dim=-1)


_KERNELS: dict[str, Callable[..., Tensor]] = {
    "forward_kl": lambda p, q: _kl(p, q),
    "reverse_kl": lambda p, q: _kl(q, p),
    "total_variation": lambda p, q: _tv(p, q),
    "jsd": lambda p, q, beta: beta * _kl(p, _mix(p, q, beta)) + (1 - beta) * _kl(q, _mix(p, q, beta)),
    "skew_kl": lambda p, q, alpha: _kl(p, _mix(p, q, alpha)),
    "skew_reverse_kl": lambda p, q, alpha: _kl(q, _mix(q, p, alpha)),
    "alpha_beta": lambda p, q, alpha, beta: _alpha_beta(p, q, alpha, beta),
}


def _kl(log_x: Tensor, log_y: Tensor) -> Tensor:
    """Σ x (log x − log y) with 0 · log 0 = 0. Both guards let nan through, so a bad row shows."""
    absent = log_x == -_INF
    if not absent.any():
        return (log_x.exp() * (log_x - log_y)).sum(-1)
    safe = log_x.masked_fill(absent, 0.0)
    difference = safe - log_y.masked_fill(absent, 0.0)
    return (safe.exp() * difference).masked_fill(absent, 0.0).sum(-1)


def _tv(log_p: Tensor, log_q: Tensor) -> Tensor:
    """½ Σ |p − q|. A difference within rounding counts as none, so that equal rows have the subgradient 0."""
    p, difference = log_p.exp(), log_p.exp() - log_q.exp()
    same = difference.abs() <= 64 * torch.finfo(p.dtype).eps * p
    return 0.5 * difference.masked_fill(same, 0.0).abs().sum(-1)


def _weighted(log_p: Tensor, values: Tensor) -> Tensor:
    """Σ p · values, where p = 0 contributes nothing."""
    absent = log_p == -_INF
    return (log_p.exp() * values.masked_fill(absent, 0.0)).sum(-1)


def _mix(log_x: Tensor, log_y: Tensor, share: float) -> Tensor:
    """log(share · x + (1 − share) · y), safe in value and gradient where either is −inf."""
    if share == 0:
        return log_y
    a, b = log_x + math.log(share), log_y + math.log1p(-share)
    both = (a == -_INF) & (b == -_INF)
    if not both.any():
        return torch.logaddexp(a, b)
    mixed = torch.logaddexp(a.masked_fill(both, 0.0), b.masked_fill(both, 0.0))
    return mixed.masked_fill(both, -_INF)


def _at_samples(loss: str, student: Tensor, target: Sampled, temperature: float) -> Tensor:
    check_temperature(loss, temperature)
    same_temperature(loss, target.temperature, temperature)
    return log_softmax(student, temperature).gather(-1, target.ids)


def _check_alpha(loss: str, alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise InputError(f"{loss}: alpha is {alpha} and must lie in [0, 1).")


def _done(
    loss: str, values: Tensor, student: Tensor, target: Target | Tensor, temperature: float, tau_squared: bool
) -> Tensor:
    values = checked(loss, values, student, target)
    return values * temperature**2 if tau_squared else values
