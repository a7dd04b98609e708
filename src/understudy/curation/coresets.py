"""Small subsets that stand for a whole set (paper 37): farthest points, and the subset whose weighted sum is a target.

Greedy and deterministic: of equals the lowest index is taken. `pruning.herding_scores` and `pruning.el2n_scores` order by other
rules.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from understudy.errors import InputError


class Centers(NamedTuple):
    """Indices `[number]` in the order in which they were taken, and the largest distance of an item to the nearest of them."""

    chosen: Tensor
    radius: float


class Pursuit(NamedTuple):
    """Indices `[number]` in the order in which they were taken, their weights, and the norm of target less weighted sum."""

    chosen: Tensor
    weights: Tensor
    residual: float


def k_center(features: Tensor, number: int, *, start: int = 0) -> Centers:
    """Again and again the item that is farthest from those taken: at most twice the best possible radius.

    Args:
        features: `[items, width]`. number: of items wanted. start: the first one.

    Raises:
        InputError: there are fewer items than wanted.

    Source: Gonzalez 1985; Sener & Savarese 2018 (core-set).
    """
    _check("k_center", features, number)
    x, chosen = features.double(), [start]
    nearest = (x - x[start]).norm(dim=1)
    while len(chosen) < number:
        left = nearest.clone()
        left[chosen] = -1.0  # an item equal to one that was taken is at distance 0
        chosen.append(int(left.argmax()))
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).norm(dim=1))
    return Centers(torch.tensor(chosen), float(nearest.max()))


def matching_pursuit(features: Tensor, target: Tensor, number: int) -> Pursuit:
    """Items whose weighted sum comes near a target: orthogonal matching pursuit.

    Again and again the item of largest |⟨f, r⟩| / ‖f‖ with the residual r, then a least-squares fit of all weights. The norm of
    the residual never rises. It ends early where no item is left that correlates with the residual.

    Args:
        features: `[items, width]`, such as gradients. target: `[width]`, such as their mean. number: of items wanted.

    Raises:
        InputError: there are fewer items than wanted.

    Source: Pati et al. 1993; Killamsetty et al. 2021 (GradMatch), Algorithm 2, without its regularisation.
    """
    _check("matching_pursuit", features, number)
    x, wanted = features.double(), target.double()
    norms, chosen = x.norm(dim=1), list[int]()
    weights, residual = x.new_zeros(0), wanted
    while len(chosen) < number:
        correlation = (x @ residual).abs() / torch.where(norms > 0, norms, 1)
        correlation[chosen] = -1.0
        best = int(correlation.argmax())
        if chosen and not float(correlation[best]) > 1e-12 * float(wanted.norm()):
            break
        chosen.append(best)
        basis = x[chosen].T
        weights = torch.linalg.lstsq(
            basis, wanted[:, None], driver="gelsd" if basis.device.type == "cpu" else None
        ).solution[:, 0]
        residual = wanted - basis @ weights
    return Pursuit(torch.tensor(chosen), weights, float(residual.norm()))


def _check(name: str, features: Tensor, number: int) -> None:
    if not 1 <= number <= len(features):
        raise InputError(f"{name}: {number} of {len(features)} items are wanted: choose from 1 to that many.")
