"""Losses between a small synthetic training set and a real one (dataset distillation).

What is compared couples all examples of a set, so a pair of sets is one row: values are scalars `[]`, of
`kernel_ridge_error` one a real example. The real side is a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from understudy.errors import InputError

_EPSILON = 1e-6


def gradient_distance(
    synthetic: Sequence[Tensor], real: Sequence[Tensor], *, metric: Literal["layers", "mse", "cosine"] = "layers"
) -> Tensor:
    """How far the gradients of a network on two sets are from each other.

    `layers`: Σ over tensors and their rows `[out, rest]` of 1 − ⟨a, b⟩ / (‖a‖ ‖b‖ + 10⁻⁶); tensors of one axis (biases, norms) are
    left out. `cosine`: the same of all tensors as one vector. `mse`: Σ (a − b)². The first two do not see norms. A row of
    zeros adds 1.

    Args:
        synthetic, real: gradients of the same parameters.

    Raises:
        InputError: they are not of the same parameters, or `layers` has no tensor of two axes.

    Source: Zhao et al. 2021 (DC), Section 3 and its released code.
    """
    if [g.shape for g in synthetic] != [g.shape for g in real]:
        raise InputError(
            f"gradient_distance: {len(synthetic)} and {len(real)} gradients that differ in shape; both must be of the same "
            "parameters."
        )
    pairs = [(a, b.detach()) for a, b in zip(synthetic, real, strict=True)]
    if metric == "mse":
        return torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
    if metric == "cosine":
        a, b = (torch.cat([g.flatten() for g in side]) for side in zip(*pairs, strict=True))
        return _cosine_distance(a[None], b[None]).sum()
    rows = [_cosine_distance(a.flatten(1), b.flatten(1)).sum() for a, b in pairs if a.dim() > 1]
    if not rows:
        raise InputError(
            "gradient_distance: no parameter has two axes, and layers compares no others: choose a metric."
        )
    return torch.stack(rows).sum()


def _cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """`[rows]`."""
    norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return 1 - (a * b).sum(1) / (norms + _EPSILON)


def mean_distance(synthetic: Tensor, real: Tensor) -> Tensor:
    """‖mean φ(synthetic) − mean φ(real)‖²: MMD² with a linear kernel.

    Args:
        synthetic, real: features φ of the examples of one class, `[examples, width]` each.

    Source: Zhao & Bilen 2023 (DM), Eq. 5.
    """
    _check_items("mean_distance", synthetic, real, 1)
    return (synthetic.mean(0) - real.detach().mean(0)).square().sum()


def mmd(synthetic: Tensor, real: Tensor, bandwidths: Sequence[float], *, unbiased: bool = False) -> Tensor:
    """MMD² = E k(x, x′) + E k(z, z′) − 2 E k(x, z), with k the sum of Gaussian kernels of the bandwidths.

    Args:
        synthetic, real: z and x, `[items, width]`. bandwidths: s of exp(−‖d‖² / (2 s²)).
        unbiased: leave out an item with itself, which needs two items a side; the value can then be below 0.

    Source: Gretton et al. 2012, Eqs. 3 and 5.
    """
    _check_items("mmd", synthetic, real, 2 if unbiased else 1)
    x, z = real.detach(), synthetic

    def _mean(a: Tensor, b: Tensor, same: bool) -> Tensor:
        kernel = torch.stack([gaussian_kernel(a, b, s) for s in bandwidths]).sum(0)
        if not (same and unbiased):
            return kernel.mean()
        return (kernel.sum() - kernel.diagonal().sum()) / (len(a) * (len(a) - 1))

    return _mean(x, x, True) + _mean(z, z, True) - 2 * _mean(x, z, False)


def gaussian_kernel(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    """exp(−‖a_i − b_j‖² / (2 s²)), `[a, b]`, by products."""
    square = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return torch.exp(-square.clamp(min=0) / (2 * bandwidth**2))


def trajectory_distance(student: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """‖θ_student − θ_target‖² / ‖θ_start − θ_target‖².

    Args:
        student: parameters after steps on the synthetic set, from `start`. target: an expert's, later than `start`. All
            `[parameters]`.

    Raises:
        InputError: the expert has not moved.

    Source: Cazenavette et al. 2022 (MTT), Eq. 2.
    """
    moved = (start - target).detach().square().sum()
    if not bool(moved > 0):
        raise InputError(
            "trajectory_distance: the expert's parameters at both times are equal: take times further apart."
        )
    return (student - target.detach()).square().sum() / moved


def kernel_ridge_prediction(cross: Tensor, kernel: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """K_TS (K_SS + λ I)⁻¹ Y_S, `[real, classes]`.

    Args:
        cross: K_TS `[real, synthetic]`. kernel: K_SS `[synthetic, synthetic]`. targets: Y_S `[synthetic, classes]`.
        ridge: λ, above 0: two equal examples make the kernel singular.
    """
    if not ridge > 0:
        raise InputError(f"kernel_ridge_prediction: the ridge is {ridge} and must be above 0.")
    eye = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    return cross @ torch.linalg.solve(kernel + ridge * eye, targets)


def kernel_ridge_error(prediction: Tensor, targets: Tensor) -> Tensor:
    """½ ‖Y_T − prediction‖² of each real example, `[real]`.

    Source: Nguyen et al. 2021 (KIP), Eq. 4.
    """
    return (targets - prediction).square().sum(1) / 2


def _check_items(loss: str, synthetic: Tensor, real: Tensor, least: int) -> None:
    for side, items in (("synthetic", synthetic), ("real", real)):
        if len(items) < least:
            raise InputError(f"{loss}: the {side} side has {len(items)} items and needs at least {least}.")
