"""What a teacher says, as typed values. A loss states which of them it accepts."""

from understudy.targets.types import Dense, Projected, Sampled, Scores, Target, Text, TopK, sample, top_k

__all__ = ["Dense", "Projected", "Sampled", "Scores", "Target", "Text", "TopK", "sample", "top_k"]
