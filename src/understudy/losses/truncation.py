"""Divergences on the most probable classes, where both sides' logits are at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._kernels import alpha_beta_sum, kl, mix, tv
from understudy.losses._pairs import Truncation, bucketed, checked, pair
from understudy.targets import largest

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
    **options: float,
) -> Tensor:
    """A divergence on the k most probable classes of one side or of both, where both sides' logits are known.

    Ties go to the lowest class index. GKD truncates forward KL to the teacher's support, reverse KL to the student's,
    everything else to the union. Values `[rows]`, not reduced.
    """
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
    return checked(divergence, _KERNELS[divergence](log_p, log_q, **options), student, teacher)


def _on_support(log_x: Tensor, keep: Tensor, truncation: Truncation) -> Tensor:
    """As `bucketed`, for supports whose size differs from row to row: classes left out become −inf."""
    kept = log_x.masked_fill(~keep, -_INF)
    if truncation == "renorm":
        return torch.log_softmax(kept, dim=-1)
    width = torch.arange(log_x.shape[-1], device=log_x.device).expand_as(log_x)
    tail = bucketed(log_x.masked_fill(keep, -_INF), width[..., :0], "tail")
    return torch.cat([kept, tail], dim=-1)


_KERNELS: dict[str, Callable[..., Tensor]] = {
    "forward_kl": lambda p, q: kl(p, q),
    "reverse_kl": lambda p, q: kl(q, p),
    "total_variation": lambda p, q: tv(p, q),
    "jsd": lambda p, q, beta: beta * kl(p, mix(p, q, beta)) + (1 - beta) * kl(q, mix(p, q, beta)),
    "skew_kl": lambda p, q, alpha: kl(p, mix(p, q, alpha)),
    "skew_reverse_kl": lambda p, q, alpha: kl(q, mix(q, p, alpha)),
    "alpha_beta": lambda p, q, alpha, beta: alpha_beta_sum(p, q, alpha, beta),
}
