"""How much of its training texts a student writes itself: the options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Replay(BaseModel):
    """Samples that are used again (DistiLLM, Ko et al. 2024).

    Args:
        size: samples that are kept; the oldest leave. Until there are so many, every sample is fresh.
        probability: of a replay in the place of a fresh sample; `linear` goes from 0 at the first step to 1 at the last.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(1000, ge=1, description="Samples that are kept; the oldest leave.")
    probability: Annotated[float, Field(ge=0, le=1)] | Literal["linear"] = Field(
        "linear", description="Of a replay in the place of a fresh sample; linear rises from 0 to 1 over the run."
    )

    def at(self, progress: float) -> float:
        """The probability at a share of the run."""
        return progress if self.probability == "linear" else self.probability


class Adaptive(BaseModel):
    """The share of own samples rises by `by` when the validation loss is `tolerance` nats above that of the evaluation
    before (DistiLLM, Algorithm 1; the released code compares with the last loss that made it rise)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: float = Field(0.1, gt=0, le=1, description="How much the share rises.")
    tolerance: float = Field(0.1, ge=0, description="Nats of validation loss above the last that make it rise.")


class OnPolicy(BaseModel):
    """How much the student writes itself, and how (GKD, Agarwal et al. 2024).

    The teacher answers for the student's text like for any other. Its tokens are no labels: a term that reads labels is 0
    there. Each example is decided for itself, where GKD's code decides for a whole batch. The default of `fraction` and
    `kd` with `divergence=jsd` are GKD's; DistiLLM is `kd` with `skew_kl` or `skew_reverse_kl` (alpha 0.1), `fraction=0`,
    `replay` and `adaptive`.

    Texts are written with a KV cache by the student itself, with the weights of the moment. Both engines are those of
    `transformers`, draw by the example and write the same texts, up to the rounding of batched products. A server is none
    of them: it draws by itself, and would need the weights sent at every update.

    Args:
        fraction: λ, probability that an example's completion is replaced; where it starts, with `adaptive`.
        max_new_tokens: tokens of a sample at most.
        temperature: 0 is greedy.
        top_p, top_k: 1 and 0 leave all tokens.
        steps: optimizer steps whose samples are written at once, with the weights of the first of them (fewer before
            the end of an epoch); 1 is strictly on-policy.
        in_flight: sequences that are written side by side, at most. Writing is cheap where there are 64 or more, so
            raise `steps` where the log's `in_flight` is small.
        engine: `padded` writes batch after batch with `generate`, each until its last text ends. `continuous` gives the place
            of a text that ends to the next prompt: for lengths that vary and more prompts than `in_flight`
            (`docs/benchmarks.md`). It writes in the weights' own precision, not in that of `bf16`.
        cut: where plain text is cut into prompt and completion: a share of its length, or `random`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: float = Field(0.5, ge=0, le=1, description="Probability that an example's completion is replaced.")
    max_new_tokens: int = Field(128, ge=1, description="Tokens of a sample at most.")
    temperature: float = Field(1.0, ge=0, description="Of the sampling; 0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus of the sampling; 1 leaves all tokens.")
    top_k: int = Field(0, ge=0, description="Most likely tokens that are sampled from; 0 leaves all.")
    steps: int = Field(8, ge=1, description="Optimizer steps whose samples are written at once.")
    in_flight: int = Field(64, ge=1, description="Sequences that are written side by side, at most.")
    engine: Literal["padded", "continuous"] = Field(
        "padded", description="Batch after batch, or the next prompt in the place of a text that ends."
    )
    cut: Annotated[float, Field(gt=0, lt=1)] | Literal["random"] = Field(
        "random", description="Where plain text is cut into prompt and completion: a share of its length, or random."
    )
    replay: Replay | None = Field(None, description="Use samples again; keys below.")
    adaptive: Adaptive | None = Field(None, description="Raise the share when validation loss rises; keys below.")

    @classmethod
    def known(cls, path: Sequence[Any]) -> list[str]:
        """The keys at a place inside these options."""
        parts: dict[str, type[BaseModel]] = {"replay": Replay, "adaptive": Adaptive}
        return list(parts.get(str(path[0]) if path else "", cls).model_fields)
