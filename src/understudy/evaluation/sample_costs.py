"""Costs of single samples, the lower the better, by which candidates are ranked. None of them has a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.evaluation.clouds import chamfer_distance, earth_mover_distance, voxel_iou, voxel_jsd

CloudMetric = Literal["chamfer", "jsd", "iou", "emd"]


def metric_for(asked: Literal["nearest"] | CloudMetric | None, paired: bool) -> Literal["nearest"] | CloudMetric:
    """The metric that ranks samples.

    Args:
        asked: a metric, or `None` for the default: chamfer where every sample has a truth of its own, else nearest.
        paired: whether it has.

    Raises:
        InputError: these data cannot be ranked by it.
    """
    metric = asked or ("chamfer" if paired else "nearest")
    if (metric == "nearest") == paired:
        known = "chamfer, jsd, iou and emd" if paired else "nearest"
        raise InputError(f"options.metric is {metric!r}, and samples of these data are ranked by {known}.")
    return metric


@torch.no_grad()
def cloud_costs(metric: CloudMetric, samples: Tensor, truth: Tensor, *, voxel: float) -> Tensor:
    """The distance of each sampled cloud from its true one: `[rows]`, float64.

    Args:
        metric: of `understudy.evaluation.clouds`; of `iou` 1 − IoU. The range of `jsd` is that of the row's truth.
        samples: `[rows, points, dimensions]`.
        truth: `[rows, points, dimensions]`, points in any number.
        voxel: side of a voxel of `jsd` and `iou`.
    """
    measure: dict[str, Callable[[Tensor, Tensor], float]] = {
        "chamfer": chamfer_distance,
        "emd": earth_mover_distance,
        "iou": lambda a, b: 1 - voxel_iou(a, b, voxel=voxel),
        "jsd": lambda a, b: voxel_jsd(a, b, voxel=voxel, reach=voxel * math.ceil(float(b.abs().max()) / voxel + 1e-9)),
    }
    pairs = zip(samples.cpu(), truth.cpu(), strict=True)
    found = [measure[metric](a, b) for a, b in pairs]
    return torch.tensor(found, dtype=torch.float64, device=samples.device)


@torch.no_grad()
def nearest_costs(samples: Tensor, examples: Tensor) -> Tensor:
    """The root mean square difference of each sample from the example nearest to it: `[rows]`.

    Args:
        samples, examples: `[rows, ...]`, of one shape.

    Raises:
        InputError: the shapes differ.
    """
    if samples.shape[1:] != examples.shape[1:]:
        raise InputError(f"Samples of shape {tuple(samples.shape[1:])} are compared with {tuple(examples.shape[1:])}.")
    ours = samples.double().flatten(1)
    theirs = examples.to(ours).flatten(1)
    near = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    return near / math.sqrt(ours.shape[1])
