"""Architectures of students before any training: spaces of them, what they cost, scores, and a search."""

from understudy.architectures.candidates import Budget, Candidate, CandidateLog, Examiner, ranked
from understudy.architectures.correlation import Correlation, rank_correlation
from understudy.architectures.evolution import evolve
from understudy.architectures.scores import Semantic, TeacherSimilarity, jacobian_score, random_score, synflow_score
from understudy.architectures.space import Range, Space

__all__ = [
    "Budget",
    "Candidate",
    "CandidateLog",
    "Correlation",
    "Examiner",
    "Range",
    "Semantic",
    "Space",
    "TeacherSimilarity",
    "evolve",
    "jacobian_score",
    "random_score",
    "rank_correlation",
    "ranked",
    "synflow_score",
]
