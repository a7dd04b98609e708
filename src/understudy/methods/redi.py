"""28. REDI: Reinforcement Distillation from a teacher's correct and wrong traces (2025, arXiv 2505.24850).

First supervised training on the correct traces y_w. Then, on the problems that have a wrong trace y_l too and without a
reference, the likelihood of a token of y_w is raised and that of a token of y_l lowered:

    loss = −log π(y_w | x) / |y_w| + α log π(y_l | x) / |y_l|,    0 ≤ α ≤ 1
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from understudy import InputError
from understudy.data import Batch, ListBatch, TextSet
from understudy.losses import signed_likelihood
from understudy.training import CollapseMonitored, ModelOutput, Phase, Requirements, SetupContext, Term, TrainState


class REDI(CollapseMonitored):
    """Supervised training on correct traces, then an asymmetric objective on correct and wrong ones."""

    name = "redi"
    paper = 28
    kinds = frozenset({"preference"})
    cost = "first phase: one student forward and backward a correct trace; second: two a pair; no reference"
    page: ClassVar[dict[str, str]] = {
        "when": "Several traces of a teacher for each problem, scored right or wrong by a checker.",
        "not": "Without supervised training first, or at its learning rate: the second loss has no lower bound and the "
        "likelihood of both sides falls (`collapse_monitor` watches it). Judge by the task's accuracy.",
        "deviations": "A list is one problem: its best and its worst trace are y_w and y_l, where the paper draws one. The "
        "second phase gets a share of the run's steps in place of one epoch, and the recipe's schedule.",
    }

    alpha: float = Field(0.8, ge=0, le=1, description="Weight of the wrong trace; 1 weighs both sides alike.")
    gamma: float = Field(0.0, ge=0, description="`negw`: wrong traces count e^(γ · mean log-probability) times.")
    mask_common_prefix: bool = Field(
        False, description="Do not lower the tokens that a wrong trace shares with the correct one at its beginning."
    )
    min_logp: float | None = Field(None, lt=0, description="Floor of a wrong trace's token log-probabilities, nats.")
    correct: float = Field(0.5, description="A trace with a score above this is correct.")
    sft_share: float = Field(0.5, ge=0, lt=1, description="Of the run's steps; 0 if the student is trained already.")
    learning_rate: float = Field(1e-6, gt=0, description="Of the second phase: about a fiftieth of the first one's.")

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="none")

    def phases(self) -> tuple[Phase, ...]:
        second = Phase("redi", 1 - self.sft_share, split="pairs", trainer={"learning_rate": self.learning_rate})
        return (Phase("sft", self.sft_share, split="correct"), second) if self.sft_share else (second,)

    def setup(self, context: SetupContext) -> dict[str, Tensor]:
        correct, pairs = [], []
        for row in context.splits["train"].records:
            scores = torch.tensor(row["scores"], dtype=torch.float64)
            best, worst = int(scores.argmax()), int(scores.argmin())
            if scores[best] > self.correct:
                correct.append(_of(row, best))
                if scores[worst] <= self.correct:
                    pairs.append(_of(row, best, worst))
        if not pairs:
            raise InputError(
                f"redi: none of {len(context.splits['train'])} training problems has both a trace with a score above "
                f"{self.correct:g} and one that is not. Score wrong traces lower, or move options.correct between them."
            )
        context.splits.update(correct=TextSet(correct), pairs=TextSet(pairs))
        return {}

    def counts(self, batch: Batch) -> dict[str, float]:
        assert isinstance(batch, ListBatch)
        return {"sft": float(batch.lengths[:, 0].sum())}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, ListBatch)
        tokens, _ = student.signal.by_token(self.name)
        if state.phase != "redi":
            return {"sft": Term(-batch.sum_tokens(tokens)[:, 0])}
        lowered = tokens if self.min_logp is None else tokens.clamp(min=self.min_logp)
        counted = ~batch.shared if self.mask_common_prefix else None
        both = torch.stack([batch.mean_tokens(tokens)[:, 0], batch.mean_tokens(lowered, counted)[:, 1]], 1)
        if not bool(both.isfinite().all()):
            row, side = (~both.isfinite()).nonzero()[0].tolist()
            raise InputError(
                f"redi: a token of the {('correct', 'wrong')[side]} trace of example {int(batch.ids[row])} has probability 0. "
                "Leave the example out, or set options.min_logp if the trace is wrong."
            )
        weights = both.new_tensor([1.0, -self.alpha])
        monitors = {f"logps/{side}": Term(both[:, i].detach(), 0.0) for i, side in enumerate(("chosen", "rejected"))}
        return {"redi": Term(signed_likelihood(both, weights, gamma=self.gamma)), **monitors}


def _of(row: dict[str, Any], *chosen: int) -> dict[str, Any]:
    return row | {key: [row[key][i] for i in chosen] for key in ("sequences", "scores")} | {"log_probs": None}
