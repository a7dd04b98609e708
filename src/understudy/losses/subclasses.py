"""Subclasses: each class is split along linear directions of an embedding; targets are over classes × subclasses.

The projector, means and directions are float64. Source: LELP (paper 6); its scalings are reconstructed. Axes: rows are
examples, `classes` C, `subclasses` S per class, `width` D of the embedding; column `c · S + s` of a flat target or
student output is subclass s of class c. Nothing is reduced over rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import checked, log_softmax
from understudy.losses.classification import check_labels


class Directions(NamedTuple):
    """Principal directions of each class.

    Args:
        means: `[classes, width]`.
        directions: `[classes, subclasses, width]`, orthonormal within a class.
        variances: `[classes, subclasses]` along the directions, dividing by the class's number of examples.
    """

    means: Tensor
    directions: Tensor
    variances: Tensor

    @property
    def scale(self) -> Tensor:
        """σ_c `[classes]`: root of the mean variance over the directions, invariant to a rotation of them."""
        return self.variances.mean(-1).sqrt()


def two_class_head(weight: Tensor) -> Tensor:
    """The weights `[classes, width]` of a head; a single sigmoid output becomes two classes with logits (0, z)."""
    return torch.cat([torch.zeros_like(weight), weight]) if weight.shape[0] == 1 else weight


def null_projector(weight: Tensor) -> Tensor:
    """P = I − W⁺W, `[width, width]`: the projector onto the null space of the head. Symmetric and idempotent, float64.

    Args:
        weight: W `[classes, width]` of the teacher's output layer.
    """
    w = weight.detach().double()
    if not bool(w.isfinite().all()):
        raise InputError("null_projector: the weights of the teacher's head are not finite.")
    return torch.eye(w.shape[1], dtype=w.dtype, device=w.device) - torch.linalg.pinv(w) @ w


def principal_directions(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    subclasses: int,
    projector: Tensor | None = None,
    strict: bool = True,
) -> Directions:
    """Mean and top principal directions of each class's (projected) embeddings.

    The sign of a direction makes its entry of largest absolute value positive. With tied singular values the directions
    within the tie are arbitrary. A variance below the rounding error of the embeddings is set to 0, and only a class
    where all variances are 0 may have fewer directions than `subclasses`.

    Args:
        features: `[rows, width]`, the teacher's.
        labels: `[rows]`.
        projector: from `null_projector`, or `None` for the whole width.
        strict: raise an error if a class has too few examples or too few directions with variance; otherwise all
            classes get fewer directions.
    """
    check_labels("principal_directions", labels, classes)
    x = features.detach().double()
    finite = x.isfinite().all(-1)
    if not bool(finite.all()):
        raise InputError(f"principal_directions: embedding {int((~finite).nonzero()[0, 0])} is not finite.")
    rounding = 4 * torch.finfo(x.dtype if features.dtype == x.dtype else torch.float32).eps
    floor = rounding * x.norm(dim=-1).max() if len(x) else x.new_zeros(())  # before P: then only rounding may be left
    if projector is not None:
        x = x @ projector
    number = _affordable(labels, x.shape[1], classes, subclasses, projector, strict)
    means, directions, variances = [], [], []
    for c in range(classes):
        own = x[labels == c]
        mean = own.mean(0)
        _, singular, v = torch.linalg.svd(own - mean, full_matrices=False)
        v, spread = v[:number], singular[:number] / len(own) ** 0.5
        largest = v.gather(1, v.abs().argmax(1, keepdim=True))
        directions.append(v * torch.where(largest < 0, -1.0, 1.0))
        means.append(mean)
        variances.append(torch.where(spread > floor, spread, 0.0).square())
    found = Directions(torch.stack(means), torch.stack(directions), torch.stack(variances))
    number = _varying(found.variances, labels, strict)
    return Directions(found.means, found.directions[:, :number], found.variances[:, :number])


def _varying(variances: Tensor, labels: Tensor, strict: bool) -> int:
    """The number of subclasses for which every class has enough directions with variance; an error if `strict` and it
    is below the requested number."""
    asked, ranks = variances.shape[1], (variances > 0).sum(1)
    short = (ranks > 0) & (ranks < asked)
    if not bool(short.any()):
        return asked
    number, c = (int(v) for v in torch.where(short, ranks, asked).min(0))
    if strict:
        raise InputError(
            f"principal_directions: the {int((labels == c).sum())} embeddings of class {c} vary in {number} directions "
            f"alone and {asked} subclasses need as many. Give other examples, fewer subclasses, or strict=false."
        )
    return number


def _affordable(
    labels: Tensor, width: int, classes: int, subclasses: int, projector: Tensor | None, strict: bool
) -> int:
    """The number of subclasses that the examples and the width allow; an error if `strict` and it is below the
    requested number."""
    if subclasses < 1:
        raise InputError(f"principal_directions: subclasses is {subclasses} and must be at least 1.")
    rank = width if projector is None else round(float(projector.trace()))  # the trace of a projector is its rank
    if subclasses > rank:
        raise InputError(
            f"principal_directions: {subclasses} subclasses need as many directions and the embedding leaves {rank} "
            f"of its {width}: the most is {rank}."
        )
    counts = torch.bincount(labels, minlength=classes)
    least = int(counts.argmin())
    number = int(counts[least])
    if number < (subclasses + 1 if strict else 2):
        needed = f"{subclasses} subclasses need at least {subclasses + 1}" if strict else "any split needs at least 2"
        raise InputError(
            f"principal_directions: class {least} has {number} examples and {needed}. Give more examples"
            + (", fewer subclasses, or strict=false." if strict else ".")
        )
    return min(subclasses, number - 1)


def random_rotations(classes: int, subclasses: int, *, seed: int) -> Tensor:
    """Q `[classes, subclasses, subclasses]`, orthonormal, uniform (Haar), independent between classes; float64.

    Principal directions differ much in variance, so without rotation the first would dominate the softmax. After U = Q
    V every direction has the same variance in expectation.
    """
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(classes, subclasses, subclasses, generator=generator, dtype=torch.float64))
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]


def projections(features: Tensor, means: Tensor, directions: Tensor) -> Tensor:
    """u_cs · (h − μ_c) for all classes, `[rows, classes, subclasses]`, float64.

    Args:
        features: h `[rows, width]`, projected like those that the directions were computed from.
    """
    centred = features.double()[:, None] - means.double()
    return torch.einsum("rcd,csd->rcs", centred, directions.double())


def subclass_log_probs(scores: Tensor, *, beta: float, scale: Tensor | None = None) -> Tensor:
    """log r(s | c, x): log-softmax over s of `scores / (β σ_c)`, `[rows, classes, subclasses]`.

    β → ∞: log 1/S. β → 0: one-hot on the best.

    Args:
        scores: `[rows, classes, subclasses]`.
        scale: σ_c `[classes]`; where it is 0 (embeddings of a class all equal) the subclasses are uniform.
    """
    if not beta > 0:
        raise InputError(f"subclass_log_probs: beta is {beta} and must be above 0.")
    if scale is not None:
        flat = (scale <= 0)[:, None]
        scores = torch.where(flat, torch.zeros_like(scores), scores / torch.where(flat, 1.0, scale[:, None]))
    return torch.log_softmax(scores / beta, -1)


def split_log_targets(logits: Tensor, log_subclass: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log p̃_cs = log softmax(z / τ)_c + log r(s | c), flat `[rows, classes · subclasses]`.

    Summed over s it is the class distribution, to rounding.

    Args:
        logits: z `[rows, classes]` of the teacher.
        log_subclass: `[rows, classes, subclasses]`.
    """
    if not temperature > 0:
        raise InputError(f"split_log_targets: temperature is {temperature} and must be above 0.")
    if log_subclass.shape[:2] != logits.shape:
        raise InputError(
            f"split_log_targets: the teacher's logits are {tuple(logits.shape)} and the subclasses "
            f"{tuple(log_subclass.shape)}: rows and classes must agree."
        )
    log_p = torch.log_softmax(logits.double() / temperature, -1)
    return (log_p[..., None] + log_subclass).flatten(1)


def marginal_logits(logits: Tensor, classes: int) -> Tensor:
    """Class scores logsumexp_s o_cs, `[..., classes]` of `[..., classes · subclasses]`.

    Their softmax is the summed probability of each class's subclasses, so its argmax may differ from the class of the
    single largest output.
    """
    if classes < 1 or logits.shape[-1] % classes:
        raise InputError(f"marginal_logits: {logits.shape[-1]} outputs cannot be shared among {classes} classes.")
    return logits.unflatten(-1, (classes, -1)).logsumexp(-1)


def marginal_cross_entropy(student: Tensor, labels: Tensor, *, classes: int) -> Tensor:
    """−log Σ_s q[label, s], `[rows]`.

    Args:
        student: logits `[rows, classes · subclasses]`.
        labels: `[rows]` in `0 … classes − 1`.
    """
    check_labels("marginal_cross_entropy", labels, classes)
    log_q = marginal_logits(log_softmax(student, 1.0), classes)
    return checked("marginal_cross_entropy", -log_q.gather(-1, labels[:, None])[:, 0], student, None)
