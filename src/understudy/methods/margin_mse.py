"""41. Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation (2020).

Rankers of different architecture score on scales of their own, so the student copies differences, not scores:

    loss = ((s⁺ − s⁻) − (t⁺ − t⁻))²

for a query with a relevant and another document. Labels only say which is which: where the teacher prefers the other
document, so does the student. The teacher's scores are computed once, before training, or come with the data.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from understudy.data import Batch
from understudy.data.retrieval_batches import RankingBatch, RankingSet
from understudy.data.scored_triples import Triple, write_triples
from understudy.errors import InputError
from understudy.losses import retrieval
from understudy.losses.retrieval import PairLoss
from understudy.models import ModelOutput
from understudy.models.rankers import RankerAdapter, RankerEnsemble
from understudy.teachers.cache.scores import ScoreStore, score_lists
from understudy.training import Method, Requirements, SetupContext, Term, TrainState

log = logging.getLogger(__name__)


class MarginMSE(Method):
    """Regression of the teacher's margins between relevant and other documents."""

    name = "margin-mse"
    paper = 41
    kinds = frozenset({"ranking"})
    used_with: ClassVar[dict[str, Any]] = {"clamp": {"loss_type": ("weighted_ranknet",)}}
    cost = "one student forward and backward a query and document; the teacher scores each pair once and is stored"
    page: ClassVar[dict[str, str]] = {
        "when": "A slow ranker (a cross-encoder, or several) is to become a fast one (dot product, late interaction), or "
        "its scores are at hand in a file of triples.",
        "not": "When teacher and student share a scale and scores themselves matter; when the teacher gives "
        "probabilities, whose margins are squeezed.",
        "deviations": "Several positives or negatives are divided by the number of valid pairs in the update. In-batch "
        "negatives ask the teacher at every step and depend on how a batch is cut, the micro-batch being the group. "
        "Standardised ensembles and the clamp of weighted RankNet are ours, and off. The embedded world rebuilds an "
        "experiment from its description; default learning rates for small encoders are ours. Runs have a "
        "fixed number of steps; the paper's early stopping on nDCG is `patience` with trainer.eval_strategy=steps.",
    }

    variants: ClassVar[str | None] = "loss_type"

    loss_type: Literal["margin_mse", "pointwise_mse", "weighted_ranknet", "ranknet"] = Field(
        "margin_mse", description="The paper's loss, or one of those it compares with."
    )
    clamp: bool = Field(False, description="Weighted RankNet: 0 where the teacher prefers the negative, not below.")
    positives: Literal["all", "first"] = Field("all", description="Which of a query's positives are paired.")
    negatives: Literal["listed", "in_batch"] = Field(
        "listed",
        description="The query's own, or also every other document of the micro-batch (which asks the teacher live, but for ranknet).",
    )
    scores: Literal["auto", "recorded", "teacher", "live"] = Field(
        "auto",
        description="recorded: those of the data; teacher: computed once and stored; live: at every step; auto: the "
        "teacher's if the recipe names one, else recorded.",
    )
    ensemble: Literal["mean", "standardise"] = Field(
        "mean",
        description="Several teachers: the mean of raw scores, or of scores divided by their margins' deviation.",
    )
    write_scores: Path | None = Field(
        None, description="Write the training triples with their scores (.tsv, .parquet)."
    )

    @model_validator(mode="after")
    def _live_scores_are_not_kept(self) -> Self:
        if self.loss_type == "ranknet" and self.scores == "live":
            raise ValueError("scores=live has no effect with loss_type=ranknet, which reads labels alone: leave it out")
        if self._live and (self.scores == "recorded" or self.write_scores or self.ensemble != "mean"):
            raise ValueError(
                "scores=live and negatives=in_batch make pairs that are scored at every step: their scores are neither "
                "recorded, written nor standardised"
            )
        return self

    @property
    def _live(self) -> bool:
        """Whether every step has pairs of its own to score."""
        return self.scores == "live" or self.negatives == "in_batch"

    @property
    def requires(self) -> Requirements:
        """The teacher in every step where new pairs come up in each, unless the loss reads no scores; otherwise its scores are
        computed once."""
        if self._live:
            return Requirements(teacher="none" if self.loss_type == "ranknet" else "outputs")
        if self.scores == "teacher":
            return Requirements(teacher="setup", teacher_model=True)
        own = self.scores == "recorded" or (self.loss_type == "ranknet" and self.write_scores is None)
        return Requirements(teacher="none" if own else "optional", teacher_model=not own)

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        train: RankingSet = context.splits["train"]
        if self._live:
            for row in train.records:
                row["crossed"] = self.negatives == "in_batch"
            return {}
        if self.scores == "teacher" and context.teacher_model is None:
            raise InputError("margin-mse with scores='teacher' needs a teacher: set `teacher`.")
        if context.teacher_model is not None and self.scores != "recorded":
            columns = score(context, train)
            taught = {"train": columns}
        elif all("members" in row for row in train.records):
            taught = {
                s: [row["members"] for row in x.records] for s, x in context.splits.items() if "members" in x.records[0]
            }
        elif self.loss_type == "ranknet" and self.write_scores is None:
            return {}
        else:
            raise InputError(
                f"margin-mse with scores={self.scores!r}: the data has no teacher scores. Set `teacher`, or give a file of "
                "scored triples."
            )
        spreads = deviations(train, taught["train"]) if self.ensemble == "standardise" else None
        for split, members in taught.items():
            flat = torch.cat([torch.tensor(scores, dtype=torch.float64) for scores in members], 1)
            means = retrieval.ensemble(flat, spreads=spreads).split([len(scores[0]) for scores in members])
            for row, values in zip(context.splits[split].records, means, strict=True):
                row["taught"] = values.tolist()
        if context.teacher_model is not None:
            _look(train)
        if self.write_scores is not None:
            write_triples(self.write_scores, triples(train))
        return {}

    def _valid(self, batch: RankingBatch) -> Tensor:
        """`[queries, candidates, candidates]`: positives with negatives."""
        positive, negative = (batch.labels > 0) & batch.candidates, (batch.labels <= 0) & batch.candidates
        if self.positives == "first":
            positive &= positive.cumsum(1) == 1
        return positive[:, :, None] & negative[:, None, :]

    def counts(self, batch: Batch) -> dict[str, float]:
        assert isinstance(batch, RankingBatch)
        return {self.loss_type: float(self._valid(batch).sum())}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert isinstance(batch, RankingBatch)
        ours, valid = student.signal.values, self._valid(batch)
        if not bool(valid.any()):
            log.warning("A batch of %d queries has no positive with a negative: it teaches nothing.", batch.num_items)
        theirs = ours.detach()  # of RankNet, which asks no teacher
        if teacher is not None:
            theirs = teacher.signal.values
        elif batch.taught is not None:
            theirs = batch.taught
        pairs: dict[str, PairLoss] = {
            "margin_mse": retrieval.margin_mse,
            "pointwise_mse": retrieval.pointwise_mse,
            "weighted_ranknet": lambda *s: retrieval.weighted_ranknet(*s, clamp=self.clamp),
            "ranknet": lambda better, worse, *_: retrieval.ranknet(better, worse),
        }
        return {self.loss_type: Term(retrieval.over_pairs(pairs[self.loss_type], ours, theirs, valid).sums)}


