"""What a tree search over reasoning steps asks of models: next steps, and whether the steps so far are right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from understudy.curation import Checker
from understudy.curation.answers import choices
from understudy.errors import InputError
from understudy.generation import Completion, Prompt, Request
from understudy.generation.tree_search import Expansion, Leaf, Step, distinct
from understudy.training.pipeline import Ask

WRONG, RIGHT = "A", "B"
LEAST = 1e-6
"""The probability of "right" where the evaluator is certain of "wrong": 0 itself says nothing (`state_value`)."""
NEW = 1.25
"""Factor of the outcome of a right answer that is not the reference solution (released code)."""


class Question(NamedTuple):
    """A question that steps are searched for.

    Args:
        prompt: what the policy continues. text: the question alone. gold: its answer, canonical. solution: the reference's text.
    """

    prompt: str
    text: str
    gold: str
    solution: str


def outcome(answer: str, question: Question, checker: Checker) -> float:
    """O of a finished answer: 1 if it is right, 1.25 if it is also not the reference solution, else −1."""
    if not checker.correct(answer, question.gold):
        return -1.0
    return 1.0 if answer.split() == question.solution.split() else NEW


def probability_right(said: Completion) -> float:
    """The probability of "right" from an answer of one letter and its log-probability; 0, which says nothing, where it is neither.

    Without a log-probability the answer is certain.
    """
    letter = (choices(said.text) or [""])[0]
    p = math.exp(min(0.0, said.log_prob)) if said.log_prob is not None else 1.0
    return {RIGHT: p, WRONG: max(LEAST, 1.0 - p)}.get(letter, 0.0)


@dataclass(frozen=True)
class StepProposer:
    """Proposes the next steps of questions and evaluates them; called by `search_trees`.

    Args:
        questions: by the id of their tree. ask: the model that proposes. judge: the one that evaluates, if any.
        judge_prompt: with the slots `question`, `steps` and `solution`, answered with A (wrong) or B (right).
        checker: of final answers; behind its mark an answer ends. place: begins the ids of requests.
        draw: another number asks for other samples. max_tokens, temperature: of a step. stop: what ends a step.
        hint: show the evaluator the reference solution. chat: ask it in a chat.
        solution: behind a beginning of the reference solution its own next step is one of those proposed.
    """

    questions: Mapping[str, Question]
    ask: Ask
    judge: Ask | None
    judge_prompt: Prompt
    checker: Checker
    place: str = ""
    draw: int = 0
    max_tokens: int = 128
    temperature: float = 1.0
    stop: str = "\n"
    hint: bool = True
    chat: bool = False
    solution: bool = False

    @property
    def calls_per_step(self) -> int:
        """Most model calls of a proposed step."""
        return 1 + (self.judge is not None)

    def __call__(self, leaves: Sequence[Leaf]) -> Iterator[Expansion]:
        known = [self._known_step(leaf) for leaf in leaves]
        asked = [leaf.width - len(own) for leaf, own in zip(leaves, known, strict=True)]
        requests = [self._request(leaf, k) for leaf, number in zip(leaves, asked, strict=True) for k in range(number)]
        said = zip(requests, self.ask(requests), strict=True)
        proposed = [
            _beside([self._step(leaf, *next(said)) for _ in range(number)], own)
            for leaf, number, own in zip(leaves, asked, known, strict=True)
        ]
        judged = iter(self._judged([(leaf, s) for leaf, steps in zip(leaves, proposed, strict=True) for s in steps]))
        for number, steps in zip(asked, proposed, strict=True):
            found = [next(judged) for _ in steps]
            yield Expansion(found, number + (len(steps) if self.judge is not None else 0))

    def _known_step(self, leaf: Leaf) -> list[Step]:
        """The reference solution's next step, where it begins with the steps so far; not yet with a probability."""
        whole, said = self.questions[leaf.tree].solution, "".join(leaf.steps)
        rest = whole[len(said) :]
        if not self.solution or not whole.startswith(said) or not rest.strip():
            return []
        end = rest.find(self.stop, len(rest) - len(rest.lstrip()))
        ends = leaf.last or end < 0 or not rest[end:].strip()
        text = rest if ends else rest[: end + len(self.stop)]
        return [Step(text, 0.0, 1, outcome=1.0 if ends else None, ended=ends)]

    def _request(self, leaf: Leaf, k: int) -> Request:
        text = self.questions[leaf.tree].prompt + "".join(leaf.steps)
        name, draw = f"{self.place}{leaf.tree}/{leaf.node}/{k}", self.draw * leaf.width + k
        how: Any = {"max_tokens": self.max_tokens, "temperature": self.temperature, "log_probs": True}
        return Request(text, name, draw, stop=(self.stop,), **how)

    def _step(self, leaf: Leaf, request: Request, said: Completion) -> Step:
        if said.log_prob is None:
            raise InputError(f"Request {request.id} has no log-probability, which the prior of a step needs.")
        answer = "".join(leaf.steps) + said.text
        whole = said.finish == "stop" and self.checker.mark in answer
        ended = whole or self.checker.parse(answer).value is not None
        known = outcome(answer, self.questions[leaf.tree], self.checker) if ended or leaf.last else None
        text = said.text + self.stop if said.finish == "stop" and known is None and said.text.strip() else said.text
        return Step(text, said.log_prob, said.tokens, 0.0, known, ended, (request.id,))

    def _judged(self, proposed: Sequence[tuple[Leaf, Step]]) -> list[Step]:
        """The steps with what the evaluator says of them."""
        if self.judge is None:
            return [step for _, step in proposed]
        requests = [self._judgement(leaf, step) for leaf, step in proposed]
        said = zip(proposed, requests, self.judge(requests), strict=True)
        return [
            replace(step, self_evaluation=probability_right(answer), requests=(*step.requests, request.id))
            for (_, step), request, answer in said
        ]

    def _judgement(self, leaf: Leaf, step: Step) -> Request:
        question = self.questions[leaf.tree]
        solution = question.solution if self.hint else ""
        steps = "".join(leaf.steps) + step.text
        text = self.judge_prompt.render(question=question.text, steps=steps.rstrip("\n"), solution=solution)
        asked: Any = ({"role": "user", "content": text},) if self.chat else text
        name = step.requests[0] if step.requests else f"{self.place}{leaf.tree}/{leaf.node}/solution"
        return Request(asked, f"{name}/judged", max_tokens=1, temperature=0.0, log_probs=True)


def _beside(proposed: Sequence[Step], known: Sequence[Step]) -> list[Step]:
    """Distinct steps. A known one is as likely, a token, as the likeliest of those proposed, so a search prefers neither."""
    likeliest = max(proposed, key=lambda s: s.log_prob / max(1, s.tokens), default=None)
    if likeliest is not None:
        known = [replace(s, log_prob=likeliest.log_prob, tokens=likeliest.tokens) for s in known]
    return distinct([*proposed, *known])
