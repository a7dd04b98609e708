"""Relations among the images of a group, and among its classes: one value an image, unreduced.

A group is `[images, width]`; its images are coupled, so a batch may be cut between groups and not inside one. Student and
teacher may differ in width. Targets carry no gradient. A group of one image has no relations: its value is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import check_temperature, checked, full, log_softmax, need_dense, unit
from understudy.targets import Target

# By products, distances of vectors that have a large mean in common cancel away.
_EXACT = "donot_use_mm_for_euclid_dist"


def by_group(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor, group: int) -> Tensor:
    """`loss` on groups of consecutive images, `[images]`.

    Args:
        student, teacher: `[images, width]`. group: images of a group; the last may have fewer.
    """
    if len(student) != len(teacher):
        raise InputError(
            f"The student has {len(student)} images and the teacher {len(teacher)}: they must be the same."
        )
    parts = [loss(student[i : i + group], teacher[i : i + group]) for i in range(0, len(student), group)]
    return torch.cat(parts) if parts else full(student).sum(1)


def similarity_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over j of (G_s[i, j] − G_t[i, j])², with G the rows of A Aᵀ divided by their norms: `[images]`.

    Args:
        student, teacher: A, activations `[images, width]`.

    Source: Tung & Mori 2019 (SP), Eqs. 1 to 4: the mean over images is ‖G_s − G_t‖² / b².
    """
    gram_s, gram_t = (unit(a @ a.T) for a in (full(student), full(teacher.detach())))
    return (gram_s - gram_t.to(gram_s.dtype)).square().mean(1)


def class_map_mse(student: Tensor, teacher: Tensor, *, student_head: Tensor, teacher_head: Tensor) -> Tensor:
    """Mean over pairs of classes of (S_s[n, m] − S_t[n, m])²: how the maps of the classes resemble each other.

    The map of class n is Σ_c w[n, c] A[:, c] over all images and positions of the group; S is the Gram matrix of the maps,
    its rows divided by their norms. The group has one value, which each of its images gets: `[images]`.

    Args:
        student, teacher: A, maps `[images, channels, height, width]`; channels and sizes may differ.
        student_head, teacher_head: w, weights of the linear head `[classes, channels]`; the teacher's has no gradient.

    Raises:
        InputError: a head reads another number of channels than its map has, or the classes differ or are fewer than two.

    Source: Dong et al. 2023 (DisWOT), the semantic similarity; the normalisation is reconstructed.
    """
    sides = {"student": (student, student_head), "teacher": (teacher.detach(), teacher_head.detach())}
    for side, (features, head) in sides.items():
        if features.shape[1] != head.shape[1]:
            raise InputError(
                f"class_map_mse: the {side}'s map has {features.shape[1]} channels and its head reads {head.shape[1]}: choose "
                "the map that is pooled before the head."
            )
    if len(student_head) != len(teacher_head) or len(student_head) < 2:
        raise InputError(
            f"class_map_mse: the student has {len(student_head)} classes and the teacher {len(teacher_head)}: they must be the "
            "same, and two or more."
        )
    maps = [torch.einsum("nc,bchw->nbhw", full(w), full(a)).flatten(1) for a, w in sides.values()]
    gram_s, gram_t = (unit(g @ g.T) for g in maps)
    return (gram_s - gram_t.to(gram_s.dtype)).square().mean().expand(len(student))


def distance_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over j of huber(ψ_s[i, j] − ψ_t[i, j]), with ψ the distances divided by their mean in the group: `[images]`.

    Equal vectors have distance 0 and add nothing to a gradient. Unchanged by shifting, rotating and scaling either side.
    Source: Park et al. 2019 (RKD), Eqs. 4 to 6; a mean over pairs, as released.
    """
    ours, theirs = _distances(full(student)), _distances(full(teacher.detach()))
    return F.smooth_l1_loss(ours, theirs.to(ours.dtype), reduction="none").mean(1)


def _distances(x: Tensor) -> Tensor:
    distance = torch.cdist(x, x, compute_mode=_EXACT)
    pairs = len(x) * (len(x) - 1)
    mean = distance.sum() / max(1, pairs)
    return distance / torch.where(mean > 0, mean, torch.ones_like(mean))


def angle_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over i and k of huber(cos ∠_s(i, j, k) − cos ∠_t(i, j, k)) for each image j as the corner: `[images]`.

    Memory grows with images³ of the group. Source: Park et al. 2019 (RKD), Eqs. 7 and 8; a mean over triples, as released.
    """
    ours, theirs = _angles(full(student)), _angles(full(teacher.detach()))
    return F.smooth_l1_loss(ours, theirs.to(ours.dtype), reduction="none").mean((1, 2))


def _angles(x: Tensor) -> Tensor:
    edges = unit(x[None] - x[:, None])
    return edges @ edges.transpose(1, 2)


def pearson_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 − Pearson's correlation along the last axis, `[...]`, between 0 and 2.

    A side without variation correlates with nothing: its distance is 1 and has no gradient.
    """
    centred = [x - x.mean(-1, keepdim=True) for x in (full(a), full(b))]
    return 1 - (unit(centred[0]) * unit(centred[1]).to(centred[0].dtype)).sum(-1)


def inter_class_relation(student: Tensor, target: Target | Tensor, *, temperature: float = 1.0) -> Tensor:
    """Pearson distance of the two softmaxes of each image, over classes: `[images]`. Rows are independent.

    Args:
        student: logits `[images, classes]`. target: `Dense` teacher logits. temperature: of both softmaxes.

    Source: Huang et al. 2022 (DIST), Eq. 8.
    """
    q, p = _probabilities(student, target, temperature)
    return checked("inter_class_relation", pearson_distance(q, p), student, target)


def intra_class_relation(student: Tensor, target: Target | Tensor, *, temperature: float = 1.0) -> Tensor:
    """Pearson distance of the two softmaxes of each class, over the group's images, averaged over classes.

    The group has one value, which each of its images gets: `[images]`. Args: as of `inter_class_relation`.
    Source: Huang et al. 2022 (DIST), Eq. 9.
    """
    q, p = _probabilities(student, target, temperature)
    if len(q) == 1:
        return q.sum(1) * 0
    return pearson_distance(q.T, p.T).mean().expand(len(q))


def _probabilities(student: Tensor, target: Target | Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    check_temperature("DIST", temperature)
    teacher = need_dense("DIST", target, student.shape[-1])
    return log_softmax(student, temperature).exp(), log_softmax(teacher, temperature).exp()
