"""Two heads on one backbone, mixed after training: a head that learned from labels, one that learned from a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._kernels import mix
from understudy.losses._pairs import log_softmax, unit
from understudy.losses.classification import check_labels

ALPHAS = tuple(i / 20 for i in range(21))
BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)


class Mixing(NamedTuple):
    """The best of a grid of mixtures.

    Args:
        alpha, beta: of the best, the first one where several are. accuracy: its own, in percent.
        grid: accuracies `[betas, alphas]`, float64, in percent.
    """

    alpha: float
    beta: float
    accuracy: float
    grid: Tensor


def cosine_logits(features: Tensor, weight: Tensor, bias: Tensor | None = None, *, scale: float = 100.0) -> Tensor:
    """scale · W (x / ‖x‖) + b, `[..., classes]`: a linear layer on features of one length, as a vision-language model has.

    With rows of W of length 1 and without b it is scale times a cosine. Features of norm 0 give b.

    Args:
        features: x, `[..., width]`. weight: W, `[classes, width]`. bias: b, `[classes]`. scale: 100 in CLIP.

    Source: DHO (paper 23), the aligned head of the teacher; it is as released.
    """
    return F.linear((scale * unit(features)).to(weight.dtype), weight, bias)


def mixed_log_probabilities(ce: Tensor, kd: Tensor, *, alpha: float, beta: float) -> Tensor:
    """log(α softmax(ce) + (1 − α) softmax(kd / β)), `[..., classes]`. Probabilities are mixed, not logits.

    Args:
        ce, kd: logits `[..., classes]` of the head of labels and that of the teacher. alpha: in [0, 1]. beta: above 0.

    Raises:
        InputError: shapes that differ, or a weight or temperature outside its range.

    Source: DHO (paper 23), inference; it is as released.
    """
    _check_mixture(ce, kd, alpha, beta)
    ours, theirs = log_softmax(ce, 1.0), log_softmax(kd, beta)
    return theirs if alpha == 0 else ours if alpha == 1 else mix(ours, theirs, alpha)


def _check_mixture(ce: Tensor, kd: Tensor, alpha: float, beta: float) -> None:
    if ce.shape != kd.shape:
        raise InputError(
            f"Heads of {tuple(ce.shape)} and {tuple(kd.shape)} cannot be mixed: give them the same classes."
        )
    if not 0 <= alpha <= 1 or not beta > 0:
        raise InputError(f"A mixture has alpha in [0, 1] and beta above 0, and these are {alpha} and {beta}.")


def best_mixing(
    ce: Tensor, kd: Tensor, labels: Tensor, *, alphas: Sequence[float] = ALPHAS, betas: Sequence[float] = BETAS
) -> Mixing:
    """The α and β of highest accuracy, on examples that neither head was trained on.

    Every β in order, and for each every α; a later pair replaces the best so far if it is strictly better.

    Args:
        ce, kd: logits `[examples, classes]`. labels: `[examples]`.

    Raises:
        InputError: no examples, or a label outside the classes.
    """
    if not len(labels):
        raise InputError("There are no examples to choose the mixture of two heads on.")
    check_labels("best_mixing", labels, ce.shape[-1])
    rows = []
    ours = ce.double().softmax(-1)  # of saturated heads log-probabilities would break ties by their rounding
    for beta in betas:
        for alpha in alphas:
            _check_mixture(ce, kd, alpha, beta)
        theirs = (kd.double() / beta).softmax(-1)
        found = [(alpha * ours + (1 - alpha) * theirs).argmax(-1) for alpha in alphas]
        rows.append(torch.stack([(p == labels).double().mean() for p in found]) * 100)
    grid = torch.stack(rows)
    place = int(grid.flatten().argmax())  # the first of the largest
    row, column = divmod(place, len(alphas))
    return Mixing(alphas[column], betas[row], float(grid.flatten()[place]), grid)
