"""24. TPO: Tree Preference Optimization from multi-branch, multi-step preference trees (2024, arXiv 2410.12854).

All answers of a tree, or list, are learned from at once, and steps that matter weigh more in an answer's reward:

    ρ_i^t = mean over the tokens of step t of log π − log π_ref        w_i^t = 1 + cos(e_i^t, e_best^t)
    R_i = Σ_t w_i^t ρ_i^t / Σ_t w_i^t                                  e: mean hidden state of the step's tokens
    loss = Σ_{v_i > v_j} λ_ij softplus(−β (R_i − R_j))                 λ: how much the list gains by the order of i and j
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from understudy.data import Batch, ListBatch
from understudy.data.numeric_columns import Column
from understudy.errors import InputError
from understudy.losses import steps
from understudy.training import Method, ModelOutput, Requirements, SetupContext, Term, TrainState
from understudy.training.reference import attach_tokens

log = logging.getLogger(__name__)


class TPO(Method):
    """Rank all graded answers of a tree by rewards whose steps weigh by their likeness to the best answer's."""

    name = "tpo"
    paper = 24
    kinds = frozenset({"preference"})
    cost = "one student forward and backward an answer; the reference costs one forward an answer, once and stored"
    page: ClassVar[dict[str, str]] = {
        "when": "Several graded answers for each prompt, written in steps (columns `tree`, or `steps` and `scores`). "
        "`tpo-trees` builds them from a model's searches.",
        "not": "With pairs it is DPO with a mean over steps. Answers without `steps` count as one step, which its weight "
        "does not change.",
        "deviations": "The step weights are constants, where the released code lets gradients flow into them, and belong to "
        "the best-scored answer, where it takes the first. The released objective has its sign inverted and no λ: the loss "
        "here is the paper's. Its grades are scores over [−100, 100] (`score_range`). Weights of the reference's hidden "
        "states are not offered.",
    }

    beta: float = Field(0.5, gt=0, description="Scale of the difference of two rewards.")
    step_weights: Literal["adaptive", "one_minus_cos", "uniform"] = Field(
        "adaptive", description="1 + cos with the best answer's step, 1 − cos, or 1."
    )
    step_reduce: Literal["mean", "sum"] = Field("mean", description="Of the log-ratios of a step's tokens.")
    lambda_weights: bool = Field(True, description="Weigh pairs by λ; else all alike.")
    divide_by: Literal["none", "pairs", "lambda"] = Field(
        "none", description="Divide a list's loss by its ordered pairs, or by the sum of their λ."
    )
    score_range: tuple[float, float] | None = Field(
        None, description="Scores that are the grades 0 and 1; the lowest and the highest training score if not given."
    )
    reference: Literal["start", "teacher"] = Field(
        "start", description="The student at its start, or the recipe's teacher."
    )

    @model_validator(mode="after")
    def _range_ascends(self) -> Self:
        if self.score_range is not None and not self.score_range[0] < self.score_range[1]:
            low, high = self.score_range
            raise ValueError(f"score_range is [{low:g}, {high:g}]: give the lower end first")
        return self

    @property
    def requires(self) -> Requirements:
        teacher: Any = "setup" if self.reference == "teacher" else "none"
        return Requirements(teacher=teacher, features=self.step_weights != "uniform")

    def setup(self, context: SetupContext) -> dict[str, Tensor]:
        rows = context.splits["train"].records
        span = self._score_range(rows)
        scorer = context.live_teacher() if self.reference == "teacher" else context.student
        attach_tokens(context, scorer, self.name)
        ids = torch.tensor([row["id"] for row in rows])
        context.add_column(Column.by_token("step", ids, [_token_steps(row) for row in rows]))
        return {"score_range": torch.tensor(span, dtype=torch.float64)}

    def _score_range(self, rows: list[dict[str, Any]]) -> tuple[float, float]:
        """The scores of the grades 0 and 1, if the data order answers and lie between."""
        flat = sum(min(row["scores"]) == max(row["scores"]) for row in rows)
        if flat == len(rows):
            raise InputError(f"tpo: none of {flat} training examples has two answers of different scores.")
        if flat:
            log.warning("tpo: %d of %d training examples order no answers and teach nothing.", flat, len(rows))
        every = [score for row in rows for score in row["scores"]]
        low, high = self.score_range or (min(every), max(every))
        for row in rows:
            for score in row["scores"]:
                if not low <= score <= high:
                    raise InputError(
                        f"tpo: train example {row['id']} has the score {score:g} and options.score_range is "
                        f"[{low:g}, {high:g}]: set it to the range of your scores."
                    )
        return low, high

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, ListBatch)
        rewards = self._rewards(student, batch, state)
        low, high = state.tables["score_range"].to(rewards.device)
        values = steps.lambda_rank(
            rewards,
            (batch.scores - low) / (high - low),
            beta=self.beta,
            mask=batch.candidates,
            weighted=self.lambda_weights,
            divide_by=self.divide_by,
        )
        seen = self.beta * rewards.detach()
        chosen, rejected = (seen.gather(1, side[:, None])[:, 0] for side in (batch.best, batch.worst))
        margins = chosen - rejected
        right = (margins > 0).to(margins.dtype)
        monitors = {"chosen": chosen, "rejected": rejected, "margins": margins, "accuracies": right}
        return {"tpo": Term(values), **{f"rewards/{name}": Term(value, 0.0) for name, value in monitors.items()}}

    def _rewards(self, student: ModelOutput, batch: ListBatch, state: TrainState) -> Tensor:
        """R, `[lists, candidates]`."""
        tokens, _ = student.signal.by_token(self.name)
        ratios = tokens - state.columns["reference"].of_tokens(batch).to(tokens.dtype)
        step = state.columns["step"].of_tokens(batch)
        number = int(step.max())
        cell, cells = batch.tokens.sequence * number + step - 1, len(batch.labels) * number

        def by_step(values: Tensor, reduce: Literal["mean", "sum"]) -> Tensor:
            pooled = steps.pool_steps(values, cell, cells, reduce=reduce)
            return batch.by_candidate(pooled.view(len(batch.labels), number, *values.shape[1:]))

        present = by_step(torch.ones_like(tokens), "sum") > 0
        hidden = tokens[:, None] if student.features is None else student.features
        weights = steps.step_weights(by_step(hidden.detach(), "mean"), present, batch.best, how=self.step_weights)
        return steps.step_reward(by_step(ratios, self.step_reduce), weights)


def _token_steps(row: dict[str, Any]) -> Tensor:
    """The step of each token of a list's answers; those beyond the shortest answer's last step are of that one."""
    found: list[Tensor] | None = row.get("steps")
    if found is None:
        return torch.ones(sum(int((labels[1:] >= 0).sum()) for _, labels in row["sequences"]), dtype=torch.long)
    least = min(int(answer.max()) for answer in found)
    return torch.cat(found).clamp(max=least)
