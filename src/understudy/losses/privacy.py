"""Soft targets that tell less about private rows: a temperature of each row's own, and noise. Nothing is reduced."""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._kernels import kl
from understudy.losses._pairs import Temperature, check_temperature, checked, full, log_softmax, need_dense
from understudy.targets import Target


def private_temperature(score: Tensor, base: float, most: float) -> Tensor:
    """τ = τ₀ + s · (τ_max − τ₀), `[rows]` (Swing Distillation): flat targets for private rows.

    Args:
        score: s `[rows]`, in 0 … 1, how likely a row is private. base: τ₀. most: τ_max.

    Raises:
        InputError: a score outside of 0 … 1, or not 0 < τ₀ ≤ τ_max.
    """
    if not 0 < base <= most:
        raise InputError(f"private_temperature: base is {base} and most {most}; give 0 < base <= most.")
    wrong = (~((score >= 0) & (score <= 1))).nonzero()
    if len(wrong):
        row = int(wrong[0, 0])
        raise InputError(f"private_temperature: the score of row {row} is {float(score[row])} and must lie in [0, 1].")
    return base + score * (most - base)


def perturbed(probs: Tensor, noise: Tensor, *, keep_support: bool = False) -> Tensor:
    """clip(p + ξ, 0) / Σ clip(p + ξ, 0), `[rows, classes]`; uniform where everything is clipped.

    Args:
        probs: p `[rows, classes]`. noise: ξ, likewise. keep_support: classes of probability 0 stay at 0.
    """
    raw, allowed = _clipped(probs, noise, keep_support)
    total = raw.sum(-1, keepdim=True)
    even = allowed.to(probs) / allowed.sum(-1, keepdim=True)
    return torch.where(total > 0, raw / torch.where(total > 0, total, 1.0), even)


def clipped_whole(
    target: Target | Tensor, temperature: Temperature, noise: Tensor, *, keep_support: bool = False
) -> Tensor:
    """Of which rows the noise clips every class away, so that `perturbed` is uniform: `[rows]`, of booleans.

    Args:
        target, temperature, noise, keep_support: as of `noisy_forward_kl`.
    """
    log_p = log_softmax(need_dense("clipped_whole", target), temperature)
    return ~(_clipped(log_p.exp(), full(noise), keep_support)[0] > 0).any(-1)


def _clipped(probs: Tensor, noise: Tensor, keep_support: bool) -> tuple[Tensor, Tensor]:
    """clip(p + ξ, 0) of the classes that may have probability, and which these are; both `[rows, classes]`."""
    allowed = probs > 0 if keep_support else torch.ones_like(probs, dtype=torch.bool)
    return (probs + noise.to(probs)).clamp(min=0).masked_fill(~allowed, 0.0), allowed


def noisy_forward_kl(
    student: Tensor,
    target: Target | Tensor,
    temperature: Temperature,
    noise: Tensor | None = None,
    *,
    student_temperature: Temperature | None = None,
    tau_squared: bool = False,
    keep_support: bool = False,
) -> Tensor:
    """KL(p̃ ‖ softmax(S / τ)) with p̃ the noisy softmax(U / τ) (Swing Distillation).

    Without noise it is `forward_kl`, whose minimum is S = U whatever τ is: its gradient shrinks with 1/τ².

    Args:
        student: logits S `[rows, classes]`. target: `Dense` logits U. temperature: τ, one or `[rows]`.
        noise: ξ `[rows, classes]`, or `None`. student_temperature: the student's own, τ unless given.
        tau_squared: multiply by τ², which weighs private rows up.

    Returns:
        `[rows]`, in nats.
    """
    check_temperature("noisy_forward_kl", temperature)
    own = temperature if student_temperature is None else student_temperature
    check_temperature("noisy_forward_kl", own)
    log_p = log_softmax(need_dense("noisy_forward_kl", target, student.shape[-1]), temperature)
    if noise is not None:
        log_p = perturbed(log_p.exp(), full(noise), keep_support=keep_support).log()
    values = checked("noisy_forward_kl", kl(log_p, log_softmax(student, own)), student, target)
    return values * temperature**2 if tau_squared else values
