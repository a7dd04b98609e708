"""Preference losses on sequence log-probabilities, one value per pair (or per example). Nothing is reduced.

Conventions (card of paper 39): `chosen` and `rejected` are log π(y | x) in nats, summed over completion tokens with
EOS, `[pairs]`; `*_ref` are those of the reference model, never differentiated; `*_tokens` are numbers of tokens. A
log-probability that is −inf or nan is an `InputError` that names its pair. All losses are written with softplus, so
that no margin overflows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import softplus
from understudy.losses.checks import check_finite


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    chosen_ref: Tensor,
    rejected_ref: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """(1 − e) softplus(−h) + e softplus(h) with h = β (log-ratio of chosen − of rejected).

    e = 0 is DPO (Rafailov et al. 2023, Eq. 7); e > 0 is cDPO, whose minimum is at h = log((1 − e) / e).
    At policy = reference it is ln 2.
    """
    smoothing("dpo", label_smoothing)
    h = beta * margin("dpo", chosen, rejected, chosen_ref, rejected_ref, beta)
    return (1 - label_smoothing) * softplus(-h) + label_smoothing * softplus(h)


def robust_dpo(
    chosen: Tensor,
    rejected: Tensor,
    chosen_ref: Tensor,
    rejected_ref: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    """[(1 − e) softplus(−h) − e softplus(h)] / (1 − 2e): unbiased under labels flipped with probability e < ½.

    It can be negative. Source: Chowdhury et al. 2024.
    """
    smoothing("robust_dpo", label_smoothing)
    e = label_smoothing
    h = beta * margin("robust_dpo", chosen, rejected, chosen_ref, rejected_ref, beta)
    return ((1 - e) * softplus(-h) - e * softplus(h)) / (1 - 2 * e)


def hinge(chosen: Tensor, rejected: Tensor, chosen_ref: Tensor, rejected_ref: Tensor, *, beta: float = 0.1) -> Tensor:
    """relu(1 − h), h = β times the margin of log-ratios; 1 at policy = reference (SLiC, Zhao et al. 2023)."""
    return F.relu(1 - beta * margin("hinge", chosen, rejected, chosen_ref, rejected_ref, beta))


def ipo(chosen: Tensor, rejected: Tensor, chosen_ref: Tensor, rejected_ref: Tensor, *, beta: float = 0.1) -> Tensor:
    """(margin − 1/(2β))² (Azar et al. 2023, Eq. 17).

    The paper's log-ratios are sums over the sequence. TRL since 2024 uses means over its tokens: divide each side by its
    number of tokens first (`per_token`). The two differ by orders of magnitude.
    """
    return (margin("ipo", chosen, rejected, chosen_ref, rejected_ref, beta) - 1 / (2 * beta)).square()


def kto(
    log_ratio: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w_D (1 − σ(β (r − z))) for desirable examples, w_U (1 − σ(β (z − r))) for the others: `[examples]`.

    Args:
        log_ratio: r, sequence log-ratio of policy to reference, `[examples]`.
        desirable: `[examples]`, bool.
        kl: z ≥ 0, an estimate of KL(policy ‖ reference), broadcast to the examples, without gradient (`kto_kl`).

    ½ at policy = reference. Source: Ethayarajh et al. 2024, Eq. 8.
    """
    _check("kto", log_ratio)
    positive("kto", beta)
    difference = beta * (log_ratio - kl.detach())
    values = torch.sigmoid(torch.where(desirable, -difference, difference))
    return torch.where(desirable, desirable_weight * values, undesirable_weight * values)


def kto_kl(mismatched_log_ratio: Tensor) -> Tensor:
    """max(0, mean log-ratio) over prompts with another example's completion; a scalar without gradient, 0 if empty."""
    if mismatched_log_ratio.numel() < 1:
        return mismatched_log_ratio.new_zeros(())
    return mismatched_log_ratio.detach().mean().clamp(min=0)


