"""Refinement of strategies: what was tried for a scenario, where it ends, and what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from understudy.curation.items import Item
from understudy.curation.strategies import Strategy, transcript

NOTHING = "NONE"
"""What a teacher writes where no further advice would help."""


class Scenario(Item):
    """A conversation up to a turn of the student, and what the student said."""

    conversation: tuple[dict[str, str], ...]
    answer: str
    type: str | None = None

    @property
    def text(self) -> str:
        """As the library and the prompts have it."""
        return transcript(self.conversation)


class Refinement(NamedTuple):
    """How the refinement of a strategy stands.

    Args:
        converged_at: the first refinement after which the student is as good as the teacher; −1 if none.
        best: the refinement with the best score up to there, the earliest on ties; 0 is the student without strategy.
        used: refinements up to the end.
    """

    converged_at: int
    best: int
    used: int


def refinement(teacher: float, student: Sequence[float], tolerance: float = 0.0) -> Refinement:
    """Where the refinement of a strategy stops, and which strategy is kept.

    Args:
        teacher: score of the teacher's answer. student: scores of the student's answers, `[0]` without a strategy and
            `[t]` with that of refinement `t`. tolerance: how much the student may be below the teacher.
    """
    converged_at = next((t for t, score in enumerate(student) if score >= teacher - tolerance), -1)
    end = converged_at if converged_at >= 0 else len(student) - 1
    best = max(range(end + 1), key=lambda t: student[t])  # `max` returns the first of equals
    return Refinement(converged_at, best, end)


@dataclass
class Attempt:
    """The refinement of one scenario's strategy.

    Args:
        scenario: what it is written for. answer: the teacher's. goal: its score. said: the student's last answer.
        scores: of the student's answers; `[0]` without a strategy. advice: strategies; `[0]` is none.
        ended: nothing more is to be asked.
    """

    scenario: Scenario
    answer: str
    goal: float
    said: str
    scores: list[float]
    advice: list[str] = field(default_factory=lambda: [""])
    ended: bool = False

    @property
    def slots(self) -> dict[str, str]:
        """For the prompt that asks the teacher for the next version."""
        last = self.advice[-1] or NOTHING
        return {"conversation": self.scenario.text, "student": self.said, "teacher": self.answer, "strategy": last}

    def state(self, tolerance: float) -> Refinement:
        """Of the scores so far."""
        return refinement(self.goal, self.scores, tolerance)

    def entry(self, tolerance: float, pending: bool) -> Strategy:
        """The best strategy, as an entry of the library that is pending or approved."""
        state = self.state(tolerance)
        return Strategy(
            scenario=self.scenario.text,
            strategy=self.advice[state.best],
            status="pending" if pending else "approved",
            score=self.scores[state.best],
            base_score=self.scores[0],
            teacher_score=self.goal,
            rounds=state.used,
            converged=state.converged_at >= 0,
            type=self.scenario.type,
            parents=(self.scenario.id,),
        )
