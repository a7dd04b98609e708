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
from understudy.losses._pairs import full, softplus
from understudy.losses.checks import check_finite


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    chosen_ref: Tensor,
    rejected_ref: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float | Tensor = 0.0,
    offset: float | Tensor = 0.0,
) -> Tensor:
    """(1 − e) softplus(−h) + e softplus(h) with h = β (log-ratio of chosen − of rejected) + offset.

    e is one number below ½, or one for each pair, `[pairs]`, up to ½ (`visit_label_smoothing`), where neither side is
    preferred and the minimum is at h = 0.

    e = 0 is DPO (Rafailov et al. 2023, Eq. 7); e > 0 is cDPO, whose minimum is at h = log((1 − e) / e). With α (tokens of
    chosen − of rejected) as `offset`, `[pairs]`, it is R-DPO (Park et al. 2024): a longer chosen one is preferred for its
    length in part, and teaches less. At policy = reference and no offset it is ln 2.
    """
    smoothing("dpo", label_smoothing)
    h = beta * margin("dpo", chosen, rejected, chosen_ref, rejected_ref, beta) + offset
    return _smoothed(h, label_smoothing)


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


def exo_pair(
    chosen: Tensor,
    rejected: Tensor,
    chosen_ref: Tensor,
    rejected_ref: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> Tensor:
    """KL((σ(h), σ(−h)) ‖ (1 − e, e)), h = β times the margin: the reverse KL to smoothed labels (EXO, Ji et al. 2024, Eq. 16).

    e must be above 0, where the KL would be infinite.
    """
    smoothing("exo_pair", label_smoothing)
    if label_smoothing == 0:
        raise InputError("exo_pair: label_smoothing is 0, where its KL is infinite; EXO takes 0.001.")
    h = beta * margin("exo_pair", chosen, rejected, chosen_ref, rejected_ref, beta)
    q, log_q, log_other = torch.sigmoid(h), -softplus(-h), -softplus(h)
    return q * (log_q - math.log1p(-label_smoothing)) + torch.sigmoid(-h) * (log_other - math.log(label_smoothing))


def nca_pair(
    chosen: Tensor, rejected: Tensor, chosen_ref: Tensor, rejected_ref: Tensor, *, beta: float = 0.1
) -> Tensor:
    """softplus(−a) + ½ softplus(a) + ½ softplus(b) with a, b = β times the log-ratios of chosen and rejected.

    It holds the chosen likelihood by itself, not only the margin. Source: NCA, Chen et al. 2024, Eq. for pairs.
    """
    a, b = rewards("nca_pair", chosen, rejected, chosen_ref, rejected_ref, beta)
    return softplus(-a) + 0.5 * softplus(a) + 0.5 * softplus(b)


def bco_pair(
    chosen: Tensor, rejected: Tensor, chosen_ref: Tensor, rejected_ref: Tensor, *, beta: float = 0.1
) -> Tensor:
    """softplus(−a) + softplus(b), a, b = β times the log-ratios: a binary classifier of chosen and rejected.

    Source: BCO, Jung et al. 2024, without its reward shift, as TRL has it for pairs.
    """
    a, b = rewards("bco_pair", chosen, rejected, chosen_ref, rejected_ref, beta)
    return softplus(-a) + softplus(b)


def sppo_hard(
    chosen: Tensor, rejected: Tensor, chosen_ref: Tensor, rejected_ref: Tensor, *, beta: float = 0.1
) -> Tensor:
    """(log-ratio of chosen − 1/(2β))² + (log-ratio of rejected + 1/(2β))².

    Source: SPPO, Wu et al. 2024, Eq. 4.7 with the chosen one certain to win.
    """
    a, b = rewards("sppo_hard", chosen, rejected, chosen_ref, rejected_ref, beta)
    return ((a - 0.5) / beta).square() + ((b + 0.5) / beta).square()


def apo_zero(
    chosen: Tensor, rejected: Tensor, chosen_ref: Tensor, rejected_ref: Tensor, *, beta: float = 0.1
) -> Tensor:
    """σ(−a) + σ(b), a, b = β times the log-ratios: raise chosen, lower rejected.

    For chosen answers better than the model's own; 1 at policy = reference. Source: APO, D'Oosterlinck et al. 2024, Eq. 7.
    """
    a, b = rewards("apo_zero", chosen, rejected, chosen_ref, rejected_ref, beta)
    return torch.sigmoid(-a) + torch.sigmoid(b)


def apo_down(
    chosen: Tensor, rejected: Tensor, chosen_ref: Tensor, rejected_ref: Tensor, *, beta: float = 0.1
) -> Tensor:
    """σ(a) + σ(b − a), a, b = β times the log-ratios: lower chosen, and rejected more.

    For chosen answers worse than the model's own; 1 at policy = reference. Source: APO, D'Oosterlinck et al. 2024, Eq. 8.
    """
    a, b = rewards("apo_down", chosen, rejected, chosen_ref, rejected_ref, beta)
    return torch.sigmoid(a) + torch.sigmoid(b - a)


def aot(
    chosen: Tensor,
    rejected: Tensor,
    chosen_ref: Tensor,
    rejected_ref: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """cDPO of the sorted log-odds of the policy, less the sorted log-odds of the reference, over the pairs given.

    The k-th value belongs to the k-th smallest pair of the policy, so the pairs are one group: stochastic dominance of the
    policy's margins over the reference's. Source: AOT (paired), Melnyk et al. 2024.
    """
    smoothing("aot", label_smoothing)
    margin("aot", chosen, rejected, chosen_ref, rejected_ref, beta)
    ours, theirs = chosen - rejected, (chosen_ref - rejected_ref).detach()
    h = beta * (ours.sort().values - theirs.sort().values)
    return _smoothed(h, label_smoothing)


def aot_unpaired(
    chosen: Tensor,
    rejected: Tensor,
    chosen_ref: Tensor,
    rejected_ref: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """cDPO of the sorted log-ratios of all chosen, less those of all rejected, so that the pairs are one group.

    Source: AOT (unpaired), Melnyk et al. 2024.
    """
    smoothing("aot_unpaired", label_smoothing)
    a, b = rewards("aot_unpaired", chosen, rejected, chosen_ref, rejected_ref, beta)
    h = a.sort().values - b.sort().values
    return _smoothed(h, label_smoothing)


def discopop(
    chosen: Tensor,
    rejected: Tensor,
    chosen_ref: Tensor,
    rejected_ref: Tensor,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
) -> Tensor:
    """(1 − s) softplus(−h) + s exp(−h) with s = σ(h / τ), h = β times the margin (DiscoPOP, Lu et al. 2024, Eq. 5).

    Where s underflows, the exponential, which would overflow, has no part.
    """
    if not tau > 0:
        raise InputError(f"discopop: tau is {tau} and must be positive.")
    h = beta * margin("discopop", chosen, rejected, chosen_ref, rejected_ref, beta)
    exponential = torch.exp(-softplus(-h / tau) - h)  # σ(h / τ) e^(−h), as one exponent
    return torch.sigmoid(-h / tau) * softplus(-h) + exponential


def f_divergence_score(log_ratio: Tensor, divergence: str, *, alpha: float = 0.5) -> Tensor:
    """f′(t) at t = π / π_ref, what the log-ratio becomes in DPO under another f-divergence than the reverse KL.

    `reverse_kl`: log t. `forward_kl`: 1 − 1/t. `js_divergence`: log(2t / (1 + t)). `alpha_divergence`:
    (t^(α − 1) − 1) / (α − 1), log t at α = 1. Only differences of two scores have a meaning. Exponents are cut off at 80, as in TRL,
    where the gradient is 0.

    Source: f-DPO, Wang et al. 2023, Table 1.
    """
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "forward_kl":
        return 1 - (-log_ratio).clamp(max=80).exp()
    if divergence == "js_divergence":
        return math.log(2) - softplus(-log_ratio)
    if divergence != "alpha_divergence":
        raise InputError(
            f"Unknown f-divergence {divergence!r}. Known: reverse_kl, forward_kl, js_divergence, alpha_divergence."
        )
    if abs(alpha - 1) < 1e-6:
        return log_ratio
    return torch.expm1(((alpha - 1) * log_ratio).clamp(max=80)) / (alpha - 1)


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
    (log_ratio,) = _checked("kto", log_ratio)
    positive("kto", beta)
    difference = beta * (log_ratio - full(kl.detach()))
    values = torch.sigmoid(torch.where(desirable, -difference, difference))
    return torch.where(desirable, desirable_weight * values, undesirable_weight * values)


def kto_kl(mismatched_log_ratio: Tensor) -> Tensor:
    """max(0, mean log-ratio) over prompts with another example's completion; a scalar without gradient, 0 if empty."""
    if mismatched_log_ratio.numel() < 1:
        return mismatched_log_ratio.new_zeros(())
    return mismatched_log_ratio.detach().mean().clamp(min=0)


def kto_pair(
    chosen: Tensor,
    rejected: Tensor,
    chosen_ref: Tensor,
    rejected_ref: Tensor,
    *,
    beta: float = 0.1,
    detach_kl: bool = False,
) -> Tensor:
    """1 − σ(β (r_w − z_l)) and 1 − σ(β (z_w − r_l)) with r = log π − log π_ref, `[pairs, 2]`.

    z = max(0, mean r) of one side estimates the KL and couples the pairs of a call.

    Args:
        detach_kl: whether z has no gradient, as in the KTO paper; the released code of LLaVA-MoD differentiates it.

    ½ at policy = reference. Source: paper 03, `dpo_loss` of its released code with `loss_type="kto_pair"`.
    """
    positive("kto_pair", beta)
    chosen, rejected, chosen_ref, rejected_ref = _checked("kto_pair", chosen, rejected, chosen_ref, rejected_ref)
    w, l = chosen - chosen_ref.detach(), rejected - rejected_ref.detach()  # noqa: E741
    z_w, z_l = (kto_kl(r) if detach_kl else r.mean().clamp(min=0) for r in (w, l))
    return torch.sigmoid(-beta * torch.stack([w - z_l, z_w - l], -1))


def cpo(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """softplus(−β (chosen − rejected)): DPO with a uniform reference (Xu et al. 2024). CPO adds the NLL of `chosen` to
    it."""
    positive("cpo", beta)
    chosen, rejected = _checked("cpo", chosen, rejected)
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
    chosen, rejected = _checked("simpo", chosen, rejected)
    means = per_token(chosen, chosen_tokens) - per_token(rejected, rejected_tokens)
    return softplus(-(beta * means - gamma))


def odds_ratio(chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor) -> Tensor:
    """softplus(−log odds ratio) of the mean log-probabilities (ORPO, Hong et al. 2024, Eq. 6), without its weight β.

    Mean log-probabilities are clamped at −1e−7, where the odds would be infinite.
    """
    chosen, rejected = _checked("odds_ratio", chosen, rejected)
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
    (log_probs,) = _checked("signed_likelihood", log_probs)
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
    chosen, rejected, chosen_ref, rejected_ref = _checked(loss, chosen, rejected, chosen_ref, rejected_ref)
    return (chosen - chosen_ref.detach()) - (rejected - rejected_ref.detach())


def rewards(
    loss: str, chosen: Tensor, rejected: Tensor, chosen_ref: Tensor, rejected_ref: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """β times the log-ratios of chosen and of rejected, `[pairs]` each; the references are detached."""
    positive(loss, beta)
    chosen, rejected, chosen_ref, rejected_ref = _checked(loss, chosen, rejected, chosen_ref, rejected_ref)
    return beta * (chosen - chosen_ref.detach()), beta * (rejected - rejected_ref.detach())


def _smoothed(h: Tensor, label_smoothing: float | Tensor) -> Tensor:
    """(1 − e) softplus(−h) + e softplus(h), the cross-entropy of σ(h) with labels of which a share e is flipped."""
    return (1 - label_smoothing) * softplus(-h) + label_smoothing * softplus(h)


def _checked(loss: str, *log_probs: Tensor) -> list[Tensor]:
    """Log-probabilities in single precision at least; an error names the position of −inf or nan."""
    for values in log_probs:
        check_finite(
            values.flatten(),
            lambda value, at: f"{loss}: log-probability {at} is {value}: the model gives a completion probability 0.",
        )
    return [full(values) for values in log_probs]


def positive(loss: str, beta: float) -> None:
    """Raise an error for a scale that is not positive."""
    if not beta > 0:
        raise InputError(f"{loss}: beta is {beta} and must be positive.")


def smoothing(loss: str, e: float | Tensor) -> None:
    """Raise an error for label smoothing outside [0, ½); values of each pair may be ½."""
    if isinstance(e, Tensor):
        check = ~((e >= 0) & (e <= 0.5))
        if bool(check.any()):
            at = int(check.nonzero()[0, 0])
            raise InputError(f"{loss}: label_smoothing of pair {at} is {float(e[at])} and must lie in [0, 0.5].")
    elif not 0 <= e < 0.5:
        raise InputError(f"{loss}: label_smoothing is {e} and must lie in [0, 0.5).")


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0, exact at both ends."""
    small = x < -math.log(2)
    return torch.where(
        small, torch.log1p(-x.masked_fill(~small, -1.0).exp()), torch.log(-torch.expm1(x.masked_fill(small, -0.5)))
    )
