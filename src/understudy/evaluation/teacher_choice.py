"""Choosing a teacher by what its traces do to a student."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from understudy.curation.traces import TeacherTrial
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


def trial_notes(trials: Sequence[TeacherTrial], decided: bool) -> list[str]:
    """What a reader of the choice must know."""
    notes = [
        f"{t.role} answered {t.answered:.0%} of the smoke questions as required: its students had less to learn from."
        for t in trials
        if t.answered < 0.5
    ]
    if not decided:
        notes.append(
            "The smoke test is undecided: its students do not differ by more than two standard errors. Raise "
            "options.smoke_questions, smoke_steps or smoke_runs."
        )
    return notes


def trial_metrics(trials: Sequence[TeacherTrial], best: int) -> dict[str, float]:
    """Place and own accuracy of the chosen teacher, and the token entropy of each one's traces as `NAME_entropy`."""
    entropies = {f"{t.role.partition('.')[2]}_entropy": t.entropy for t in trials if t.entropy is not None}
    return {"chosen_teacher": float(best), "chosen_teacher_accuracy": trials[best].accuracy, **entropies}


def trial_table(trials: Sequence[TeacherTrial], best: int) -> dict[str, Any]:
    """The teachers side by side; nothing but their students' accuracy is chosen by."""
    headings = "teacher, its student, itself, traces, questions answered, tokens a trace, entropy, shift of the student"
    rows = []
    for i, t in enumerate(trials):
        values = (sum(t.accuracies) / len(t.accuracies), t.accuracy)
        more = ("–" if v is None else f"{v:.3g}" for v in (t.tokens, t.entropy, t.shift))
        chosen = f"{t.role} (chosen)" if i == best else t.role
        rows.append([chosen, *(f"{v:.3f}" for v in values), t.traces, f"{t.answered:.3f}", *more])
    return {"title": "Teachers by what their traces teach", "headings": headings.split(", "), "rows": rows}
