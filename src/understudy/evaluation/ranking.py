"""Metrics of rankings: nDCG, MRR and recall, averaged over ties, and exact search by inner product."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from understudy.data import Batch
from understudy.data.retrieval_batches import RankingBatch, RankingSet
from understudy.errors import InputError
from understudy.models import ModelAdapter, evaluating
from understudy.models.rankers import BiEncoderAdapter

Gain = Literal["linear", "exponential"]


class Ranked:
    """Lists sorted by score; all orders of documents with equal scores are averaged.

    Args:
        scores, values: `[queries, candidates]`.
        mask: True for valid candidates.
    """

    def __init__(self, scores: Tensor, values: Tensor, mask: Tensor) -> None:
        scores = scores.double().masked_fill(~mask, -torch.inf)
        if torch.isnan(scores).any():
            raise InputError("A ranker's scores are nan. Lower its learning rate, or check its inputs.")
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        self.values = values.double().masked_fill(~mask, 0.0).gather(1, order)
        new = torch.ones_like(scores, dtype=torch.long)
        new[:, 1:] = (scores[:, 1:] != scores[:, :-1]).long()
        self.group = new.cumsum(1) - 1
        self.size = self._by_group(torch.ones_like(self.values))
        start = (new * torch.arange(scores.shape[1], device=scores.device)).cummax(1).values
        self.offset = torch.arange(scores.shape[1], device=scores.device) - start

    def _by_group(self, x: Tensor) -> Tensor:
        """The sum over the group of equal scores that each position belongs to."""
        return torch.zeros_like(x).scatter_add(1, self.group, x).gather(1, self.group)

    @property
    def expected(self) -> Tensor:
        """`[queries, candidates]`, the mean value at each position over all orders of ties."""
        return self._by_group(self.values) / self.size

    @property
    def first(self) -> Tensor:
        """`[queries, candidates]`, the probability that the first value of 1 is at each position."""
        ones, left = self._by_group(self.values), self.size - self.offset
        stays = ((left - ones) / left).clamp(min=0)
        before = torch.cat([torch.ones_like(stays[:, :1]), stays.cumprod(1)[:, :-1]], 1)
        return before * (ones / left).clamp(max=1)


def ndcg(
    scores: Tensor, grades: Tensor, mask: Tensor, *, k: int = 10, ideal: Tensor | None = None, gain: Gain = "linear"
) -> Tensor:
    """Normalised discounted cumulative gain at k, `[queries]` in [0, 1]; 0 for a query without relevant documents.

    Args:
        scores, grades: `[queries, candidates]`.
        mask: True for valid candidates.
        k: cutoff rank.
        ideal: `[queries, n]`, the best grades of each query over all graded documents, including those that are not
            candidates; those of the candidates if not given.
        gain: `linear` (as trec_eval and scikit-learn) or `exponential` (2^grade − 1). A grade below 0 gains 0, as in
            trec_eval: a list is not worse for what stands behind its relevant documents.
    """
    best = (grades.masked_fill(~mask, 0) if ideal is None else ideal).double().sort(1, descending=True).values
    found = _discounted(Ranked(scores, _gain(grades, gain), mask).expected, k)
    wanted = _discounted(_gain(best, gain), k)
    return torch.where(wanted > 0, found / wanted.clamp(min=1e-300), torch.zeros_like(found))


def _gain(grades: Tensor, gain: Gain) -> Tensor:
    grades = grades.double().clamp(min=0)
    return torch.exp2(grades) - 1 if gain == "exponential" else grades


def _discounted(gains: Tensor, k: int) -> Tensor:
    gains = gains[:, :k]
    return (gains / torch.log2(torch.arange(gains.shape[1], device=gains.device, dtype=torch.float64) + 2)).sum(1)


def mrr(scores: Tensor, relevant: Tensor, mask: Tensor, *, k: int = 10) -> Tensor:
    """1 / rank of the first relevant document, 0 if it is not among the first k. `[queries]`; arguments as in `ndcg`."""
    first = Ranked(scores, relevant.bool().double(), mask).first[:, :k]
    return (first / torch.arange(1, first.shape[1] + 1, device=first.device)).sum(1)


def recall(scores: Tensor, relevant: Tensor, mask: Tensor, *, k: int, total: Tensor | None = None) -> Tensor:
    """Fraction of the relevant documents that are among the first k, `[queries]`; 0 for a query without relevant
    documents.

    Args:
        total: `[queries]`, number of relevant documents over all graded ones; of the candidates if not given.
    """
    relevant = relevant.bool() & mask
    total = relevant.sum(1) if total is None else total
    return Ranked(scores, relevant.double(), mask).expected[:, :k].sum(1) / total.double().clamp(min=1)


def search(queries: Tensor, documents: Tensor, k: int, *, tile: int = 65536) -> tuple[Tensor, Tensor]:
    """The k documents with the largest inner product, computed exactly, tile by tile.

    Args:
        queries: `[queries, width]`.
        documents: `[documents, width]`.
        k: number of documents per query.
        tile: documents per block.

    Returns:
        Scores `[queries, k]`, largest first, and document indices; k is at most the number of documents.
    """
    if queries.shape[1] != documents.shape[1]:
        raise InputError(f"search: queries are {queries.shape[1]} wide and documents {documents.shape[1]}.")
    values = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(documents), tile):
        scores = queries @ documents[start : start + tile].T
        where = torch.arange(start, start + scores.shape[1], device=queries.device).expand_as(scores)
        values, indices = torch.cat([values, scores], 1), torch.cat([indices, where], 1)
        values, kept = values.topk(min(k, values.shape[1]), dim=1)
        indices = indices.gather(1, kept)
    return values, indices


@torch.no_grad()
def evaluate_ranking(student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any]) -> dict[str, Any]:
    """Metrics of re-ranking the candidates, and of exact retrieval from the whole collection for students that embed
    documents.

    `ndcg_10` (graded, linear gain), `mrr_10`, `recall_10`; those of the teacher (a model, or scores in the data) have
    the prefix `teacher_`; `agreement`: fraction of pairs that both order the same way. `retrieval_…`: the same metrics
    over the collection, for dot products.
    """
    models = [m for m in (student, teacher) if m is not None]
    parts: dict[str, list[Tensor]] = {}
    with evaluating(*models):
        for values in loader:
            batch = Batch.from_dict(values)
            assert isinstance(batch, RankingBatch)
            said = [m(batch.to(next(m.parameters()).device)).signal.values.cpu() for m in models]
            if len(said) == 1 and batch.taught is not None:
                said.append(batch.taught)
            for prefix, scores in zip(("", "teacher_"), said, strict=False):
                _reranked(parts, prefix, scores, batch)
            if len(said) == 2:
                parts.setdefault("agreement", []).append(_agreement(said[0], said[1], batch.candidates))
        joined = {name: torch.cat(found) for name, found in parts.items()}
        if not joined or len(joined["ndcg_10"]) == 0:
            raise InputError("The split has no query to evaluate.")
        metrics = {name: float(v.mean()) for name, v in joined.items() if len(v)}
        data = loader.dataset
        if (
            isinstance(data, RankingSet)
            and data.collection
            and isinstance(student, BiEncoderAdapter)
            and student.searches
        ):
            metrics |= retrieved(student, data)
    return {"rows": len(joined["ndcg_10"]), "metrics": metrics}


def _reranked(parts: dict[str, list[Tensor]], prefix: str, scores: Tensor, batch: RankingBatch) -> None:
    found = {
        "ndcg_10": ndcg(scores, batch.labels, batch.candidates, ideal=batch.ideal),
        "mrr_10": mrr(scores, batch.relevant, batch.candidates),
        "recall_10": recall(scores, batch.relevant, batch.candidates, k=10, total=batch.total),
    }
    for name, value in found.items():
        parts.setdefault(prefix + name, []).append(value)


def _agreement(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    """1 for each pair that the teacher orders and the student orders the same way, 0.5 for a tie of the student's."""
    pairs = mask[:, :, None] & mask[:, None, :] & (theirs[:, :, None] > theirs[:, None, :])
    return ((ours[:, :, None] - ours[:, None, :])[pairs].sign().double() + 1) / 2


