"""Drafts of a teacher for a student: questions it made up, their rationales, and preferences between them (paper 5)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Literal

import numpy as np

from understudy.curation.answers import Checker
from understudy.curation.filters import Funnel
from understudy.curation.in_context import InContextScores, in_context_scores
from understudy.curation.items import Item
from understudy.curation.pairs import best_and_worst, best_and_worst_shares
from understudy.data.reasoning import same_question
from understudy.generation import Completion, Request

TAG = "<question>"
_TAGGED = re.compile(r"<question>(.*?)</question>", re.DOTALL)


class Probe(Item):
    """A validation question on which examples are tried.

    Args:
        question: its place in the validation data. discrimination: α of item response theory; 0 where none was fitted.
    """

    question: int
    discrimination: float


class Draft(Item):
    """A question that a teacher made up."""

    question: str


class DraftRationale(Item):
    """A rationale of a draft.

    Args:
        draft: its question's place among the drafts. place: among that question's rationales. right: which probes the student
            answers with it as the example. gains: what each probe gains by a step of training on it. One of both, once it is tried.
    """

    draft: int
    place: int
    rationale: str
    answer: str
    right: tuple[bool, ...] = ()
    gains: tuple[float, ...] = ()

    @property
    def score(self) -> float:
        """The share of probes that are right, or their mean gain."""
        return fmean(self.gains or self.right)


class Preference(Item):
    """A better and a worse completion of a prompt for the teacher.

    Args:
        kind: of what. prompt: for a question the seed questions' prompt, for a rationale the plain one, whatever prompt it was
            written for.
    """

    kind: Literal["question", "rationale"]
    prompt: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float


def read_questions(text: str, cut: bool = False) -> list[str]:
    """The questions that a model wrote: those between tags, or each line, without its number, where there are none.

    Args:
        cut: the text did not end by itself, so its last line is no whole question.
    """
    found = _TAGGED.findall(text) if TAG in text else text.split("\n")[: -1 if cut else None]
    plain = (re.sub(r"^\s*(?:[-*]|\d+[.)])\s+", "", q).strip() for q in found)
    return [q for q in plain if q]


def write_questions(questions: Sequence[str], tagged: bool) -> str:
    """Questions as a prompt shows them, and as a completion has them: `read_questions` undoes it."""
    return "\n".join(f"{TAG}{q}</question>" if tagged else q for q in questions)


class NewQuestions:
    """Collects distinct questions.

    Args:
        known: questions that may not be among them, such as those that are evaluated.
    """

    def __init__(self, known: Iterable[str]) -> None:
        self._known, self.drafts = {same_question(q) for q in known}, dict[str, Draft]()
        self.total, self._dropped = 0, Counter[str]()

    def add(self, request: Request, said: Completion) -> None:
        """The questions of a completion that are new."""
        for question in read_questions(said.text, said.finish == "length"):
            self.total += 1
            key = same_question(question)
            if not key or key in self._known:
                self._dropped["asked or evaluated" if key else "empty"] += 1
            elif key in self.drafts:
                self._dropped["written before"] += 1
            else:
                self.drafts[key] = Draft(question=question, requests=(request.id,))

    def note(self, name: str, funnel: Funnel) -> None:
        """Count them as a step of the funnel."""
        funnel.note(name, self.total, len(self.drafts), self._dropped)


def read_drafts(
    asked: Sequence[tuple[int, int]],
    said: Sequence[tuple[Request, Completion]],
    checker: Checker,
    funnel: Funnel,
    name: str,
) -> list[DraftRationale]:
    """Rationales whose answer can be read.

    Args:
        asked: draft and place of each. name: of the step.
    """

    def problem(item: tuple[tuple[int, int], tuple[Request, Completion]]) -> str | None:
        return "cut off" if item[1][1].finish == "length" else checker.parse(item[1][1].text).reason

    kept = funnel.sieve(name, list(zip(asked, said, strict=True)), problem)
    return [
        DraftRationale(
            draft=draft,
            place=place,
            rationale=checker.before(answer.text),
            answer=answer.text.rpartition(checker.mark)[2].strip().split("\n")[0].strip(),
            requests=(request.id,),
        )
        for (draft, place), (request, answer) in kept
    ]


def one_of_each(rationales: Sequence[DraftRationale], best: bool) -> list[DraftRationale]:
    """Of each draft the first rationale, or the first of those with the largest score."""
    found: dict[int, DraftRationale] = {}
    for r in rationales:
        if r.draft not in found or (best and r.score > found[r.draft].score):
            found[r.draft] = r
    return list(found.values())


def scores_of(rationales: Sequence[DraftRationale], drafts: int, places: int) -> InContextScores:
    """Scores of rationales and of their questions, NaN where there is none.

    Args:
        drafts, places: numbers of questions, and of rationales that each was to have.
    """
    probes = len(rationales[0].gains or rationales[0].right) if rationales else 0
    values, asked = np.zeros((drafts, places, probes)), np.zeros((drafts, places), bool)
    for r in rationales:
        values[r.draft, r.place], asked[r.draft, r.place] = r.gains or r.right, True
    return in_context_scores(values, asked)


def rationale_preferences(
    rationales: Sequence[DraftRationale],
    scores: InContextScores,
    prompts: Sequence[str],
    texts: Sequence[str],
    funnel: Funnel,
) -> list[Preference]:
    """Of each draft its best and its worst rationale; none where all scores are equal.

    Args:
        prompts: the plain prompt of each draft. texts: each rationale as the teacher is to write it.
    """
    values = [float(scores.rationales[r.draft, r.place]) for r in rationales]
    pairs = best_and_worst([r.draft for r in rationales], values, funnel)
    prompt = lambda p: prompts[rationales[p.chosen].draft]  # noqa: E731
    ids = [r.id for r in rationales]
    return [_preference("rationale", prompt(p), p.chosen, p.rejected, texts, values, ids) for p in pairs]


def question_preferences(
    drafts: Sequence[Draft],
    scores: InContextScores,
    share: float,
    prompts: Sequence[str],
    texts: Sequence[str],
    seed: int,
) -> list[Preference]:
    """Pairs of a draft of the best share and one of the worst, both drawn at random; one pair for each of `prompts`.

    Args:
        texts: each draft as the teacher is to write it.

    Raises:
        InputError: the scores carry no signal.
    """
    values, ids = scores.questions.tolist(), [d.id for d in drafts]
    best, worst = best_and_worst_shares(values, share)
    chance = np.random.default_rng([seed, 0xA27E, 1])
    draw = lambda pool: pool[int(chance.integers(len(pool)))]  # noqa: E731
    return [_preference("question", prompt, draw(best), draw(worst), texts, values, ids) for prompt in prompts]


def _preference(
    kind: Literal["question", "rationale"],
    prompt: str,
    chosen: int,
    rejected: int,
    texts: Sequence[str],
    scores: Sequence[float],
    ids: Sequence[str],
) -> Preference:
    return Preference(
        kind=kind,
        prompt=prompt,
        chosen=texts[chosen],
        rejected=texts[rejected],
        chosen_score=scores[chosen],
        rejected_score=scores[rejected],
        parents=(ids[chosen], ids[rejected]),
    )


def preference_records(pairs: Sequence[Preference], chat: bool) -> Mapping[str, list[dict[str, object]]]:
    """Records of a preference set by split. Every tenth pair is set aside for validation and test; of fewer than twenty none."""

    def record(p: Preference) -> dict[str, object]:
        if not chat:
            return {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}
        sides = {s: [{"role": "assistant", "content": t}] for s, t in (("chosen", p.chosen), ("rejected", p.rejected))}
        return {"prompt": [{"role": "user", "content": p.prompt}], **sides}

    records = [record(p) for p in pairs]
    aside = records[::10] if len(records) >= 20 else records
    kept = [r for i, r in enumerate(records) if i % 10] if len(records) >= 20 else records
    return {"train": kept, "validation": aside, "test": aside}