def cpo(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """softplus(−β (chosen − rejected)): DPO with a uniform reference (Xu et al. 2024). CPO adds the NLL of `chosen` to
    it."""
    positive("cpo", beta)
    _check("cpo", chosen, rejected)
    return softplus(-beta * (chosen - rejected))


def simpo(
    chosen: Tensor,
    rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
) -> Tensor:
    """softplus(−(β (mean log-prob of chosen − of rejected) − γ)) (Meng et al. 2024, Eq. 6). No reference."""
    positive("simpo", beta)
    _check("simpo", chosen, rejected)
    means = per_token(chosen, chosen_tokens) - per_token(rejected, rejected_tokens)
    return softplus(-(beta * means - gamma))


def odds_ratio(chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor) -> Tensor:
    """softplus(−log odds ratio) of the mean log-probabilities (ORPO, Hong et al. 2024, Eq. 6), without its weight β.

    Mean log-probabilities are clamped at −1e−7, where the odds would be infinite.
    """
    _check("odds_ratio", chosen, rejected)
    a, b = (per_token(x, n).clamp(max=-1e-7) for x, n in ((chosen, chosen_tokens), (rejected, rejected_tokens)))
    return softplus(-((a - b) - (_log1mexp(a) - _log1mexp(b))))


def signed_likelihood(log_probs: Tensor, weights: Tensor, *, gamma: float = 0.0) -> Tensor:
    """−Σ_i w_i ℓ_i, with e^{γ ℓ_i} as another factor where w_i < 0: raise some completions, lower others. `[lists]`.

    Linear in ℓ at γ = 0, so no completion's gradient depends on its own value and the loss has no lower bound. With γ > 0 the
    term of a completion fades as it becomes unlikely; the gradient flows through the factor.

    Args:
        log_probs: ℓ, the mean log-probability a token of each completion in nats, `[lists, completions]`.
        weights: w, which broadcast; 1 and −α of a correct and a wrong completion are REDI.

    Source: REDI (2025, arXiv 2505.24850), Eq. for L_REDI; the factor is `negw` of its released code.
    """
    _check("signed_likelihood", log_probs)
    if gamma < 0:
        raise InputError(f"signed_likelihood: gamma is {gamma} and must be at least 0.")
    faded = torch.where(weights < 0, gamma * log_probs, 0.0).exp()
    return -(weights * faded * log_probs).sum(-1)


def per_token(log_prob: Tensor, tokens: Tensor) -> Tensor:
    """Turn sums over completions into means over their tokens; an empty completion is an `InputError`."""
    empty = (tokens < 1).nonzero()
    if len(empty):
        raise InputError(
            f"Completion {int(empty[0, 0])} of the batch has no tokens: drop it, or raise data.max_length."
        )
    return log_prob / tokens


def margin(
    loss: str, chosen: Tensor, rejected: Tensor, chosen_ref: Tensor, rejected_ref: Tensor, beta: float = 1.0
) -> Tensor:
    """Log-ratio of chosen minus log-ratio of rejected, `[pairs]`; the reference is detached."""
    positive(loss, beta)
    _check(loss, chosen, rejected, chosen_ref, rejected_ref)
    return (chosen - chosen_ref.detach()) - (rejected - rejected_ref.detach())


def _check(loss: str, *log_probs: Tensor) -> None:
    """Raise an error that names the position of −inf or nan."""
    for values in log_probs:
        check_finite(
            values.flatten(),
            lambda value, at: f"{loss}: log-probability {at} is {value}: the model gives a completion probability 0.",
        )


def positive(loss: str, beta: float) -> None:
    """Raise an error for a scale that is not positive."""
    if not beta > 0:
        raise InputError(f"{loss}: beta is {beta} and must be positive.")


def smoothing(loss: str, e: float) -> None:
    """Raise an error for label smoothing outside [0, ½)."""
    if not 0 <= e < 0.5:
        raise InputError(f"{loss}: label_smoothing is {e} and must lie in [0, 0.5).")


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0, exact at both ends."""
    small = x < -math.log(2)
    return torch.where(
        small, torch.log1p(-x.masked_fill(~small, -1.0).exp()), torch.log(-torch.expm1(x.masked_fill(small, -0.5)))
    )
