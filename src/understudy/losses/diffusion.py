"""Diffusion: predictions, deterministic steps, and the bootstrapping loss of BOOT.

A noisy example is x_t = α_t x_0 + σ_t ε with α² + σ² = 1, and λ_t = log(σ_t / α_t) rises with t. Examples are
`[rows, ...]` of any shape; α, σ, t and weights are `[rows]`. Losses give one value a row: the mean over the example's
own entries, never over rows.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from understudy.errors import InputError, nearest
from understudy.losses._pairs import full

PREDICTIONS = ("epsilon", "sample", "v_prediction")
"""Prediction types of a denoiser, by the names of diffusers."""

Weight = Literal["uniform", "inv_delta", "inv_coef"]


def over(rows: Tensor, values: Tensor) -> Tensor:
    """Reshape `rows` `[rows]` to broadcast with `values`, in the dtype of `values`."""
    return rows.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1))


def noised(clean: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x = α · clean + σ · ε."""
    return over(alpha, clean) * clean + over(sigma, clean) * eps


def signal_of(x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """y = (x − σ ε) / α: the state without the initial noise of its trajectory. Source: Gu et al. 2023 (BOOT), signal
    variable."""
    return (x - over(sigma, x) * eps) / over(alpha, x)


def x0_from(output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """The clean example x_0 that corresponds to a network's output.

    Args:
        output: of the network.
        x: its input, the noisy example.
        alpha, sigma: `[rows]`.
        prediction: the kind of output, one of `PREDICTIONS`.

    Raises:
        InputError: unknown prediction type; or `epsilon` where α = 0, since x_0 cannot be computed from pure noise.
    """
    check_prediction(prediction)
    if prediction == "sample":
        return output
    if prediction == "v_prediction":
        return over(alpha, x) * x - over(sigma, x) * output
    if bool((alpha == 0).any()):
        raise InputError(
            "x0_from: a network that predicts epsilon cannot be read where alpha = 0 (a schedule that ends in pure "
            "noise): lower options.t_max, or use a teacher with v_prediction or sample."
        )
    return (x - over(sigma, x) * output) / over(alpha, x)


def epsilon_from(clean: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """ε = (x − α x_0) / σ: the noise in a noisy example, given its clean part. The inverse of `x0_from` for `epsilon`.

    Args:
        clean: x_0. x: the noisy example. alpha, sigma: `[rows]`, σ above 0.
    """
    return (x - over(alpha, x) * clean) / over(sigma, x)


def check_prediction(prediction: str) -> None:
    """Raise an error for an unknown prediction type."""
    if prediction not in PREDICTIONS:
        raise InputError(
            f"Unknown prediction type {prediction!r}.{nearest(prediction, PREDICTIONS)} Known: {', '.join(PREDICTIONS)}."
        )


def denoising_loss(clean: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """Mean squared error in the network's own output type, computed from its x_0: `[rows]`.

    An error e in x_0 is α/σ · e in ε and e/σ in v.
    """
    check_prediction(prediction)
    scale = {"sample": torch.ones_like(sigma), "epsilon": alpha / sigma, "v_prediction": 1 / sigma}[prediction]
    error = squared_error(clean, x0)
    return scale.square().to(error.dtype) * error


def ddim_coefficient(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    """c = 1 − exp(λ_s − λ_t) in (0, 1]: the relative step towards the teacher's x_0 of an exact DDIM step from t to s <
    t, `[rows]`.

    1 where α_t = 0 (pure noise) or σ_s = 0 (no noise left); → 0 as s → t. Source: BOOT, the signal ODE solved for a
    constant f.

    Raises:
        InputError: s ≥ t in some row.
    """
    edge = (alpha_t == 0) | (sigma_s == 0)
    safe = [v.double().masked_fill(edge, 1.0) for v in (alpha_t, sigma_t, alpha_s, sigma_s)]
    gap = (safe[3].log() - safe[2].log()) - (safe[1].log() - safe[0].log())
    if not bool(((alpha_s > alpha_t) | (sigma_s < sigma_t)).all()):
        raise InputError("A DDIM step goes from t to an earlier s < t, and some row has s >= t: check delta.")
    return torch.where(edge, 1.0, -torch.expm1(gap)).to(alpha_t.dtype)


def ddim_step(x: Tensor, clean: Tensor, alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    """One deterministic step from x at t to s: (σ_s / σ_t) x + (α_s − α_t σ_s / σ_t) · clean."""
    ratio = sigma_s / sigma_t
    return over(ratio, x) * x + over(alpha_s - alpha_t * ratio, x) * clean


def guided(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """f_u + w (f_c − f_u): classifier-free guidance; w = 1 is the conditional model, w = 0 the unconditional one."""
    return unconditional + weight * (conditional - unconditional)


def bootstrap_target(signal: Tensor, clean: Tensor, coefficient: Tensor) -> Tensor:
    """y + c (f − y), detached: the signal after one teacher step. Source: BOOT, bootstrapping loss.

    Args:
        signal: the student's own at t.
        clean: the teacher's x_0 at the student's state (with Heun, the mean of both ends).
        coefficient: from `ddim_coefficient`.
    """
    y, f = signal.detach(), clean.detach()
    return y + over(coefficient, y) * (f - y)


def bootstrap_weight(kind: Weight, delta: Tensor, coefficient: Tensor) -> Tensor:
    """1, 1/δ² or 1/c²: `[rows]`. δ is t − s."""
    if kind == "uniform":
        return torch.ones_like(coefficient)
    if kind == "inv_delta":
        return 1 / delta.square()
    if kind == "inv_coef":
        return 1 / coefficient.square()
    raise InputError(f"Unknown weight {kind!r}. Known: uniform, inv_delta, inv_coef.")


def bootstrapping(signal: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """w · mean (g(ε, s) − target)²: `[rows]`. The gradient goes to `signal` alone."""
    error = squared_error(signal, target)
    return weight.to(error.dtype) * error


def boundary(signal: Tensor, clean: Tensor) -> Tensor:
    """mean (g(ε, t_max) − f(ε, t_max))²: `[rows]`, with gradient to `signal` alone. Source: BOOT."""
    return squared_error(signal, clean)


def squared_error(values: Tensor, target: Tensor) -> Tensor:
    """Mean over an example's entries of (values − target)²: `[rows]`, in float32 at least, the target detached."""
    if values.shape != target.shape:
        raise InputError(f"Student {tuple(values.shape)} and target {tuple(target.shape)} differ in shape.")
    return (full(values) - full(target.detach())).square().flatten(1).mean(1)
