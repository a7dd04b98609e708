"""Choosing images of an unlabelled pool: those that teacher and student together are confident about.

Logits are `[images, classes]`; nothing is random. Source of all: Tang et al. 2023 (KD³), as released.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from understudy.errors import InputError

EPOCHS, LAST, TURN = 240, 120, 160
"""The schedule's epochs, the first without the teacher, and where its exponent would be 0."""


class Confident(NamedTuple):
    """What `confident` finds.

    Args:
        confidence: `[images]`, the largest probability. classes: `[images]`, its class, the lowest of equals.
        thresholds: `[classes]`, what an image of the class must exceed. keep: bool `[images]`.
    """

    confidence: Tensor
    classes: Tensor
    thresholds: Tensor
    keep: Tensor


def teacher_share(epoch: float) -> float:
    """a = 1 − exp(−5 ((e + 1) / 160 − 1)²) before epoch 120, then 0: the teacher chooses first, the student later.

    Args:
        epoch: e of 240, from 1.
    """
    return 1 - math.exp(-5 * ((epoch + 1) / TURN - 1) ** 2) if epoch < LAST else 0.0


def confident(
    teacher: Tensor, student: Tensor, share: float, *, cutoff: float = 0.95, min_threshold: float = 0.0
) -> Confident:
    """The images whose confidence exceeds the threshold of their class.

    The logits are mixed, a · teacher + (1 − a) · student; with n_k images predicted as class k and β_k = n_k / max_j n_j the
    threshold is c β_k / (2 − β_k): c for the class predicted most, near 0 for one that is hardly predicted, whose images
    pass at nearly any confidence.

    Args:
        teacher, student: logits of the pool.
        share: a in [0, 1]. cutoff: c. min_threshold: least threshold of any class.

    Raises:
        InputError: there are no images, the shapes differ, or logits are not finite.
    """
    if teacher.shape != student.shape or not len(teacher):
        raise InputError(
            f"The pool has logits {tuple(teacher.shape)} of the teacher and {tuple(student.shape)} of the student: both "
            "must have a row for each image, and one image at least."
        )
    p = torch.softmax(share * teacher.double() + (1 - share) * student.double(), -1)
    if not bool(p.isfinite().all()):
        raise InputError(
            f"The logits of image {int((~p.isfinite()).any(-1).nonzero()[0, 0])} of the pool are not finite."
        )
    top = p.max(-1, keepdim=True).values
    classes = (p == top).int().argmax(-1)
    numbers = torch.bincount(classes, minlength=p.shape[1]).double()
    relative = numbers / numbers.max()
    thresholds = (cutoff * relative / (2 - relative)).clamp(min=min_threshold)
    return Confident(top[:, 0], classes, thresholds, top[:, 0] > thresholds[classes])


def chosen(found: Confident, fallback: float = 0.1) -> tuple[Tensor, bool]:
    """Indices of the images that are kept, in order, and whether fewer than two passed, so that the most confident tenth
    (two at least) was taken in their place.

    Raises:
        InputError: the pool has fewer than two images.
    """
    number = len(found.keep)
    if number < 2:
        raise InputError(
            f"The pool has {number} image, and the contrast of images needs two at least: give a larger one."
        )
    if int(found.keep.sum()) >= 2:
        return found.keep.nonzero()[:, 0], False
    order = found.confidence.sort(descending=True, stable=True).indices
    return order[: max(2, math.ceil(fallback * number))].sort().values, True
