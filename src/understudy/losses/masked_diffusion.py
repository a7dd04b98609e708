"""Masked autoregressive diffusion: which tokens are masked, the error of a masked token, and that of an image.

An image is L tokens of C channels. Some of them are masked, and a diffusion head learns each masked token by itself:
x_t = √ᾱ_t x + √(1 − ᾱ_t) n, with t in 0 … T − 1. The head answers 2 C channels: its prediction of n, and a value v that
interpolates log-variances. `alphas_cumprod` is ᾱ, `[T]`, float64. Tokens have any leading axes; errors are one value a
token, the mean over its channels. The preference loss of images is `losses.preference.dpo` on negative errors of images.

Source: LightGen (Wu et al. 2025), its `diffusion/gaussian_diffusion.py` (learned-range variance of Nichol and Dhariwal
2021) and its Eq. 7.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import full


def cosine_alphas(steps: int) -> Tensor:
    """ᾱ of the schedule `squaredcos_cap_v2`, `[steps]`, float64: β_t = 1 − f((t + 1)/T) / f(t/T), at most 0.999, with
    f(u) = cos²((u + 0.008) / 1.008 · π/2)."""
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = ((u + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - (1 - f[1:] / f[:-1]).clamp(max=0.999)).cumprod(0)


def mask_ratio(u: Tensor, *, least: float = 0.7, deviation: float = 0.25) -> Tensor:
    """Fraction of tokens to mask: a normal with mean 1 truncated to [least, 1], by inversion of `u` in [0, 1]."""
    low = torch.special.ndtr(u.new_tensor((least - 1) / deviation))
    return (1 + deviation * torch.special.ndtri(low + u * (0.5 - low))).clamp(least, 1.0)


def masked_number(ratio: Tensor, length: int) -> Tensor:
    """⌈L · ratio⌉: the number of masked tokens of an image, int64, at least 1."""
    return (length * ratio).ceil().long().clamp(1, length)


def masked_after(length: int, iterations: int) -> list[int]:
    """Number of tokens that are still masked after each iteration of sampling: ⌊L cos(π/2 · (i + 1)/I)⌋, at least 1 and
    less than before, and 0 after the last.

    Raises:
        InputError: more iterations than tokens, so that some iteration would sample none.
    """
    if not 1 <= iterations <= length:
        raise InputError(
            f"Sampling an image of {length} tokens in {iterations} iterations: each must sample at least one token. Use 1 "
            f"to {length}."
        )
    found, now = [], length
    for i in range(iterations - 1):
        now = max(1, min(now - 1, math.floor(length * math.cos(math.pi / 2 * (i + 1) / iterations))))
        found.append(now)
    return [*found, 0]


def linear_guidance(weight: float, masked: int, length: int) -> float:
    """1 + (w − 1) (L − masked) / L: guidance that grows as tokens are known; `masked` counts those after the iteration."""
    return 1 + (weight - 1) * (length - masked) / length


def noise_error(predicted: Tensor, noise: Tensor) -> Tensor:
    """mean_C (n − ε_θ)²: `[...]` of tokens `[..., C]`, in float32 at least."""
    if predicted.shape != noise.shape:
        raise InputError(f"Predicted noise {tuple(predicted.shape)} and noise {tuple(noise.shape)} differ in shape.")
    return (full(noise) - full(predicted)).square().mean(-1)


def variance_error(
    predicted: Tensor, value: Tensor, x: Tensor, x_t: Tensor, t: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """The variational term of the learned variance, in bits per channel: `[...]`, with gradient to `value` alone.

    For t > 0 it is the KL divergence of the true posterior of x_{t−1} from N(μ_θ, σ²_θ); at t = 0 it is −log of what the
    latter gives an interval of width 2/255 around x. σ² is that of `learned_log_variance`.

    Args:
        predicted: of the noise, `[..., C]`; detached here, so that the term does not train it.
        value: v, `[..., C]`.
        x, x_t: the clean token and the noisy one.
        t: `[...]`, int64.
    """
    predicted, value, x, x_t = full(predicted.detach()), full(value), full(x), full(x_t)
    of_clean, of_noisy = (v.to(value.dtype)[..., None] for v in posterior_terms(t, alphas_cumprod))
    level = _levels(t, alphas_cumprod)[0].to(value.dtype)[..., None]
    clean = (x_t - (1 - level).sqrt() * predicted) / level.sqrt()
    away = of_clean * (x - clean)  # the two means have the same part in x_t
    low, _ = (v.to(value.dtype)[..., None] for v in _log_variances(t, alphas_cumprod))
    log_variance = learned_log_variance(value, t, alphas_cumprod)
    kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + away.square() * (-log_variance).exp())
    first = -_interval(x, of_clean * clean + of_noisy * x_t, 0.5 * log_variance)
    return torch.where(t[..., None] == 0, first, kl).mean(-1) / math.log(2)


def learned_log_variance(value: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """log σ² = (v + 1)/2 · log β_t + (1 − v)/2 · log β̃_t: `[..., C]`, of v `[..., C]` and `t` `[...]`."""
    low, high = (v.to(value)[..., None] for v in _log_variances(t, alphas_cumprod))
    return (value + 1) / 2 * high + (1 - value) / 2 * low


def posterior_terms(t: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of x_0 and of x_t in the mean of x_{t−1}, float64, of `t` of any shape."""
    now, before, beta = _levels(t, alphas_cumprod)
    return before.sqrt() * beta / (1 - now), (1 - before) * (1 - beta).sqrt() / (1 - now)


def _levels(t: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ᾱ_t, ᾱ_{t−1} (1 before the first) and β_t."""
    table = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod]).to(t.device)
    now, before = table[t + 1], table[t]
    return now, before, 1 - now / before


def _log_variances(t: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """log β̃_t, which at t = 0 is that of t = 1, since its own is not finite, and log β_t."""
    now, before, beta = _levels(t.clamp(min=1), alphas_cumprod)
    return (beta * (1 - before) / (1 - now)).log(), _levels(t, alphas_cumprod)[2].log()


def _interval(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """log of a Gaussian's probability of x ± 1/255, open beyond ±0.999, with the tanh approximation of its CDF."""
    scale = (-log_deviation).exp()
    above, below = _cdf(scale * (x - mean + 1 / 255)), _cdf(scale * (x - mean - 1 / 255))
    inside = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return inside.clamp(min=1e-12).log()


def _cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def image_sums(errors: Tensor, mask: Tensor) -> Tensor:
    """Sum of the errors of an image's masked tokens: `[images]`. Its count is that of masked tokens.

    Args:
        errors, mask: `[images, L]`; an axis of repeated draws between the two is averaged: `[images, draws, L]`.
    """
    each = errors.mean(1) if errors.dim() == 3 else errors
    return (each * mask.to(each.dtype)).sum(1)


def image_errors(errors: Tensor, mask: Tensor) -> Tensor:
    """E of an image, the mean error of its masked tokens: `[images]`. −E stands for a log-probability in DPO (Eq. 7).

    Raises:
        InputError: an image without a masked token, or one whose error is not finite.
    """
    masked = mask.sum(1)
    if bool((masked == 0).any()):
        row = int((masked == 0).nonzero()[0])
        raise InputError(f"Image {row} has no masked token, and its error is not defined: mask at least one.")
    found = image_sums(errors, mask) / masked
    if not bool(found.isfinite().all()):
        row = int((~found.isfinite()).nonzero()[0])
        raise InputError(
            f"The error of image {row} is {float(found[row])} and must be finite: lower the learning rate, or look at that "
            "image."
        )
    return found
