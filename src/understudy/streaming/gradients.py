"""Values and gradients of the common losses, written out by hand for one strip of logits.

Each equals its loss in `understudy.losses` under autograd and needs fewer passes over memory. If a row is not finite
(forbidden classes, bad input) or a combination is not covered, `by_hand` returns `None` and the plain loss is used.

With g = ∂L/∂q the gradient with respect to the logits is q (g − Σ q g) / τ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

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
    """Values `[rows]` and gradient `[rows, classes]`, or `None` if autograd is needed."""
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
        teacher = target.logits.to(logits.dtype)
        found = _DENSE[loss](scaled, teacher if tau == 1 else teacher / tau, **options)
    elif isinstance(target, Sampled) and loss in (losses.forward_kl, losses.cross_entropy_soft) and not options:
        found = _sampled(loss, scaled, target)
    elif isinstance(target, TopK) and loss in _BUCKETED:
        found = _buckets(loss, scaled, target, options)
    if found is None:
        return None
    values, slope = found
    return _finite((values.mul_(factor), slope if factor == tau else slope.mul_(factor / tau)))


def scaling(
    target: Target | None, rows: tuple[Tensor, ...], options: dict[str, Any]
) -> tuple[float, float, dict[str, Any]] | None:
    """Temperature, the factor of `tau_squared` and all other options, or `None` where the plain loss has to look: at rows
    that keep fewer classes than others, or have temperatures of their own, too."""
    options = dict(options)
    tau = options.pop("temperature", 1.0)
    if isinstance(tau, Tensor):
        return None
    factor = tau**2 if options.pop("tau_squared", False) else 1.0
    if not tau > 0 or rows or getattr(target, "temperature", tau) != tau:
        return None
    if isinstance(target, TopK) and bool((target.ids < 0).any()):
        return None
    return tau, factor, options


def _finite(pair: Pair) -> Pair | None:
    return pair if bool(pair[0].isfinite().all()) else None


def _softmax(z: Tensor) -> Pair:
    """q `[rows, classes]` and log Σ exp z `[rows, 1]`, the latter as z − log q of the most probable class, whose q is
    never small."""
    q = torch.softmax(z, -1)
    return q, z.amax(-1, keepdim=True) - q.amax(-1, keepdim=True).log_()


def _cross_entropy(z: Tensor, labels: Tensor) -> Pair:
    check_labels("cross_entropy", labels, z.shape[-1])
    q, norm = _softmax(z)
    values = (norm - z.gather(-1, labels[:, None]))[:, 0]
    return values, q.scatter_add_(-1, labels[:, None], q.new_full((len(labels), 1), -1.0))


def _both(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, p and log p/q for each class. Probabilities do not sum to 1 exactly, so normalisers are subtracted before
    sums."""
    (q, norm_q), (p, norm_p) = _softmax(z), _softmax(t)
    return q, p, (t - z).add_(norm_q - norm_p)


def _forward(z: Tensor, t: Tensor) -> Pair:
    q, p, ahead = _both(z, t)
    return torch.linalg.vecdot(p, ahead), q.sub_(p)


def _soft(z: Tensor, t: Tensor) -> Pair:
    (q, norm), p = _softmax(z), torch.softmax(t, -1)
    return torch.linalg.vecdot(p, norm - z), q.sub_(p)


def _reverse(z: Tensor, t: Tensor) -> Pair:
    _, q, ahead = _both(t, z)
    values = torch.linalg.vecdot(q, ahead)
    return values, q.mul_(ahead.sub_(values[:, None]))


# Of a mixture m = a p + (1 − a) q: a p / m = sigmoid (log p/q + log_odds a), which cannot overflow.


def _jsd(z: Tensor, t: Tensor, beta: float = 0.5) -> Pair | None:
    if not 0 < beta < 1:
        return _forward(z, t) if beta == 0 else _reverse(z, t) if beta == 1 else None
    q, p, ahead = _both(z, t)
    # log m/q; from 40 on softplus equals its argument, in float64 too
    above = softplus(ahead + _log_odds(beta), threshold=40.0).add_(math.log1p(-beta))
    left, own = torch.linalg.vecdot(p, ahead.sub_(above)), torch.linalg.vecdot(q, above)
    return beta * left - (1 - beta) * own, q.mul_(above.sub_(own[:, None])).mul_(beta - 1)


def _skew(z: Tensor, t: Tensor, alpha: float = 0.1) -> Pair | None:
    if not 0 < alpha < 1:
        return _forward(z, t) if alpha == 0 else None
    q, p, ahead = _both(z, t)
    ratio = ahead.add_(_log_odds(alpha)).sigmoid_().div_(alpha)  # p/m
    values = torch.linalg.vecdot(p, _log(ratio))
    # g = −(1 − α) p/m
    mean = torch.linalg.vecdot(q, ratio.sub_(1))
    return values, q.mul_(ratio.sub_(mean[:, None])).mul_(alpha - 1)


def _skew_reverse(z: Tensor, t: Tensor, alpha: float = 0.1) -> Pair | None:
    if not 0 < alpha < 1:
        return _reverse(z, t) if alpha == 0 else None
    _, q, ahead = _both(t, z)
    ratio = ahead.add_(_log_odds(alpha)).sigmoid_().div_(alpha)  # q/m
    log_ratio = _log(ratio)
    values = torch.linalg.vecdot(q, log_ratio)
    # g = log q/m + 1 − α q/m
    g = log_ratio.sub_(ratio, alpha=alpha)
    return values, q.mul_(g.sub_(torch.linalg.vecdot(q, g)[:, None]))


def _log_odds(share: float) -> float:
    return math.log(share) - math.log1p(-share)


def _log(ratio: Tensor) -> Tensor:
    """The logarithm, finite where a ratio is 0 in floating point, so that 0 times it is 0."""
    return ratio.clamp_min(torch.finfo(ratio.dtype).tiny).log_()


_DENSE: dict[Callable[..., Tensor], Callable[..., Pair | None]] = {
    losses.forward_kl: _forward,
    losses.cross_entropy_soft: _soft,
    losses.reverse_kl: _reverse,
    losses.jsd: _jsd,
    losses.skew_kl: _skew,
    losses.skew_reverse_kl: _skew_reverse,
}
_BUCKETED = frozenset({*_DENSE, losses.total_variation, losses.alpha_beta})


def _sampled(loss: Callable[..., Tensor], z: Tensor, target: Sampled) -> Pair:
    weights, (q, norm) = target.weights.to(z.dtype), _softmax(z)
    at = z.gather(-1, target.ids) - norm
    values = (weights * (target.log_probs.to(z.dtype) - at if loss is losses.forward_kl else -at)).sum(-1)
    return values, q.mul_(weights.sum(-1, keepdim=True)).scatter_add_(-1, target.ids, -weights)


def _buckets(loss: Callable[..., Tensor], z: Tensor, target: TopK, options: dict[str, Any]) -> Pair:
    """Any divergence on k kept classes and a tail: autograd on the k + 1 buckets, by hand from the buckets to the
    classes.

    ∂ log Q_b / ∂ z_v is δ_bv − q_v for a kept class, and q_v / Q_tail [v outside] − q_v for the tail.
    """
    q, norm = _softmax(z)
    kept = z.gather(-1, target.ids) - norm
    outside = q.scatter_(-1, target.ids, 0.0)
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
