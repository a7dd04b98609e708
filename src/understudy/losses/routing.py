"""Several sources of logits for each example: mutual distillation, distillation from the routed ones, balance of the routing.

Values are per row and not reduced. A *way* is one source that an example can be routed to.
Source: MST-Distill (arXiv 2507.07015) and its released code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._kernels import kl
from understudy.losses._pairs import check_temperature, checked, full, log_softmax
from understudy.losses.divergences import forward_kl

SMALLEST = 1e-12
"""Least mean probability of a way whose logarithm is taken."""


def mutual_kl(logits: Tensor, *, temperature: float = 4.0, detach: bool = False) -> Tensor:
    """Σ over the other models v of τ² KL(p_v ‖ p_u) for each model u, `[models, rows]`, in nats.

    The sum over models is symmetric in them, and 0 with gradient 0 where all agree.

    Args:
        logits: `[models, rows, classes]`.
        temperature: τ, of both softmaxes.
        detach: a model gets a gradient from its own terms only; otherwise also from those in which it is the source.

    Raises:
        InputError: not three axes, or a row that is no distribution.

    Source: stage 1 of MST-Distill, where neither side is detached.
    """
    check_temperature("mutual_kl", temperature)
    if logits.dim() != 3:
        raise InputError(f"mutual_kl: logits are {tuple(logits.shape)} and must be [models, rows, classes].")
    log_q = log_softmax(logits, temperature)
    log_p = log_q.detach() if detach else log_q
    found = []
    for u in range(len(logits)):
        others = [kl(log_p[v], log_q[u]) for v in range(len(logits)) if v != u]
        values = torch.stack(others).sum(0) if others else log_q[u].sum(-1) * 0
        found.append(checked("mutual_kl", temperature**2 * values, logits[u], None))
    return torch.stack(found)


def kl_by_way(student: Tensor, ways: Tensor, *, temperature: float = 4.0) -> Tensor:
    """τ² KL(p_w ‖ q) of each way w, `[rows, ways]`, in nats. The ways get no gradient.

    Args:
        student: logits of q `[rows, classes]`.
        ways: logits of p `[ways, rows, classes]`.
        temperature: τ, of both softmaxes. The gradient of a value is τ (softmax(student/τ) − softmax(way/τ)).

    Raises:
        InputError: the shapes do not fit, or a row is no distribution.
    """
    if ways.dim() != 3 or ways.shape[1:] != student.shape:
        raise InputError(
            f"kl_by_way: the ways are {tuple(ways.shape)} and the student {tuple(student.shape)}: give [ways, rows, classes] "
            "and [rows, classes]."
        )
    return torch.stack([forward_kl(student, way, temperature=temperature, tau_squared=True) for way in ways], 1)


def top_ways(probabilities: Tensor, k: int) -> Tensor:
    """The k most probable ways of each row, `[rows, k]`, int64, best first; the lowest index wins where two are equal.

    Args:
        probabilities: `[rows, ways]`. k: from 1 to the number of ways.
    """
    if not 1 <= k <= probabilities.shape[1]:
        raise InputError(f"top_ways: k is {k} and must lie in 1 … {probabilities.shape[1]}, the number of ways.")
    return probabilities.detach().argsort(dim=1, descending=True, stable=True)[:, :k]


def balance(probabilities: Tensor, *, mode: Literal["kl", "cv"] = "kl") -> Tensor:
    """How unevenly a group of rows uses the ways, with p̄ the mean of its rows: one value, which each row gets, `[rows]`.

    `kl`: 1/W Σ_w 1/W (log 1/W − log p̄_w), the KL from uniform divided by W. `cv`: standard deviation (unbiased) of p̄ over its
    mean. Both are 0 if p̄ is uniform, and for one way.

    Args:
        probabilities: `[rows, ways]`; all rows are coupled. log p̄ is cut off at log 1e-12.

    Source: the load balance of MST-Distill's stage 3.
    """
    rows, ways = probabilities.shape
    p = full(probabilities)
    if rows == 0 or ways == 1:
        return p.sum(1) * 0
    mean = p.mean(0)
    if mode == "cv":
        value = mean.std() / mean.mean()
    else:
        value = ((1 / ways) * (-mean.clamp(min=SMALLEST).log() - torch.tensor(float(ways)).to(mean).log())).sum() / ways
    return value.expand(rows)
