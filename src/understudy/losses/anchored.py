"""Anchored preference losses over lists of candidates (paper 2, ADPO), and their target distributions.

All arrays are `[lists, candidates]` with a `mask` of valid candidates; masked entries may hold any value and affect
neither value nor gradient. Losses return one value per list.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import full
from understudy.losses.checks import check_finite

Temperature = float | Tensor
"""One for all lists, or `[lists]`."""


def anchored_cross_entropy(
    log_prob: Tensor, anchor: Tensor, target: Tensor, *, tau: Temperature, mask: Tensor | None = None
) -> Tensor:
    """−Σ q log softmax((log π − log π_ref) / τ) over valid candidates: `[lists]`. A list with one candidate gives 0.

    Args:
        log_prob: log π, sequence log-probabilities of the policy, nats.
        anchor: log π_ref, sequence log-probabilities of the anchor, nats, not differentiated.
        target: q, rows sum to 1 over valid candidates, not differentiated.

    Gradient per list: (p̃ − q) / τ. The optimum is log π = log π_ref + τ log q + const. Source: ADPO, Eq. for L.
    With two candidates and q = (1, 0) it is DPO at β = 1/τ.
    """
    mask = _mask(log_prob, mask)
    q = full(target.detach()).masked_fill(~mask, 0.0)
    _check_target(q, mask)
    log_p = _anchored(log_prob, anchor, tau, mask)
    return -(q * log_p.masked_fill(q == 0, 0.0)).sum(-1)


def adaptive_temperature(
    tau: float,
    entropy: Tensor,
    reward: Tensor,
    *,
    by_entropy: float = 0.5,
    by_reward: float = 0.0,
    least: float = 0.1,
    most: float = 5.0,
) -> Tensor:
    """τ (1 + a H + b (1 − H) (1 − R)), bounded to [least, most]: `[lists]`, without gradient.

    It softens lists that the policy is not sure of (H), and with b those that it is sure of and that are rewarded little.

    Args:
        entropy: H in [0, 1], relative to its largest value, `[lists]`.
        reward: R in [0, 1], the mean reward of each list relative to those of others, `[lists]`.
        by_entropy, by_reward: a and b.

    Source: ADPO, adaptive temperature, official code.
    """
    h, r = entropy.detach(), reward.detach()
    return (tau * (1 + by_entropy * h + by_reward * (1 - h) * (1 - r))).clamp(least, most)


def _anchored(log_prob: Tensor, anchor: Tensor, tau: Temperature, mask: Tensor) -> Tensor:
    _check_positive("tau", tau)
    ours, theirs = (full(x).masked_fill(~mask, 0.0) for x in (log_prob, anchor.detach()))
    for name, x in (("log-probability", ours), ("anchor", theirs)):
        check_finite(x, _names(name))
    return torch.log_softmax(((ours - theirs) / by_list(tau)).masked_fill(~mask, -math.inf), -1)


def _check_positive(name: str, value: Temperature) -> None:
    if not bool(torch.as_tensor(value > 0).all()):
        raise InputError(f"{name} is {value} and must be positive.")


def by_list(tau: Temperature) -> Temperature:
    """A temperature that divides `[lists, candidates]`."""
    return tau[..., None] if isinstance(tau, Tensor) else tau


def _mask(values: Tensor, mask: Tensor | None) -> Tensor:
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    empty = (~mask.any(-1)).nonzero()
    if len(empty):
        raise InputError(f"List {int(empty[0, 0])} has no valid candidate.")
    return mask


def _check_target(q: Tensor, mask: Tensor) -> None:
    wrong = ((q < 0).any(-1) | ((q.sum(-1) - 1).abs() > 1e-6) | q.isnan().any(-1)).nonzero()
    if len(wrong):
        row = int(wrong[0, 0])
        raise InputError(
            f"The target of list {row} is {[round(v, 4) for v in q[row].tolist()]}: it must be ≥ 0 and sum to 1."
        )


def bradley_terry(first: Tensor, second: Tensor, *, beta: float) -> Tensor:
    """The probability σ((r₁ − r₂) / β) that the first of two is better."""
    _check_positive("beta", beta)
    return torch.sigmoid((first - second) / beta)


def softmax_advantage(reward: Tensor, *, beta: float, mask: Tensor | None = None) -> Tensor:
    """softmax(A / β), A = (reward − mean) / deviation in each list (n − 1 in the denominator); uniform if all are equal."""
    _check_positive("beta", beta)
    mask = _rewards(reward, mask)
    return _softmax(_advantage(full(reward), mask) / beta, mask)


def _advantage(reward: Tensor, mask: Tensor) -> Tensor:
    number = mask.sum(-1, keepdim=True)
    values = reward.masked_fill(~mask, 0.0)
    centred = (values - values.sum(-1, keepdim=True) / number).masked_fill(~mask, 0.0)
    deviation = (centred.square().sum(-1, keepdim=True) / (number - 1).clamp(min=1)).sqrt()
    return centred / torch.where(deviation < 1e-8, torch.ones_like(deviation), deviation)


def tempered(log_prob: Tensor, *, temperature: float, mask: Tensor | None = None) -> Tensor:
    """softmax(log π_T / T) over the candidates: the teacher's distribution as target (KD)."""
    _check_positive("temperature", temperature)
    return _softmax(full(log_prob) / temperature, _mask(log_prob, mask))


