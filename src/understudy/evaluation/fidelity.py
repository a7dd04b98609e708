"""Fidelity: how closely the student matches its teacher, and at which confidence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def by_confidence(confidence: Tensor, agree: Tensor, kl: Tensor) -> dict[str, list[Any]]:
    """Agreement and mean KL(teacher ‖ student) in bins of the student's confidence; `None` in empty ones."""
    edges = torch.tensor(EDGES[1:-1], dtype=confidence.dtype)
    which = torch.bucketize(confidence, edges)
    out: dict[str, list[Any]] = {"edges": list(EDGES), "agreement": [], "kl": [], "count": []}
    for i in range(len(EDGES) - 1):
        inside = which == i
        number = int(inside.sum())
        out["count"].append(number)
        out["agreement"].append(float(agree[inside].mean()) if number else None)
        out["kl"].append(float(kl[inside].mean()) if number else None)
    return out
