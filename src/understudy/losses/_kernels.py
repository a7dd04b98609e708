"""Sums over classes that the divergences consist of, on log-probabilities, also where a class has probability 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_INF = float("inf")


def alpha_beta_sum(log_p: Tensor, log_q: Tensor, a: float, b: float) -> Tensor:
    """The α-β divergence of each row. A class with probability 0 on both sides adds 0; with probability 0 on one side
    it may add +inf, never nan."""
    none, one = (log_p == -_INF) & (log_q == -_INF), (log_p == -_INF) ^ (log_q == -_INF)
    if none.any():
        log_p, log_q = log_p.masked_fill(none, 0.0), log_q.masked_fill(none, 0.0)
    terms = _alpha_beta(log_p, log_q, a, b)
    # A term is at least 0 and its largest power dominates, so ∞ − ∞ and 0 · ∞ mean +∞.
    return (terms.masked_fill(one & terms.isnan(), _INF) if one.any() else terms).sum(-1)


def _alpha_beta(log_p: Tensor, log_q: Tensor, a: float, b: float) -> Tensor:
    """The term of each class."""
    if a == 0 and b == 0:
        return 0.5 * (log_p - log_q).square()
    if b == 0:
        return _one_sided(log_p, log_q, a)
    if a == 0:
        return _one_sided(log_q, log_p, b)
    if a + b == 0:
        ratio = a * (log_p - log_q)  # log (p/q)^a
        return (torch.expm1(ratio) - ratio) / a**2
    cross, left, right = (a * log_p + b * log_q).exp(), ((a + b) * log_p).exp(), ((a + b) * log_q).exp()
    apart = -(cross - a / (a + b) * left - b / (a + b) * right) / (a * b)
    # Near each other the powers cancel to their rounding, which 1 / (a b) multiplies.
    near = (log_q - log_p).abs() < 0.1
    d = torch.where(near, log_q - log_p, 0.0)
    p = log_p.masked_fill(~near, 0.0)
    return torch.where(
        near, ((a + b) * p).exp() * (b / (a + b) * torch.expm1((a + b) * d) - torch.expm1(b * d)) / (a * b), apart
    )


def _one_sided(log_x: Tensor, log_y: Tensor, a: float) -> Tensor:
    """1/a² [x^a log(x^a / y^a) − x^a + y^a]: the limit where the other exponent is 0."""
    x, y = (a * log_x).exp(), (a * log_y).exp()
    absent = log_x == -_INF
    ratio = torch.where(absent, torch.zeros_like(log_x), a * (log_x.masked_fill(absent, 0.0) - log_y))
    near = (ratio.abs() < 0.1) & ~absent
    small = torch.where(near, ratio, 0.0)
    return torch.where(near, x * (small + torch.expm1(-small)), x * ratio - x + y) / a**2


def kl(log_x: Tensor, log_y: Tensor) -> Tensor:
    """Σ x (log x − log y) with 0 · log 0 = 0. nan is not masked, so that an invalid row gives nan."""
    absent = log_x == -_INF
    if not absent.any():
        return (log_x.exp() * (log_x - log_y)).sum(-1)
    safe = log_x.masked_fill(absent, 0.0)
    difference = safe - log_y.masked_fill(absent, 0.0)
    return (safe.exp() * difference).masked_fill(absent, 0.0).sum(-1)


def head_share(log_p: Tensor, log_q: Tensor, mu: float, classes: int) -> Tensor:
    """The part of Σ |p − q| in the fewest most probable of the first `classes` that hold `mu` of p; ½ where p = q."""
    p, gap = log_p.exp(), (log_p.exp() - log_q.exp()).abs()
    ordered, at = p[..., :classes].sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    head = gap.gather(-1, at).masked_fill(before >= mu, 0.0).sum(-1)
    whole = gap.sum(-1)
    return torch.where(whole == 0, 0.5, head / whole)


def tv(log_p: Tensor, log_q: Tensor) -> Tensor:
    """½ Σ |p − q|. A difference within rounding error counts as 0, so that equal rows have the subgradient 0."""
    p, difference = log_p.exp(), log_p.exp() - log_q.exp()
    rounding = 4 * torch.finfo(p.dtype).eps * (1 - log_p) * p  # what a rounded log p moves its exponential by
    same = difference.abs() <= rounding
    return 0.5 * difference.masked_fill(same, 0.0).abs().sum(-1)


def weighted(log_p: Tensor, values: Tensor) -> Tensor:
    """Σ p · values, where classes with p = 0 contribute 0."""
    absent = log_p == -_INF
    return (log_p.exp() * values.masked_fill(absent, 0.0)).sum(-1)


def mix(log_x: Tensor, log_y: Tensor, share: float) -> Tensor:
    """log(share · x + (1 − share) · y), with finite values and gradients where either is −inf."""
    if share == 0:
        return log_y
    a, b = log_x + math.log(share), log_y + math.log1p(-share)
    both = (a == -_INF) & (b == -_INF)
    if not torch.compiler.is_compiling() and not both.any():  # a graph has no such branch
        return torch.logaddexp(a, b)
    mixed = torch.logaddexp(a.masked_fill(both, 0.0), b.masked_fill(both, 0.0))
    return mixed.masked_fill(both, -_INF)
