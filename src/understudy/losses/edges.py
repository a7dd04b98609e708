"""Losses over the edges of a graph, one value per edge. Nothing is reduced.

Edges are `[2, edges]`, int64, with each undirected edge in both directions; row 0 is the student's node i, row 1 the
teacher's node j. `student` and `teacher` are logits `[nodes, classes]`; the teacher is never differentiated. Values are
in nats, in float32 at least. A mean over edges weights a node by its degree.
Source: Wu et al. 2023 (FF-G2M), the factorised losses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._kernels import kl
from understudy.losses._pairs import full, log_softmax

INTEGERS = (torch.int64, torch.int32)


def low_frequency(student: Tensor, teacher: Tensor, edges: Tensor) -> Tensor:
    """KL(softmax h_j ‖ softmax z_i) for each edge (i, j), `[edges]`; `edges` includes self-loops.

    The optimal softmax z_i is the mean of the teacher's distributions over i and its neighbours. A constant added to
    the logits of one node changes nothing.
    """
    _check("low_frequency", student, teacher, edges)
    log_q, log_p = log_softmax(student, 1.0)[edges[0]], log_softmax(teacher.detach(), 1.0)[edges[1]]
    return _finite("low_frequency", kl(log_p, log_q), student, teacher, edges)


def high_frequency(student: Tensor, teacher: Tensor, edges: Tensor, *, tau: float = 1.5) -> Tensor:
    """KL(softmax v ‖ softmax u) with u = |z_i − z_j| / τ and v = |h_i − h_j| / τ, `[edges]`; without self-loops.

    It reads raw logits: a constant added to all nodes changes nothing, one added to a single node does. |·| has the
    subgradient 0 where z_i = z_j. τ → ∞: 0.
    """
    log_q, log_p = _differences("high_frequency", student, teacher, edges, tau)
    return _finite("high_frequency", kl(log_p, log_q), student, teacher, edges)


def high_frequency_cosine(student: Tensor, teacher: Tensor, edges: Tensor, *, tau: float = 1.5) -> Tensor:
    """Cosine between softmax u and softmax v of `high_frequency`, `[edges]`: 1 where student and teacher differ along
    the edge in the same way."""
    log_q, log_p = _differences("high_frequency_cosine", student, teacher, edges, tau)
    return torch.cosine_similarity(log_q.exp(), log_p.exp(), dim=-1)


def check_edges(name: str, edges: Tensor, nodes: int) -> None:
    """Raise an error for edges of another shape or type, and for the first edge with a node index out of range."""
    if edges.dim() != 2 or edges.shape[0] != 2 or edges.dtype not in INTEGERS:
        raise InputError(
            f"{name}: edges are {edges.dtype} {tuple(edges.shape)}; give whole numbers (int64, int32) of shape (2, edges)."
        )
    if edges.shape[1] == 0:
        return
    low, high = torch.aminmax(edges)
    if low < 0 or high >= nodes:
        wrong = int(((edges < 0) | (edges >= nodes)).any(0).nonzero()[0, 0])
        raise InputError(
            f"{name}: edge {wrong} is {edges[:, wrong].tolist()} and the nodes are 0 … {nodes - 1}. Check the edge list."
        )


def _differences(name: str, student: Tensor, teacher: Tensor, edges: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    _check(name, student, teacher, edges)
    if not tau > 0:
        raise InputError(f"{name}: tau is {tau} and must be above 0.")
    i, j = edges
    z, h = full(student), full(teacher.detach())
    return log_softmax((z[i] - z[j]).abs(), tau), log_softmax((h[i] - h[j]).abs(), tau)


def _check(name: str, student: Tensor, teacher: Tensor, edges: Tensor) -> None:
    if student.dim() != 2 or student.shape != teacher.shape:
        raise InputError(
            f"{name}: the student's logits are {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; both "
            "must be [nodes, classes] of one graph and one class set."
        )
    if student.shape[1] < 2:
        raise InputError(f"{name}: there is {student.shape[1]} class; at least 2 are needed.")
    check_edges(name, edges, len(student))


def _finite(name: str, values: Tensor, student: Tensor, teacher: Tensor, edges: Tensor) -> Tensor:
    """Raise an error for nan, naming the side and the node."""
    if not torch.isnan(values).any():
        return values
    edge = int(torch.isnan(values).nonzero()[0, 0])
    for side, logits in (("student", student), ("teacher", teacher)):
        for node in edges[:, edge].tolist():
            if not torch.isfinite(logits[node]).all():
                raise InputError(f"{name}: the {side}'s logits of node {node} are not finite.")
    raise InputError(f"{name}: edge {edge} has no defined value.")
