"""How far a student's hidden states are from a teacher's. Values `[rows]`, nothing is reduced."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import full

Distance = Literal["mse", "cosine", "l2", "l1"]


def hidden_distance(student: Tensor, teacher: Tensor, *, distance: Distance = "mse") -> Tensor:
    """Mean squared difference over units (FitNets, Eq. 2, divided by the width), 1 − cosine (DistilBERT), or a norm of it.

    The gradient of the norm `l2` is 0 where the states are equal.

    Args:
        student: `[rows, width]`, projected to the teacher's width. teacher: `[rows, width]`, never differentiated.

    Raises:
        InputError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"hidden_distance: the student's states are {list(student.shape)} and the teacher's {list(teacher.shape)}: project "
            "them to one width."
        )
    s, t = full(student), full(teacher.detach())
    if distance == "cosine":
        return 1 - F.cosine_similarity(s, t, dim=-1)
    if distance == "l2":
        return torch.linalg.vector_norm(s - t, dim=-1)
    return (s - t).abs().sum(-1) if distance == "l1" else (s - t).square().mean(-1)