@torch.no_grad()
def retrieved(student: BiEncoderAdapter, data: RankingSet, batch: int = 64) -> dict[str, float]:
    """Metrics of exact search through the whole collection; documents without a grade count as not relevant."""
    texts = data.collection
    documents = torch.cat([student.embed(texts[i : i + batch], "document") for i in range(0, len(texts), batch)])
    asked = [row["query"] for row in data.records]
    queries = torch.cat([student.embed(asked[i : i + batch], "query") for i in range(0, len(asked), batch)])
    deep = 1000 if len(texts) > 10_000 else 100
    scores, indices = (x.cpu() for x in search(queries, documents, min(deep, len(texts))))
    grades = torch.tensor(
        [[r["grades"].get(i, 0.0) for i in where] for r, where in zip(data.records, indices.tolist(), strict=True)]
    )
    ideal = torch.tensor([r["ideal"] for r in data.records])
    total = torch.tensor([r["total"] for r in data.records])
    mask, relevant = torch.ones_like(grades, dtype=torch.bool), grades > data.threshold
    return {
        "retrieval_ndcg_10": float(ndcg(scores, grades, mask, ideal=ideal).mean()),
        "retrieval_mrr_10": float(mrr(scores, relevant, mask).mean()),
        f"retrieval_recall_{deep}": float(recall(scores, relevant, mask, k=deep, total=total).mean()),
    }
