"""A teacher's preferences as advantages of single tokens, and their expectation under a student (paper 10).

Rows are tokens, classes the vocabulary. Nothing is reduced.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import checked, full, log_softmax

BOUND = math.log(1e7)
"""An advantage whose log-ratio is infinite: that of the probabilities 1 and 1e−7, as in the released code."""


def log_ratio_advantage(aligned: Tensor, reference: Tensor, *, beta: float = 1.0) -> Tensor:
    """A(a) = β (log π_aligned(a) − log π_reference(a)), `[rows, classes]`, without gradient.

    Its mean under π_aligned is β KL(π_aligned ‖ π_reference). 0 where both probabilities are 0; ±β ln 1e7 where one is.

    Args:
        aligned, reference: logits `[rows, classes]` of the teacher after and before its preference training.

    Source: ADPA (2025, arXiv 2502.17927), Eq. for A(s, a).
    """
    if aligned.shape != reference.shape:
        raise InputError(
            f"log_ratio_advantage: the aligned teacher gives {tuple(aligned.shape)} and its reference "
            f"{tuple(reference.shape)}. Choose models of one vocabulary."
        )
    ours, theirs = log_softmax(aligned.detach(), 1.0), log_softmax(reference.detach(), 1.0)
    checked("log_ratio_advantage", (ours.sum(-1) + theirs.sum(-1)), aligned, reference)
    never = (ours == -torch.inf) & (theirs == -torch.inf)
    return beta * (ours - theirs).masked_fill(never, 0.0).nan_to_num(posinf=BOUND, neginf=-BOUND)


def expected_advantage(student: Tensor, ids: Tensor, advantages: Tensor) -> Tensor:
    """Σ_a π(a) A(a) over the stored tokens a of each row, `[rows]`: to be raised. Other tokens count as A = 0.

    With every token stored it is exact, and the gradient with respect to the logits is π (A − E_π[A]).

    Args:
        student: logits `[rows, classes]`.
        ids: `[rows, k]`, int64, distinct.
        advantages: A in nats, `[rows, k]`, not differentiated.

    Source: ADPA (2025, arXiv 2502.17927), Eq. for L_ADPA.
    """
    p = log_softmax(student, 1.0).exp().gather(-1, ids)
    values = (p * full(advantages.detach()).to(p.dtype)).sum(-1)
    return checked("expected_advantage", values, student, None)
