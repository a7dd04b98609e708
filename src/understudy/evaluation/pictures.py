"""Samples as pictures: arrays `[height, width, 3]` of uint8."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

INK, FIELD = (11, 103, 163), (251, 250, 247)


def image_grid(images: Tensor, across: int = 12, scale: int | None = None) -> Any:
    """`[images, channels, height, width]` in [−1, 1] side by side."""
    images = images.float().cpu().nan_to_num().clamp(-1, 1)
    scale = scale or max(1, 32 // images.shape[-1])
    rows = [images[i : i + across] for i in range(0, len(images), across) if i + across <= len(images) or i == 0]
    padded = [torch.nn.functional.pad(r, (1, 1, 1, 1), value=1.0) for r in rows]
    sheet = torch.cat([torch.cat(list(r), -1) for r in padded], -2)
    sheet = sheet[:3] if len(sheet) >= 3 else sheet[:1].expand(3, -1, -1)
    pixels = ((sheet + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return np.ascontiguousarray(pixels.repeat(scale, 0).repeat(scale, 1))


def scatter(points: Tensor, bound: float, side: int = 240) -> Any:
    """Points `[samples, 2]` as dots, within ±`bound` on both axes."""
    cell = ((points.double().cpu().nan_to_num() / bound + 1) / 2 * side).long()
    inside = cell[((cell >= 0) & (cell < side)).all(1)].numpy()
    pixels = np.full((side, side, 3), FIELD, dtype=np.uint8)
    pixels[side - 1 - inside[:, 1], inside[:, 0]] = INK
    return pixels.repeat(2, 0).repeat(2, 1)
