"""Geometric features of student, teacher, label and class mean for each row. Nothing is reduced or learned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import log_softmax, need_dense
from understudy.losses.classification import check_labels
from understudy.targets import Target


def class_sums(target: Target | Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sums of a teacher's probabilities by label `[classes, classes]`, and number of rows of each label `[classes]`,
    float64.

    Both may be added over batches; `class_means` divides.

    Args:
        target: `Dense` logits `[rows, classes]`, taken at temperature 1.
        labels: `[rows]`, int64 in `0 … classes − 1`.
    """
    check_labels("class_sums", labels, classes)
    p = log_softmax(need_dense("class_sums", target, classes), 1.0).exp().double()
    one_hot = F.one_hot(labels, classes).to(p)
    return one_hot.T @ p, one_hot.sum(0)


def class_means(sums: Tensor, counts: Tensor) -> Tensor:
    """`[classes, classes]`, row c the mean of P over the rows of label c: each sums to 1. A label without rows gets the
    uniform row (TGeo-KD, T̄)."""
    uniform = torch.full_like(sums, 1 / sums.shape[-1])
    return torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), uniform)


def triangle_features(
    student: Tensor,
    target: Target | Tensor,
    labels: Tensor,
    means: Tensor,
    *,
    vertices: bool = True,
    edges: bool = True,
    angles: bool = False,
    inter: bool = True,
) -> Tensor:
    """Inputs of TGeo-KD's ratio network for each row, `[rows, n · classes]`, without gradient.

    With S and P the probabilities of student and teacher at temperature 1, G the one-hot label and T̄ the class mean:
    the vertices S, P, G, T̄; the edges (T̄−S)², (G−S)², (P−S)², (P−G)², (T̄−G)²; the angles at the student (T̄−S)(G−S),
    (P−S)(G−S). All are elementwise and in this order. The default is the first nine.

    Args:
        student: logits `[rows, classes]`.
        target: `Dense` teacher logits.
        labels: `[rows]`, int64 in `0 … classes − 1`.
        means: T̄ `[classes, classes]`, as `class_means` returns it.
        inter: include the features that use T̄; without them a row's features depend on the row alone.
    """
    classes = student.shape[-1]
    if means.shape != (classes, classes):
        raise InputError(f"triangle_features: {classes} classes and class averages of shape {list(means.shape)}.")
    check_labels("triangle_features", labels, classes)
    s = log_softmax(student.detach(), 1.0).exp()
    p = log_softmax(need_dense("triangle_features", target, classes), 1.0).exp().to(s)
    g, t = F.one_hot(labels, classes).to(s), means.to(s)[labels]
    parts: list[tuple[bool, bool, Tensor]] = [  # wanted, inter, values
        (vertices, False, s),
        (vertices, False, p),
        (vertices, False, g),
        (vertices, True, t),
        (edges, True, (t - s).square()),
        (edges, False, (g - s).square()),
        (edges, False, (p - s).square()),
        (edges, False, (p - g).square()),
        (edges, True, (t - g).square()),
        (angles, True, (t - s) * (g - s)),
        (angles, False, (p - s) * (g - s)),
    ]
    chosen = [values for wanted, across, values in parts if wanted and (inter or not across)]
    if not chosen:
        raise InputError("triangle_features: no feature is left: ask for vertices, edges or angles.")
    return torch.cat(chosen, -1)