def exact_teacher(teacher: Tensor, anchor: Tensor, *, tau: Temperature, mask: Tensor | None = None) -> Tensor:
    """softmax((log π_T − log π_ref) / τ): with this target the optimum is the teacher itself, for any anchor."""
    _check_positive("tau", tau)
    return _softmax((full(teacher) - full(anchor)) / by_list(tau), _mask(teacher, mask))


def best(reward: Tensor, mask: Tensor | None = None) -> Tensor:
    """All mass on the candidate with the largest reward (the first of equals): supervised fine-tuning on it."""
    mask = _rewards(reward, mask)
    top = reward.masked_fill(~mask, -math.inf).argmax(-1, keepdim=True)
    return torch.zeros_like(reward).scatter(-1, top, 1.0)


def kde_rank(
    reward: Tensor,
    *,
    beta: float,
    mask: Tensor | None = None,
    factor: float = 0.9,
    least: float = 1e-3,
    clip: float = 1e-4,
) -> Tensor:
    """softmax(logit F / β), F the Gaussian-kernel distribution function of the list's own rewards.

    An outlier's influence is bounded: a reward of 500 or of 5 million gives the same target. The bandwidth is
    max(factor · min(deviation, IQR / 1.349) · n^(−1/5), least).
    """
    _check_positive("beta", beta)
    mask = _rewards(reward, mask)
    return _softmax(kde_logits(reward, mask, factor, least, clip) / beta, mask)


def kde_logits(reward: Tensor, mask: Tensor, factor: float = 0.9, least: float = 1e-3, clip: float = 1e-4) -> Tensor:
    """log F − log(1 − F) of each candidate."""
    reward = full(reward)
    number = mask.sum(-1, keepdim=True)
    z = (reward[..., :, None] - reward[..., None, :]) / kde_width(reward, mask, factor, least)[..., None, None]
    below = torch.special.ndtr(z).masked_fill(~mask[..., None, :], 0.0).sum(-1) / number
    f = below.clamp(clip, 1 - clip)
    return f.log() - torch.log1p(-f)


def kde_width(reward: Tensor, mask: Tensor, factor: float = 0.9, least: float = 1e-3) -> Tensor:
    """The kernel's bandwidth, `[lists]`."""
    reward = full(reward)
    number = mask.sum(-1)
    values = reward.masked_fill(~mask, math.nan)
    centred = (reward - values.nanmean(-1, keepdim=True)).masked_fill(~mask, 0.0)
    deviation = (centred.square().sum(-1) / (number - 1).clamp(min=1)).sqrt()
    spread = values.nanquantile(0.75, -1) - values.nanquantile(0.25, -1)
    return (factor * torch.minimum(deviation, spread / 1.349) * number.to(reward.dtype) ** -0.2).clamp(min=least)


def anchored_plackett_luce(
    score: Tensor,
    reward: Tensor,
    *,
    mask: Tensor | None = None,
    top: int | None = None,
    label_smoothing: float = 0.0,
    poly: float = 0.0,
    strict: bool = False,
) -> Tensor:
    """−Σ_k log of the probability of the k-th best candidate among the remaining ones, by anchored scores, over the
    first `top` positions (by default all but the last).

    Args:
        score: (log π − log π_ref) / τ.
        reward: defines the order; ties keep the lower index first.
        label_smoothing: weight of (log Z_k − mean score of the remaining candidates).
        poly: weight of 1 − exp(−nll), with nll at most 20.
        strict: raise an error for equal rewards.

    Returns:
        `[lists]`, the *mean* over positions; 0 for one candidate.

    Source: ADPO, list-wise variant, official code.
    """
    mask, score = _rewards(reward, mask), full(score)
    check_finite(score, _names("score"), mask)
    order = reward.masked_fill(~mask, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    ranked, valid = score.masked_fill(~mask, 0.0).gather(-1, order), mask.gather(-1, order)
    if strict:
        placed = reward.gather(-1, order)
        tied = ((placed[..., 1:] == placed[..., :-1]) & valid[..., 1:]).any(-1).nonzero()
        if len(tied):
            raise InputError(
                f"List {int(tied[0, 0])} has equal rewards, and strict requires an order: leave strict out."
            )
    held = ranked.masked_fill(~valid, -math.inf)
    log_z = held.flip(-1).logcumsumexp(-1).flip(-1)
    rest = valid.flip(-1).cumsum(-1).flip(-1)
    suffix = ranked.masked_fill(~valid, 0.0).flip(-1).cumsum(-1).flip(-1) / rest.clamp(min=1)
    positions = valid & (rest > 1) & (torch.arange(score.shape[-1], device=score.device) < (top or score.shape[-1]))
    log_z = log_z.masked_fill(~positions, 0.0)
    nll = (log_z - ranked).masked_fill(~positions, 0.0)  # elsewhere exp(−nll) may overflow, and its gradient with it
    if label_smoothing:
        nll = (1 - label_smoothing) * nll + label_smoothing * (log_z - suffix)
    if poly:
        nll = nll + poly * (1 - torch.exp(-nll.clamp(max=20.0)))
    return nll.masked_fill(~positions, 0.0).sum(-1) / positions.sum(-1).clamp(min=1)


def _softmax(logits: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(logits.detach().masked_fill(~mask, -math.inf), -1)


def _rewards(reward: Tensor, mask: Tensor | None) -> Tensor:
    mask = _mask(reward, mask)
    check_finite(reward, _names("reward"), mask)
    return mask


def _names(what: str) -> Callable[[float, int, int], str]:
    return lambda value, row, column: f"The {what} of list {row}, candidate {column} is {value}: it must be finite."
