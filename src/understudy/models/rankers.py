"""Ranker adapters: a score for each candidate of a query.

| scorer | score of a query and a document |
|---|---|
| `dot` | inner product of one vector each, the first token's or the mean over tokens |
| `late` | Σ over query tokens of the largest inner product with a document token |
| `cross` | one logit of a classifier on the concatenated pair |
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from understudy.data import Batch
from understudy.data.retrieval_batches import RankingBatch, View
from understudy.errors import InputError
from understudy.models.adapters import ModelAdapter, ModelOutput
from understudy.models.encoders import Dense, Encoder, save_encoder
from understudy.targets import Scores

FACTS = "ranker.json"


def max_sim(queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
    """Σ over query tokens of the largest inner product with a document token.

    Args:
        queries: `[pairs, query tokens, width]`.
        documents: `[pairs, document tokens, width]`.
        query_mask, document_mask: without the axis of width. Masked document tokens are never the largest, masked query
            tokens contribute 0.

    Returns:
        `[pairs]`; 0 for a document without a token. In the dtype of the vectors, also under autocast: scores reach hundreds,
        where bfloat16 rounds to even numbers.
    """
    with torch.autocast(queries.device.type, enabled=False):
        similar = queries @ documents.transpose(1, 2)
    best = similar.masked_fill(~document_mask[:, None, :], -torch.inf).max(2).values
    counts = query_mask & document_mask.any(1, keepdim=True)
    return torch.where(counts, best, torch.zeros_like(best)).sum(1)


class RankerAdapter(ModelAdapter):
    """Base class of rankers: tokenized texts, and scores in the layout of the batch's candidates.

    Args:
        model: the network.
        view: its tokenizer and lengths.
    """

    def __init__(self, model: nn.Module, view: View) -> None:
        super().__init__()
        self.model, self.view, self.padding = model, view, 0

    def facts(self) -> dict[str, Any]:
        """The settings that scores depend on, beside weights and tokenized texts."""
        raise NotImplementedError

    def identity(self) -> str:
        """A key for stored scores of everything that a score depends on except weights and texts."""
        return json.dumps([self.facts(), self.view.key], sort_keys=True)

    def _side(self, batch: Batch, side: str) -> tuple[Tensor, Tensor]:
        return batch.inputs[f"{self.view.key}/{side}_ids"], batch.inputs[f"{self.view.key}/{side}_mask"]

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        assert isinstance(batch, RankingBatch)  # as the task's collator returns
        query, _ = batch.candidates.nonzero(as_tuple=True)
        pairs = self.pairs(batch, query, batch.slots[batch.candidates]).float()
        values = pairs.new_zeros(batch.slots.shape).masked_scatter(batch.candidates, pairs)
        return ModelOutput(Scores(values, batch.candidates))

    def pairs(self, batch: RankingBatch, query: Tensor, document: Tensor) -> Tensor:
        """`[pairs]` scores of these queries with these documents of the batch."""
        raise NotImplementedError


class Towers(nn.Module):
    """Encoders of queries and documents: one for both, or two. `scale` multiplies scores and may be learned."""

    def __init__(self, encoders: Sequence[Encoder], scale: float = 1.0, learn: bool = False) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        if learn:
            self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.fixed, self.learns = scale, learn

    def side(self, side: str) -> Encoder:
        """The encoder of `query` or `document`."""
        found = self.encoders[0 if side == "query" else -1]
        assert isinstance(found, Encoder)
        return found

    @property
    def scale(self) -> Tensor | float:
        """The factor of all scores."""
        return self.log_scale.exp() if self.learns else self.fixed


class BiEncoderAdapter(RankerAdapter):
    """Queries and documents encoded separately: `dot` or `late`."""

    def __init__(self, model: Towers, view: View, scorer: str) -> None:
        super().__init__(model, view)
        self.scorer = scorer
        if scorer == "late" and model.side("query").maps:
            raise InputError(
                "A Dense module maps the vector of a text, and scorer=late compares tokens: use scorer=dot."
            )

    @property
    def searches(self) -> bool:
        """Whether a document is a single vector, so that a collection can be searched."""
        return self.scorer == "dot"

    def facts(self) -> dict[str, Any]:
        encoder = self.model.side("query")
        return {
            "scorer": self.scorer,
            "pooling": encoder.pooling,
            "normalize": encoder.normalize,
            "towers": len(self.model.encoders),
            "scale": "learned" if self.model.learns else self.model.fixed,
        }

    def _tokens(self, ids: Tensor, mask: Tensor, side: str) -> tuple[Tensor, Tensor]:
        """Vectors of each token with its special tokens, and their mask."""
        before, after, *_ = self.view.template if self.model.side(side).special else ([], [], [])
        ids, mask, _ = joined([(before, 0), (ids, mask, 0), (after, 0)], self.view.tokenizer.pad_token_id or 0)
        return self.model.side(side)(ids, mask), mask

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        """Scores; features are `[queries, 1 + candidates, width]`, the vectors of each query and of its documents."""
        if not features:
            return super().answer(batch, features)
        if not self.searches:
            raise InputError(f"A ranker with scorer={self.scorer} has no single vector of a text: use scorer=dot.")
        assert isinstance(batch, RankingBatch)
        queries, every = (self._vectors(batch, side) for side in ("query", "document"))
        there = batch.candidates[..., None]
        documents = every[batch.slots.clamp(min=0)].masked_fill(~there, 0.0)
        values = (queries[:, None] * documents).sum(-1) * self.model.scale
        return ModelOutput(Scores(values, batch.candidates), torch.cat([queries[:, None], documents], 1))

    def _vectors(self, batch: RankingBatch, side: str) -> Tensor:
        """`[texts, width]`, float32."""
        return self.model.side(side).pooled(*self._tokens(*self._side(batch, side), side)).float()

    def pairs(self, batch: RankingBatch, query: Tensor, document: Tensor) -> Tensor:
        if self.searches:
            q, d = (self._vectors(batch, side) for side in ("query", "document"))
            return (q[query] * d[document]).sum(1) * self.model.scale
        queries, query_mask = self._tokens(*self._side(batch, "query"), "query")
        documents, document_mask = self._tokens(*self._side(batch, "document"), "document")
        queries, documents = (self.model.side("query").scaled(x) for x in (queries, documents))
        scores = max_sim(
            queries[query].float(), documents[document].float(), query_mask[query], document_mask[document]
        )
        return scores * self.model.scale

    def embed(self, texts: Sequence[str], side: str) -> Tensor:
        """`[texts, width]`, float32: one vector each, for search."""
        device = next(self.parameters()).device
        ids, mask = (x.to(device) for x in self.view.tensors(texts, side).values())
        return self.model.side(side).pooled(*self._tokens(ids, mask, side)).float()

    def save(self, folder: Path) -> None:
        """One shared tower as a `sentence-transformers` folder; two as such folders `query` and `document`."""
        sides = {"": "query"} if len(self.model.encoders) == 1 else {"query": "query", "document": "document"}
        for name, side in sides.items():
            save_encoder(self.model.side(side), folder / name, self.view)
        facts = self.facts() | (
            {"scale": float(torch.as_tensor(self.model.scale).detach()), "learn_scale": True}
            if self.model.learns
            else {}
        )
        (folder / FACTS).write_text(json.dumps(facts, indent=1))

    def add_dense(self, width: int, seed: int) -> None:
        """Add a linear map without bias to each tower's vectors, by weights that depend on the seed alone."""
        for encoder in map(self.model.side, ("query", "document")[: len(self.model.encoders)]):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed((seed + 1) * 1_000_003)  # another stream than that of the body
                layer = Dense(encoder.width, width, bias=False)
            encoder.dense.append(layer.to(next(encoder.parameters())))

    def add_adapters(self, options: dict[str, Any]) -> None:
        """Add adapters to each tower."""
        for encoder in self.model.encoders:
            holder = ModelAdapter()
            holder.model = encoder.body
            holder.add_adapters(options)
            encoder.body = holder.model


