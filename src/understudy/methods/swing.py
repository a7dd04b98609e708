"""13. Swing Distillation: A Privacy-Preserving Knowledge Distillation Framework (2022).

A token that looks private gets a flat target, and all targets get noise, so that the student learns little of the secrets
that the teacher knows. With s in 0 … 1 how private a token looks,

    τ = τ₀ + s (τ_max − τ₀)
    p̃ = clip(softmax(U/τ) + ξ, 0) / Σ,   ξ ~ Laplace(0, Δ/ε), drawn once a token
    loss = λ · KL(p̃ ‖ softmax(S/τ)) + (1 − λ) · CE
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from understudy.curation.private import PATTERNS, detector, private_tokens
from understudy.data import Batch
from understudy.data.noise import laplace, normal
from understudy.data.numeric_columns import Column
from understudy.errors import InputError
from understudy.evaluation.rows import row_statistics
from understudy.losses import cross_entropy
from understudy.losses.privacy import clipped_whole, noisy_forward_kl, private_temperature
from understudy.models import ModelOutput, evaluating
from understudy.models.tokenizers import token_bytes
from understudy.streaming import rowwise
from understudy.targets import Target
from understudy.training import Method, Requirements, SetupContext, Term, TrainState
from understudy.training.shares import WatchedShare

_STREAM = 0x513  # of the noise on targets
_UNIFORM = 0.01  # share of targets clipped whole from which on a run is warned
log = logging.getLogger(__name__)


class Swing(Method):
    """Flat, noisy targets for tokens that look private."""

    name = "swing"
    paper = 13
    cost = "as kd with autograd in the place of its fast path, one hash a class for the noise, and one pass over the data before"
    example: ClassVar[dict[str, Any]] = {"task": "language_modeling"}
    page: ClassVar[dict[str, str]] = {
        "when": "The teacher was trained on texts with names, numbers or addresses that the student must not repeat. Plant "
        "canaries in the teacher's data and measure (`data.canaries`).",
        "not": "Where a guarantee is needed: this is not differential privacy, whatever ε is called. Targets after the softmax "
        "get noise, one example's influence is not bounded and the teacher is asked without limit.",
        "deviations": "Only the abstract and the opening of the paper are known to us; the linear temperature, the form of the "
        "noise, the defaults and the detector are reconstructed. With one temperature on both sides the best student is still "
        "the teacher, and protection comes of small gradients and noise; `student_temperature=one` flattens the student too. "
        "The cross-entropy leaves out private tokens (`mask_labels`), or it would teach the secrets themselves. Noise hangs on "
        "run seed, example and token alone: it is the same in every epoch, so it does not average out.",
    }
    value_kinds: ClassVar[dict[str, Any]] = {"score": {"detector": frozenset({"text"})}}

    score: Literal["detector", "memorisation", "domains"] = Field(
        "detector",
        description="What says that a token is private: `patterns` and `names`; sigmoid of log p(teacher) − log p(student as "
        "it starts) of the label; or examples of `private_domains`.",
    )
    patterns: tuple[str, ...] = Field(PATTERNS, description="Regular expressions of the detector.")
    names: tuple[str, ...] = Field((), description="Names that the detector knows.")
    private_domains: tuple[str, ...] = Field(
        (), description="Domains (`data.domain_column`) whose examples are private."
    )
    base: float = Field(1.0, gt=0, description="τ₀, temperature of tokens that are not private.")
    most: float = Field(8.0, gt=0, description="τ_max, of those that are.")
    privacy_budget: float | None = Field(10.0, gt=0, description="ε; null for no noise.")
    sensitivity: float = Field(1.0, gt=0, description="Δ: the scale of the noise is Δ/ε.")
    noise: Literal["laplace", "normal"] = Field("laplace", description="Its distribution.")
    noise_on: Literal["all", "private"] = Field("all", description="Which tokens get noise.")
    keep_support: bool = Field(False, description="Noise gives no probability to classes that the teacher forbids.")
    student_temperature: Literal["same", "one"] = Field("same", description="Of the student's softmax: τ, or 1.")
    tau_squared: bool = Field(False, description="Multiply by τ² of each token, which weighs private ones up.")
    kd_weight: float = Field(0.5, ge=0, le=1, description="λ; the rest is the cross-entropy.")
    mask_labels: bool = Field(True, description="Leave private tokens out of the cross-entropy.")
    threshold: float = Field(0.5, ge=0, le=1, description="A token is private where s is above.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.most < self.base:
            raise ValueError(f"most ({self.most}) is below base ({self.base}); give base <= most")
        if self.score == "domains" and not self.private_domains:
            raise ValueError("score=domains needs private_domains")
        detector(self.patterns, self.names)
        return self

    @property
    def requires(self) -> Requirements:
        return Requirements(support="dense")

    @property
    def scale(self) -> float:
        """b = Δ/ε, 0 without noise."""
        return 0.0 if self.privacy_budget is None else self.sensitivity / self.privacy_budget

    def init_state(self, total: int) -> WatchedShare | None:
        says = (
            f"swing: the noise of options.privacy_budget={self.privacy_budget} (of scale {self.scale:g}) clips every class of "
            "{share:.1%} of the targets: they are uniform and teach nothing. Raise options.privacy_budget, or let noise be on "
            "private tokens alone (options.noise_on=private)."
        )
        return WatchedShare("uniform_targets", _UNIFORM, says) if self.scale else None

    def check_data(self, data: Any) -> None:
        if self.score == "domains":
            self._known(data.domains)
        elif self.score == "detector":
            if data.tokenizer is None:
                raise InputError("options.score=detector reads text: set options.score to memorisation or domains.")
            _pieces(data.tokenizer)

    def _known(self, domains: Sequence[str]) -> None:
        """Refuse private domains that the data do not have."""
        unknown = [name for name in self.private_domains if name not in domains]
        if unknown:
            known = ", ".join(domains) or "none (set data.domain_column)"
            raise InputError(f"options.private_domains names {unknown[:1]}; known: {known}.")

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        ids: list[Tensor] = []
        scores: list[Tensor] = []
        for batch in context.batches("train", 16):
            found = self._scores(batch, context)
            ids.append(batch.ids.cpu())
            scores += found.split(torch.bincount(batch.sequence.cpu(), minlength=len(batch.ids)).tolist())
        every = torch.cat(scores)
        if every.numel() and bool((every > self.threshold).all()):
            log.warning("Every token looks private: the student learns from flat targets alone (options.score).")
        context.add_column(Column.by_token("private_score", torch.cat(ids), scores))
        return {}

    def _scores(self, batch: Batch, context: SetupContext) -> Tensor:
        """s of each row, `[rows]`, of 0 … 1."""
        if self.score == "memorisation":
            assert context.teacher is not None
            with torch.no_grad(), evaluating(context.student):
                sides = [context.student(batch).signal, context.teacher(batch).signal]
            student, teacher = (row_statistics(s, None, batch.row_labels).nll for s in sides)
            return torch.sigmoid(student - teacher).float()
        if self.score == "domains":
            self._known(context.domains if batch.domains is not None else ())
            assert batch.domains is not None
            private = torch.tensor([name in self.private_domains for name in context.domains])
            return private.float()[batch.domains.cpu()][batch.sequence.cpu()]
        tokens, pattern = batch.inputs["input_ids"].cpu(), detector(self.patterns, self.names)
        pieces, flags = _pieces(context.tokenizer), torch.zeros(tokens.shape)
        for i, row in enumerate(tokens.tolist()):
            flags[i] = torch.tensor(private_tokens([pieces[t] for t in row], pattern)).float()
        return flags[:, 1:][batch.mask.cpu()]  # a row is private if the token that it predicts is

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None
        score = state.columns["private_score"].of_rows(batch)
        private = score > self.threshold
        noisy = private if self.noise_on == "private" else torch.ones_like(private)
        uniform = torch.zeros_like(private)  # filled in as the noise is drawn
        values = rowwise(
            self._noisy,
            student.signal,
            teacher.signal,
            private_temperature(score, self.base, self.most),
            batch.ids[batch.sequence],
            batch.places,
            noisy,
            uniform,
            seed=state.seed,
        )
        terms = {"kd": Term(values, self.kd_weight)}
        if self.scale:
            terms["uniform"] = Term(uniform.float(), 0.0)
        if self.kd_weight < 1:
            signal, labels = batch.with_labels(student.signal)
            ce = batch.among_rows(rowwise(cross_entropy, signal, None, labels))
            terms["ce"] = Term(torch.where(private, 0.0, ce) if self.mask_labels else ce, 1 - self.kd_weight)
        return terms

    def _noisy(
        self,
        student: Tensor,
        target: Target | Tensor,
        temperature: Tensor,
        ids: Tensor,
        positions: Tensor,
        noisy: Tensor,
        uniform: Tensor,
        *,
        seed: int,
    ) -> Tensor:
        """KL to the noisy targets of some rows, whose noise is drawn by example and position; `uniform`, a view of these rows,
        is set where it clips a target whole."""
        noise = None
        if self.scale:
            draw = laplace if self.noise == "laplace" else normal
            drawn = draw(ids, (student.shape[-1],), seed=seed, step=positions, stream=_STREAM)
            noise = self.scale * drawn * noisy[:, None]
            uniform.copy_(clipped_whole(target, temperature, noise, keep_support=self.keep_support))
        return noisy_forward_kl(
            student,
            target,
            temperature,
            noise,
            student_temperature=None if self.student_temperature == "same" else 1.0,
            tau_squared=self.tau_squared,
            keep_support=self.keep_support,
        )

    def on_pre_optimizer_step(self, state: TrainState, means: Mapping[str, float]) -> None:
        if self.scale:
            state.method_state.update(means["uniform"], state.step + 1 >= state.total)

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """The share of targets that noise made uniform, and the student's likelihood of private tokens and of all others on
        the split that is judged."""
        assert state.student is not None
        clipped = state.method_state.logs() if self.scale else {}
        if self.score == "memorisation":  # of the student as it started, which is gone
            return {"metrics": clipped}
        nll, private = [], []
        with torch.no_grad(), evaluating(state.student):
            for batch in context.batches(context.eval_split, 16):
                nll.append(row_statistics(state.student(batch).signal, None, batch.row_labels).nll)
                private.append(self._scores(batch, context) > self.threshold)
        every, marked = torch.cat(nll), torch.cat(private)
        parts = {"private_nll": every[marked], "public_nll": every[~marked]}
        return {"metrics": clipped | {name: float(part.mean()) for name, part in parts.items() if len(part)}}


@cache
def _pieces(tokenizer: Any) -> list[bytes]:
    """The bytes of each token, by id; a token without text ends a line."""
    if not tokenizer.is_fast:
        raise InputError(
            f"options.score=detector reads the bytes of tokens, and the tokenizer {type(tokenizer).__name__} does not give them: "
            "take a fast one (tokenizer.json), or set options.score to memorisation or domains."
        )
    return [piece if piece is not None else b"\n" for piece in token_bytes(tokenizer)[0]]
