"""Inputs and samples as pictures, for reports: arrays `[height, width, 3]` of uint8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

INK, FIELD = (11, 103, 163), (251, 250, 247)
SIDE = 64
"""Smallest number of pixels for the longer side of an input."""


def picture_grid(rows: Sequence[Tensor]) -> Pixels:
    """A picture `[height, width, 3]`, uint8, with one row of cells for each batch.

    Args:
        rows: batches `[examples, channels, height, width]` of one shape: images in [0, 1] with one or three channels,
            or signals (height 1), whose first channel is drawn as a line on one scale for all.
    """
    every = torch.stack([r.detach().float().cpu() for r in rows])
    every = torch.nan_to_num(every, nan=0.0, posinf=0.0, neginf=0.0)
    if every.shape[-2] == 1:
        low, high = float(every.min()), float(every.max())
        places = (every[:, :, 0, 0] - low) / max(high - low, 1e-12)
        cells = [[_signal(places[i, j].numpy()) for j in range(every.shape[1])] for i in range(len(rows))]
    else:
        zoom = max(1, SIDE // max(every.shape[-2:]))
        cells = [[_image(every[i, j], zoom) for j in range(every.shape[1])] for i in range(len(rows))]
    return np.concatenate([np.concatenate(row, 1) for row in cells], 0)


def _framed(cell: Pixels) -> Pixels:
    return np.pad(cell, ((2, 2), (2, 2), (0, 0)), constant_values=255)


def _image(pixels: Tensor, zoom: int) -> Pixels:
    colours = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    values = (colours.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return _framed(values.repeat(zoom, 0).repeat(zoom, 1))


def _signal(places: np.ndarray[Any, Any], height: int = SIDE) -> Pixels:
    """A line through heights in [0, 1], from left to right."""
    wide = 3 * (len(places) - 1) + 1
    heights = np.interp(np.arange(wide) / 3, np.arange(len(places)), places)
    level = np.round((1 - heights) * (height - 1)).astype(int)
    cell = np.full((height, wide, 3), 240, dtype=np.uint8)
    for x, (a, b) in enumerate(zip(level, np.append(level[1:], level[-1]), strict=True)):
        cell[min(a, b) : max(a, b) + 1, x] = (0, 60, 120)
    return _framed(cell)


def image_grid(images: Tensor, across: int = 12) -> Pixels:
    """Samples `[images, channels, height, width]` in [−1, 1] side by side, in rows of `across`."""
    shown = images[: max(1, len(images) // across) * across]
    return picture_grid([(row + 1) / 2 for row in shown.split(across)])


def scatter(points: Tensor, bound: float, side: int = 240) -> Pixels:
    """Points `[samples, 2]` as dots, within ±`bound` on both axes."""
    cell = ((points.double().cpu().nan_to_num() / bound + 1) / 2 * side).long()
    inside = cell[((cell >= 0) & (cell < side)).all(1)].numpy()
    pixels = np.full((side, side, 3), FIELD, dtype=np.uint8)
    pixels[side - 1 - inside[:, 1], inside[:, 0]] = INK
    return pixels.repeat(2, 0).repeat(2, 1)


def clouds(rows: Sequence[Tensor], bound: float, side: int = 160) -> Pixels:
    """Clouds `[points, 2 or 3]` side by side, each within ±`bound` of the origin, seen from above. In space the colour says
    the height, from low (dark) to high (bright), on one scale for all but the highest and lowest points."""
    found = [r.detach().double().cpu().nan_to_num() for r in rows]
    heights = torch.cat([c[:, 2] for c in found if c.shape[1] == 3] or [torch.zeros(1)])
    low, high = np.quantile(heights.numpy(), (0.02, 0.98))
    ink, bright = (np.array(v, dtype=float) for v in (INK, (245, 158, 11)))
    cells = []
    for cloud in found:
        cell = ((cloud[:, :2] / bound + 1) / 2 * side).long()
        inside = ((cell >= 0) & (cell < side)).all(1)
        level = (
            ((cloud[:, 2] - low) / max(high - low, 1e-12)).clamp(0, 1)
            if cloud.shape[1] == 3
            else torch.zeros(len(cloud))
        )
        place, share = cell[inside].numpy(), level[inside].numpy()[:, None]
        pixels = np.full((side, side, 3), FIELD, dtype=np.uint8)
        pixels[side - 1 - place[:, 1], place[:, 0]] = (ink + share * (bright - ink)).round().astype(np.uint8)
        cells.append(_framed(pixels.repeat(2, 0).repeat(2, 1)))
    return np.concatenate(cells, 1)
