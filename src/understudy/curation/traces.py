"""Reasoning traces: which of a teacher's are kept, which questions are worth them, and which of a question's differ most."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from understudy.curation.answers import Checker
from understudy.curation.diversity import Rule, by_length, edit_distances, select_diverse
from understudy.curation.filters import Funnel
from understudy.curation.items import Item
from understudy.curation.pairs import by_group
from understudy.errors import InputError
from understudy.generation import Completion, Request

OPEN, CLOSE = "<think>", "</think>"
"""Tags around the reasoning of models that write them."""


class Trace(Item):
    """A teacher's solution of a training question.

    Args:
        question: its place in the training data. rationale, answer: as they are trained on. tokens: of the whole text.
    """

    question: int
    rationale: str
    answer: str
    tokens: int


class TeacherTrial(Item):
    """What a teacher's traces did to students in a smoke test (paper 16).

    Args:
        role: of the teacher. accuracies: of its students on validation, one a run. accuracy: the share of its own samples that
            is right. traces: kept of them. answered: share of the questions that have one. tokens: mean length of a trace. entropy:
            mean over tokens, nats. shift: of hidden states by the training; `None` where there is nothing to measure.
    """

    role: str
    accuracies: list[float]
    accuracy: float
    traces: int
    answered: float
    tokens: float | None = None
    entropy: float | None = None
    shift: float | None = None


class PassRate(Item):
    """The share of a student's attempts at a training question that are right.

    Args:
        question: its place in the training data.
    """

    question: int
    rate: float


def has_form(text: str, checker: Checker) -> bool:
    """Whether a text is reasoning, closed once if it is opened by a tag, and then one answer."""
    answered = checker.parse(text).value is not None and bool(checker.before(text))
    if checker.form == "mark" and text.count(checker.mark) != 1:
        return False
    if OPEN not in text and CLOSE not in text:
        return answered
    inside = checker.before(text)
    return answered and inside.count(OPEN) == inside.count(CLOSE) == 1 and inside.find(OPEN) < inside.find(CLOSE)


def trace_problem(tokens: int, form: bool, right: bool, most: int) -> str | None:
    """Why a trace is not kept, or `None` (paper 16, corpus filtering).

    Args:
        tokens: of the trace. form: whether it has the form of `has_form`. right: whether its answer is. most: tokens kept.
    """
    if tokens > most:
        return "too long"
    if not form:
        return "not of the form"
    return None if right else "wrong"


def sift_traces(
    asked: Sequence[tuple[int, Request]],
    said: Sequence[Completion],
    golds: Sequence[str],
    checker: Checker,
    most: int,
    funnel: Funnel,
    name: str,
) -> list[Trace]:
    """The traces that are short enough, of the form, right, and new for their question.

    Args:
        asked: question and request of each completion in `said`. golds: canonical answers of all questions. most: tokens of one.
        name: of the teacher, for the funnel.
    """

    def problem(item: tuple[tuple[int, Request], Completion]) -> str | None:
        (question, _), answer = item
        if answer.finish == "length":
            return "cut off"
        form = has_form(answer.text, checker)
        return trace_problem(answer.tokens, form, checker.correct(answer.text, golds[question]), most)

    kept = funnel.sieve(f"traces of {name}", list(zip(asked, said, strict=True)), problem)
    traces = [_trace(question, request, answer, checker) for (question, request), answer in kept]
    seen: set[Hashable] = set()

    def again(trace: Trace) -> str | None:
        key = trace.question, trace.rationale, trace.answer
        known = key in seen
        seen.add(key)
        return "written before" if known else None

    return funnel.sieve(f"distinct traces of {name}", traces, again)


def _trace(question: int, request: Request, said: Completion, checker: Checker) -> Trace:
    answer = said.text.rpartition(checker.mark)[2].strip().split("\n")[0].strip()
    before = checker.before(said.text)
    return Trace(question=question, rationale=before, answer=answer, tokens=said.tokens, requests=(request.id,))


def pass_rates(correct: ArrayLike) -> NDArray[np.float64]:
    """The share of right attempts at each question.

    Args:
        correct: `[questions, attempts]`.

    Raises:
        InputError: there is no attempt.
    """
    table = np.asarray(correct, np.float64)
    if table.ndim != 2 or not table.shape[1]:
        raise InputError(f"Attempts have shape {table.shape}: give [questions, attempts], at least one attempt.")
    return np.asarray(table.mean(1), np.float64)


def hard_enough(rate: float, threshold: float) -> bool:
    """Whether a student fails at a question often enough to learn from it: pass rate ≤ threshold."""
    return rate <= threshold


def diverse_traces(
    traces: Sequence[Trace],
    number: int,
    rule: Rule,
    seed: int,
    encode: Callable[[str], Sequence[Hashable]],
    funnel: Funnel,
) -> tuple[list[Trace], dict[str, float]]:
    """Up to `number` traces of each question that are far from each other; of one, the shortest.

    Args:
        encode: the tokens of a text, which distances are counted in.

    Returns:
        The traces, and means over the questions with several: `distance` between those kept, `distance_by_length`, and
        `distance_before`, between all.
    """
    chosen: list[int] = []
    means: dict[str, list[float]] = {"distance": [], "distance_by_length": [], "distance_before": []}
    for places in by_group([t.question for t in traces]).values():
        if number == 1:
            chosen.append(min(places, key=lambda i: traces[i].tokens))
            continue
        tokens = [encode(traces[i].rationale) for i in places]
        distances = edit_distances(tokens)
        taken = select_diverse(distances, number, rule, (seed, traces[places[0]].question))
        chosen += [places[i] for i in taken]
        if len(taken) > 1:
            relative = by_length(distances, [len(t) for t in tokens])
            means["distance"].append(_mean_pair(distances, taken))
            means["distance_by_length"].append(_mean_pair(relative, taken))
            means["distance_before"].append(_mean_pair(distances, range(len(places))))
    kept = funnel.pick("diverse traces", traces, chosen, "nearer to the others")
    return kept, {name: fmean(values) for name, values in means.items() if values}


def _mean_pair(distances: NDArray[Any], chosen: Sequence[int]) -> float:
    """Mean over the pairs of the chosen items."""
    part = distances[np.ix_(list(chosen), list(chosen))]
    return float(part.sum() / (len(part) * (len(part) - 1)))
