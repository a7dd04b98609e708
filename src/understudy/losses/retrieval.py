"""Losses on the scores of documents, for distilling rankers. One value per row, nothing is reduced.

Score vectors must have the same shape: `[rows, 1]` against `[rows]` would silently broadcast to `[rows, rows]`. Scores
are relevance without a unit. Everything is computed in float32 at least, since dot products reach hundreds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import full, softplus

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class PairSums(NamedTuple):
    """A loss over several pairs per row.

    Args:
        sums: `[rows]`, sum over the row's valid pairs; 0 if there is none.
        counts: `[rows]`, number of valid pairs. The mean over pairs is `sums.sum() / counts.sum()`.
    """

    sums: Tensor
    counts: Tensor


def margin_mse(s_pos: Tensor, s_neg: Tensor, t_pos: Tensor, t_neg: Tensor) -> Tensor:
    """((s⁺ − s⁻) − (t⁺ − t⁻))². Source: Hofstätter et al. 2020, Section 3.1.

    Args:
        s_pos, s_neg: the student's scores of the relevant and the other document, `[rows]`.
        t_pos, t_neg: the teacher's, `[rows]`, detached here.

    Returns:
        `[rows]`.

    Limits: 0 iff the margins agree, so a constant a query on either side changes nothing; exchanging the two documents
    changes nothing; at most 2 · ((s⁺ − t⁺)² + (s⁻ − t⁻)²). Not invariant to the teacher's scale.
    """
    s_pos, s_neg, t_pos, t_neg = _same("margin_mse", s_pos=s_pos, s_neg=s_neg, t_pos=t_pos, t_neg=t_neg)
    return ((s_pos - s_neg) - (t_pos - t_neg)).square()


def margin_mse_all_pairs(
    s_pos: Tensor,
    s_neg: Tensor,
    t_pos: Tensor,
    t_neg: Tensor,
    *,
    positives: Tensor | None = None,
    negatives: Tensor | None = None,
) -> PairSums:
    """Squared difference of margins over every pair of a positive and a negative in its row.

    Args:
        s_pos, t_pos: `[rows, positives]`.
        s_neg, t_neg: `[rows, negatives]`.
        positives, negatives: bool masks of the same shapes; all valid if not given. Masked entries may hold any value.

    With one positive and one negative it is `margin_mse`.
    """
    name = "margin_mse_all_pairs"
    s_pos, t_pos = _same(name, s_pos=s_pos, t_pos=t_pos)
    s_neg, t_neg = _same(name, s_neg=s_neg, t_neg=t_neg)
    if s_pos.dim() != 2 or s_neg.dim() != 2 or len(s_pos) != len(s_neg):
        raise InputError(
            f"{name}: positives are {_shape(s_pos)} and negatives {_shape(s_neg)}; give [rows, positives] and [rows, negatives]."
        )
    valid = _mask(name, positives, s_pos)[:, :, None] & _mask(name, negatives, s_neg)[:, None, :]
    valid = F.pad(valid, (s_pos.shape[1], 0, 0, s_neg.shape[1]))
    return over_pairs(margin_mse, torch.cat([s_pos, s_neg], 1), torch.cat([t_pos, t_neg], 1), valid)


def over_pairs(loss: PairLoss, student: Tensor, teacher: Tensor, valid: Tensor) -> PairSums:
    """A loss of (s⁺, s⁻, t⁺, t⁻) summed over the pairs of candidates of each row.

    Args:
        student, teacher: scores `[rows, candidates]`. Candidates without a pair may hold any value.
        valid: `[rows, candidates, candidates]`, bool: `(b, i, j)` is True if i is the positive and j the negative of a
            pair.
    """
    row, i, j = valid.nonzero(as_tuple=True)
    values = loss(student[row, i], student[row, j], teacher[row, i], teacher[row, j])
    return PairSums(values.new_zeros(len(student)).index_add(0, row, values), valid.sum((1, 2)))


def pointwise_mse(s_pos: Tensor, s_neg: Tensor, t_pos: Tensor, t_neg: Tensor) -> Tensor:
    """½ ((s⁺ − t⁺)² + (s⁻ − t⁻)²): the scores themselves. Arguments as `margin_mse`; `[rows]`."""
    s_pos, s_neg, t_pos, t_neg = _same("pointwise_mse", s_pos=s_pos, s_neg=s_neg, t_pos=t_pos, t_neg=t_neg)
    return ((s_pos - t_pos).square() + (s_neg - t_neg).square()) / 2


def ranknet(s_pos: Tensor, s_neg: Tensor) -> Tensor:
    """−log σ(s⁺ − s⁻), from labels alone. Source: Burges et al. 2005, Eq. 3 with a target of 1. `[rows]`, or any shape."""
    s_pos, s_neg = _same("ranknet", s_pos=s_pos, s_neg=s_neg)
    return softplus(-(s_pos - s_neg))


def weighted_ranknet(s_pos: Tensor, s_neg: Tensor, t_pos: Tensor, t_neg: Tensor, *, clamp: bool = False) -> Tensor:
    """(t⁺ − t⁻) · softplus(−(s⁺ − s⁻)). Arguments as `margin_mse`; `[rows]`.

    Where the teacher prefers the negative the value is negative and without a lower bound, as in the authors' code.

    Args:
        clamp: take 0 for a negative margin of the teacher.
    """
    s_pos, s_neg, t_pos, t_neg = _same("weighted_ranknet", s_pos=s_pos, s_neg=s_neg, t_pos=t_pos, t_neg=t_neg)
    margin = t_pos - t_neg
    return (margin.clamp(min=0) if clamp else margin) * softplus(-(s_pos - s_neg))


def ordered_pairs(labels: Tensor, mask: Tensor) -> Tensor:
    """`[rows, candidates, candidates]`: whether candidate i has a higher label than j and both are valid.

    Args:
        labels, mask: `[rows, candidates]`.
    """
    return (labels[:, :, None] > labels[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def ensemble(scores: Tensor, *, spreads: Tensor | None = None) -> Tensor:
    """The arithmetic mean of several teachers' raw scores (Hofstätter et al. 2020, Section 4.2).

    Args:
        scores: `[teachers, ...]`.
        spreads: `[teachers]`, the standard deviation of each teacher's margins. If given, each teacher's scores are
            divided by its own and the mean is multiplied by the mean of them, so that no teacher dominates by its
            scale. Not in the paper.
    """
    scores = full(scores)
    if spreads is None:
        return scores.mean(0)
    spreads = full(spreads).to(scores)
    if not bool((spreads > 0).all()):
        raise InputError("ensemble: a teacher's margins are all alike, so they cannot be standardised. Leave it out.")
    shape = (-1,) + (1,) * (scores.dim() - 1)
    return (scores / spreads.view(shape)).mean(0) * spreads.mean()


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def _same(name: str, **scores: Tensor) -> list[Tensor]:
    """Check that all have one shape; convert to float32 at least and detach the teacher's."""
    (first, wanted), *rest = scores.items()
    for other, value in rest:
        if value.shape != wanted.shape:
            raise InputError(
                f"{name}: {first} is {_shape(wanted)} and {other} {_shape(value)}. Give one shape: squeeze the extra axis."
            )
    return [full(v.detach() if n.startswith("t_") else v) for n, v in scores.items()]


def _mask(name: str, mask: Tensor | None, scores: Tensor) -> Tensor:
    if mask is None:
        return torch.ones_like(scores, dtype=torch.bool)
    if mask.shape != scores.shape:
        raise InputError(f"{name}: a mask is {_shape(mask)} and its scores {_shape(scores)}. Give one shape.")
    return mask.bool()
