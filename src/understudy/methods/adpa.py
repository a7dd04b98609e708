"""10. ADPA: Advantage-Guided Distillation for preference alignment in small language models, and DCKD (2025).

Small models gain little from preference training of their own; a large one that had it guides them. With y_w, y_l the better
and the worse answer, and all means over answer tokens:

    DCKD:  NLL(y_w) + a_w KL(π_aligned ‖ π) on y_w + a_l KL(π_aligned ‖ π) on y_l
    ADPA:  NLL(y_w) − γ mean_t Σ_a π(a | s_t) A(s_t, a) on the student's own answer, which stands in the place of y_l
           A(s, a) = β (log π_aligned(a | s) − log π_reference(a | s))

π_reference is the teacher before its preference training. What teachers say is stored once, for their k likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from understudy.data import Batch, ListBatch
from understudy.errors import InputError
from understudy.losses import forward_kl
from understudy.losses.advantage import expected_advantage, log_ratio_advantage
from understudy.models import ModelAdapter
from understudy.streaming import logits_of, rowwise
from understudy.targets import TopK, largest, top_k
from understudy.training import (
    Method,
    ModelOutput,
    Requirements,
    SetupContext,
    Term,
    TrainState,
    add_token_columns,
)

STRIP = 256
"""Tokens whose logits exist at a time while teachers are read."""


class ADPA(Method):
    """Raise the advantage that a preference-trained teacher gives the student's tokens, beside the better answer's NLL."""

    name = "adpa"
    paper = 10
    kinds = frozenset({"preference"})
    variants = "objective"
    used_with: ClassVar[dict[str, Any]] = {
        **{name: {"objective": ("adpa",)} for name in ("gamma", "beta", "advantage")},
        **{name: {"objective": ("dckd",)} for name in ("chosen_weight", "rejected_weight")},
    }
    cost = "two student forwards and backwards a pair; each teacher costs two forwards a pair, once and stored"
    example: ClassVar[dict[str, Any]] = {
        "task": "preference_world",
        "data": "chains",
        "teacher": {"members": {"aligned": "soft_optimal", "reference": "reference"}},
    }
    page: ClassVar[dict[str, str]] = {
        "when": "A large teacher that had preference training, the model that it began from, and a small student after "
        "supervised training. `dckd` needs the first teacher alone; the paper's ADPA+ is `adpa` on a student of `dckd`.",
        "not": "Without a teacher of the student's tokenizer. A γ above 3 is raised beyond what the teacher knows.",
        "deviations": "The student's own answers are data: write them once with `understudy generate`, and give them as "
        "`rejected`. The reference is read at the tokens that are stored, where the released code puts in a probability for "
        "those that the reference's own list lacks. The student's probabilities are not clipped at 1e-7; the clamp of advantages to [0, 1] in the released code is a defect and "
        "is not offered.",
    }

    objective: Literal["adpa", "dckd"] = Field("adpa", description="Advantages, or divergences on both answers.")
    gamma: float = Field(1.6, ge=0, description="γ, weight of the expected advantage.")
    beta: float = Field(1.0, gt=0, description="β, scale of the advantage.")
    advantage: Literal["log_ratio", "log_prob"] = Field(
        "log_ratio", description="Against the teacher's reference, or log π_aligned alone (the paper's ablation)."
    )
    chosen_weight: float = Field(0.1, ge=0, description="a_w of dckd, on the better answer.")
    rejected_weight: float = Field(0.1, ge=0, description="a_l of dckd, on the worse answer.")
    nll_weight: float = Field(1.0, ge=0, description="Of the better answer's NLL.")
    top_k: int = Field(
        50, ge=1, description="Tokens of a teacher's distribution that are stored; all if there are fewer."
    )

    @property
    def requires(self) -> Requirements:
        both = self.objective == "adpa" and self.advantage == "log_ratio"
        return Requirements(teacher="setup", teacher_model=True, members=("aligned", "reference") if both else ())

    def check_data(self, data: Any) -> None:
        for row in data.splits["train"].records:
            if len(row["scores"]) < 2:
                raise InputError(f"adpa: train example {row['id']} has one answer: give a better and a worse one.")

    def setup(self, context: SetupContext) -> dict[str, Tensor]:
        teacher = context.live_teacher()
        models = [teacher.model[name] for name in self.requires.members] or [teacher]
        read = partial(_kept if self.objective == "dckd" else _advantages, k=self.top_k)
        kind = f"{self.objective}-{self.top_k}"
        add_token_columns(context, _Signals(models), partial(_by_strip, read), kind=kind)
        return {}

    def counts(self, batch: Batch) -> dict[str, float]:
        assert isinstance(batch, ListBatch)
        better, worse = (float(batch.lengths.gather(1, side[:, None]).sum()) for side in (batch.best, batch.worst))
        return {"nll": better, "kl/chosen": better, "kl/rejected": worse, "advantage": worse}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, ListBatch)
        tokens, signal = student.signal.by_token(self.objective)
        better, worse = batch.tokens_of(batch.best), batch.tokens_of(batch.worst)
        stored = {name: column.of_tokens(batch) for name, column in state.columns.items()}
        ids = stored["ids"].long()
        terms = {"nll": Term(-tokens[better], self.nll_weight)}
        if self.objective == "adpa":
            raised = rowwise(expected_advantage, signal.select(worse), None, ids[worse], stored["advantages"][worse])
            return {**terms, "advantage": Term(-raised, self.gamma * self.beta)}
        target = TopK(ids, stored["probs"].log(), stored["tail"].log())
        sides = {"chosen": (better, self.chosen_weight), "rejected": (worse, self.rejected_weight)}
        for side, (kept, weight) in sides.items():
            if weight:
                terms[f"kl/{side}"] = Term(rowwise(forward_kl, signal.select(kept), target.select(kept)), weight)
        return terms


class _Signals(ModelAdapter):
    """Models that answer about the same tokens, one after the other."""

    def __init__(self, models: Sequence[ModelAdapter]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        return ModelOutput([model(batch).signal.by_token("adpa")[1] for model in self.models])


def _by_strip(read: Callable[..., dict[str, Tensor]], signals: Sequence[Any]) -> dict[str, Tensor]:
    """`read` of the logits of all tokens, some at a time."""
    starts = range(0, max(1, signals[0].rows), STRIP)
    parts = [read(*(logits_of(s.select(slice(a, a + STRIP))) for s in signals)) for a in starts]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _kept(logits: Tensor, *, k: int) -> dict[str, Tensor]:
    kept = top_k(logits, k)
    return {"ids": kept.ids.int(), "probs": kept.log_probs.exp(), "tail": kept.log_tail.exp()}


def _advantages(aligned: Tensor, reference: Tensor | None = None, *, k: int) -> dict[str, Tensor]:
    """Of the k likeliest tokens; without a reference log π_aligned is the advantage, as against a uniform one up to a constant."""
    uniform = torch.zeros_like(aligned)
    found = log_ratio_advantage(aligned, uniform if reference is None else reference)
    ids = largest(aligned, min(k, aligned.shape[-1]))
    return {"ids": ids.int(), "advantages": found.gather(-1, ids)}
