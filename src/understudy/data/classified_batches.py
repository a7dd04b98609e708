"""Labelled texts as batches, read by the tokenizer of each model of the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from understudy.data.batch import Batch


@dataclass(kw_only=True)
class TextClassBatch(Batch):
    """A batch whose rows are texts, or pairs of texts, with a class.

    Args:
        inputs: of each reading, `KEY/input_ids` and `KEY/attention_mask` `[texts, length]`, and what else its tokenizer gives.
        labels: `[texts]`.
        digests: `[texts, 4]`, int64, SHA-256 of the texts themselves and of the number of tokens that is read.
    """

    digests: Tensor

    @property
    def contents(self) -> list[tuple[Tensor, ...]]:
        """The texts, whatever tokenizer reads them."""
        return [(digest,) for digest in self.digests]


class Reading:
    """One tokenizer's reading of texts and pairs, with its special tokens.

    Args:
        tokenizer: that of a model. max_length: most tokens of a text or pair; the end of the longer one is cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        if tokenizer.pad_token is None:  # decoders often have none, and what is masked is not read
            tokenizer.pad_token = tokenizer.eos_token

    @cached_property
    def key(self) -> str:
        """A hash of the tokenizer and the length."""
        facts: dict[str, Any] = {"length": self.max_length, "inputs": self.tokenizer.model_input_names}
        if self.tokenizer.is_fast:  # how it cuts and pads is set anew at each call
            core = json.loads(self.tokenizer.backend_tokenizer.to_str())
            facts["core"] = {k: v for k, v in core.items() if k not in ("truncation", "padding")}
        else:
            facts["core"] = [type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and the like, `[texts, length]`, padded on the right."""
        sides = [[item[side] for item in items] for side in ("text", "text_pair") if side in items[0]]
        found = self.tokenizer(
            *sides, truncation=True, max_length=self.max_length, padding=True, padding_side="right", return_tensors="pt"
        )
        return dict(found)

    def longer(self, items: Sequence[dict[str, Any]]) -> int:
        """How many texts have more tokens than are read."""
        sides = [[item[side] for item in items] for side in ("text", "text_pair") if side in items[0]]
        return sum(len(ids) > self.max_length for ids in self.tokenizer(*sides, verbose=False)["input_ids"])


class TextClassCollator:
    """From records to the tensors of a `TextClassBatch`.

    Args:
        readings: those that the run's models need. domains: names of the records' domains, by number.
    """

    def __init__(self, readings: Sequence[Reading], domains: Sequence[str] = ()) -> None:
        self.readings = {reading.key: reading for reading in readings}
        self.domains = {name: i for i, name in enumerate(domains)}

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {
            name: torch.tensor([i[f] for i in items]) for name, f in (("labels", "label"), ("ids", "id"))
        }
        length = next(iter(self.readings.values())).max_length
        out["digests"] = torch.stack([_digest(item, length) for item in items])
        if self.domains:
            out["domains"] = torch.tensor([self.domains[item["domain"]] for item in items])
        for key, reading in self.readings.items():
            out |= {f"{key}/{name}": value for name, value in reading(items).items()}
        return out


def _digest(item: dict[str, Any], length: int) -> Tensor:
    content = json.dumps([item["text"], item.get("text_pair"), length]).encode()
    return torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.int64)
