"""21. QCRD (2024, arXiv 2405.13014): its training objective, on rationales that are sorted and weighed already.

L = α₁ L_label + α₂ mean [ D(r⁺) l⁺ − β (1 − D(r⁻)) l⁻ ],     ℓ(r) = −log π(r | x) / |r|
l⁺ = min over positives of ℓ(r),      l⁻ = min(ℓ(r⁻) − δ, 0),  r⁻ the negative with the largest ℓ
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from understudy.data import Batch, ListBatch
from understudy.errors import InputError
from understudy.losses.rationales import many_to_one
from understudy.training import Method, ModelOutput, Requirements, SetupContext, Term, TrainState
from understudy.training.contrast import ContrastOptions
from understudy.training.reference import recorded


class RationaleContrast(ContrastOptions, Method):
    """One iteration of QCRD: the weighted contrast of given rationales, beside the answer alone."""

    name = "rationale-contrast"
    kinds = frozenset({"preference"})
    cost = "one student forward and backward a rationale; of these, two carry a gradient"
    example: ClassVar[dict[str, Any]] = {"task": "preferences", "data": "rationales.jsonl"}
    page: ClassVar[dict[str, str]] = {
        "when": "Rationales that are sorted already, in a file of your own: records of `prompt`, `completions` and `scores`, which "
        "are 1 (positive) or −1 (negative), with log D as `log_probs`; and records of one answer with score 0.",
        "not": "To make the rationales too: that is `qcrd`.",
        "deviations": "Answer and rationales are lists of their own, each kind with its own mean.",
    }

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="none")

    def setup(self, context: SetupContext) -> dict[str, Tensor]:
        for row in context.splits["train"].records:
            if not set(row["scores"]) <= {1.0, 0.0, -1.0} or (0.0 in row["scores"] and len(row["scores"]) > 1):
                raise InputError(
                    f"{self.name}: scores of train example {row['id']} are {row['scores']}: give 1 for a positive rationale "
                    "and -1 for a negative one, or 0 for an answer in a list of its own."
                )
        if self.quality:
            recorded(context)
        return {}

    def counts(self, batch: Batch) -> dict[str, float]:
        assert isinstance(batch, ListBatch)
        labels = float((batch.scores[:, 0] == 0).sum())
        both = float(((batch.scores < 0) & batch.candidates).any(1).sum())
        return {"label": labels, "contrast": len(batch.scores) - labels, "active": both}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, ListBatch)
        tokens, _ = student.signal.by_token(self.name)
        entropy = -batch.mean_tokens(tokens)
        kind = torch.where(batch.candidates, batch.scores, 0.0)
        weights = batch.reference.exp() if self.quality and batch.reference is not None else None
        found = many_to_one(entropy, kind, weights, beta=self.beta, delta=self.delta, reduce=self.reduce)
        label = torch.where(batch.scores[:, 0] == 0, entropy[:, 0], 0.0)
        active = (found.negative < 0).to(tokens.dtype)
        return {
            "label": Term(label, self.alpha_label),
            "contrast": Term(found.values, self.alpha_rationale),
            "active": Term(active, 0.0),
        }
