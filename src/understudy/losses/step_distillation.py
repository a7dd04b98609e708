"""Distillation of a diffusion model to fewer steps: two steps as one, and consistency along a trajectory.

Notation and shapes are those of `losses.diffusion`: x_t = α_t x_0 + σ_t ε, α and σ are `[rows]`, examples are `[rows, ...]`.
A level is the pair (α, σ) of a time.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import full
from understudy.losses.diffusion import over, squared_error

Level = tuple[Tensor, Tensor]
SnrWeight = Literal["snr", "truncated_snr", "snr_plus_one"]
Distance = Literal["l1", "l2"]


def two_step_target(first: Tensor, second: Tensor, start: Level, middle: Level, end: Level) -> Tensor:
    """x̃, the clean example for which one DDIM step from t to t″ ends where two steps by way of t′ do: `[rows, ...]`.

    x̃ = (z_t″ − (σ_t″ / σ_t) z_t) / (α_t″ − (σ_t″ / σ_t) α_t), written as a mean of both predictions, since z_t cancels:
    x̃ = x̂_1 + w (x̂_2 − x̂_1) with w = (α_t″ − α_t′ σ_t″ / σ_t′) / (α_t″ − α_t σ_t″ / σ_t) in [0, 1]. Where σ_t″ = 0 it is x̂_2,
    and equal predictions are their own target.

    Args:
        first, second: x̂_1 and x̂_2, the teacher's x_0 at t and, after a DDIM step with it, at t′; detached here.
        start, middle, end: levels of t > t′ > t″.

    Raises:
        InputError: t′ or t″ is not below the time before it in some row.

    Source: Salimans & Ho 2022 (arXiv 2202.00512), Algorithm 2 and Appendix G.
    """
    x, y = first.detach(), second.detach()
    (alpha_t, sigma_t), (alpha_m, sigma_m), (alpha_s, sigma_s) = start, middle, end
    for one, other in ((start, middle), (middle, end)):
        if not bool(((other[0] > one[0]) | (other[1] < one[1])).all()):
            raise InputError(
                "Two steps go from t to an earlier t' and to a t'' before that, and some row does not: take fewer steps than "
                "the schedule has times."
            )
    weight = (alpha_s - alpha_m * sigma_s / sigma_m) / (alpha_s - alpha_t * sigma_s / sigma_t)
    return torch.lerp(x, y, over(weight, x))


def snr_weight(kind: SnrWeight, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Weight of an error in x_0: `[rows]`, with SNR = α² / σ².

    `snr`: SNR, the plain error in ε. `truncated_snr`: max(SNR, 1), the larger of the errors in x_0 and in ε.
    `snr_plus_one`: SNR + 1, which is the error in v where α² + σ² = 1. The last two do not vanish where α does.

    Source: Salimans & Ho 2022, Section 4 (Eqs. 9 and 10).
    """
    snr = (alpha / sigma).square()
    if kind == "snr":
        return snr
    if kind == "truncated_snr":
        return snr.clamp(min=1)
    if kind == "snr_plus_one":
        return snr + 1
    raise InputError(f"Unknown weight {kind!r}. Known: snr, truncated_snr, snr_plus_one.")


def progressive(clean: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """w · mean (x̃ − x̂_θ(z_t))²: `[rows]`, with gradient to `clean` alone.

    Args:
        clean: the student's x_0 at t. target: x̃ of `two_step_target`. weight: of `snr_weight`, `[rows]`.

    Source: Salimans & Ho 2022, Algorithm 2.
    """
    error = squared_error(clean, target)
    return weight.to(error.dtype) * error


def consistency_scalings(level: Level, smallest: Level) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of `consistency_function`, `[rows]` each: σ_ε / σ_t and α_ε − α_t σ_ε / σ_t.

    They are differentiable in t, and 1 and 0 at the smallest time ε, as the boundary condition demands. With them the function
    is the exact DDIM step from t to ε, so that any denoiser is one; in the variance-exploding time of the paper, with the
    denoiser as F, they replace σ_d² / ((t − ε)² + σ_d²) and σ_d (t − ε) / √(σ_d² + t²), which meet the same condition.

    Args:
        level, smallest: of t and of ε.

    Source: Song et al. 2023 (arXiv 2303.01469), Eq. 5 and its boundary condition.
    """
    (alpha, sigma), (alpha_min, sigma_min) = level, smallest
    skip = torch.where(sigma == sigma_min, 1.0, sigma_min / sigma)
    return skip, alpha_min - alpha * skip


def consistency_function(x: Tensor, clean: Tensor, level: Level, smallest: Level) -> Tensor:
    """f(x_t, t) = c_skip x_t + c_out x̂_0: the end, at the smallest time, of the trajectory through x_t; the identity there.

    Args:
        x: x_t. clean: the network's x_0 at x_t. level, smallest: as of `consistency_scalings`.

    Source: Song et al. 2023, Eq. 5.
    """
    skip, out = consistency_scalings(level, smallest)
    return over(skip, x) * x + over(out, x) * clean


def consistency(values: Tensor, target: Tensor, distance: Distance = "l2") -> Tensor:
    """d(f_θ(x_t′, t′), f_θ⁻(x̂_t, t)): `[rows]`, with gradient to `values` alone.

    Args:
        values: f of the trained network at the later of two neighbouring times.
        target: f of the moving average at the earlier one, where one step of the teacher leads; detached here.
        distance: `l2` is the mean of squared differences over an example's entries, `l1` that of absolute ones.

    Source: Song et al. 2023, Eq. 7, with λ = 1.
    """
    if distance == "l2":
        return squared_error(values, target)
    if distance != "l1":
        raise InputError(f"Unknown distance {distance!r}. Known: l1, l2.")
    if values.shape != target.shape:
        raise InputError(f"Student {tuple(values.shape)} and target {tuple(target.shape)} differ in shape.")
    return (full(values) - full(target.detach())).abs().flatten(1).mean(1)
