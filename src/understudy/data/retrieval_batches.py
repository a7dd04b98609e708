"""Batches of queries with their lists of documents, without any model's special tokens.

A *view* is the tokenization of the texts by one tokenizer. A batch holds every view that the run's models need, so
teacher and student may have different tokenizers; models add their own special tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from understudy.data.batch import Batch, WholeExamples
from understudy.errors import InputError

IDEAL = 10
"""Number of a query's best grades that a row keeps, for nDCG."""


@dataclass(kw_only=True)
class RankingBatch(WholeExamples, Batch):
    """A batch whose rows are queries with candidates.

    Args:
        inputs: of each view, `VIEW/query_ids` `[queries, length]`, `VIEW/document_ids` `[documents, length]` and their
            masks `VIEW/query_mask`, `VIEW/document_mask`. Documents are distinct.
        labels: `[queries, candidates]`, grades, higher is better; 0 for no candidate.
        slots: `[queries, candidates]`, index of the document of each candidate, −1 for none.
        ideal: `[queries, 10]`, the best grades over all graded documents.
        total: `[queries]`, number of relevant documents.
        threshold: `[queries]`, grades above it count as relevant.
        taught: `[queries, candidates]`, a teacher's scores, if known.
    """

    slots: Tensor
    ideal: Tensor
    total: Tensor
    threshold: Tensor
    taught: Tensor | None = None

    @property
    def kind(self) -> str:
        return "ranking"

    @cached_property
    def candidates(self) -> Tensor:
        """`[queries, candidates]`, True for valid candidates."""
        return self.slots >= 0

    @cached_property
    def relevant(self) -> Tensor:
        """`[queries, candidates]`, True for relevant candidates."""
        return (self.labels > self.threshold[:, None]) & self.candidates

    @cached_property
    def row_labels(self) -> Tensor:
        """`[queries]`, index of the candidate with the highest grade (the first of equals)."""
        return self.labels.masked_fill(~self.candidates, -torch.inf).argmax(1)


@dataclass
class View:
    """The tokenization of queries and documents by one tokenizer.

    Args:
        query_length, document_length: most tokens of each; longer texts are truncated at the end. Special tokens and
            prompts are added to these.
        query_prompt, document_prompt: prefixes of each (`query: `, `passage: `).
    """

    tokenizer: PreTrainedTokenizerBase
    query_length: int
    document_length: int
    query_prompt: str = ""
    document_prompt: str = ""
    _known: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token is None:  # decoders often have none, and what is masked is not read
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @cached_property
    def key(self) -> str:
        """A hash of the tokenizer, the lengths and the prompts."""
        content = self.tokenizer.backend_tokenizer.to_str()
        facts = f"{content} {self.query_length} {self.document_length}"
        if self.query_prompt or self.document_prompt:
            facts += f" {self.query_prompt!r} {self.document_prompt!r}"
        return hashlib.sha256(facts.encode()).hexdigest()[:12]

    @cached_property
    def most(self) -> dict[str, int]:
        """Most tokens of each side, prompt included."""
        sides = {
            "query": (self.query_length, self.query_prompt),
            "document": (self.document_length, self.document_prompt),
        }
        encode = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        return {side: length + (len(encode(prompt)) if prompt else 0) for side, (length, prompt) in sides.items()}

    @cached_property
    def template(self) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
        """Special tokens: before and after one text; before, between and after a pair."""
        one, two = self.tokenizer("a"), self.tokenizer("a", "a")
        first, last = _ends(one.sequence_ids(0), 0)
        start, middle = _ends(two.sequence_ids(0), 0)
        again, end = _ends(two.sequence_ids(0), 1)
        a, b = one["input_ids"], two["input_ids"]
        return a[:first], a[last + 1 :], b[:start], b[middle + 1 : again], b[end + 1 :]

    def ids(self, text: str, side: str) -> list[int]:
        """Token ids of a query or document with its prompt, cached."""
        text = (self.query_prompt if side == "query" else self.document_prompt) + text
        found = self._known.get(text)
        if found is None:
            if len(self._known) > 200_000:
                self._known.clear()
            length = max(self.most.values())
            found = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:length]
            self._known[text] = found
        return found[: self.most[side]]

    def tensors(self, texts: Sequence[str], side: str) -> dict[str, Tensor]:
        """`{side}_ids` and `{side}_mask` `[texts, length]`, padded on the right."""
        found = [self.ids(t, side) for t in texts]
        ids = padded(found, self.tokenizer.pad_token_id or 0)
        lengths = torch.tensor([len(f) for f in found])
        return {f"{side}_ids": ids, f"{side}_mask": torch.arange(ids.shape[1]) < lengths[:, None]}


