"""31. Distilling the Knowledge in Data Pruning (2024).

Score every training example, keep the fraction f of highest score, and train on these with the soft targets of a teacher
that saw all of them:

    loss = (1 − α) CE + α τ² KL(teacher_τ ‖ student_τ)

The fewer are kept, the higher the best α: by default α(f) = clip(1.1 − 0.6 f, 0.5, 1).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Subset

from understudy.curation import pruning
from understudy.data import Batch
from understudy.data.batch import IGNORE
from understudy.errors import InputError
from understudy.losses import cross_entropy, forward_kl
from understudy.models import ModelOutput, evaluating, state_hash
from understudy.streaming import rowwise
from understudy.teachers import LocalTeacher
from understudy.training import Method, Phase, Requirements, SetupContext, TeacherUse, Term, TrainState

log = logging.getLogger(__name__)

BY_HISTORY = frozenset({"forgetting", "el2n", "grand"})
"""Scores of a network's training on all the data."""
BY_EMBEDDING = frozenset({"prototypes", "herding", "moderate"})
"""Scores of what the teacher's head reads."""


class DataPruningKD(Method):
    """Training on a pruned part of the data, with the targets of a teacher that saw all of it."""

    name = "data-pruning-kd"
    paper = 31
    kinds = frozenset({"image"})
    cost = (
        "as kd; once, for scores of a history, `score_epochs` epochs of training the student on all data; for scores of an "
        "embedding, a teacher forward an example"
    )
    page: ClassVar[dict[str, str]] = {
        "when": "Less data must do, for the time or the storage it takes, and a teacher of all the data is at hand.",
        "not": "When all the data can be trained on. Without a teacher, hard examples alone can be mislabelled ones. With strong "
        "pruning a smaller teacher can be better than the largest: compare a few, and weights `alpha` too.",
        "deviations": "There is no released code. The budget is that of the recipe in optimizer steps, whatever the fraction: "
        "what is kept is seen more often. Scores of a history are those of a copy of the student, trained before the run "
        "on all the data without augmentation by AdamW. GraNd is that of the last layer. The rule for α is "
        "reconstructed. Ids, scores and indices of what is kept lie in `store/data-pruning-*.safetensors`.",
    }

    fraction: float = Field(0.5, gt=0, le=1, description="f, share of the training examples that is kept.")
    score: Literal["random", "forgetting", "el2n", "grand", "prototypes", "herding", "moderate"] = Field(
        "random", description="How examples are scored; those of highest score are kept."
    )
    class_balanced: bool = Field(False, description="Keep of every class its best examples, in proportion to its size.")
    alpha: float | None = Field(None, ge=0, le=1, description="α, weight of the teacher; by the fraction if not given.")
    temperature: float = Field(4.0, gt=0, description="τ of both sides.")
    score_epochs: int = Field(10, ge=2, description="Epochs of the training that histories are of.")
    score_rate: float = Field(1e-3, gt=0, description="Its learning rate.")
    clusters: int = Field(10, ge=1, description="Centres of `prototypes`.")

    @property
    def weight(self) -> float:
        """α as it is used."""
        return pruning.kd_weight(self.fraction) if self.alpha is None else self.alpha

    @property
    def requires(self) -> Requirements:
        reads = self.score in BY_EMBEDDING
        use: TeacherUse = "outputs" if self.weight else "setup" if reads else "none"
        return Requirements(teacher=use, teacher_model=reads, temperature=self.temperature)

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        pairs = [(batch.ids.cpu(), batch.labels.cpu()) for batch in context.batches("train")]
        every_id, every_label = (torch.cat(column) for column in zip(*pairs, strict=True))
        places = (every_label != IGNORE).nonzero()[:, 0]  # what does not count is neither scored nor kept
        ids, labels = every_id[places], every_label[places]
        if (self.score not in ("random", "prototypes") or self.class_balanced) and bool((labels < 0).any()):
            raise InputError(
                f"Example {int(ids[labels < 0][0])} has no label, which options.score={self.score} or class_balanced reads: "
                "choose random or prototypes without class_balanced, or leave it out."
            )
        if ids.unique().numel() < len(ids):
            raise InputError("Two training examples have the same id: scores are filed by id, so give each its own.")
        settings = {**self.model_dump(exclude={"alpha", "temperature"}), "seed": context.seed}
        if self.score in BY_HISTORY:
            settings["student"] = state_hash(context.student)

        def pruned() -> dict[str, Tensor]:
            scores = self._scores(context, places, ids, labels)
            kept = pruning.kept(scores, self.fraction, labels if self.class_balanced else None)
            return {"ids": ids, "scores": scores, "kept": places[kept]}

        found = context.once("data-pruning", pruned, **settings)
        self._warn(found, every_label)
        context.splits["kept"] = Subset(context.splits["train"], found["kept"].tolist())
        return found

    def _warn(self, found: Mapping[str, Tensor], labels: Tensor) -> None:
        if self.fraction < 1 and len(found["scores"]) > 1 and found["scores"].unique().numel() == 1:
            log.warning("All scores of %s are equal: the first examples are kept.", self.score)
        lost = set(labels[labels >= 0].tolist()) - set(labels[found["kept"]].tolist())
        if lost:
            log.warning(
                "No example of class %s is kept: set options.class_balanced.", ", ".join(map(str, sorted(lost)))
            )

    def _scores(self, context: SetupContext, places: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        if self.score == "random":
            return pruning.random_scores(ids, context.seed)
        if self.score in BY_EMBEDDING:
            teacher = LocalTeacher(context.live_teacher(), "teacher", freeze=False, features=True)
            found = [teacher(batch).features for batch in context.batches("train")]
            features = torch.cat([f for f in found if f is not None]).cpu()
            if self.score == "prototypes":
                return pruning.prototype_scores(features, self.clusters, context.seed)
            scorer = pruning.herding_scores if self.score == "herding" else pruning.moderate_scores
            return scorer(features, labels)
        training = {**self.model_dump(include={"score_epochs", "score_rate"}), "seed": context.seed}
        training |= {"student": state_hash(context.student), "features": self.score == "grand"}
        return context.once("history-scores", lambda: self._of_history(context, places, labels), **training)[self.score]

    def _of_history(self, context: SetupContext, places: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """All scores of one training, so that another score or fraction does not pay for it again."""
        logits, norms = self._history(context, places)
        scores = {
            "forgetting": pruning.forgetting_scores(pruning.correct(logits, labels)),
            "el2n": pruning.el2n_scores(logits, labels),
        }
        return scores | ({"grand": pruning.grand_scores(logits, labels, norms)} if self.score == "grand" else {})

    def _history(self, context: SetupContext, places: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[epochs, examples, classes]` and norms of features `[epochs, examples]` of a copy of the student.

        Args:
            places: of the examples in the training data.
        """
        examples, net = context.examples("train"), copy.deepcopy(context.student)
        device = next(net.parameters()).device
        history = []
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else None):
            torch.manual_seed(context.seed)
            optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=self.score_rate)
            for _ in range(self.score_epochs):
                net.train()
                for chosen in places[torch.randperm(len(places))].split(64):
                    if len(chosen) == 1:  # batch normalisation has nothing to normalise
                        continue
                    batch = Batch.from_dict(context.collate([examples[i] for i in chosen.tolist()])).to(device)
                    loss = rowwise(cross_entropy, net(batch).signal, None, batch.row_labels).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                with torch.no_grad(), evaluating(net):
                    seen = [net(b, features=self.score == "grand") for b in context.batches("train", 256)]
                logits = torch.cat([o.signal.logits for o in seen]).cpu()
                norms = [o.features.norm(dim=-1) for o in seen if o.features is not None]
                history.append((logits, torch.cat(norms).cpu() if norms else logits[:, 0] * 0))
        return torch.stack([z for z, _ in history]), torch.stack([h for _, h in history])

    def phases(self) -> Sequence[Phase]:
        return (Phase("kept", split="kept"),)

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        alpha, terms = self.weight, {}
        if alpha:
            assert teacher is not None
            kd = rowwise(forward_kl, student.signal, teacher.signal, temperature=self.temperature, tau_squared=True)
            terms["kd"] = Term(kd, alpha)
        if alpha < 1:
            terms["ce"] = Term(rowwise(cross_entropy, student.signal, None, batch.row_labels), 1 - alpha)
        return terms

    def finish(self, state: TrainState, context: SetupContext) -> Mapping[str, Any]:
        """How many examples were kept, the weight of the teacher and, where the labels before noise are known, the share of
        wrong ones among what was kept."""
        kept, train = state.tables["kept"], context.splits["train"]
        metrics = {"kept": float(len(kept)), "kd_weight": self.weight}
        clean = getattr(train, "clean", None)
        if clean is not None:
            metrics["kept_wrong"] = float((clean[kept] != train.labels[kept]).double().mean())
        return {"metrics": metrics}