Members = list[list[float]]


def score(context: SetupContext, train: RankingSet) -> list[Members]:
    """`[rows][teachers][documents]`: what each teacher says, each pair of query and document computed once and stored."""
    teacher = context.teacher_model
    assert isinstance(teacher, RankerAdapter)
    members = teacher.members if isinstance(teacher, RankerEnsemble) else [teacher]
    columns: list[Members] = [[] for _ in train.records]
    distinct, store = train.distinct(), ScoreStore(context.store / "scores")
    for member in members:
        name = member.identity()

        def contents(row: Mapping[str, Any], name: str = name) -> list[bytes]:
            return [f"{name}\0{row['query']}\0{d}".encode() for d in row["documents"]]

        score_lists(member, distinct, context.collate, store, column="found", contents=contents)
        known = {(r["query"], d): v for r in distinct.records for d, v in zip(r["documents"], r["found"], strict=True)}
        for row, column in zip(train.records, columns, strict=True):
            column.append([known[row["query"], d] for d in row["documents"]])
    return columns


def deviations(train: RankingSet, members: list[Members]) -> Tensor:
    """`[teachers]`, the standard deviation of each teacher's margins over all pairs of a positive and a negative."""
    found = []
    for row, scores in zip(train.records, members, strict=True):
        values, positive = torch.tensor(scores, dtype=torch.float64), torch.tensor(row["labels"]) > 0
        found.append((values[:, positive][:, :, None] - values[:, ~positive][:, None, :]).flatten(1))
    return torch.cat(found, 1).std(1)


def triples(train: RankingSet) -> list[Triple]:
    """Each positive with each negative of its row, and the scores of both."""
    return [
        Triple(row["taught"][i], row["taught"][j], row["query"], row["documents"][i], row["documents"][j])
        for row in train.records
        for i, better in enumerate(row["labels"])
        for j, worse in enumerate(row["labels"])
        if better > 0 >= worse
    ]


def _look(train: RankingSet) -> None:
    scores = [v for row in train.records for v in row["taught"]]
    bad = next((row for row in train.records if not torch.tensor(row["taught"]).isfinite().all()), None)
    if bad is not None:
        raise InputError(f"The teacher's score for the query {bad['query'][:60]!r} is not finite. Load it in float32.")
    if min(scores) >= 0 and max(scores) <= 1:
        log.warning(
            "All scores of the teacher lie in [0, 1], like probabilities: their margins are squeezed. Use logits."
        )
