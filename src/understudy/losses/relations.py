"""Relations among tokens: nearest neighbours within an image and across a group of images.

Tokens are `[..., tokens, width]`; leading axes are independent groups. Student and teacher may differ in width, but not
in the number of tokens. Values are per token or per image, not reduced.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import full, unit
from understudy.losses.features import feature_map

# Distances computed from products lose precision if the tokens have a large common mean.
_EXACT = "donot_use_mm_for_euclid_dist"


def grid_tokens(features: Tensor, grid: int, prefix: int | None = None) -> Tensor:
    """The tokens that each cover one area of an image, `[images, grid², width]`.

    Args:
        features: a map `[images, width, height, width]`, or tokens `[images, tokens, width]` of a square grid.
        prefix: number of tokens before the grid, which are dropped (class token, registers). Default: 0, or 1 if that
            leaves a square number.
    """
    features = feature_map(features, prefix)
    if min(features.shape[2:]) < grid:
        raise InputError(
            f"grid_tokens: features of shape {tuple(features.shape)} have no {grid} × {grid} grid. Choose a smaller grid "
            "or an earlier layer."
        )
    return F.adaptive_avg_pool2d(features, grid).flatten(2).transpose(1, 2)


def knn_affinity(tokens: Tensor, *, k: int, sigma: float | Tensor) -> Tensor:
    """A[i, j] = exp(−‖T_i − T_j‖² / 2σ) where i is one of the k nearest of j, else 0: `[..., tokens, tokens]`.

    A token is not its own neighbour; ties go to the lower index. The choice of neighbours has no gradient. `sigma` is a
    number, or a tensor with one entry per group, `[...]`.
    Source: Zhang et al. 2023 (TRG), token-level relationship graph. Note σ, not σ².
    """
    tokens, number = full(tokens), tokens.shape[-2]
    if not 1 <= k < number:
        raise InputError(
            f"knn_affinity: k is {k} and there are {number} tokens: k must be at least 1 and less than that."
        )
    if not bool(torch.as_tensor(sigma > 0).all()):
        raise InputError(f"knn_affinity: sigma is {sigma} and must be positive.")
    if isinstance(sigma, Tensor) and sigma.dim():
        sigma = sigma[..., None, None]
    near = _neighbours(tokens, k)
    index = near.flatten(-2)[..., None].expand(*near.shape[:-2], number * k, tokens.shape[-1])
    neighbours = tokens.gather(-2, index).unflatten(-2, (number, k))
    squared = (neighbours - tokens[..., :, None, :]).square().sum(-1)
    values = torch.exp(-squared / (2 * sigma))
    affinity = values.new_zeros(*tokens.shape[:-1], number)
    return affinity.scatter(-1, near, values).transpose(-1, -2)


@torch.no_grad()
def _neighbours(tokens: Tensor, k: int) -> Tensor:
    """The k nearest tokens of each token, nearest first, `[..., tokens, k]`: without itself, ties to the lower index."""
    distance = torch.cdist(tokens, tokens, compute_mode=_EXACT)
    distance = distance.masked_fill(torch.eye(tokens.shape[-2], dtype=torch.bool, device=tokens.device), math.inf)
    return distance.sort(dim=-1, stable=True).indices[..., :k]


def neighbour_overlap(student: Tensor, teacher: Tensor, *, k: int) -> Tensor:
    """Fraction of the teacher's k nearest neighbours of a token that are also the student's, `[..., tokens]`; a metric
    without gradient.

    Args:
        student, teacher: tokens, `[..., tokens, width]`; the widths may differ.
    """
    if student.shape[:-1] != teacher.shape[:-1] or not 1 <= k < student.shape[-2]:
        raise InputError(
            f"neighbour_overlap: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be as many tokens, "
            f"more than k, which is {k}."
        )
    ours, theirs = (_neighbours(full(t), k) for t in (student, teacher))
    return (ours[..., :, None] == theirs[..., None, :]).any(-1).float().mean(-1)


def median_squared_distance(tokens: Tensor) -> Tensor:
    """The median of ‖T_i − T_j‖² over i ≠ j, per group `[...]`, without gradient; 1 where it is 0."""
    with torch.no_grad():
        number = tokens.shape[-2]
        tokens = full(tokens)
        squared = torch.cdist(tokens, tokens, compute_mode=_EXACT).square()
        off = ~torch.eye(number, dtype=torch.bool, device=tokens.device)
        middle = squared[..., off].median(-1).values
        return torch.where(middle > 0, middle, torch.ones_like(middle))


def affinity_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    direction: Literal["student_teacher", "teacher_student"] = "student_teacher",
    scale: float = 1.0,
) -> Tensor:
    """KL between the row softmaxes of two affinity matrices, `[..., tokens]`; at most scale²/2 a row.

    Args:
        student, teacher: `[..., tokens, tokens]`.
        direction: student ‖ teacher as TRG writes it, or the reverse.
        scale: multiplies both affinities before the softmax.
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"affinity_kl: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape."
        )
    log_s, log_t = (torch.log_softmax(scale * full(a), -1) for a in (student, teacher.detach()))
    log_x, log_y = (log_s, log_t) if direction == "student_teacher" else (log_t, log_s)
    return (log_x.exp() * (log_x - log_y)).sum(-1)


def paired_info_nce(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """−log of the softmax probability, by cosine similarity, of the teacher's token at the same place among all tokens
    of the group: `[..., tokens]`.

    A token of norm 0 has similarity 0 to all. Source: TRG, global relationship loss.
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"paired_info_nce: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape: "
            "project the student to the teacher's width."
        )
    if temperature <= 0:
        raise InputError(f"paired_info_nce: temperature is {temperature} and must be positive.")
    similarity = unit(student) @ unit(teacher.detach()).transpose(-1, -2) / temperature
    return torch.logsumexp(similarity, -1) - similarity.diagonal(dim1=-2, dim2=-1)


def contextual_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of softmax(F Fᵀ / √width), each with its own width: `[images]`. Source: TRG, inner loss."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise InputError(
            f"contextual_mse: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in tokens."
        )
    return (self_similarity(student) - self_similarity(teacher.detach())).square().mean((-1, -2))


def self_similarity(tokens: Tensor) -> Tensor:
    """softmax over each row of F Fᵀ / √width: `[..., tokens, tokens]`."""
    tokens = full(tokens)
    return torch.softmax(tokens @ tokens.transpose(-1, -2) / math.sqrt(tokens.shape[-1]), -1)