def padded(lists: Sequence[Sequence[float]], fill: float, dtype: torch.dtype = torch.long) -> Tensor:
    """`[lists, longest]`, at least one wide; shorter lists are padded with `fill`."""
    longest = max(1, *map(len, lists))
    return torch.tensor([[*x, *[fill] * (longest - len(x))] for x in lists], dtype=dtype)


def _ends(parts: list[int | None], which: int) -> tuple[int, int]:
    inside = [i for i, p in enumerate(parts) if p == which]
    return inside[0], inside[-1]


class RankingSet(Dataset[dict[str, Any]]):
    """Rows `{id, query, documents, labels, ideal, total}`, with `taught` and `crossed` if a method added them.

    Args:
        rows: `members` holds recorded scores, `[teachers][documents]`; `judged` grades by index into the collection.
        collection: all documents, for retrieval; empty if there is none.
        threshold: grades above it count as relevant.
    """

    def __init__(self, rows: list[dict[str, Any]], collection: Sequence[str] = (), threshold: float = 0.0) -> None:
        self.records, self.collection, self.threshold = rows, collection, threshold
        for row in rows:
            row.setdefault("threshold", threshold)
            row.setdefault("ideal", sorted(row["labels"], reverse=True)[:IDEAL])
            row["ideal"] = [*row["ideal"], *[0.0] * (IDEAL - len(row["ideal"]))]
            row.setdefault("total", sum(v > threshold for v in row["labels"]))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[index]

    def distinct(self, size: int = 16) -> RankingSet:
        """Each pair of query and document once, in lists of at most `size`."""
        found: dict[str, dict[str, None]] = {}
        for row in self.records:
            found.setdefault(row["query"], {}).update(dict.fromkeys(row["documents"]))
        rows: list[dict[str, Any]] = []
        for query, documents in found.items():
            every = list(documents)
            for start in range(0, len(every), size):
                chosen = every[start : start + size]
                rows.append({"id": len(rows), "query": query, "documents": chosen, "labels": [0.0] * len(chosen)})
        return RankingSet(rows, threshold=self.threshold)


class RankingCollator:
    """From rows to the tensors of a `RankingBatch`.

    Rows marked `crossed` have every document of their batch as a candidate, with grade 0 for those that are not their
    own.

    Args:
        views: the tokenizations that the run's models need.
    """

    def __init__(self, views: Sequence[View]) -> None:
        self.views = {view.key: view for view in views}

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        place: dict[str, int] = {}
        for item in items:
            for document in item["documents"]:
                place.setdefault(document, len(place))
        if all(item.get("crossed") for item in items):
            items = [_crossed(item, list(place)) for item in items]
        slots = padded([[place[d] for d in i["documents"]] for i in items], -1)
        labels = padded([i["labels"] for i in items], 0.0, torch.float32)
        known = all("taught" in i for i in items)
        taught = padded([i["taught"] for i in items], 0.0, torch.float64) if known else None
        out: dict[str, Any] = {"slots": slots, "labels": labels, "ids": torch.tensor([i["id"] for i in items])}
        out |= {"ideal": torch.tensor([i["ideal"] for i in items]), "total": torch.tensor([i["total"] for i in items])}
        out["threshold"] = torch.tensor([float(i["threshold"]) for i in items])
        out |= {"taught": taught} if taught is not None else {}
        for key, view in self.views.items():
            sides = {"query": [i["query"] for i in items], "document": list(place)}
            for side, texts in sides.items():
                out |= {f"{key}/{name}": value for name, value in view.tensors(texts, side).items()}
        return out


def _crossed(item: dict[str, Any], documents: list[str]) -> dict[str, Any]:
    grades: dict[str, float] = {}
    for document, grade in zip(item["documents"], item["labels"], strict=True):
        grades[document] = max(grade, grades.get(document, grade))  # a triple may hold one document twice
    crossed = {k: v for k, v in item.items() if k != "taught"}
    return crossed | {"documents": documents, "labels": [grades.get(d, 0.0) for d in documents]}


def train_encoder_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A lower-case byte-level BPE tokenizer with BERT's special tokens, trained on `texts`.

    Not WordPiece, whose trainer numbers its pieces differently each time, so that runs could not be resumed.
    """
    if vocab_size < 262:
        raise InputError(f"data.vocab_size is {vocab_size}; byte-level BPE needs at least 262 (256 bytes, 5 specials).")
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])  # type: ignore[assignment]
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    ends = [(token, core.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)
