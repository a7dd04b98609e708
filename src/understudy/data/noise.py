"""Random numbers by example: they depend on (seed, step, example id) alone, so they are the same in any batch, order or
resumed run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor


def mix_bits(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, with wrap-around: a well-spread hash of each entry."""
    x = (x ^ shift(x, 30)) * -4658895280553007687
    x = (x ^ shift(x, 27)) * -7723592293110705685
    return x ^ shift(x, 31)


def shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def uniform(ids: Tensor, shape: Sequence[int], *, seed: int, step: int | Tensor, stream: int = 0) -> Tensor:
    """Uniform numbers `[ids, *shape]` in (0, 1), float64. Different `stream`s are independent for the same ids and
    step; `step` is one for all, or `[ids]`."""
    number = math.prod(shape)
    start = mix_bits(mix_bits(mix_bits(ids.long() * 0x9E3779B97F4A7C1 + step) + seed) + stream)
    index = torch.arange(1, number + 1, device=ids.device) * 0x9E3779B97F4A7C1
    bits = shift(mix_bits(start[:, None] + index), 11)  # 53 bits
    return ((bits.double() + 0.5) / 2**53).view(len(ids), *shape)


def normal(ids: Tensor, shape: Sequence[int], *, seed: int, step: int | Tensor, stream: int = 0) -> Tensor:
    """Standard normals `[ids, *shape]`, float64, by inversion."""
    return torch.special.ndtri(uniform(ids, shape, seed=seed, step=step, stream=stream))


def laplace(ids: Tensor, shape: Sequence[int], *, seed: int, step: int | Tensor, stream: int = 0) -> Tensor:
    """Laplace draws of scale 1 `[ids, *shape]`, float64, by inversion."""
    drawn = uniform(ids, shape, seed=seed, step=step, stream=stream) - 0.5
    return -drawn.sign() * torch.log1p(-2 * drawn.abs())


def beta(ids: Tensor, alpha: float, *, seed: int, step: int | Tensor, stream: int = 0) -> Tensor:
    """Draws `[ids]` of the symmetric Beta(α, α), float64, by inversion."""
    drawn = uniform(ids, (), seed=seed, step=step, stream=stream)
    return torch.from_numpy(np.asarray(betaincinv(alpha, alpha, drawn.cpu().numpy()))).to(drawn.device)
