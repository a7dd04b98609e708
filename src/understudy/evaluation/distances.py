"""Distances between sets of samples, and the number of modes they cover."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from understudy.errors import InputError


def frechet_distance(ours: Tensor, theirs: Tensor) -> float:
    """‖μ − μ'‖² + tr(C + C' − 2 (C C')^½) of two sets of features `[samples, width]`. Biased upwards for few samples."""
    check(ours, theirs)
    means, roots, traces = [], [], []
    for features in (ours.double(), theirs.double()):
        mean = features.mean(0)
        covariance = (features - mean).T @ (features - mean) / (len(features) - 1)
        values, vectors = torch.linalg.eigh(covariance)
        means.append(mean)
        traces.append(float(values.clamp(min=0).sum()))
        roots.append(vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T)
    # tr (C C')^½ is the sum of the singular values of C^½ C'^½.
    cross = float(torch.linalg.svdvals(roots[0] @ roots[1]).sum())
    return max(0.0, float((means[0] - means[1]).square().sum()) + sum(traces) - 2 * cross)


def energy_distance(ours: Tensor, theirs: Tensor) -> float:
    """2 E‖X − Y‖ − E‖X − X'‖ − E‖Y − Y'‖ of `[samples, ...]`, an unbiased estimate, which may be slightly below 0."""
    check(ours, theirs)
    x, y = ours.double().flatten(1), theirs.double().flatten(1)
    return 2 * _mean(x, y, len(x) * len(y)) - sum(_mean(v, v, len(v) * (len(v) - 1)) for v in (x, y))


def _mean(a: Tensor, b: Tensor, pairs: int, tile: int = 512) -> float:
    total = sum(
        float(torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist").sum()) for part in a.split(tile)
    )
    return total / pairs


def check(ours: Tensor, theirs: Tensor) -> None:
    """Raise an error for sets that are too small or differ in shape, and for samples that are not finite."""
    if ours.shape[1:] != theirs.shape[1:]:
        raise InputError(f"Samples of shape {tuple(ours.shape[1:])} are compared with {tuple(theirs.shape[1:])}.")
    if min(len(ours), len(theirs)) < 2:
        raise InputError(f"A distance needs two samples a side, not {len(ours)} and {len(theirs)}.")
    if not bool(ours.isfinite().all()):
        raise InputError(
            "The model draws samples that are not finite: it has diverged, or is read by a wrong schedule."
        )


def coverage(modes: Tensor, expected: Tensor) -> float:
    """Fraction of the modes that are sampled at least a quarter as often as expected.

    Args:
        modes: `[samples]`, the mode of each sample; negative for none.
        expected: `[modes]`, expected fractions.
    """
    found = torch.bincount(modes[modes >= 0], minlength=len(expected)).double() / max(1, len(modes))
    present = expected > 0
    return float((found[present] >= expected[present] / 4).double().mean())


class Shift(NamedTuple):
    """How far hidden states moved.

    Args:
        distance: Euclidean, between the mean projections. explained: variance along each component, `[dimensions]`.
    """

    distance: float
    explained: Tensor


def pca_shift(before: Tensor, after: Tensor, dimensions: int = 2) -> Shift:
    """The distance between the means of two sets of hidden states, projected on the principal components of the first.

    Args:
        before, after: hidden states of the same inputs, `[inputs, width]`. dimensions: number of components.

    0 without a change; signs of components and rotations of the hidden space change nothing.

    Raises:
        InputError: other shapes, or more components than inputs or width give.

    Source: DED (2025), analysis of forgetting; the variance has n − 1 in the denominator.
    """
    if (
        before.shape != after.shape
        or before.dim() != 2
        or not 1 <= dimensions <= min(before.shape[0] - 1, before.shape[1])
    ):
        raise InputError(
            f"Hidden states {tuple(before.shape)} before and {tuple(after.shape)} after have no {dimensions} principal "
            "components: give the same inputs to both, more of them than components."
        )
    x, y = before.double(), after.double()
    _, values, components = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    moved = components[:dimensions] @ (y.mean(0) - x.mean(0))
    return Shift(float(moved.norm()), values[:dimensions].square() / (len(x) - 1))


def detail_ratio(ours: Tensor, theirs: Tensor) -> float:
    """Mean squared Laplacian of images `[samples, channels, height, width]` over that of others: below 1 they are
    blurred, above 1 noisy."""

    def detail(images: Tensor) -> Tensor:
        inner = images.double()[..., 1:-1, 1:-1]
        around = [images.double().roll(by, axis)[..., 1:-1, 1:-1] for axis in (-2, -1) for by in (-1, 1)]
        return (torch.stack(around).sum(0) - 4 * inner).square().mean()

    return float(detail(ours) / detail(theirs).clamp(min=1e-12))
