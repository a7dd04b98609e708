"""A few numbers per row, computed tile by tile, so that evaluation never holds `[rows, classes]`."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from understudy.losses import forward_kl
from understudy.streaming import logits_of
from understudy.targets import Dense, Mixture, Projected

TILE_BYTES = 6 * 2**20
"""Of `[tile rows, classes]` in float32; statistics hold about eight of them in float64."""


@dataclass
class RowStatistics:
    """Statistics per row, `[rows]` each. The teacher's are nan without a teacher.

    Args:
        nll: −log q[label], nats.
        correct: whether the student's top class is the label.
        confidence: the probability of the student's top class.
        teacher_nll, teacher_correct: the same for the teacher.
        agree: whether both have the same top class.
        kl: KL(p ‖ q), nats.
    """

    nll: Tensor
    correct: Tensor
    confidence: Tensor
    teacher_nll: Tensor
    teacher_correct: Tensor
    agree: Tensor
    kl: Tensor

    @classmethod
    def join(cls, parts: list[RowStatistics]) -> RowStatistics:
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)))


@torch.no_grad()
def row_statistics(
    student: Dense | Projected | Mixture,
    teacher: Dense | Projected | Mixture | None,
    labels: Tensor,
    tile_bytes: int = TILE_BYTES,
) -> RowStatistics:
    """Compute the statistics of each row.

    Args:
        student, teacher: outputs for the same rows.
        labels: `[rows]`.
    """
    tile = max(1, tile_bytes // (4 * student.classes))
    parts = []
    for start in range(0, max(1, len(labels)), tile):
        part = slice(start, start + tile)
        q, y = _logits(student, part), labels[part]
        log_q = torch.log_softmax(q.double(), -1)
        confidence, top = log_q.max(-1)
        values = [-log_q.gather(-1, y[:, None])[:, 0], (top == y).double(), confidence.exp()]
        if teacher is None:
            values += [torch.full_like(values[0], float("nan"))] * 4
        else:
            p = _logits(teacher, part)
            log_p = torch.log_softmax(p.double(), -1)
            mode = log_p.argmax(-1)
            values += [-log_p.gather(-1, y[:, None])[:, 0], (mode == y).double(), (mode == top).double()]
            values.append(forward_kl(q.double(), p.double()) if len(y) else values[0])
        parts.append(RowStatistics(*(v.cpu() for v in values)))
    return RowStatistics.join(parts)


def _logits(signal: Dense | Projected | Mixture, part: slice) -> Tensor:
    return logits_of(signal.select(part))
