"""Distances between point clouds `[points, dimensions]`, in metres where the coordinates are. The clouds may differ in size.

Source: metrics of scene completion as in LiDiff (2024) and Distillation-DPO (2025, arXiv 2504.11447).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from understudy.errors import InputError

Array = np.ndarray[Any, Any]


def chamfer_distance(ours: Tensor, theirs: Tensor) -> float:
    """(mean over p of min over q of ‖p − q‖ + mean over q of min over p of ‖p − q‖) / 2, not squared.

    Symmetric, invariant to the order of points, and 0 if and only if both are the same set.
    """
    a, b = _arrays(ours, theirs)
    return float(cKDTree(b).query(a)[0].mean() + cKDTree(a).query(b)[0].mean()) / 2


def voxel_jsd(ours: Tensor, theirs: Tensor, *, voxel: float, reach: float, flat: bool = False) -> float:
    """Jensen-Shannon distance (square root, natural logarithm) of two histograms of points over voxels: in [0, √ln 2].

    Args:
        voxel: side of a voxel.
        reach: the histogram covers [−reach, reach] on every axis; points outside are left out.
        flat: seen from above: occupied voxels are counted along the last axis.

    Raises:
        InputError: no point of a cloud lies within `reach`.
    """
    edges = np.linspace(-reach, reach, max(1, round(2 * reach / voxel)) + 1)
    found = []
    for name, cloud in zip(("first", "second"), _arrays(ours, theirs), strict=True):
        counts = np.histogramdd(cloud, [edges] * cloud.shape[1])[0]
        if not counts.any():
            raise InputError(f"voxel_jsd: no point of the {name} cloud lies within {reach:g} of the origin.")
        found.append((counts.clip(max=1).sum(-1) if flat else counts).ravel())
    return float(np.nan_to_num(jensenshannon(*found)))  # rounding may give the root of −1e-17 for equal ones


def voxel_iou(ours: Tensor, theirs: Tensor, *, voxel: float) -> float:
    """|A ∩ B| / |A ∪ B| of the occupied voxels, a point p lying in voxel round(p / voxel). Two empty clouds have 1."""
    a, b = ({tuple(v) for v in np.rint(c / voxel).astype(np.int64).tolist()} for c in _arrays(ours, theirs, empty=True))
    return len(a & b) / len(a | b) if a or b else 1.0


def earth_mover_distance(ours: Tensor, theirs: Tensor) -> float:
    """Mean length of the shortest one-to-one assignment between two clouds of equally many points, exact.

    Its cost is cubic in the number of points.

    Raises:
        InputError: the clouds differ in size.
    """
    a, b = _arrays(ours, theirs)
    if len(a) != len(b):
        raise InputError(
            f"earth_mover_distance assigns points one to one, and the clouds have {len(a)} and {len(b)}: sample as many of "
            "each, or use the Chamfer distance."
        )
    lengths = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return float(lengths[linear_sum_assignment(lengths)].mean())


def _arrays(ours: Tensor, theirs: Tensor, empty: bool = False) -> tuple[Array, Array]:
    """Both clouds as float64, if they can be compared."""
    if ours.dim() != 2 or theirs.dim() != 2 or ours.shape[1] != theirs.shape[1]:
        raise InputError(f"Clouds of shape {tuple(ours.shape)} and {tuple(theirs.shape)} cannot be compared.")
    found = []
    for name, cloud in (("first", ours), ("second", theirs)):
        if not len(cloud) and not empty:
            raise InputError(f"The {name} of two clouds that are compared has no point.")
        if not bool(cloud.isfinite().all()):
            raise InputError(
                f"The {name} of two clouds that are compared has coordinates that are not finite: remove these points, or "
                "lower the learning rate if a model makes them."
            )
        found.append(cloud.detach().double().cpu().numpy())
    return found[0], found[1]
