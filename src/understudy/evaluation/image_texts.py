"""Answers about images: greedy texts of a model against the references, and what they make up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from understudy.data import TextSet
from understudy.data.batch import COUNT
from understudy.data.pictures import picture_inputs
from understudy.models import ModelAdapter, evaluating
from understudy.synthetic.scenes import named

EXPLAINED = {
    "exact_match": "Share of the prompts whose greedy answer is the reference, letter by letter.",
    "token_accuracy": "Share of the reference's tokens that are the likeliest ones, given those before.",
    "hallucination_rate": "Of the digits that captions name, the share that is not in the image.",
    "missing_rate": "Of the digits in the images, the share that the captions do not name.",
    "yes_no_f1": "F1 of the answer yes to whether a digit is in the image; half of them are.",
    "yes_rate": "Share of these questions that are answered with yes.",
}


@dataclass(frozen=True)
class Asked:
    """A prompt that is answered in evaluation.

    Args:
        row: the prompt's `input_ids`, and its images.
        reference: the text that is expected.
        kind: `describe` or `question` of the embedded scenes, whose `digits` are in the image; else empty.
    """

    row: Mapping[str, Any]
    reference: str
    kind: str = ""
    digits: tuple[int, ...] = ()


class AskedSet(TextSet):
    """Encoded rows of a split, with the prompts that are answered where it is evaluated.

    Args:
        most: tokens of an answer.
    """

    def __init__(self, records: list[dict[str, Any]], asked: Sequence[Asked], tokenizer: Any, most: int) -> None:
        super().__init__(records)
        self.asked, self.tokenizer, self.most = list(asked), tokenizer, most


@torch.no_grad()
def write_answers(model: ModelAdapter, rows: Sequence[Mapping[str, Any]], tokenizer: Any, most: int) -> list[str]:
    """The greedy answers of a model to prompts with images.

    Args:
        rows: each with `input_ids`, and `pictures` and `token_fields` if it has images.
        most: tokens of an answer.
    """
    inner, pad = model.model, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    home, texts = next(model.parameters()), []
    with evaluating(model):
        for start in range(0, len(rows), 64):
            part = rows[start : start + 64]
            width = max(len(row["input_ids"]) for row in part)
            ids, mask = torch.full((len(part), width), pad or 0), torch.zeros(len(part), width, dtype=torch.long)
            for number, row in enumerate(part):
                first = width - len(row["input_ids"])
                ids[number, first:], mask[number, first:] = row["input_ids"], 1
            beside = {k: v for k, v in picture_inputs(part, width, right=False).items() if not k.startswith(COUNT)}
            inputs = {"input_ids": ids, "attention_mask": mask, **beside}
            moved = {k: v.to(home.device, home.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
            out = inner.generate(**moved, max_new_tokens=most, do_sample=False, pad_token_id=pad)
            texts += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return texts


def judge_answers(written: Sequence[str], asked: Sequence[Asked]) -> dict[str, float]:
    """Metrics of answers; those of the embedded scenes where `kind` says so (`EXPLAINED`)."""
    alike = [text.strip() == a.reference.strip() for text, a in zip(written, asked, strict=True)]
    plain = [ok for ok, a in zip(alike, asked, strict=True) if a.kind != "question"]
    found = {"exact_match": sum(plain) / max(1, len(plain))}
    told = [
        (set(named(text).values()), set(a.digits))
        for text, a in zip(written, asked, strict=True)
        if a.kind == "describe"
    ]
    if told:
        said, there = sum(len(s) for s, _ in told), sum(len(d) for _, d in told)
        found["hallucination_rate"] = sum(len(s - d) for s, d in told) / max(1, said)
        found["missing_rate"] = sum(len(d - s) for s, d in told) / max(1, there)
    questions = [(t.strip(), a.reference.strip()) for t, a in zip(written, asked, strict=True) if a.kind == "question"]
    if questions:
        right = sum(t == r == "yes" for t, r in questions)
        claimed, true = (sum(one[i] == "yes" for one in questions) for i in (0, 1))
        found["yes_no_f1"] = 2 * right / max(1, claimed + true)
        found["yes_rate"] = claimed / len(questions)
    return found


def answer_table(
    asked: Sequence[Asked], tokenizer: Any, answers: Mapping[str, Sequence[str]], number: int = 8
) -> dict[str, Any]:
    """The first answers beside their references, for the report."""
    prompts = [tokenizer.decode(a.row["input_ids"], skip_special_tokens=True) for a in asked[:number]]
    rows = zip(prompts, [a.reference for a in asked], *answers.values(), strict=False)
    return {
        "title": "Answers about images, greedy",
        "headings": ["prompt", "expected", *answers],
        "rows": [list(row) for row in rows],
    }
