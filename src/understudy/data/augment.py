"""Random crops and flips that depend on (seed, epoch, example id) alone, so they are the same in any batch, order or
resumed run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.data.noise import mix_bits, shift


def augment(pixels: Tensor, ids: Tensor, *, seed: int, epoch: int, crop: int = 4, flip: bool = True) -> Tensor:
    """Shift each image by up to `crop` pixels (zero padded) and mirror half of them.

    Args:
        pixels: `[images, channels, height, width]`.
        ids: `[images]`, stable ids that select the randomness.
    """
    number, _, height, width = pixels.shape
    bits = mix_bits(mix_bits(ids.long() * 0x9E3779B97F4A7C1 + epoch) + seed)
    span = 2 * crop + 1
    down, across = shift(bits, 8) % span, shift(bits, 24) % span
    rows = down[:, None] + torch.arange(height, device=pixels.device)
    columns = across[:, None] + torch.arange(width, device=pixels.device)
    if flip:
        mirrored = (shift(bits, 40) & 1).bool()
        columns = torch.where(mirrored[:, None], columns.flip(-1), columns)
    padded = F.pad(pixels, (crop,) * 4).permute(0, 2, 3, 1)
    picked = padded[torch.arange(number, device=pixels.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()
