"""MiniLLM (Gu et al. 2024, arXiv 2306.08543): the reverse KL of whole texts by its policy gradient, with three corrections.

    ∇L = E_{y ∼ α p + (1 − α) q} Σ_t w_t [∇ KL(q_t ‖ p_t) − R_t ∇ log q(y_t)] + weight · ∇ CE

R_t is the mean of log p / q over later tokens, w_t the importance weight of a token. CE is on the data's own texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from understudy.data import Batch
from understudy.data.batch import UNLABELLED
from understudy.errors import InputError
from understudy.losses import cross_entropy, reverse_kl
from understudy.losses.policy_gradient import future_rewards, importance_weights, long_part
from understudy.models import ModelOutput
from understudy.streaming import rowwise
from understudy.targets import Dense, Projected
from understudy.training import Method, Term, TrainState


class MiniLLM(Method):
    """Policy gradient of the reverse KL of whole texts, written by a mixture of student and teacher."""

    name = "minillm"
    kinds = frozenset({"text"})
    cost = "one teacher forward, one student forward and backward a row, and one pass of both for each written token"
    defaults: ClassVar[Mapping[str, Any]] = {"on_policy": {"fraction": 0.5, "teacher_share": 0.2, "steps": 1}}
    example: ClassVar[dict[str, Any]] = {"trainer": {"max_steps": 60}}
    page: ClassVar[dict[str, str]] = {
        "when": "A small student of a live teacher, on long answers: what a token leads to counts, not the token alone. α is "
        "`on_policy.teacher_share`; the data's own texts, the share that `on_policy.fraction` leaves, keep its language.",
        "not": "Before the student can write at all: train it by sft first (student.train). Where time is short: gkd's reverse "
        "KL leaves the later tokens out and varies less.",
        "deviations": "One update for each text, so that PPO's clipping would do nothing and is left out. The corpus for "
        "pre-training is the data's own texts; to have another one, add it to the data.",
    }

    length_normalised: bool = Field(True, description="R is a mean over later tokens, not a sum.")
    ce_weight: float = Field(1.0, ge=0, description="Weight of the cross-entropy with the data's own texts.")

    def counts(self, batch: Batch) -> dict[str, float]:
        written = float((batch.row_labels == UNLABELLED).sum())
        return {"reverse_kl": written, "long": written, "ce": batch.num_items - written}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        share = state.on_policy.teacher_share if state.on_policy is not None else 0.0
        if share == 1:
            raise InputError("minillm needs texts that the student writes too: set on_policy.teacher_share below 1.")
        if not isinstance(teacher.signal, (Dense, Projected)):
            raise InputError("minillm reads the teacher's probability of every token: give one live model as teacher.")
        at = (batch.row_labels == UNLABELLED).nonzero()[:, 0]
        tokens = batch.inputs["input_ids"][:, 1:][batch.mask][at]
        q, p = student.signal.select(at), teacher.signal.select(at)
        log_q, log_p = (-rowwise(cross_entropy, side, None, tokens) for side in (q, p))
        weights = importance_weights(log_q.detach(), log_p, share)
        future = future_rewards(log_p - log_q.detach(), batch.sequence[at], self.length_normalised)
        terms = {
            "reverse_kl": Term(weights * rowwise(reverse_kl, q, p)),
            "long": Term(long_part(log_q, weights, future)),
        }
        if self.ce_weight:
            signal, labels = batch.with_labels(student.signal)
            terms["ce"] = Term(rowwise(cross_entropy, signal, None, labels), self.ce_weight)
        return terms
