"""On-policy distillation: the options for training on text that the student, the teacher or both generate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Replay(BaseModel):
    """Replay buffer of generated samples (DistiLLM, Ko et al. 2024).

    Args:
        size: capacity; the oldest samples are dropped. Until the buffer is full, every sample is fresh.
        probability: that a sample is taken from the buffer instead of generated; `linear` rises from 0 at the first step to
            1 at the last.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(1000, ge=1, description="Samples that are kept; the oldest leave.")
    probability: Annotated[float, Field(ge=0, le=1)] | Literal["linear"] = Field(
        "linear", description="Of a replay in the place of a fresh sample; linear rises from 0 to 1 over the run."
    )

    def at(self, progress: float) -> float:
        """The probability after the fraction `progress` of the run."""
        return progress if self.probability == "linear" else self.probability


class Adaptive(BaseModel):
    """Adaptive fraction: it rises by `by` when the validation loss exceeds that of the previous evaluation by `tolerance`
    nats (DistiLLM, Algorithm 1; the released code compares with the last loss that caused a rise)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: float = Field(0.1, gt=0, le=1, description="How much the share rises.")
    tolerance: float = Field(0.1, ge=0, description="Nats of validation loss above the last that make it rise.")


class OnPolicy(BaseModel):
    """On-policy samples: a fraction of the completions is replaced by text that the student generates (GKD, Agarwal et
    al. 2024), the teacher (sequence-level KD, Kim and Rush 2016), or both by turns at every token (MiniLLM, Gu et al. 2024).

    The student's tokens are not labels: a term that reads labels is 0 on them. The teacher's are. Whether a completion is replaced is drawn
    for each example, while GKD's code draws once per batch. The default of `fraction` and `kd` with `divergence=jsd`
    are GKD; `kd` with `skew_kl` or `skew_reverse_kl` (alpha 0.1), `fraction=0`, `replay` and `adaptive` is DistiLLM.

    The student generates with its present weights and a KV cache. Both engines are those of `transformers`; their
    random numbers depend on the example alone, so both generate the same text up to the rounding of batched products. A
    server cannot be used: it has its own random numbers and would need the new weights at every update.

    Args:
        fraction: λ, probability that an example's completion is replaced; with `adaptive` its initial value.
        teacher_share: α, every token is drawn from α p + (1 − α) q, with p the teacher and q the student.
        generations: with `teacher_share` 1, texts of a prompt that are kept: epoch e uses number e modulo this. `None` is a
            text of its own in each epoch (the data sources `offline` and `online` of paper 20).
        max_new_tokens: most tokens of a sample.
        temperature: of sampling; 0 is greedy.
        top_p, top_k: 1 and 0 keep all tokens.
        steps: optimizer steps whose samples are generated at once, with the weights before the first of them (fewer
            before the end of an epoch); 1 is strictly on-policy.
        in_flight: most sequences that are generated in parallel. Generation is efficient from 64 on, so raise `steps`
            if `in_flight` in the log is small.
        engine: `padded` calls `generate` batch by batch, each until its longest text ends. `continuous` starts the next
            prompt as soon as a text ends: for lengths that vary and more prompts than `in_flight`
            (`docs/benchmarks.md`). It generates in the dtype of the weights, not in that of `bf16`.
        cut: where plain text is split into prompt and completion: a fraction of its length, or `random`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: float = Field(0.5, ge=0, le=1, description="Probability that an example's completion is replaced.")
    teacher_share: float = Field(
        0.0, ge=0, le=1, description="Of the teacher in the mixture that every token is drawn from; 1: it writes alone."
    )
    generations: int | None = Field(
        None,
        ge=1,
        description="Texts of a prompt by the teacher alone that are used in turn; none: a new one each epoch.",
    )
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

    @model_validator(mode="after")
    def _can_be_written(self) -> Self:
        if self.generations is not None and self.teacher_share < 1:
            raise ValueError(
                "generations keeps texts of a teacher that writes alone: set teacher_share=1, or leave it out"
            )
        if self.generations is not None and self.replay is not None:
            raise ValueError("generations and replay both use texts again: leave one of them out")
        if 0 < self.teacher_share < 1 and self.engine == "continuous":
            raise ValueError("teacher_share mixes two models at every token, which engine=padded alone can: set it")
        return self

    @classmethod
    def known(cls, path: Sequence[Any]) -> list[str]:
        """The known keys at a path inside these options."""
        parts: dict[str, type[BaseModel]] = {"replay": Replay, "adaptive": Adaptive}
        return list(parts.get(str(path[0]) if path else "", cls).model_fields)
