"""Rationales of questions: read from what models wrote, sorted by a vote, and written as lists to be contrasted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from understudy.curation.answers import MARK, Checker, majority
from understudy.curation.filters import Funnel
from understudy.curation.items import Item
from understudy.data.reasoning import same_question
from understudy.generation import Completion, Prompt, Request

TEACHER = "rationales/"
"""Begins the ids of the requests to the teacher."""


class Rationale(Item):
    """A rationale of a training question.

    Args:
        question: its place in the training data. text: rationale and answer as they are trained on.
        answer: `None` if it cannot be read. good: positive, else negative. right: whether its answer is the data's.
        log_quality: log D, nats.
    """

    question: int
    text: str
    answer: str | None
    good: bool
    right: bool
    log_quality: float = 0.0

    @property
    def sampled(self) -> bool:
        """Whether the teacher wrote it."""
        return self.requests[0].startswith(TEACHER)


def read_rationale(request: Request, said: Completion, question: int, gold: str, checker: Checker) -> Rationale:
    """What a model wrote, as a negative; what was cut off has no answer."""
    answer = checker.parse(said.text).value if said.finish == "stop" else None
    text = f" {said.text.strip()}" if said.text.strip() else ""
    right = answer == gold
    return Rationale(question=question, text=text, answer=answer, good=False, right=right, requests=(request.id,))


def sort_rationales(found: Sequence[Rationale], samples: int, by_vote: bool, funnel: Funnel) -> list[Rationale]:
    """Those that can be read; positive where the answer is the majority's, or the data's.

    Args:
        found: `samples` of each question in order, which decides a tie: the answer that came first wins.
        funnel: counts what is dropped, and the votes that were tied.
    """
    votes = [majority([r.answer for r in found[s : s + samples]]) for s in range(0, len(found), samples)]
    kept = funnel.sieve("rationales", found, lambda r: "cannot be read" if r.answer is None else None)
    tied = sum(v.tied for v in votes)
    funnel.note("votes without a tie", len(votes), len(votes) - tied, Counter(tied=tied) if tied else None)
    return [r.model_copy(update={"good": r.answer == votes[r.question].value if by_vote else r.right}) for r in kept]


def without_positives(found: Sequence[Rationale], positives: Sequence[Rationale], funnel: Funnel) -> list[Rationale]:
    """Negatives that are not empty and that no positive of the question equals, but for case, space and punctuation."""
    known = {(r.question, same_question(r.text)) for r in positives if r.good}

    def problem(r: Rationale) -> str | None:
        if not r.text:
            return "empty"
        return "equals a positive" if (r.question, same_question(r.text)) in known else None

    return funnel.sieve("negatives of the student", found, problem)


def answer_list(prompt: Prompt, record: Mapping[str, Any]) -> dict[str, Any]:
    """The answer alone as a list of one, with score 0."""
    asked, said = prompt.render(question=record["question"]), f" {MARK} {record['answer']}"
    return {"prompt": asked, "completions": [said], "scores": [0], "log_probs": [0.0]}


def contrast_lists(
    records: Sequence[Mapping[str, Any]], rationales: Sequence[Rationale], answer: Prompt, explain: Prompt
) -> list[dict[str, Any]]:
    """Of each question its answer alone, and its rationales with score 1 or −1 and log D; no second list without any.

    Args:
        answer, explain: the prompts, with the slot `question`, for an answer alone and for a rationale.
    """
    sets: dict[int, list[Rationale]] = {}
    for r in rationales:
        sets.setdefault(r.question, []).append(r)
    rows = []
    for i, record in enumerate(records):
        rows.append(answer_list(answer, record))
        if i in sets:
            scores, log_probs = [1 if r.good else -1 for r in sets[i]], [r.log_quality for r in sets[i]]
            asked, said = explain.render(question=record["question"]), [r.text for r in sets[i]]
            rows.append({"prompt": asked, "completions": said, "scores": scores, "log_probs": log_probs})
    return rows


def rationale_report(found: Sequence[Rationale], questions: int, samples: int) -> dict[str, float]:
    """How good a teacher's rationales are, and whether D tells the right ones from the others.

    Args:
        found: those that can be read, of `samples` for each of `questions`.

    `discriminator_auc`: the probability that a right rationale has a higher D than a wrong one, ties counted half; 0.5 where
    there is none of a kind.
    """
    right, wrong = ([r.log_quality for r in found if r.right is side] for side in (True, False))
    both = np.sign(np.asarray(right)[:, None] - np.asarray(wrong)[None])
    return {
        "teacher_sample_accuracy": len(right) / (questions * samples),
        "teacher_vote_accuracy": len({r.question for r in found if r.good and r.right}) / questions,
        "positives": sum(r.good for r in found) / questions,
        "discriminator_auc": float((both.mean() + 1) / 2) if both.size else 0.5,
    }
