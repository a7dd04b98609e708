"""Random crops and flips that depend on (seed, epoch, example id) alone, so they are the same in any batch, order or
resumed run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.data.noise import mix_bits, shift
from understudy.errors import InputError


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


def mix_statistics(pixels: Tensor, share: Tensor, order: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """Give each image a mixture of its own mean and deviation in every channel and those of another image.

    With m and s = √(variance + ε) of a channel: (x − m) / s · (λ s + (1 − λ) s_π) + λ m + (1 − λ) m_π. A constant
    channel stays constant.

    Args:
        pixels: `[images, channels, height, width]`, of two positions at least.
        share: λ `[images]`, in [0, 1]; 1 keeps the image as it is. order: π `[images]`, the other image of each.
        epsilon: ε, added to the unbiased variance.

    Raises:
        InputError: the images have one position, whose variance is undefined.

    Source: Zhou et al. 2021 (MixStyle) on the inputs, as Tang et al. 2023 (KD³, MixDistribution) released it.
    """
    if pixels.shape[2:].numel() < 2:
        raise InputError(
            f"Images of {pixels.shape[2]} × {pixels.shape[3]} have one position and no variance to mix: give larger ones."
        )
    kept = share.to(pixels)[:, None, None, None]
    mean = pixels.mean((2, 3), keepdim=True).detach()
    deviation = (pixels.var((2, 3), keepdim=True) + epsilon).sqrt().detach()
    mixed_mean, mixed_deviation = (kept * v + (1 - kept) * v[order] for v in (mean, deviation))
    return (pixels - mean) / deviation * mixed_deviation + mixed_mean
