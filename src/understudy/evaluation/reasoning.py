"""Final answers of what a language model writes: greedy, and several samples of each question, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from understudy.curation import Checker, majority
from understudy.data.batch import IGNORE
from understudy.data.tokenize import TextSet
from understudy.evaluation.answers import Proportion, pass_at_k, wilson
from understudy.evaluation.fidelity import answer_agreement, rationale_bleu
from understudy.generation.decoding import end_tokens, sample, writer
from understudy.models import ModelAdapter

CUT_OFF = "cut off"


@dataclass(frozen=True)
class Grading:
    """How answers are asked for and judged.

    Args:
        checker: reads the answer in the format that is trained. lenient: reads the last one, wherever it stands.
        max_new_tokens: of an answer with its rationale. samples, temperature: of the sampled attempts; 0 samples for none.
    """

    checker: Checker
    lenient: Checker
    tokenizer: Any
    max_new_tokens: int
    samples: int
    temperature: float


class QuestionSet(TextSet):
    """Token rows of questions, each with `gold` (its answer, canonical) and `level` (its difficulty, or `None`)."""

    def __init__(self, records: list[dict[str, Any]], grading: Grading) -> None:
        super().__init__(records)
        self.grading = grading


@dataclass(frozen=True)
class Attempt:
    """A written answer: its text, how many tokens, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool

    def read(self, checker: Checker) -> tuple[str | None, str | None]:
        """The canonical answer, or the reason why there is none."""
        found = checker.parse(self.text)
        return found.value, found.reason if found.value is not None or self.ended else CUT_OFF


@torch.no_grad()
def write_answers(
    model: ModelAdapter, rows: Sequence[Any], grading: Grading, draws: Sequence[int]
) -> list[list[Attempt]]:
    """What a model writes after each prompt, once for each draw; draw 0 is greedy. It depends on weights, row and draw alone."""
    prompts = []
    for row in rows:
        start = int((row["labels"] != IGNORE).nonzero()[0])
        prompts.append(row["input_ids"][:start].tolist())
    own, words = writer(model), grading.tokenizer
    ends = end_tokens(own, words)
    found: list[list[Attempt]] = [[] for _ in rows]
    for draw in draws:
        ids = sample(
            own,
            prompts,
            torch.tensor([int(row["id"]) * 1_000_003 + draw for row in rows]),
            most=grading.max_new_tokens,
            vocabulary=len(words),
            ends=ends,
            pad=words.pad_token_id or 0,
            temperature=grading.temperature if draw else 0.0,
        )
        for attempts, tokens in zip(found, ids, strict=True):
            text = words.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            attempts.append(Attempt(text, len(tokens), tokens[-1] in ends))
    return found


def judge(attempts: Sequence[Sequence[Attempt]], rows: Sequence[Any], grading: Grading) -> dict[str, Any]:
    """Metrics and tables of attempts: the first of each question is greedy, the others are sampled.

    `accuracy` is of greedy answers in the trained format; `accuracy_lenient` takes the last answer wherever it stands, and is
    never to stand alone: a change of format is no change of ability. What cannot be read is wrong.
    """
    golds = [row["gold"] for row in rows]
    greedy = [tries[0].read(grading.checker) for tries in attempts]
    right = [value == gold for (value, _), gold in zip(greedy, golds, strict=True)]
    loose = [
        answer == gold or tries[0].read(grading.lenient)[0] == gold
        for tries, (answer, _), gold in zip(attempts, greedy, golds, strict=True)
    ]
    n, unread = len(rows), Counter(reason for value, reason in greedy if value is None)
    shares = {
        "accuracy": wilson(sum(right), n),
        "accuracy_lenient": wilson(sum(loose), n),
        "unparsed": wilson(unread.total(), n),
    }
    shares |= _sampled(attempts, golds, grading.checker)
    metrics = {name: found.share for name, found in shares.items()}
    metrics["answer_tokens"] = fmean(tries[0].tokens for tries in attempts)
    tables = [_shares_table(shares, n)]
    tables += (
        [_table("Greedy answers that cannot be read", ["reason", "answers"], unread.most_common())] if unread else []
    )
    levels = sorted({row["level"] for row in rows if row["level"] is not None})
    if levels:
        tables.append(_levels_table(levels, rows, right))
    return {"metrics": metrics, "tables": tables}


def compare_answers(
    student: Sequence[Sequence[Attempt]], teacher: Sequence[Sequence[Attempt]], grading: Grading
) -> dict[str, float]:
    """How far the student's greedy answers are the teacher's, right or wrong, and its rationales worded like them (paper 14)."""
    sides = [[tries[0] for tries in attempts] for attempts in (teacher, student)]
    answers = [[attempt.read(grading.checker)[0] for attempt in side] for side in sides]
    rationales = [[grading.checker.before(attempt.text) for attempt in side] for side in sides]
    return {
        "answer_agreement": answer_agreement(*answers),
        "rationale_bleu": rationale_bleu(*rationales),
    }


def _sampled(attempts: Sequence[Sequence[Attempt]], golds: Sequence[str], checker: Checker) -> dict[str, Proportion]:
    """pass@1, pass@k and majority@k of the k samples."""
    k, n = len(attempts[0]) - 1, len(golds)
    if not k:
        return {}
    answers = [[a.read(checker)[0] for a in tries[1:]] for tries in attempts]
    correct = [sum(a == gold for a in said) for said, gold in zip(answers, golds, strict=True)]
    votes = [majority(said).value == gold for said, gold in zip(answers, golds, strict=True)]
    passed = {f"pass_at_{m}": wilson(sum(pass_at_k(k, c, m) for c in correct), n) for m in sorted({1, k})}
    return {**passed, f"majority_at_{k}": wilson(sum(votes), n)}


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    return {"title": title, "headings": list(headings), "rows": [list(row) for row in rows]}


def _shares_table(shares: dict[str, Proportion], n: int) -> dict[str, Any]:
    rows = [[name, f"{s.share:.3f}", f"{s.low:.3f} to {s.high:.3f}", n] for name, s in shares.items()]
    return _table("Final answers, with 95 % intervals", ["metric", "share", "interval", "questions"], rows)


def _levels_table(levels: Sequence[int], rows: Sequence[Any], right: Sequence[bool]) -> dict[str, Any]:
    cells = []
    for level in levels:
        mine = [good for good, row in zip(right, rows, strict=True) if row["level"] == level]
        found = wilson(sum(mine), len(mine))
        cells.append([level, f"{found.share:.3f}", f"{found.low:.3f} to {found.high:.3f}", len(mine)])
    return _table("Greedy accuracy by level", ["level", "accuracy", "interval", "questions"], cells)
