"""Eight Gaussian modes on a circle: points whose denoiser is known in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from understudy.data.noise_sets import Source

MODES, RADIUS, DEVIATION = 8, 1.3, 0.12


def ring8() -> Source:
    """The ring for `load_source`."""
    return Source(ring_examples, (2,), MODES, ring_centres(), "ring8", DEVIATION)


def ring_centres() -> Tensor:
    """`[8, 2]`, on a circle."""
    angle = torch.arange(MODES, dtype=torch.float64) * 2 * math.pi / MODES
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1)


def ring_examples(split: str, number: int = 4000) -> tuple[Tensor, Tensor]:
    """Draws from the ring with the mode each comes from; a split's draws are always the same."""
    seed = {"train": 1, "validation": 2, "test": 3}[split]
    generator = torch.Generator().manual_seed(seed)
    mode = torch.randint(0, MODES, (number,), generator=generator)
    noise = torch.randn(number, 2, generator=generator, dtype=torch.float64)
    return (ring_centres()[mode] + DEVIATION * noise).float(), mode
