"""Choosing a teacher by what its corpus does to a student."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from understudy.errors import InputError


class TeacherChoice(NamedTuple):
    """The teacher whose students are best.

    Args:
        best: its position. means: of the students of each teacher. spread: best mean − worst mean. error: its standard error.
    """

    best: int
    means: list[float]
    spread: float
    error: float

    @property
    def decided(self) -> bool:
        """Whether the students differ by more than two standard errors; otherwise the choice is noise."""
        return self.spread > 2 * self.error


def choose_teacher(accuracies: Sequence[Sequence[float]], questions: int) -> TeacherChoice:
    """The teacher with the largest mean accuracy of its students; of equals the first.

    Args:
        accuracies: `[teachers][runs]`, of a student of each run on the same questions. questions: how many these are.

    The standard error has the part of a finite number of questions and, with several runs, that of the runs.

    Raises:
        InputError: no teacher, no run, or not the same number of runs.

    Source: DED (2025), teacher selection by a smoke test.
    """
    if not accuracies or not all(len(runs) == len(accuracies[0]) > 0 for runs in accuracies) or questions < 1:
        raise InputError(
            f"{len(accuracies)} teachers have {[len(runs) for runs in accuracies]} scores on {questions} questions: give each "
            "as many, at least one."
        )
    table = np.asarray(accuracies, np.float64)
    means, runs = table.mean(1), table.shape[1]
    variances = means * (1 - means) / questions + (table.var(1, ddof=1) / runs if runs > 1 else 0.0)
    best, worst = int(means.argmax()), int(means.argmin())
    error = math.sqrt(variances[best] + variances[worst])
    return TeacherChoice(best, means.tolist(), float(means[best] - means[worst]), error)
