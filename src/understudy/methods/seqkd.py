"""Sequence-level knowledge distillation (Kim and Rush 2016, arXiv 1606.07947): train on what the teacher writes.

loss = −log q(y | x), y written by the teacher
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from understudy.data import Batch
from understudy.data.batch import UNLABELLED
from understudy.errors import InputError
from understudy.losses import cross_entropy
from understudy.models import ModelOutput
from understudy.streaming import rowwise
from understudy.training import Method, Requirements, Term, TrainState


class SeqKD(Method):
    """Cross-entropy with the teacher's own texts in the place of the data's completions."""

    name = "seqkd"
    kinds = frozenset({"text"})
    cost = "one student forward and backward a row, and one pass of the teacher for each token that it writes, once a prompt"
    defaults: ClassVar[Mapping[str, Any]] = {
        "on_policy": {"fraction": 1.0, "teacher_share": 1.0, "generations": 1, "temperature": 0.0}
    }
    page: ClassVar[dict[str, str]] = {
        "when": "As the baseline of on-policy methods, and where the teacher's probabilities are of no use (another "
        "temperature, a student that is far too small). `on_policy.temperature: 1` samples in place of the teacher's most "
        "likely tokens, `generations` takes several texts a prompt, `fraction` keeps some of the data's.",
        "not": "With a teacher behind an endpoint: `understudy generate` writes its texts once, and `sft` learns from them.",
        "deviations": "Texts are greedy, where the paper searches with a beam.",
    }

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="calls")

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        if bool((batch.row_labels == UNLABELLED).any()):
            raise InputError("seqkd learns from what the teacher writes alone: leave on_policy.teacher_share at 1.")
        return {"ce": Term(rowwise(cross_entropy, student.signal, None, batch.row_labels))}
