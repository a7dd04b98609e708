"""The differential information between two policies over a finite set of responses (paper 32, arXiv 2505.23761).

Conventions: log-probabilities in nats, `[..., responses]`; constants added to a policy cancel in every distribution below.
A response that neither policy can give (−inf in both) is no part of the set.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import full, logsumexp, softplus

FEW = 5.0
"""An effective number of samples below which an estimate says little."""


def log_ratio_distribution(log_p: Tensor, log_reference: Tensor) -> Tensor:
    """log q with q ∝ π / π_ref, the differential information distribution from the reference to the policy.

    q(y) is the probability of y given the information that turns the reference into the policy. Uniform if both are
    equal; from policy to reference it is ∝ 1 / q; over a chain of policies it multiplies.

    Args:
        log_p, log_reference: log π and log π_ref.

    Returns:
        log q, −inf for what the policy cannot give.

    Raises:
        InputError: nan, or a response that the policy gives and the reference cannot.

    Source: paper 32, definition 1.
    """
    _check("log_ratio_distribution", log_p, log_reference)
    return _normalised(_ratio("log_ratio_distribution", log_p, log_reference))


def entropy_of(log_q: Tensor) -> Tensor:
    """−Σ q log q in nats, at most the logarithm of the number of responses: `[...]`.

    Low: the update concentrates on few responses (reinforcement, the likelihood of the chosen rises). High: it spreads
    (smoothing, likelihood displacement). Source: paper 32, section on entropy.
    """
    present = log_q.masked_fill(log_q == -torch.inf, 0.0)  # log 1 adds nothing, and has a gradient
    return -(present.exp() * present).sum(-1)


def rejected_distribution(log_reference: Tensor, log_target: Tensor, *, beta: float) -> Tensor:
    """log π_l with π_l ∝ π_ref (π_ref / π*)^β: what to sample rejected answers from, if the chosen come from π_ref.

    With it DPO at this β has its minimum at the target π*. β → 0 gives π_ref, that is pairs without information.

    Raises:
        InputError: β ≤ 0, nan, or a response that only one of the two can give.

    Source: paper 32, optimal rejected distribution.
    """
    if not beta > 0:
        raise InputError(f"rejected_distribution: beta is {beta} and must be positive.")
    _check("rejected_distribution", log_reference, log_target)
    away = _ratio("rejected_distribution", log_reference, log_target)
    _ratio("rejected_distribution", log_target, log_reference)
    return _normalised(log_reference + beta * away)


def preference_matrix(log_chosen: Tensor, log_rejected: Tensor) -> Tensor:
    """P(a is the chosen one | the pair {a, b}), chosen ~ π_w and rejected ~ π_l: `[..., responses, responses]`.

    σ(log π_w(a)/π_l(a) − log π_w(b)/π_l(b)) with a in rows: ½ on the diagonal, and 1 together with its transpose. nan for a
    pair that is never sampled: one response is of neither policy, or both are never chosen, or never rejected.
    Source: paper 32, preference model of sampled pairs.
    """
    _check("preference_matrix", log_chosen, log_rejected)
    information = log_chosen - log_rejected
    found = torch.sigmoid(information[..., :, None] - information[..., None, :])
    same = torch.eye(found.shape[-1], dtype=torch.bool, device=found.device) & ~information.isnan()[..., None]
    return found.masked_fill(same, 0.5)


def expected_preference_loss(reward: Tensor, log_chosen: Tensor, log_rejected: Tensor) -> Tensor:
    """E softplus(−(r(y_w) − r(y_l))) over y_w ~ π_w, y_l ~ π_l, exactly: `[...]`.

    DPO is r = β log π / π_ref. Time and memory grow with the square of the number of responses.

    Args:
        reward: `[..., responses]`. log_chosen, log_rejected: normalised log-probabilities, never differentiated.
    """
    weights = (log_chosen.detach()[..., :, None] + log_rejected.detach()[..., None, :]).exp()
    reward = reward.masked_fill((log_chosen == -torch.inf) & (log_rejected == -torch.inf), 0.0)  # it may be nan there
    return (weights * softplus(reward[..., None, :] - reward[..., :, None])).sum((-1, -2))


def ordered_pairs(log_target: Tensor, log_reference: Tensor, log_rejected: Tensor) -> Tensor:
    """Fraction of pairs a ≠ b that target, reference and rejected policy order by their margins as DPO needs it: `[...]`.

    The change of log π(a) − log π(b) from reference to target, and that from rejected policy to reference, have one
    sign. 1 for the optimal rejected distribution. Source: paper 32, log-margin ordering.
    """
    _check("ordered_pairs", log_target, log_reference)
    _check("ordered_pairs", log_reference, log_rejected)
    first, second = (_order(a, b) for a, b in ((log_target, log_reference), (log_reference, log_rejected)))
    there = ~torch.stack(
        [x == -torch.inf for x in torch.broadcast_tensors(log_target, log_reference, log_rejected)]
    ).all(0)
    apart = ~torch.eye(there.shape[-1], dtype=torch.bool, device=there.device)
    apart = apart & there[..., :, None] & there[..., None, :]
    number = apart.sum((-1, -2))
    if bool((number == 0).any()):
        raise InputError("ordered_pairs: one response makes no pair: give at least two.")
    return ((first == second) & apart).sum((-1, -2)).to(full(log_target).dtype) / number


def _order(a: Tensor, b: Tensor) -> Tensor:
    """The sign of (a − b)_i − (a − b)_j, `[..., i, j]`; 0 where it is no more than rounding."""
    change = a - b
    noise = 8 * torch.finfo(change.dtype).eps * (a.abs() + b.abs()).nan_to_num(posinf=0.0)
    apart = change[..., :, None] - change[..., None, :]
    return torch.where(apart.abs() <= noise[..., :, None] + noise[..., None, :], 0.0, torch.sign(apart))


def sampled_entropy(log_p: Tensor, log_reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entropy of π / π_ref, normalised, from responses sampled from π.

    With weights w ∝ 1 / π_ref(y_k) and log Z = log mean 1 / π_ref(y_k): −Σ w_k (log π(y_k) − log π_ref(y_k) − log Z). Both
    log-probabilities are sums over the response and must be normalised.

    Returns:
        Entropy, log Z and the effective number of samples 1 / Σ w², each `[...]`.

    Warns if the effective number of some estimate is below 5: its variance is large.
    Source: paper 32, estimator with K = 32 samples a prompt.
    """
    _check("sampled_entropy", log_p, log_reference)
    if not log_p.numel() or bool((log_p.isinf() | log_reference.isinf()).any()):
        raise InputError(
            "sampled_entropy: each sample needs a finite log-probability under both models, and one is not."
        )
    log_z = (-log_reference).logsumexp(-1) - torch.tensor(log_p.shape[-1], dtype=log_p.dtype).log()
    weights = torch.softmax(-log_reference, -1)
    entropy = -(weights * (log_p - log_reference - log_z[..., None])).sum(-1)
    effective = 1 / weights.square().sum(-1)
    if float(effective.min()) < FEW:
        warnings.warn(
            f"sampled_entropy: the effective number of samples is {float(effective.min()):.1f}, below {FEW:g}: draw more.",
            stacklevel=2,
        )
    return entropy, log_z, effective


