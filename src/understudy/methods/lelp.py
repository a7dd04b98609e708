"""6. Linear Projections of Teacher Embeddings for Few-Class Distillation (LELP, 2024).

With two classes a teacher's probabilities say little. Its embedding says more: each class is split into subclasses along
linear directions of the embedding that the teacher's own head cannot see, and the student learns classes × subclasses.

    r(s | c, x) = softmax_s u_cs · (P h(x) − μ_c) / (β σ_c),    p̃_cs = softmax(z / τ)_c · r(s | c, x)
    loss = τ² · −Σ_cs p̃_cs log softmax(o / τ)_cs,    prediction: logsumexp_s o_cs

P projects on the null space of the head, μ_c and u_c are mean and (randomly rotated) principal directions of class c.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from understudy.data import Batch
from understudy.errors import InputError
from understudy.losses import cross_entropy_soft
from understudy.losses.subclasses import (
    marginal_cross_entropy,
    marginal_logits,
    null_projector,
    split_log_targets,
    two_class_head,
)
from understudy.models import (
    ClassifierAdapter,
    MarginalAdapter,
    ModelAdapter,
    ModelOutput,
    evaluating,
    find_head,
    replace_head,
)
from understudy.models.classifier_heads import linear_readout, sum_subclasses
from understudy.models.taps import layer
from understudy.streaming import rowwise
from understudy.streaming.plain import dense
from understudy.targets import Dense
from understudy.teachers import LocalTeacher
from understudy.teachers.splitters import SPLITTERS, Known, Shape, lookup
from understudy.training import Method, Requirements, SetupContext, TeacherUse, Term, TrainState

log = logging.getLogger(__name__)


class LELP(Method):
    """Classes × subclasses read off linear projections of the teacher's embedding."""

    name = "lelp"
    paper = 6
    kinds = frozenset({"classification"})
    cost = "as kd; once, a teacher forward an example and a singular value decomposition a class (embeddings in memory)"
    used_with: ClassVar[dict[str, Any]] = {
        **{name: {"split": ("linear",)} for name in ("rotate", "normalise", "strict")},
        "beta": {"split": ("linear", "kmeans_soft")},
    }
    page: ClassVar[dict[str, str]] = {
        "when": "Two or a few classes that have parts the teacher can tell apart, and little transfer data. It needs no "
        "labels in training (`data.unlabelled=true`) and no embeddings of equal width.",
        "not": "With many classes, whose probabilities say enough; where classes have no separable parts, it costs a "
        "little. Leave τ at 1 unless validated: τ² gives the noisy part of the target too much weight.",
        "deviations": "The text gives the steps, not the scalings: centring by the class mean, β in units of σ_c "
        "(`normalise=true`), τ² and all defaults are reconstructed. Where the data stage finds another teacher, data or "
        "option it computes anew; a stored file that says otherwise inside is refused. The saved student is an ordinary "
        "model of the task, and that is what is judged. A small network keeps its wide head as one that sums over "
        "subclasses, which is the method's prediction exactly. Other models get the linear head that fits the exact "
        "probabilities best on the training examples; that head is an approximation, and `merge_agreement` is the share "
        "of validation examples on which it predicts the same class as the exact one. The wide head is drawn anew, so a "
        "pretrained student keeps its body alone. Cached targets are those of images without augmentation.",
    }

    subclasses: int = Field(5, ge=1, description="S, parts of each class. 1 is plain distillation.")
    beta: float = Field(0.25, gt=0, description="Temperature of the subclasses, in units of σ_c if `normalise`.")
    tau: float = Field(1.0, gt=0, description="Temperature of the classes and of the student.")
    alpha: float = Field(0.0, ge=0, le=1, description="Weight of the labels' cross-entropy; the rest is the method's.")
    split: Literal["linear", "kmeans", "kmeans_soft", "random", "oracle"] = Field(
        "linear", description="How classes are split: the method's projections, or what it is compared with."
    )
    null_space: bool = Field(True, description="Remove what the teacher's head can see from the embedding.")
    rotate: bool = Field(True, description="Rotate the principal directions at random, once, by `rotation_seed`.")
    normalise: bool = Field(True, description="Divide by σ_c, the root of the mean variance over the directions.")
    rotation_seed: int = Field(0, ge=0, description="Of rotations, clusters and random splits.")
    strict: bool = Field(True, description="Refuse a class with too few examples; otherwise fewer subclasses for all.")
    assign: Literal["label", "teacher"] = Field(
        "label",
        description="An example's class when fitting: its label (the teacher's where it has none), or always the teacher's.",
    )
    fit_on: Literal["train", "teacher_train"] = Field(
        "train", description="Fit the split to the student's training examples, or to all that the teacher may see."
    )
    teacher_layer: str | None = Field(
        None, description="Layer whose output is the embedding; the head's input if not given. Needs null_space=false."
    )
    cache: bool = Field(
        False, description="Compute all targets once, before training, and do not run the teacher again."
    )
    head: Literal["auto", "exact", "linear"] = Field(
        "auto", description="How the wide head is saved: auto is exact for small networks and linear for others."
    )

    @model_validator(mode="after")
    def _embedding_of_the_head(self) -> LELP:
        if self.teacher_layer is not None and self.null_space:
            raise ValueError("an inner layer has no head whose null space could be taken: set null_space=false")
        return self

    @property
    def requires(self) -> Requirements:
        layer = self.teacher_layer is not None
        use: TeacherUse = "setup" if self.cache else "outputs"
        return Requirements(
            teacher=use, teacher_features=not self.cache and not layer, teacher_layers=layer, teacher_model=True
        )

    def taps(self, side: Literal["student", "teacher"], rows: ModelAdapter, batch: Batch) -> Mapping[str, nn.Module]:
        if side == "student" or self.teacher_layer is None:
            return {}
        return {"embedding": layer(rows.model, self.teacher_layer)}

    # -- before training: read the teacher, split the classes ---------------------------------------------------------

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        facts = {**self.model_dump(exclude={"alpha", "head"}), "teacher_and_data": context.key}
        said = torch.tensor(list(json.dumps(facts, sort_keys=True).encode()), dtype=torch.uint8)
        found = context.once("lelp", lambda: {**self._fit(context), "facts": said}, **facts)
        if not torch.equal(found.pop("facts"), said):
            raise InputError(
                f"A stored split in {context.store} was fitted to another teacher, other data or options: delete lelp-* there."
            )
        return found

    def _fit(self, context: SetupContext) -> dict[str, Tensor]:
        """The split's tables, the projector, and the targets where they are to be cached."""
        model = context.live_teacher()
        taps = self.taps("teacher", model, next(context.batches("train", 2)))
        features = self.teacher_layer is None
        teacher = LocalTeacher(model, "teacher", freeze=False, features=features, taps=taps)
        read = [
            (*self._read(teacher(batch), batch), batch.row_labels, _ids(batch))
            for batch in context.batches(self.fit_on)
        ]
        embeddings, logits, labels, ids = (torch.cat(column) for column in zip(*read, strict=True))
        broken = ~embeddings.isfinite().all(1)
        if bool(broken.any()):
            raise InputError(
                f"The teacher's embedding of example {int(ids[broken][0])} is not finite: look at that example, or load the "
                "teacher in float32."
            )
        projector = self._projector(model, embeddings, logits)
        by_teacher = torch.ones_like(labels, dtype=torch.bool) if self.assign == "teacher" else labels < 0
        chosen = torch.where(by_teacher, logits.argmax(1), labels)
        known = Known(embeddings, chosen, ids, _parts(context.examples(self.fit_on), ids))
        classes = logits.shape[1]
        shape = Shape(classes, self.subclasses, self.rotation_seed, projector, self.strict, self.rotate, self.normalise)
        tables = {k: v.cpu() for k, v in SPLITTERS[self.split].fit(known, shape).items()}
        if float(tables.get("scale", torch.ones(1)).min()) == 0:
            log.warning("The embeddings of a class are all equal: its subclasses are uniform and teach nothing.")
        if projector is not None:
            tables["projector"] = projector.cpu()
        if self.cache:
            tables |= self._cached(context, teacher, tables)
        return tables

    def _projector(self, teacher: ModelAdapter, embeddings: Tensor, logits: Tensor) -> Tensor | None:
        """P, or `None` where it is not asked for or the head sees all of the embedding."""
        if not self.null_space:
            return None
        head = find_head(teacher)
        weight = getattr(head, "weight", None)
        if weight is not None:
            weight = two_class_head(weight.detach()).double()
        fits = weight is not None and weight.shape == (logits.shape[1], embeddings.shape[1])
        if fits:  # z − W h must be one constant, the bias
            assert weight is not None
            rest = logits.double() - embeddings.double() @ weight.T
            fits = bool((rest - rest[0]).abs().max() <= 1e-2 * (1 + logits.abs().max()))
        if not fits:
            raise InputError(
                "The teacher's logits are no linear map of its embedding, so that its head has no null space: set "
                "options.null_space=false."
            )
        assert weight is not None
        if int(torch.linalg.matrix_rank(weight)) >= weight.shape[1]:
            log.warning("The teacher's head sees every direction of its embedding: the null space is left out.")
            return None
        return null_projector(weight)

    def _cached(self, context: SetupContext, teacher: LocalTeacher, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = [(_ids(batch), self._targets(teacher(batch), batch, tables)) for batch in context.batches("train")]
        ids, targets = (torch.cat([pair[i] for pair in found]).cpu() for i in (0, 1))
        order = ids.argsort()
        return {"cached_ids": ids[order], "cached": targets[order]}

    # -- the targets and the loss -------------------------------------------------------------------------------------

    def _read(self, teacher: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embedding and logits of the rows."""
        embedding = teacher.features
        if self.teacher_layer is not None:
            embedding = batch.select(teacher.taps["embedding"]).flatten(1)
        signal = dense(teacher.signal)
        assert embedding is not None and isinstance(signal, Dense)
        return embedding, signal.logits

    def _targets(self, teacher: ModelOutput, batch: Batch, tables: Mapping[str, Tensor]) -> Tensor:
        """log p̃ `[rows, classes · subclasses]`, float64."""
        embedding, logits = self._read(teacher, batch)
        tables = {k: v.to(logits.device) for k, v in tables.items()}
        x = embedding.double() @ tables["projector"] if "projector" in tables else embedding.double()
        parts = SPLITTERS[self.split].assign(x, _ids(batch), tables, self.beta)
        return split_log_targets(logits, parts, temperature=self.tau)

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        if self.cache:
            ids = _ids(batch)
            place = lookup(ids, state.tables["cached_ids"].to(ids.device))
            targets = state.tables["cached"].to(ids.device)[place]
        else:
            assert teacher is not None
            targets = self._targets(teacher, batch, state.tables)
        dtype = torch.promote_types(student.signal.logits.dtype, torch.float32)
        logits = Dense(self.tau * targets.to(dtype))  # the loss divides by τ again
        values = rowwise(cross_entropy_soft, student.signal, logits, temperature=self.tau, tau_squared=True)
        terms = {"lelp": Term(values, 1 - self.alpha)}
        if self.alpha:
            classes = targets.shape[1] // int(state.tables["subclasses"])
            ce = rowwise(marginal_cross_entropy, student.signal, None, batch.row_labels, classes=classes)
            terms["ce"] = Term(ce, self.alpha)
        return terms

    # -- the student: a wide head while it learns, an ordinary model afterwards ------------------------------------------

    def student(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        assert isinstance(student, ClassifierAdapter)
        if self.head == "exact" and not hasattr(student.model, "understudy"):
            raise InputError(
                f"head='exact' is for the small networks and the student is a {type(student.model).__name__}: its format "
                "has no head that sums over subclasses. Set options.head=linear."
            )
        replace_head(student, context.classes * int(self.setup(context)["subclasses"]), seed=context.seed)
        return student

    def eval_model(self, student: ModelAdapter, state: TrainState) -> ModelAdapter:
        assert isinstance(student, ClassifierAdapter)
        return MarginalAdapter(student, student.classes // int(state.tables["subclasses"]))

    def export(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        assert isinstance(student, ClassifierAdapter)
        if student.classes == context.classes:  # one subclass: the head is ordinary already
            return student
        if self.head == "exact" or (self.head == "auto" and hasattr(student.model, "understudy")):
            sum_subclasses(student, context.classes)
            return student
        (x, exact), (seen, wanted) = (_exact(student, context, split) for split in ("train", "validation"))
        head = replace_head(student, context.classes)
        fitted = linear_readout(x, torch.softmax(exact, -1), bias=head.bias is not None)
        found = fitted(seen.double()).argmax(-1)
        head.load_state_dict(fitted.state_dict())
        head.merge_agreement = float((found == wanted.argmax(-1)).double().mean())  # type: ignore[assignment]
        return student

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        assert state.student is not None
        agreement = getattr(find_head(state.student), "merge_agreement", None)
        return {"metrics": {"merge_agreement": agreement}} if agreement is not None else {}


def _ids(batch: Batch) -> Tensor:
    """The example id of each row."""
    return batch.ids[batch.sequence]


def _parts(examples: Any, ids: Tensor) -> Tensor | None:
    """True class and subclass of each row, where the examples know them."""
    if getattr(examples, "parts", None) is None:
        return None
    order = examples.ids.argsort()
    found: Tensor = examples.parts[order[lookup(ids.cpu(), examples.ids[order])]]
    return found.to(ids.device)


@torch.no_grad()
def _exact(student: ClassifierAdapter, context: SetupContext, split: str) -> tuple[Tensor, Tensor]:
    """The student's features and exact class scores on a split, without augmentation."""
    with evaluating(student):
        rows = [student(batch, features=True) for batch in context.batches(split)]
    features = torch.cat([r.features for r in rows if r.features is not None])
    return features, marginal_logits(torch.cat([r.signal.logits for r in rows]).double(), context.classes)
