"""Divergences restricted to the most probable classes, where both sides' logits are known."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from understudy.errors import InputError, nearest
from understudy.losses import divergences
from understudy.losses._pairs import Truncation, bucketed, checked, pair
from understudy.targets import largest

NAMES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "alpha_beta")

_INF = float("inf")


def truncate(
    divergence: str,
    student: Tensor,
    teacher: Tensor,
    k: int,
    *,
    support: Literal["teacher", "student", "union"] = "teacher",
    truncation: Truncation = "tail",
    temperature: float = 1.0,
    tau_squared: bool = False,
    **options: float,
) -> Tensor:
    """A divergence on the k most probable classes of one side or of both, with both sides' logits known.

    Ties go to the lowest class index. GKD truncates forward KL to the teacher's support, reverse KL to the student's,
    and all others to the union. Values `[rows]`, not reduced.

    Args:
        divergence: name of a function of `losses.divergences`.
        options: its options (`beta`, `alpha`).
        student, teacher: logits `[rows, classes]`.
        k: number of classes per side; at least `classes` keeps all.
        support: whose classes are kept.
        tau_squared: multiply by temperature².

    Raises:
        InputError: an unknown divergence or support, k below 1, or an error of the divergence itself.
    """
    if divergence not in NAMES:
        raise InputError(f"truncate: unknown divergence {divergence!r}.{nearest(divergence, NAMES)}")
    if support not in ("teacher", "student", "union"):
        raise InputError(f"truncate: support is {support!r} and must be teacher, student or union.")
    if k < 1:
        raise InputError(f"truncate: k is {k} and must be at least 1.")
    log_q, log_p = pair("truncate", student, teacher, temperature, truncation)
    if support != "union":
        side = log_p if support == "teacher" else log_q
        ids = largest(side.detach(), k)
        if k < student.shape[-1]:
            log_q, log_p = bucketed(log_q, ids, truncation), bucketed(log_p, ids, truncation)
    elif k < student.shape[-1]:
        keep = torch.zeros_like(log_p, dtype=torch.bool)
        for log_x in (log_p, log_q):
            ids = largest(log_x.detach(), k)
            keep = keep.scatter(-1, ids, True)
        log_q, log_p = (_on_support(x, keep, truncation) for x in (log_q, log_p))
    # In a row that is not a distribution only sums are nan, so the check uses its logits and not those of its buckets.
    checked(f"truncated {divergence}", log_q.detach().sum(-1) + log_p.sum(-1), student, teacher)
    kept: Tensor = getattr(divergences, divergence)(log_q, log_p, **options)  # log-probabilities are logits
    return kept * temperature**2 if tau_squared else kept


def _on_support(log_x: Tensor, keep: Tensor, truncation: Truncation) -> Tensor:
    """As `bucketed`, for supports whose size differs between rows: classes outside become −inf."""
    kept = log_x.masked_fill(~keep, -_INF)
    if truncation == "renorm":
        return torch.log_softmax(kept, dim=-1)
    width = torch.arange(log_x.shape[-1], device=log_x.device).expand_as(log_x)
    tail = bucketed(log_x.masked_fill(keep, -_INF), width[..., :0], "tail")
    return torch.cat([kept, tail], dim=-1)