class CrossEncoderAdapter(RankerAdapter):
    """A classifier with one logit on the concatenated pair."""

    def facts(self) -> dict[str, Any]:
        return {"scorer": "cross"}

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        if features:
            raise InputError("A cross-encoder has no vector of a text alone: use an encoder with scorer=dot.")
        return super().answer(batch, features)

    def pairs(self, batch: RankingBatch, query: Tensor, document: Tensor) -> Tensor:
        q, q_mask = (x[query] for x in self._side(batch, "query"))
        d, d_mask = (x[document] for x in self._side(batch, "document"))
        _, _, before, between, after = self.view.template
        parts: list[Part] = [(before, 0), (q, q_mask, 0), (between, 0), (d, d_mask, 1), (after, 1)]
        ids, mask, types = joined(parts, self.view.tokenizer.pad_token_id or 0)
        given = {"token_type_ids": types} if "token_type_ids" in self.view.tokenizer.model_input_names else {}
        return self.model(input_ids=ids, attention_mask=mask.long(), **given).logits[:, 0]

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / FACTS).write_text(json.dumps(self.facts(), indent=1))


class RankerEnsemble(RankerAdapter):
    """Several rankers: the mean of their raw scores. Members may have their own tokenizers."""

    def __init__(self, members: Sequence[RankerAdapter]) -> None:
        super().__init__(nn.ModuleList(members), members[0].view)

    @property
    def members(self) -> list[RankerAdapter]:
        """The rankers."""
        return list(self.model)

    def facts(self) -> dict[str, Any]:
        return {"members": [m.identity() for m in self.members]}

    def pairs(self, batch: RankingBatch, query: Tensor, document: Tensor) -> Tensor:
        return torch.stack([m.pairs(batch, query, document).float() for m in self.members]).mean(0)

    def save(self, folder: Path) -> None:
        raise InputError("An ensemble is a teacher: train or save one of its members.")


Part = tuple[list[int], int] | tuple[Tensor, Tensor, int]


def joined(parts: Sequence[Part], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenate ragged parts and constant tokens, padded on the right: ids, mask and types `[rows, length]`.

    Args:
        parts: constant tokens with their type, or ids and mask `[rows, length]` with their type.
        pad: id of the padding token.
    """
    like = next(p[0] for p in parts if isinstance(p[0], Tensor))
    ids, masks, types = [], [], []
    for part in parts:
        own = (
            part[0] if isinstance(part[0], Tensor) else like.new_tensor(part[0], dtype=like.dtype).expand(len(like), -1)
        )
        ids.append(own)
        masks.append(part[1] if len(part) == 3 else torch.ones_like(own, dtype=torch.bool))
        types.append(torch.full_like(own, part[-1]))
    mask = torch.cat(masks, 1)
    order = (~mask).to(torch.int8).sort(dim=1, stable=True).indices
    mask = mask.gather(1, order)
    length = max(1, int(mask.sum(1).max())) if len(mask) else 1
    mask = mask[:, :length]
    out = torch.cat(ids, 1).gather(1, order)[:, :length].masked_fill(~mask, pad)
    return out, mask, torch.cat(types, 1).gather(1, order)[:, :length].masked_fill(~mask, 0)
