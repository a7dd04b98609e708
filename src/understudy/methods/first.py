"""33. FIRST: Teach A Reliable LLM Through Efficient Trustworthy Distillation (2024).

The teacher's k most probable classes hold nearly all of its knowledge, and its probabilities are overconfident. They are
calibrated on held-out data first, by the c with the least calibration error of the teacher's own answers:

    P′_i = exp(P_i / c) / Σ_j exp(P_j / c)        over its k classes
    loss = KL(P′ ‖ Q′)                            Q′: the student's probabilities of these classes, renormalised

There is no term for the labels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from understudy.data import Batch
from understudy.errors import InputError
from understudy.evaluation.calibration import calibrate_probabilities, expected_calibration_error
from understudy.evaluation.rows import TILE_BYTES
from understudy.losses.calibration import Recalibration, most_probable, recalibrate, top_k_kl
from understudy.models import ModelOutput
from understudy.streaming import rowwise
from understudy.streaming.plain import dense
from understudy.training import Method, Requirements, SetupContext, Term, TrainState

log = logging.getLogger(__name__)


class FIRST(Method):
    """The teacher's most probable classes, calibrated on held-out data before they are learnt."""

    name = "first"
    paper = 33
    cost = "as kd, and one teacher forward a held-out row before training; from a cache no teacher forward at all"
    used_with: ClassVar[dict[str, Any]] = {
        "c": {"recalibration": ("temperature",)},
        "delta": {"recalibration": ("label_smoothing",)},
    }
    page: ClassVar[dict[str, str]] = {
        "when": "The student's confidence is to be trusted, or the large model can be run only once: a capture keeps k "
        "classes a row (`understudy cache capture` with `--splits train,validation`).",
        "not": "When every class matters (k = 5 of 10 does not cover much), without labelled held-out data, or "
        "with a calibrated teacher: no c leaves its probabilities as they are. On examples "
        "that the teacher was trained on its probabilities are more certain than elsewhere: other inputs teach more.",
        "deviations": "The student's probabilities are renormalised; the released code takes their softmax too "
        "(`student_c=1`), which bounds their ratios by e and leaves a student that is less calibrated than without. "
        "`truncation=tail` takes logarithms on both sides, where the released code compares probabilities with "
        "logarithms and pushes all mass to the first class. Label smoothing is done on probabilities, not on logarithms, "
        "and on the teacher's side alone. Classes that a cache keeps in another order are sorted. Loss sums are divided as "
        "`reduction` says: `sequence_sum` is the released code's.",
    }

    k: int = Field(5, ge=1, description="Most probable classes of the teacher that are learnt.")
    recalibration: Recalibration = Field(
        "temperature", description="temperature: softmax(P / c); label_smoothing: δ of the first goes to the others."
    )
    c: float | None = Field(None, gt=0, description="Temperature of probabilities; the best calibrated if not given.")
    delta: float = Field(0.1, ge=0, le=1, description="δ of label_smoothing.")
    epsilon: float = Field(1e-6, ge=0, description="Added to probabilities before they are renormalised.")
    student_c: float | None = Field(
        None, gt=0, description="Softmax of the student's probabilities over this, in place of renormalising them."
    )
    truncation: Literal["renorm", "tail"] = Field(
        "renorm", description="tail: one more bucket for the mass outside; nothing is recalibrated then."
    )
    calibrate_on: Literal["validation", "train"] = Field("validation", description="Split that calibration reads.")
    bins: int = Field(10, ge=1, description="Bins of the calibration error.")

    @model_validator(mode="after")
    def _can_be_learnt(self) -> Self:
        if self.truncation == "tail" and (self.recalibration != "none" or self.student_c is not None):
            raise ValueError("truncation=tail recalibrates nothing: set recalibration=none and leave student_c out")
        if self.k == 1 and self.truncation == "renorm":
            raise ValueError(
                "k=1 leaves one class of probability 1 and nothing to learn: raise k, or set truncation=tail"
            )
        return self

    @property
    def requires(self) -> Requirements:
        asked = ("train",) if self.recalibration == "none" else tuple(dict.fromkeys(("train", self.calibrate_on)))
        return Requirements(support=f"scored:{self.k}", splits=asked)

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        if self.recalibration == "none":
            return {}
        probs, correct = self._answers(context)
        before = expected_calibration_error(probs[:, 0], correct, self.bins)
        c = self.c
        if c is None:
            c = calibrate_probabilities(probs, correct, self.bins).best if self.recalibration == "temperature" else 1.0
        log_p = recalibrate(probs, self.recalibration, c=c, delta=self.delta)
        after = expected_calibration_error(log_p.exp().amax(-1), correct, self.bins)
        dethroned = float((log_p.argmax(-1) != 0).double().mean())
        if dethroned:
            log.warning(
                "options.delta=%g takes the first place from the teacher's own answer in %.1f %% of the %s rows: lower it.",
                self.delta,
                100 * dethroned,
                self.calibrate_on,
            )
        if after > before:
            log.warning(
                "Recalibration raises the calibration error from %.3f to %.3f: options.recalibration=none leaves the teacher "
                "as it is.",
                before,
                after,
            )
        found = {"c": c, "ece_before": before, "ece_after": after}
        found |= {"accuracy": float(correct.mean()), "coverage": float(probs.sum(-1).mean())}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}

    def _answers(self, context: SetupContext) -> tuple[Tensor, Tensor]:
        """P `[rows, k]` of the teacher on held-out rows, and whether its first class is the label `[rows]`."""
        assert context.teacher is not None
        probs, correct = [], []
        for batch in context.batches(self.calibrate_on, 16):
            try:
                signal = context.teacher(batch).signal
            except InputError as error:
                raise InputError(
                    f"Method 'first' calibrates the teacher on the {self.calibrate_on} split (options.calibrate_on): {error}"
                ) from None
            tile = max(1, TILE_BYTES // (4 * context.classes))
            for start in range(0, batch.num_items, tile):
                part = slice(start, start + tile)
                answers = dense(signal.select(part))
                assert answers is not None
                found = most_probable(answers, self.k, context.classes)
                if bool(found.log_probs.isnan().any()):
                    raise InputError(
                        f"Method 'first' calibrates the teacher on the {self.calibrate_on} split, and its output for row "
                        f"{int(found.log_probs.isnan().any(-1).nonzero()[0, 0]) + start} of a batch is nan: load it in float32."
                    )
                probs.append(found.log_probs.exp().double().cpu())
                correct.append((found.ids[:, 0] == batch.row_labels[part]).double().cpu())
        if not probs:
            raise InputError(
                f"Method 'first' calibrates the teacher on the {self.calibrate_on} split, which has no label: set "
                "options.calibrate_on to one that has, or options.recalibration=none."
            )
        return torch.cat(probs), torch.cat(correct)

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        values = rowwise(
            top_k_kl,
            student.signal,
            teacher.signal,
            k=self.k,
            recalibration=self.recalibration,
            c=float(state.tables.get("c", 1.0)),
            delta=self.delta,
            epsilon=self.epsilon,
            student_c=self.student_c,
            truncation=self.truncation,
        )
        return {"first": Term(values)}

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """Calibration of the teacher's answers on the held-out split, before and after, and the temperature that was chosen."""
        return {"metrics": {f"calibration_{name}": float(value) for name, value in state.tables.items()}}
