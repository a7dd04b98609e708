"""3. LLaVA-MoD: Making LLaVA Tiny via MoE Knowledge Distillation (2024, arXiv 2408.15881).

A student, vision-language or text, whose feed-forward networks become mixtures of experts, in three phases:

    dense:       L = KL(teacher ‖ student), on the tokens of the data's completions
    sparse:      every second FFN becomes E copies of itself and a router;  L = KL + CE + c · L_aux
    preference:  L = DPO or paired KTO on better and worse completions, with the teacher as reference;  + c · L_aux

L_aux = E Σ_e mean(p_e) · (share of tokens whose first choice is e), summed over the mixtures.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from understudy.data import IGNORE, Batch, ListBatch, TextSet
from understudy.errors import InputError
from understudy.losses import forward_kl
from understudy.losses.experts import load_balance
from understudy.losses.preference import dpo, kto_pair
from understudy.models import ModelAdapter, ModelOutput, SequenceAdapter, evaluating
from understudy.models.expert_files import as_transformers
from understudy.models.upcycling import mixtures, upcycle
from understudy.streaming import rowwise
from understudy.training import Method, Phase, Requirements, SetupContext, Term, TrainState
from understudy.training.reference import Reward, finite, reward_counts, reward_terms

EXPERT_PARAMETERS = r"\.(mlp|feed_forward|ffn)\."
VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual|vision_encoder|image_encoder)\.")
ADAPTOR = re.compile(r"merger|projector|connector|adaptor|adapter")
log = logging.getLogger(__name__)


class LLaVAMoD(Method):
    """Up-cycle a student into sparse experts that mimic the teacher, then learn preferences with it as reference."""

    name = "llava-mod"
    paper = 3
    kinds = frozenset({"preference"})
    cost = (
        "as kd, and a router for each mixture; of E experts k are computed for a token. In the last phase two completions a "
        "pair, of student and teacher"
    )
    used_with: ClassVar[dict[str, Any]] = {"detach_kl": {"loss_type": ("kto_pair",)}}
    example: ClassVar[dict[str, Any]] = {"task": "vision_language"}
    page: ClassVar[dict[str, str]] = {
        "when": "A vision-language student (`task=vision_language`), or a text LM (`task=preferences`), that is to become "
        "larger without becoming slower, and a teacher with the same tokens that makes fewer things up. Pairs of better and "
        "worse completions are needed; single completions beside them (`data.unpaired=true`) are mimicked too.",
        "not": "Without pairs (kd), or with a teacher of another tokenizer. A student that must stay small in memory: E copies "
        "of every second feed-forward network are stored.",
        "deviations": "The mimic loss reads the predictions of the response's tokens; the released code reads those made at "
        "them, one position too late. It is a KL, which differs from the paper's cross-entropy by the teacher's entropy, a "
        "constant. The released code adds the balance loss of the sparse phase twice; here it counts once. The adaptor's own "
        "initialisation is supervised training (`student.train`). Only the best completion of a record is mimicked. Experts take "
        "any number of tokens unless `capacity_factor` is set (the released code drops what is beyond 1.5). The shares of the "
        "balance loss are those of a micro-batch, which is its group: they depend on how a batch is cut; `balance=sequence` takes "
        "each sequence by itself. The KL of `kto_pair` couples the pairs of a micro-batch in the same way.",
    }

    experts: int = Field(4, ge=2, description="E, experts of each mixture.")
    top_k: int = Field(2, ge=1, description="k, experts that a token uses.")
    every: int = Field(2, ge=1, description="Layers 0, every, 2·every, … become mixtures.")
    capacity_factor: float | None = Field(None, gt=0, description="Most tokens of an expert, of its even share.")
    balance_weight: float = Field(0.01, ge=0, description="c, weight of the balance loss.")
    balance: Literal["batch", "sequence"] = Field("batch", description="Tokens whose load is balanced together.")
    shares: tuple[float, float, float] = Field(
        (0.25, 0.5, 0.25), description="Of the steps: dense mimic, sparse mimic, preference. 0 leaves a phase out."
    )
    lm_weight: float = Field(1.0, ge=0, description="Weight of the data's own tokens in the sparse phase.")
    loss_type: Literal["sigmoid", "kto_pair"] = Field("sigmoid", description="DPO, or KTO on pairs, as released.")
    beta: float = Field(0.1, gt=0, description="β of the preference loss.")
    detach_kl: bool = Field(False, description="No gradient of kto_pair's KL, as in the KTO paper.")
    reference: Literal["teacher", "start"] = Field(
        "teacher", description="Reference model: the teacher, or the student as the last phase finds it."
    )
    preference_rate: float | None = Field(
        None, gt=0, description="Learning rate of the last phase; a tenth of trainer.learning_rate in the paper."
    )
    freeze: bool = Field(
        True, description="Vision encoders stay frozen, and from the sparse phase on all but feed-forward networks."
    )

    @model_validator(mode="after")
    def _is_defined(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k} and there are {self.experts} experts: choose at most as many")
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"shares {list(self.shares)} are at least 0 and sum to 1")
        if not sum(self.shares[1:]):
            raise ValueError("shares leave no step to the experts: give the sparse or the preference phase some")
        return self

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher_model=True)

    # -- before training ----------------------------------------------------------------------------------------

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        if not isinstance(context.student, SequenceAdapter):
            raise InputError("llava-mod reads tokens of completions: choose task=vision_language or preferences.")
        mimicked, pairs, alike = [], [], 0
        for row in context.splits["train"].records:
            order = sorted(range(len(row["scores"])), key=lambda i: -row["scores"][i])
            best, worst = order[0], order[-1]
            mimicked.append(_of(row, best))
            if row["scores"][best] > row["scores"][worst]:
                same = torch.equal(row["sequences"][best][0], row["sequences"][worst][0])
                alike += same
                if not same:
                    pairs.append(_of(row, best, worst))
        if alike:
            log.warning("llava-mod: %d pairs of equal completions teach no order and were left out.", alike)
        if self.shares[2] and not pairs:
            raise InputError(
                "llava-mod: no training record has a better and a worse completion: give pairs, or set options.shares with 0 "
                "for the preference phase."
            )
        context.splits.update(mimic=TextSet(mimicked), pairs=TextSet(pairs))
        return {}

    def student(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        if hasattr(student.model, "peft_config"):
            raise InputError("llava-mod trains whole experts: leave student.peft out.")
        if not mixtures(student.model):
            upcycle(
                student.model,
                experts=self.experts,
                k=self.top_k,
                every=self.every,
                capacity_factor=self.capacity_factor,
            )
        elif self.shares[0]:
            raise InputError("The student has experts already: set options.shares with 0 for the dense phase.")
        if self.freeze:
            for name, parameter in student.model.named_parameters():
                if VISION.search(name) and not ADAPTOR.search(name):
                    parameter.requires_grad_(False)
        return student

    def taps(self, side: Literal["student", "teacher"], model: ModelAdapter, batch: Batch) -> Mapping[str, nn.Module]:
        return routers(model) if side == "student" and self.balance_weight else {}

    def companions(self, student: ModelAdapter) -> dict[str, nn.Module]:
        return {"reference": copy.deepcopy(student)} if self.reference == "start" and self.shares[2] else {}

    def phases(self) -> Sequence[Phase]:
        parameters = EXPERT_PARAMETERS if self.freeze else None
        trainer: dict[str, Any] = {} if self.preference_rate is None else {"learning_rate": self.preference_rate}
        planned = (
            Phase("dense", self.shares[0], split="mimic"),
            Phase("sparse", self.shares[1], split="mimic", parameters=parameters),
            Phase("preference", self.shares[2], split="pairs", parameters=parameters, trainer=trainer),
        )
        return [phase for phase in planned if phase.share]

    def on_phase_begin(self, state: TrainState) -> None:
        """Experts become copies of the dense network that was trained; the reference, of the student."""
        assert state.student is not None
        names = [phase.name for phase in self.phases()]
        # By the plan and not by what this process has done: a run that is resumed here has only read the dense phase's weights.
        follows = names[0] == "dense" and state.phase == names[1]
        for mixture in mixtures(state.student.model):
            mixture.dense = state.phase == "dense"
            if follows:
                mixture.spread()
        if state.phase == "preference" and "reference" in state.companions:
            reference = state.companions["reference"]
            reference.load_state_dict(state.student.state_dict())
            for mixture in mixtures(reference):
                mixture.dense = False

    # -- each update --------------------------------------------------------------------------------------------

    def counts(self, batch: Batch) -> dict[str, float]:
        assert isinstance(batch, ListBatch)
        tokens = float(batch.tokens.num_items)
        balanced = float(batch.inputs["attention_mask"].sum())
        return {"mimic": tokens, "lm": tokens, "balance": balanced, **reward_counts(batch)}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, ListBatch) and teacher is not None
        terms = {} if state.phase == "dense" else self._balance_terms(student, batch)
        if state.phase == "preference":
            return self._preference_terms(student, teacher, batch, state) | terms
        log_probs, ours = student.signal.by_token(self.name)
        _, theirs = teacher.signal.by_token(self.name)
        mimic = {"mimic": Term(rowwise(forward_kl, ours, theirs))}
        if state.phase == "dense" or not self.lm_weight:
            return mimic | terms
        return {**mimic, "lm": Term(-log_probs, self.lm_weight), **terms}

    def _balance_terms(self, student: ModelOutput, batch: ListBatch) -> dict[str, Term]:
        """The balance loss of every token that is no padding, images and prompts included, summed over the mixtures."""
        if not self.balance_weight:
            return {}
        kept = batch.inputs["attention_mask"].bool()
        group = kept.nonzero()[:, 0] if self.balance == "sequence" else None
        values = torch.stack([load_balance(logits[kept], group) for logits in student.taps.values()])
        return {"balance": Term(values.sum(0), self.balance_weight)}

    def _preference_terms(
        self, student: ModelOutput, teacher: ModelOutput, batch: ListBatch, state: TrainState
    ) -> dict[str, Term]:
        """`setup` put the better completion of each pair first."""
        values, reference = finite(student.signal.values, batch), teacher.signal.values
        if "reference" in state.companions:
            with torch.no_grad():
                reference = state.companions["reference"](batch).signal.values
        sides = values[:, 0], values[:, 1], reference[:, 0], reference[:, 1]
        if self.loss_type == "kto_pair":
            term = kto_pair(*sides, beta=self.beta, detach_kl=self.detach_kl).mean(1)
        else:
            term = dpo(*sides, beta=self.beta)
        return {self.loss_type: Term(term), **reward_terms(Reward(self.beta), values, reference, batch)}

    # -- afterwards ---------------------------------------------------------------------------------------------

    def export(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        """The student in an architecture of transformers with experts, if there is one; else as it is."""
        assert isinstance(student, SequenceAdapter)
        for mixture in mixtures(student.model):
            mixture.dense = False
        plain = as_transformers(student.model)
        if plain is None:
            log.warning(
                "transformers has no architecture for %s with these experts: the student is saved in a form that this package "
                "loads.",
                type(student.model).__name__,
            )
            return student
        found = SequenceAdapter(plain, student.vocabulary)
        found.processor = student.processor
        return found

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """Which experts the tokens of the evaluation split use."""
        assert state.student is not None
        shares, balance = expert_use(state.student, context)
        kinds = ("image", "prompt", "completion")
        rows = [
            [name, kind, *(f"{share:.3f}" for share in shares[name][kind].tolist())]
            for name in shares
            for kind in kinds
            if kind in shares[name]
        ]
        number = max(len(next(iter(kinds.values()))) for kinds in shares.values())
        table = {
            "title": "Use of the experts: share of the choices of tokens of each kind",
            "headings": ["router", "tokens", *(f"expert {e}" for e in range(number))],
            "rows": rows,
        }
        whole = torch.stack([torch.stack(list(kinds.values())).min() for kinds in shares.values()])
        return {
            "tables": [table],
            "metrics": {"expert_balance": balance, "expert_least_use": float(whole.min())},
            "pictures": {"Experts (columns) by router and kind of token (rows); brighter is more": _drawn(shares)},
        }


def routers(model: ModelAdapter) -> dict[str, nn.Module]:
    """The routers of a student, by name."""
    return {f"router {i}": mixture.gate for i, mixture in enumerate(mixtures(model))}


@torch.no_grad()
def expert_use(
    student: ModelAdapter, context: SetupContext, most: int = 8
) -> tuple[dict[str, dict[str, Tensor]], float]:
    """The share of each expert among the choices of tokens of a kind, `[experts]`, by router and kind; and the mean balance
    loss of a router. Of the first `most` batches of the evaluation split."""
    gates, taken = routers(student), mixtures(student.model)
    config = student.model.config
    image = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    totals: dict[str, dict[str, Tensor]] = {name: {} for name in gates}
    balances: list[Tensor] = []
    with evaluating(student):
        for number, batch in enumerate(context.batches(context.eval_split, 32)):
            if number == most:
                break
            kept, ids = batch.inputs["attention_mask"].bool(), batch.inputs["input_ids"]
            seen = ids == image if image is not None else torch.zeros_like(kept)
            said = batch.labels != IGNORE
            kinds = {"image": kept & seen, "prompt": kept & ~seen & ~said, "completion": kept & said}
            taps = student(batch, taps=gates).taps
            for (name, logits), mixture in zip(taps.items(), taken, strict=True):
                balances.append(load_balance(logits[kept]).mean())
                for kind, mask in kinds.items():
                    index = logits[mask].topk(mixture.k, -1).indices.flatten().cpu()
                    found = torch.bincount(index, minlength=len(mixture.experts))
                    totals[name][kind] = totals[name].get(kind, torch.zeros_like(found)) + found
    shares = {
        name: {kind: found / found.sum() for kind, found in kinds.items() if int(found.sum())}
        for name, kinds in totals.items()
    }
    return shares, float(torch.stack(balances).mean())


def _drawn(shares: Mapping[str, Mapping[str, Tensor]], side: int = 24) -> Any:
    """`[height, width, 3]` of uint8: a square for each share, white where an expert takes all."""
    grid = torch.stack([found for kinds in shares.values() for found in kinds.values()])
    levels = (255 * grid).to(torch.uint8)
    return levels.repeat_interleave(side, 0).repeat_interleave(side, 1)[..., None].expand(-1, -1, 3).numpy()


def _of(row: dict[str, Any], *chosen: int) -> dict[str, Any]:
    return row | {key: [row[key][i] for i in chosen] for key in ("sequences", "scores")} | {"log_probs": None}
