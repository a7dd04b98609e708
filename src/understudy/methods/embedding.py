"""Embedding distillation: the student's vector of a text becomes the teacher's (Reimers and Gurevych 2020, arXiv 2004.09813).

    loss = mean over queries and documents x of d(s(x), t(x))        d = 1 − cos, or the mean squared difference

Where the widths differ, the teacher's vectors are reduced to their principal directions, Pᵀ t(x), or the student's are
mapped by a matrix W that is learned, W s(x), and stays behind or becomes the student's last layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from understudy.data import Batch
from understudy.data.retrieval_batches import RankingBatch
from understudy.errors import InputError
from understudy.losses.embeddings import cosine_distance, embedding_mse, principal_directions
from understudy.models import ModelAdapter, ModelOutput
from understudy.models.rankers import BiEncoderAdapter
from understudy.teachers import LocalTeacher
from understudy.training import Method, Requirements, SetupContext, Shapes, Term, TrainState


class Embedding(Method):
    """Match the teacher's vector of each query and document."""

    name = "embedding"
    kinds = frozenset({"ranking"})
    used_with: ClassVar[dict[str, Any]] = {"keep_projection": {"reduce": ("projection",)}}
    cost = "one teacher forward and one student forward and backward a query and document; `pca` embeds the texts once more"
    example: ClassVar[dict[str, Any]] = {
        "teacher": {"model": "embedding:64", "train": {"max_steps": 1000}},
        "options": {"reduce": "pca"},
    }
    page: ClassVar[dict[str, str]] = {
        "when": "A sentence encoder is to become a smaller or faster one and its vectors, not its scores, are to be kept: "
        "without labels, and without negatives. The baseline for `margin-mse`.",
        "not": "When the teacher is a cross-encoder or compares token by token: it has no vector of a text.",
        "deviations": "One language, so that the translations of the paper's second term are left out. `pca` uses the "
        "directions without the mean, as sentence-transformers reduces an encoder. Each listed document of a query "
        "counts, also where another query of the batch lists it too, so that batches may be cut anywhere.",
    }

    distance: Literal["cosine", "mse"] = Field("cosine", description="Between the vectors of student and teacher.")
    reduce: Literal["none", "pca", "projection"] = Field(
        "none",
        description="Where widths differ: the teacher's principal directions, or a learned matrix on the student's vectors.",
    )
    keep_projection: bool = Field(
        False, description="The matrix is saved as the student's last layer (Dense); otherwise it stays behind."
    )

    @property
    def requires(self) -> Requirements:
        return Requirements(features=True, teacher_features=True, teacher_model=self.reduce == "pca")

    def setup(self, context: SetupContext) -> Mapping[str, Tensor]:
        if self.reduce != "pca":
            return {}

        def directions() -> Mapping[str, Tensor]:
            teacher = LocalTeacher(context.live_teacher(), "teacher", freeze=False, features=True)
            seen = []
            for batch in context.batches("train"):
                vectors = teacher(batch).features
                assert vectors is not None
                seen.append(vectors[_texts(batch)].cpu())
            vectors = torch.cat(seen)
            return {"directions": principal_directions(vectors, vectors.shape[1])}

        return context.once("principal-directions", directions)

    def student(self, student: ModelAdapter, context: SetupContext) -> ModelAdapter:
        if self.reduce == "projection" and self.keep_projection:
            if not isinstance(student, BiEncoderAdapter):
                raise InputError(
                    "options.keep_projection is the last layer of an encoder: set student.options.scorer=dot."
                )
            teacher = LocalTeacher(context.live_teacher(), "teacher", freeze=False, features=True)
            vectors = teacher(next(iter(context.batches("train")))).features
            assert vectors is not None
            student.add_dense(vectors.shape[-1], context.seed)
        return student

    def modules(self, shapes: Shapes) -> dict[str, nn.Module]:
        ours, theirs = shapes.features, shapes.teacher_features
        assert ours is not None and theirs is not None
        if self.reduce == "projection" and not self.keep_projection:
            return {"projector": nn.Linear(ours, theirs, bias=False)}
        if ours > theirs or (self.reduce == "none" and ours != theirs):
            raise InputError(
                f"The student's vectors have {ours} entries and the teacher's {theirs}: set options.reduce=projection"
                f"{' or pca' if ours < theirs else ''}, or choose a student of the same width."
            )
        return {}

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"embedding": float(_texts(batch).sum())}

    def loss(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, state: TrainState
    ) -> dict[str, Term]:
        assert teacher is not None and student.features is not None and teacher.features is not None
        texts = _texts(batch)
        ours, theirs = student.features[texts], teacher.features[texts].to(student.features.dtype)
        if "projector" in state.modules:
            ours = state.modules["projector"](ours)
        elif self.reduce == "pca":
            theirs = theirs @ state.tables["directions"][:, : ours.shape[-1]].to(theirs)
        distance = {"cosine": cosine_distance, "mse": embedding_mse}[self.distance]
        values = distance(ours, theirs)
        return {"embedding": Term(values.new_zeros(texts.shape).masked_scatter(texts, values).sum(1))}


def _texts(batch: Batch) -> Tensor:
    """`[queries, 1 + candidates]`, which texts there are: the query, then its documents."""
    assert isinstance(batch, RankingBatch)
    return torch.cat([torch.ones_like(batch.candidates[:, :1]), batch.candidates], 1)
