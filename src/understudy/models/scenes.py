"""Denoisers of point clouds that are told a sparse scan: local noise, a small network, and its adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from understudy.data.noise_sets import NoiseBatch
from understudy.errors import InputError
from understudy.models.diffusion import DenoiserAdapter, Sampler
from understudy.models.noise_levels import Table

NEIGHBOURS = 4
"""Nearest points of the scan that a point is told."""
BANDS = 4
"""Fourier features of a coordinate, of wavelengths from 40 m down."""


class LocalNoise(Table):
    """Noise that is added to each point while the signal keeps its scale: α = 1, σ = √(1 − ᾱ).

    ᾱ is that of `steps` linear betas from `first` to `last`; with the defaults σ ends at 0.985 m. The network's time input is t.

    Source: LiDiff (2024); Distillation-DPO (2025, arXiv 2504.11447).
    """

    def __init__(self, first: float = 3.5e-5, last: float = 7e-3, steps: int = 1000) -> None:
        betas = torch.linspace(first, last, steps, dtype=torch.float64)
        super().__init__((1 - betas).cumprod(0))

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        _, sigma = super().at(t)
        return torch.ones_like(sigma), sigma

    def clock(self, t: Tensor) -> Tensor:
        return self.snap(t)


class ScenePoints(nn.Module):
    """Predicts the noise of every point from its place, the nearest points of the scan, a code of the scan, and the time.

    Args:
        dimensions: of a point.
        hidden: widths of the layers a point passes; the first is also that of the code.
    """

    def __init__(self, dimensions: int, hidden: Sequence[int]) -> None:
        super().__init__()
        width = hidden[0]
        self.code = nn.Sequential(nn.Linear(dimensions, width), nn.SiLU(), nn.Linear(width, width))
        widths = (dimensions * (1 + 2 * BANDS + NEIGHBOURS) + width + 10, *hidden)
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Linear(widths[-1], dimensions))

    def forward(self, x: Tensor, t: Tensor, scan: Tensor) -> Tensor:
        """The noise `[clouds, points, dimensions]`.

        Args:
            x: noisy points, `[clouds, points, dimensions]`, in metres.
            t: `[clouds]`, in [0, 1].
            scan: `[clouds, points of a scan, dimensions]`, all 0 if it is not shown.
        """
        near = torch.cdist(x.detach(), scan).topk(min(NEIGHBOURS, scan.shape[1]), largest=False).indices
        rows = torch.arange(len(x), device=x.device)[:, None, None]
        offsets = (scan[rows, near] - x[:, :, None]).flatten(2)
        offsets = nn.functional.pad(offsets, (0, x.shape[-1] * NEIGHBOURS - offsets.shape[-1]))
        waves = (x[..., None] * (math.pi / 20) * 2.0 ** torch.arange(BANDS, device=x.device)).flatten(2)
        angle = (t[:, None] * (math.pi / 2) * 2.0 ** torch.arange(5, device=x.device)).to(x.dtype)
        whole = torch.cat([self.code(scan / 10).amax(1), angle.sin(), angle.cos()], 1)
        parts = [x / 10, waves.sin(), waves.cos(), offsets, whole[:, None].expand(-1, x.shape[1], -1)]
        return self.body(torch.cat(parts, -1))


class SceneDenoiser(DenoiserAdapter):
    """A denoiser of clouds `[points, dimensions]` on batches with a `scan`, called as `(x, time, scan)`.

    A cloud begins as the scan, its points repeated, plus noise. Where the condition of a row is below 0, as for guidance,
    the scan is a cloud of zeros.
    """

    def condition_of(self, batch: NoiseBatch) -> Tensor:
        """The scan of each row."""
        scan = self._scan(batch)
        return scan.masked_fill((batch.condition < 0)[:, None, None], 0.0)

    def initial(self, batch: NoiseBatch, eps: Tensor) -> Tensor:
        """The scan's points in turn, as many as the cloud has, plus the noise."""
        scan = self._scan(batch).to(eps)
        return scan.repeat(1, -(-self.shape[0] // scan.shape[1]), 1)[:, : self.shape[0]] + eps

    def _scan(self, batch: NoiseBatch) -> Tensor:
        if "scan" not in batch.inputs:
            raise InputError("This denoiser completes scans, and the batch has none: use task=scene_completion.")
        dtype = next(self.model.parameters()).dtype
        return batch.inputs["scan"].to(dtype)


def scene_denoiser(name: str, shape: tuple[int, ...], classes: int = 0) -> SceneDenoiser:
    """A new `pointnet:64,64` for clouds of `shape` (points, dimensions).

    Raises:
        InputError: the examples are no clouds of points of the plane or of space.
    """
    if len(shape) != 2 or shape[1] not in (2, 3):
        raise InputError(f"{name} makes clouds [points, 2 or 3], and the examples have shape {shape}.")
    model = ScenePoints(shape[1], [int(v) for v in name.partition(":")[2].split(",")])
    model.understudy = {"understudy_model": name, "classes": classes, "shape": list(shape)}  # type: ignore[assignment]
    return SceneDenoiser(model, LocalNoise(), "epsilon", shape, sampler=Sampler(steps=50, t_min=0.0, t_max=1.0))
