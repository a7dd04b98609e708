"""Ranking of responses by a reward, as RRHF (2023, arXiv 2304.05302) and PRO (2023, arXiv 2306.17492) have it.

With s = log π(y | x) / |y| of every response of a list and r its reward:

    rrhf: Σ_{r_i < r_j} relu(s_i − s_j)        pro: −Σ_k log(exp s_k / Σ_{i ≥ k} exp s_i), best first
    loss = ranking + nll_weight · NLL of the best response
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from understudy.data import Batch, ListBatch
from understudy.losses import responses
from understudy.losses.preference import per_token
from understudy.training import Method, ModelOutput, Requirements, SetupContext, Term, TrainState
from understudy.training.reference import Reward, finite, need_order, reward_counts, reward_terms, rewarded, with_margin

_REWARD = Reward(1.0, False, True)


class RankResponses(Method):
    """Order responses by their mean log-probability as a reward orders them, without a reference."""

    name = "rank-responses"
    kinds = frozenset({"preference"})
    variants = "loss_type"
    cost = "one student forward and backward a response; no reference"
    page: ClassVar[dict[str, str]] = {
        "when": "Several responses to a prompt with scores of a teacher, as the baseline of methods that learn from lists.",
        "not": "With noisy scores see `adpo`, with pairs `dpo`: nothing here holds the student near its start but the "
        "likelihood of the best response.",
        "deviations": "The NLL is a mean over the tokens of the best response, where both papers have a sum. PRO's "
        "temperatures by difference of rewards are left out.",
    }

    loss_type: Literal["rrhf", "pro"] = Field(
        "rrhf", description="Of pairs that are in the wrong order, or of the order."
    )
    nll_weight: float = Field(1.0, ge=0, description="Weight of the mean NLL a token of the best response.")

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="none")

    def check_data(self, data: Any) -> None:
        need_order(self.name, data)

    def setup(self, context: SetupContext) -> dict[str, Tensor]:
        rewarded(context, _REWARD)
        return {}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, ListBatch)
        values = finite(student.signal.values, batch)
        scores = per_token(values, batch.lengths.clamp(min=1))
        ranking = getattr(responses, self.loss_type)(scores, batch.scores, mask=batch.candidates)
        nll = -scores.gather(1, batch.best[:, None])[:, 0]
        terms = {self.loss_type: Term(ranking), **({"nll": Term(nll, self.nll_weight)} if self.nll_weight else {})}
        return {**terms, **reward_terms(_REWARD, values, None, batch)}

    def counts(self, batch: Batch) -> dict[str, float]:
        assert isinstance(batch, ListBatch)
        return reward_counts(batch)

    def logged(self, means: Mapping[str, float]) -> Mapping[str, float]:
        return with_margin(means)
