"""On-policy samples: completions that the student generates; where the prompt ends, and the resulting row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from understudy.data.batch import IGNORE, UNLABELLED
from understudy.data.tokenize import byte_length
from understudy.errors import InputError

COLUMNS = {"input_ids", "attention_mask", "labels", "ids", "bytes"}


@dataclass(frozen=True)
class Sample:
    """A prompt with a generated completion.

    Args:
        id: of the example with this prompt.
        at: the optimizer step whose weights generated it.
        prompt: tokens of the prompt.
        ids: prompt and completion, with the ending token if it was generated.
    """

    id: int
    at: int
    prompt: int
    ids: tuple[int, ...]


def token_rows(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The examples of a collated text batch, without padding, in the form that `collate_text` takes."""
    other = set(values) - COLUMNS
    if other:
        raise InputError(
            f"Examples with {', '.join(sorted(other))} beside their tokens cannot be written anew: leave out on_policy."
        )
    kept = values["attention_mask"].bool()
    return [
        {"input_ids": ids[m].cpu(), "labels": labels[m].cpu(), "id": int(number), "bytes": int(size)}
        for ids, labels, m, number, size in zip(
            values["input_ids"], values["labels"], kept, values["ids"], values["bytes"], strict=True
        )
    ]


def prompt_length(labels: Tensor, cut: float | Literal["random"], draw: float) -> int:
    """Number of tokens before the completion.

    The completion begins at the last contiguous span of trained tokens: in a conversation that is the last answer.
    Plain text is split at the fraction `cut` of its length, or anywhere, by `draw` in (0, 1).
    """
    counted = labels != IGNORE
    begins = (counted & ~torch.cat([counted.new_zeros(1), counted[:-1]])).nonzero()[:, 0]
    start = int(begins[-1]) if len(begins) else 0
    if start:
        return start
    length = len(labels)
    place = 1 + int(draw * (length - 1)) if cut == "random" else round(cut * length)
    return max(1, min(length - 1, place))


def sampled_row(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The example of a sample: every generated token counts and none is a label."""
    written = sample.ids[sample.prompt :]
    special = set(tokenizer.all_special_ids)
    return {
        "input_ids": torch.tensor(sample.ids),
        "labels": torch.tensor([IGNORE] * sample.prompt + [UNLABELLED] * len(written)),
        "id": sample.id,
        "bytes": byte_length([t for t in written if t not in special], tokenizer),
    }


def pack(samples: list[Sample]) -> dict[str, Tensor]:
    """Samples as three tensors, for a checkpoint."""
    return {
        "ids": torch.tensor([t for s in samples for t in s.ids], dtype=torch.long),
        "facts": torch.tensor([[s.id, s.at, s.prompt, len(s.ids)] for s in samples], dtype=torch.long).view(-1, 4),
    }


def unpack(packed: Mapping[str, Tensor]) -> list[Sample]:
    """The inverse of `pack`."""
    facts, ids = packed["facts"].tolist(), packed["ids"].tolist()
    samples, start = [], 0
    for number, at, prompt, length in facts:
        samples.append(Sample(number, at, prompt, tuple(ids[start : start + length])))
        start += length
    return samples
