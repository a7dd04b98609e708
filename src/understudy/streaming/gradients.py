"""Values and gradients of the common losses written out by hand, for one strip of logits.

Each equals its loss in `understudy.losses` under autograd and takes fewer passes over memory. Where a row is not finite
(forbidden classes, bad input) or a combination is not covered, `by_hand` gives `None` and the plain loss decides.

With g = ∂L/∂q the gradient with respect to the logits is q (g − Σ q g) / τ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from understudy import losses
from understudy.losses.classification import check_labels
from understudy.targets import Dense, Sampled, Target, TopK

Pair = tuple[Tensor, Tensor]


def by_hand(
    loss: Callable[..., Tensor],
    logits: Tensor,
    target: Target | None,
    rows: tuple[Tensor, ...],
    options: dict[str, Any],
) -> Pair | None:
    """Values `[rows]` and gradient `[rows, classes]`, or `None` where autograd has to do it."""
    if loss is losses.cross_entropy and target is None:
        return _finite(_cross_entropy(logits, *rows))
    scales = scaling(target, rows, options)
    if scales is None:
        return None
    tau, factor, options = scales
    found: Pair | None = None
    scaled = logits if tau == 1 else logits / tau
    if isinstance(target, Dense) and loss in _DENSE and target.logits.shape == logits.shape:
        options.pop("truncation", None)
        log_q = torch.log_softmax(scaled, -1)
        teacher = target.logits.to(logits.dtype)
        log_p = torch.log_softmax(teacher if tau == 1 else teacher / tau, -1)
        found = _DENSE[loss](log_q, log_p, **options)
    elif isinstance(target, Sampled) and loss in (losses.forward_kl, losses.cross_entropy_soft) and not options:
        found = _sampled(loss, torch.log_softmax(scaled, -1), target)
    elif isinstance(target, TopK) and loss in _BUCKETED:
        found = _buckets(loss, torch.log_softmax(scaled, -1), target, options)
    if found is None:
        return None
    values, slope = found
    return _finite((values.mul_(factor), slope if factor == tau else slope.mul_(factor / tau)))


def scaling(
    target: Target | None, rows: tuple[Tensor, ...], options: dict[str, Any]
) -> tuple[float, float, dict[str, Any]] | None:
    """Temperature, the factor of `tau_squared` and all other options, or `None` where the plain loss has to look: at rows
    that keep fewer classes than others, too."""
    options = dict(options)
    tau = options.pop("temperature", 1.0)
    factor = tau**2 if options.pop("tau_squared", False) else 1.0
    if not tau > 0 or rows or getattr(target, "temperature", tau) != tau:
        return None
    if isinstance(target, TopK) and bool((target.ids < 0).any()):
        return None
    return tau, factor, options


def _finite(pair: Pair) -> Pair | None:
    return pair if bool(pair[0].isfinite().all()) else None


def _cross_entropy(logits: Tensor, labels: Tensor) -> Pair:
    check_labels("cross_entropy", labels, logits.shape[-1])
    log_q = torch.log_softmax(logits, -1)
    values = -log_q.gather(-1, labels[:, None])[:, 0]
    slope = log_q.exp_()
    slope.scatter_add_(-1, labels[:, None], slope.new_full((len(labels), 1), -1.0))
    return values, slope


def _forward(log_q: Tensor, log_p: Tensor) -> Pair:
    p, q = log_p.exp(), log_q.exp()
    values = torch.linalg.vecdot(p, log_p.sub_(log_q))
    return values, q.sub_(p)


def _soft(log_q: Tensor, log_p: Tensor) -> Pair:
    p, q = log_p.exp_(), log_q.exp()
    return -torch.linalg.vecdot(p, log_q), q.sub_(p)


def _reverse(log_q: Tensor, log_p: Tensor) -> Pair:
    q = log_q.exp()
    ratio = log_q.sub_(log_p)
    values = torch.linalg.vecdot(q, ratio)
    return values, q.mul_(ratio.sub_(values[:, None]))


def _jsd(log_q: Tensor, log_p: Tensor, beta: float = 0.5) -> Pair | None:
    if not 0 < beta < 1:
        return _forward(log_q, log_p) if beta == 0 else _reverse(log_q, log_p) if beta == 1 else None
    p, q = log_p.exp(), log_q.exp()
    log_m = _mixture(p, q, beta).log_()
    left, right = torch.linalg.vecdot(p, log_p.sub_(log_m)), log_q.sub_(log_m)
    own = torch.linalg.vecdot(q, right)
    values = beta * left + (1 - beta) * own
    return values, q.mul_(right.sub_(own[:, None])).mul_(1 - beta)


def _skew(log_q: Tensor, log_p: Tensor, alpha: float = 0.1) -> Pair | None:
    if not 0 < alpha < 1:
        return _forward(log_q, log_p) if alpha == 0 else None
    p, q = log_p.exp(), log_q.exp()
    m = _mixture(p, q, alpha)
    values = torch.linalg.vecdot(p, log_p.sub_(m.log()))
    # q g = −(1 − α) q p / m, and p / m is at most 1 / α: no overflow.
    pull = p.div_(m).mul_(q).mul_(-(1 - alpha))
    return values, pull.sub_(q.mul_(pull.sum(-1, keepdim=True)))


def _skew_reverse(log_q: Tensor, log_p: Tensor, alpha: float = 0.1) -> Pair | None:
    if not 0 < alpha < 1:
        return _reverse(log_q, log_p) if alpha == 0 else None
    q = log_q.exp()
    m = _mixture(q, log_p.exp_(), alpha)
    ratio = log_q.sub_(m.log())
    values = torch.linalg.vecdot(q, ratio)
    # g = log q/m + 1 − α q/m
    g = ratio.sub_((q / m).mul_(alpha))
    return values, q.mul_(g.sub_(torch.linalg.vecdot(q, g)[:, None]))


def _mixture(p: Tensor, q: Tensor, share: float) -> Tensor:
    """share · p + (1 − share) · q. Where both are 0 in floating point it is above 0, so that its logarithm times 0 is 0."""
    return torch.lerp(q, p, share).clamp_min_(torch.finfo(p.dtype).tiny)


_DENSE: dict[Callable[..., Tensor], Callable[..., Pair | None]] = {
    losses.forward_kl: _forward,
    losses.cross_entropy_soft: _soft,
    losses.reverse_kl: _reverse,
    losses.jsd: _jsd,
    losses.skew_kl: _skew,
    losses.skew_reverse_kl: _skew_reverse,
}
_BUCKETED = frozenset({*_DENSE, losses.total_variation, losses.alpha_beta})


def _sampled(loss: Callable[..., Tensor], log_q: Tensor, target: Sampled) -> Pair:
    weights = target.weights.to(log_q.dtype)
    at = log_q.gather(-1, target.ids)
    values = (weights * (target.log_probs.to(log_q.dtype) - at if loss is losses.forward_kl else -at)).sum(-1)
    slope = log_q.exp_().mul_(weights.sum(-1, keepdim=True))
    return values, slope.scatter_add_(-1, target.ids, -weights)


def _buckets(loss: Callable[..., Tensor], log_q: Tensor, target: TopK, options: dict[str, Any]) -> Pair:
    """Any divergence on k kept classes and a tail: autograd on k + 1 buckets, by hand from there to the classes.

    ∂ log Q_b / ∂ z_v is δ_bv − q_v for a kept class, and q_v / Q_tail [v outside] − q_v for the tail.
    """
    kept = log_q.gather(-1, target.ids)
    outside = log_q.exp_().scatter_(-1, target.ids, 0.0)
    tail = outside.sum(-1, keepdim=True)
    values, u = bucket_gradient(loss, torch.cat([kept, tail.log()], -1), target, options)
    share, whole = torch.where(tail > 0, u[:, -1:] / tail, torch.zeros_like(tail)), u.sum(-1, keepdim=True)
    return values, outside.mul_(share - whole).scatter_(-1, target.ids, u[:, :-1] - kept.exp() * whole)


def bucket_gradient(loss: Callable[..., Tensor], log_q: Tensor, target: TopK, options: dict[str, Any]) -> Pair:
    """Values, and ∂ L / ∂ log Q `[rows, k + 1]`, of a loss on k kept classes and a tail."""
    leaf = log_q.detach().requires_grad_(True)
    place = torch.arange(leaf.shape[-1] - 1, device=leaf.device).expand(len(leaf), -1)
    with torch.enable_grad():
        values = loss(leaf, TopK(place, target.log_probs, target.log_tail), **options)
        (u,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), u
