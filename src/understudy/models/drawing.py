"""Samples of a saved generator, and completed scans, for users of a student."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from understudy.data.noise import normal
from understudy.data.noise_sets import NoiseBatch
from understudy.errors import InputError
from understudy.models.denoisers import load_denoiser
from understudy.models.diffusion import DenoiserAdapter
from understudy.models.masked_generator import MaskedGeneratorAdapter
from understudy.models.modes import evaluating

TOGETHER = 64
"""Samples that are drawn side by side."""


@torch.no_grad()
def draw_samples(
    model: str | Path | DenoiserAdapter | MaskedGeneratorAdapter,
    number: int = 16,
    *,
    classes: Sequence[int] | None = None,
    scans: Tensor | None = None,
    steps: int | None = None,
    first: int = 0,
) -> Tensor:
    """Draw samples of a generator as a run saved it, with the sampler that is saved beside it.

    Args:
        model: folder of the student, a Hub id, or an adapter.
        number: of samples; with classes or scans there is one for each of these.
        classes: the class of each sample, for a model that is told one.
        scans: sparse scans `[scenes, points, dimensions]` in metres, for a model that completes scenes.
        steps: calls of the network for a sample; those of the saved sampler if not given.
        first: the noise of sample i is a function of first + i, so another `first` gives other samples.

    Returns:
        Images `[number, channels, height, width]` in [−1, 1], points `[number, dimensions]`, or clouds
        `[scenes, points, dimensions]`.

    Raises:
        InputError: the model cannot be loaded, or is not told what it needs.
    """
    if classes is not None and scans is not None:
        raise InputError("Give classes or scans: a model that completes scenes is told no class.")
    told = classes if classes is not None else scans
    number = number if told is None else len(told)
    if number < 1:
        raise InputError(f"{number} samples were asked for, and at least one is needed.")
    rows = load_denoiser(model)
    home = next(rows.parameters()).device
    condition = torch.tensor(classes) if classes is not None else torch.full((number,), -1 if scans is None else 0)
    parts = []
    with evaluating(rows):
        for chosen in torch.arange(number).split(TOGETHER):
            asked = condition[chosen]
            inputs = {} if scans is None else {"scan": scans[chosen].float()}
            batch = NoiseBatch(inputs, asked, chosen + first, condition=asked).to(home)
            eps = normal(batch.ids, rows.shape, seed=0, step=0).float()
            parts.append(rows.draw(batch, eps, steps).cpu().float())
    return torch.cat(parts)