def _ratio(loss: str, log_p: Tensor, log_reference: Tensor) -> Tensor:
    """log π − log π_ref, −inf where π is 0."""
    undefined = ((log_reference == -torch.inf) & (log_p != -torch.inf)).nonzero()
    if len(undefined):
        raise InputError(
            f"{loss}: response {int(undefined[0, -1])} has probability 0 under one policy and not under the other: the ratio "
            "is undefined. Give it a floor, or leave it out."
        )
    if bool(((log_reference == -torch.inf) & (log_p == -torch.inf)).any()):
        warnings.warn(f"{loss}: responses with probability 0 under both policies are left out.", stacklevel=3)
    return torch.where(log_p == -torch.inf, log_p, log_p - log_reference)


def _normalised(x: Tensor) -> Tensor:
    return torch.where(x == -torch.inf, x, x - logsumexp(x))


def _check(loss: str, log_p: Tensor, log_q: Tensor) -> None:
    if log_p.shape[-1] != log_q.shape[-1]:
        raise InputError(f"{loss}: {log_p.shape[-1]} responses of one policy and {log_q.shape[-1]} of the other.")
    for values in (log_p, log_q):
        wrong = (values.isnan() | (values == torch.inf)).nonzero()
        if len(wrong):
            raise InputError(
                f"{loss}: the log-probability of response {int(wrong[0, -1])} is not a number below infinity."
            )
