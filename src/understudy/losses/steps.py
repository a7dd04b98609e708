"""Answers of several steps: what is said of tokens pooled by step, rewards of weighted steps, and ranking by pairs (paper 24).

Arrays are `[lists, candidates]` or `[lists, candidates, steps]`; what a list or an answer does not have may hold anything.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import full, softplus

StepWeights = Literal["adaptive", "one_minus_cos", "uniform"]


def pool_steps(values: Tensor, cell: Tensor, cells: int, *, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
    """The mean or sum over the tokens of each step, `[cells, …]`, in float32 at least; 0 where a cell has none.

    Args:
        values: `[tokens, …]`.
        cell: `[tokens]`, the step that each token belongs to, counted over all answers; −1 belongs to none.
    """
    kept, values = cell >= 0, full(values)
    sums = values.new_zeros(cells, *values.shape[1:]).index_add(0, cell[kept], values[kept])
    if reduce == "sum":
        return sums
    number = torch.bincount(cell[kept], minlength=cells).clamp(min=1)
    return sums / number.view(-1, *[1] * (values.dim() - 1))


def step_weights(embeddings: Tensor, present: Tensor, anchor: Tensor, *, how: StepWeights = "adaptive") -> Tensor:
    """w of each step, `[lists, candidates, steps]`, without gradient.

    `adaptive`: 1 + cos(e_i, e_0) in [0, 2], e_0 being the same step of the best answer; `one_minus_cos`: 1 − cos; `uniform`: 1.
    0 where the answer or the best one lacks the step; a zero embedding has the cosine 0.

    Args:
        embeddings: e, the mean hidden state of the step's tokens, `[lists, candidates, steps, width]`.
        present: `[lists, candidates, steps]`, which steps an answer has.
        anchor: `[lists]`, the best answer.

    Source: TPO (2024, arXiv 2410.12854), adaptive step reward, as in its released code.
    """
    rows = torch.arange(len(anchor), device=anchor.device)
    both = present & present[rows, anchor][:, None]
    if how == "uniform":
        return both.to(full(embeddings).dtype)
    e = full(embeddings.detach()).masked_fill(~present[..., None], 0.0)
    cosine = F.cosine_similarity(e, e[rows, anchor][:, None].expand_as(e), dim=-1)
    weights = 1 + cosine if how == "adaptive" else 1 - cosine
    return torch.where(both & (weights > 8 * torch.finfo(e.dtype).eps), weights, 0.0)  # opposite vectors, to rounding


def step_reward(log_ratios: Tensor, weights: Tensor) -> Tensor:
    """Σ_t w_t ρ_t / Σ_t w_t of each answer, `[lists, candidates]`; 0 where all weights are 0.

    Args:
        log_ratios: ρ, log π − log π_ref of each step. weights: w, not differentiated. Both `[lists, candidates, steps]`.
    """
    w, log_ratios = weights.detach(), full(log_ratios)
    total = w.sum(-1)
    weighted = (w * log_ratios.masked_fill(w == 0, 0.0)).sum(-1)
    return weighted / torch.where(total == 0, 1.0, total)


def lambda_rank(
    rewards: Tensor,
    grades: Tensor,
    *,
    beta: float = 0.5,
    mask: Tensor | None = None,
    weighted: bool = True,
    divide_by: Literal["none", "pairs", "lambda"] = "none",
) -> Tensor:
    """Σ over pairs with g_i > g_j of λ_ij softplus(−β (R_i − R_j)): `[lists]`; 0 where no pair is ordered.

    λ_ij = |G_i − G_j| · |1 / ln(1 + τ_i) − 1 / ln(1 + τ_j)|, G = 2^g − 1, τ the rank by R from 1 on (the first of equals goes
    first); no gradient flows through it. At R = 0 it is ln 2 · Σ λ. A constant added to all R of a list changes nothing.

    Args:
        rewards: R. grades: g in [0, 1]. Both `[lists, candidates]`.
        mask: which candidates there are. weighted: false for λ = 1.
        divide_by: the number of ordered pairs, or the sum of their λ.

    Raises:
        InputError: beta is not positive, or a grade lies outside [0, 1].

    Source: LiPO-λ (Liu et al. 2024, Eq. 9); TPO (2024, arXiv 2410.12854).
    """
    if not beta > 0:
        raise InputError(f"lambda_rank: beta is {beta} and must be positive.")
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    rewards, grades = full(rewards).masked_fill(~mask, 0.0), grades.masked_fill(~mask, 0.0)
    wrong = (~((grades >= 0) & (grades <= 1))).nonzero()
    if len(wrong):
        row, i = wrong[0].tolist()
        raise InputError(
            f"lambda_rank: candidate {i} of list {row} has the grade {float(grades[row, i])}: give [0, 1]."
        )
    ordered = (grades[:, :, None] > grades[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    factor = ordered.to(rewards.dtype) * (lambdas(rewards, grades, mask) if weighted else 1.0)
    values = (factor * softplus(-beta * (rewards[:, :, None] - rewards[:, None, :]))).sum((1, 2))
    if divide_by == "none":
        return values
    total = (factor if divide_by == "lambda" else ordered).sum((1, 2))
    return values / torch.where(total == 0, 1, total)


def lambdas(rewards: Tensor, grades: Tensor, mask: Tensor) -> Tensor:
    """λ of every two candidates, `[lists, candidates, candidates]`, without gradient; as in `lambda_rank`."""
    discount = 1 / torch.log1p(ranks(rewards, mask).to(rewards.dtype))
    gain = torch.exp2(grades.to(rewards.dtype)) - 1
    return (gain[:, :, None] - gain[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()


def ranks(rewards: Tensor, mask: Tensor) -> Tensor:
    """τ of each candidate by its reward, `[lists, candidates]`: 1 for the largest, the first of equals goes first, and what
    there is not goes last."""
    order = rewards.detach().masked_fill(~mask, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return order.argsort(-1) + 1
