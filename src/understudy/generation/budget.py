"""What a whole run may spend on text, over all the models that it asks; counted from their request logs, so that a run that
is started again goes on counting."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True)
class Spent:
    """What answers have used.

    Args:
        requests: answers that were paid for. prompt_tokens, tokens: read and written. cost: by the prices of each model.
    """

    requests: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.tokens + other.tokens,
            self.cost + other.cost,
        )


class Budget(BaseModel):
    """Bounds on all models of a run together; each endpoint may have bounds of its own beside them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    requests: int | None = Field(default=None, ge=1, description="Most answers of all models that a procedure asks.")
    tokens: int | None = Field(
        default=None, ge=1, description="Most tokens of all of them, prompts and completions together."
    )
    cost: float | None = Field(
        default=None, gt=0, description="Most money for all of them, by the prices of their endpoints."
    )

    def exceeded(self, spent: Spent, used: Spent) -> str:
        """The bound that `spent` goes over, as a sentence; empty where it keeps all.

        Args:
            spent: with the next request. used: without it.
        """
        tokens = used.prompt_tokens + used.tokens
        if self.requests is not None and spent.requests > self.requests:
            return f"budget.requests={self.requests} does not cover the next request: {used.requests} are answered."
        if self.tokens is not None and spent.prompt_tokens + spent.tokens > self.tokens:
            return f"budget.tokens={self.tokens} does not cover the next request: {tokens} are used."
        if self.cost is not None and spent.cost > self.cost:
            return f"budget.cost={self.cost:g} does not cover the next request: {used.cost:.4g} is used."
        return ""
