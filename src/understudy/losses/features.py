"""Inner layers of a student against those of a teacher: one value an image, unreduced.

Maps are `[images, channels, height, width]`. Both sides may differ in channels; where they differ in height or width, the
larger map is pooled to the smaller one (`same_grid`). Targets carry no gradient.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import full, unit


def feature_map(features: Tensor, prefix: int | None = None) -> Tensor:
    """The output of a layer as a map `[images, channels, height, width]`.

    Args:
        features: a map; tokens `[images, tokens, channels]` of a square grid; or a vector `[images, channels]`, which becomes
            a map of one position.
        prefix: tokens in front of the grid, which are dropped (class, registers); by itself none, or one where that leaves
            a square.

    Raises:
        InputError: the tokens are no square grid, or the output has another number of axes.
    """
    features = full(features)
    if features.dim() == 2:
        return features[:, :, None, None]
    if features.dim() == 3:
        number = features.shape[1]
        if prefix is None:
            prefix = 0 if math.isqrt(number) ** 2 == number else 1
        side = math.isqrt(max(0, number - prefix))
        if side * side != number - prefix or not side:
            raise InputError(
                f"{number} tokens are no square grid behind {prefix} others: say how many stand in front of it."
            )
        return features[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    if features.dim() != 4:
        raise InputError(
            f"A layer's output of shape {tuple(features.shape)} is no map of features. Name another layer."
        )
    return features


def same_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller of their heights and widths, by adaptive average pooling."""
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    pooled = [x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (student, teacher)]
    return pooled[0], pooled[1]


def hint_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of (r(s) − t)² over channels and positions, `[images]`.

    Args:
        student: r(s), the student's map after the regressor. teacher: of the same shape.

    Raises:
        InputError: the shapes differ.

    Source: Romero et al. 2015 (FitNets), Eq. 3, whose ½ Σ is a mean here, as in later comparisons.
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"hint_mse: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape."
        )
    return (full(student) - full(teacher.detach())).square().flatten(1).mean(1)


def attention_map(features: Tensor, *, power: float = 2.0) -> Tensor:
    """Where a map is active: Σ_channels |A|^power by position, divided by its norm: `[images, height · width]`.

    A map that is 0 everywhere stays 0 and gets no gradient. Source: Zagoruyko & Komodakis 2017, Section 3.1, F_sum^p.
    """
    if power < 1:
        raise InputError(f"attention_map: power is {power} and must be at least 1.")
    return unit(full(features).abs().pow(power).sum(1).flatten(1))


def attention_transfer(student: Tensor, teacher: Tensor, *, power: float = 2.0) -> Tensor:
    """Mean squared difference of two attention maps over positions, `[images]`; at most 4 / positions.

    Args:
        student, teacher: maps of the same height and width, of any two numbers of channels.

    Raises:
        InputError: height or width differ.

    Source: Zagoruyko & Komodakis 2017, Eq. 2; squared and a mean over positions, as released.
    """
    if student.shape[2:] != teacher.shape[2:]:
        raise InputError(
            f"attention_transfer: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in height or width."
        )
    ours, theirs = attention_map(student, power=power), attention_map(teacher.detach(), power=power)
    return (ours - theirs).square().mean(1)


def disagreement_weights(student: Tensor, teacher: Tensor) -> Tensor:
    """sigmoid(‖student − teacher + 10⁻⁶‖₂), `[images]`, without gradient: ½ where both agree, near 1 where they do not.

    Args:
        student, teacher: logits `[images, classes]`.

    Raises:
        InputError: the shapes differ.

    Source: Tang et al. 2023 (KD³), weights of the aligned features, as released.
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"disagreement_weights: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape."
        )
    return (full(student.detach()) - full(teacher.detach()) + 1e-6).norm(dim=1).sigmoid()


def channel_similarity_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ over pairs of channels of (E_s[c, d] − E_t[c, d])², divided by the channels: `[images]`.

    E is the Gram matrix of an image's channels over positions, its rows divided by their norms.

    Args:
        student, teacher: maps `[images, channels, height, width]` of equally many channels; sizes may differ.

    Raises:
        InputError: the channels differ.

    Source: Liu et al. 2021 (ICKD), as released with DisWOT, whose semantic score is this on the gradients of each class.
    """
    if student.shape[1] != teacher.shape[1]:
        raise InputError(
            f"channel_similarity_mse: the student has {student.shape[1]} channels and the teacher {teacher.shape[1]}: compare "
            "layers of one width, or use class_map_mse."
        )
    ours, theirs = (unit(a @ a.transpose(1, 2)) for a in (full(x).flatten(2) for x in (student, teacher.detach())))
    return (ours - theirs.to(ours.dtype)).square().sum((1, 2)) / student.shape[1]
