"""What a teacher that is trained here writes for a student: questions from seeds, and rationales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from understudy.curation import Checker, Funnel
from understudy.curation.drafts import TAG, Draft, DraftRationale, NewQuestions, read_drafts, write_questions
from understudy.curation.in_context import draw_shots
from understudy.data.reasoning import completion
from understudy.errors import InputError
from understudy.generation import Completion, Prompt, Request
from understudy.training.pipeline import PipelineContext
from understudy.training.solvers import load_source

Records = Sequence[Mapping[str, Any]]
BARE = {
    "chat": False,
    "max_tokens": 24,
    "question_prompt": "write_bare",
    "style_prompts": ["bare"],
    "plain_prompt": "bare",
    "teacher_data": {"styles": {"ordered": 0.5, "bare": 0.5}},
    "student_data": {"shots": 1, "styles": {"ordered": 0.7, "bare": 0.3}},
}
"""Options for small models that know no words: a question is continued by questions, or by its solution. The teacher learns to
write all steps or the answer alone, and the student to use an example in its prompt."""


@dataclass(frozen=True)
class Drafting:
    """How a teacher is asked.

    Args:
        questions: prompt with the slots `questions` and, if wanted, `number`. number: of questions that it asks for. seeds: of
            questions that it shows. plain: prompt with the slot `question`. styles: others. temperature: of questions and
            drafted rationales. max_tokens: of a text. chat: ask in a chat; off, prompts are texts to be continued.
        seed: of the choice of seeds. tries: times the prompts that would do if all they bring were new, at most.
    """

    questions: Prompt
    number: int
    seeds: int
    plain: Prompt
    styles: Sequence[Prompt]
    temperature: float
    max_tokens: int
    chat: bool
    seed: int
    tries: int

    # -- prompts, and texts as the teacher is to write them -------------------------------------------------------

    def seeded(self, records: Records, draw: int) -> str:
        """The prompt for questions, with others at random."""
        shown = [r["question"] for r in draw_shots(records, self.seeds, self.seed, draw)]
        values = {"questions": write_questions(shown, self._tagged), "number": self.number}
        return self.questions.render({k: v for k, v in values.items() if k in self.questions.slots or k == "questions"})

    def shown(self, questions: Sequence[str]) -> str:
        """Questions as the answer to that prompt."""
        text = write_questions(questions, self._tagged)
        return text if self.chat else f"\n{text}"

    def solution(self, rationale: str, answer: str) -> str:
        """A rationale and its answer as the answer to a prompt with a question."""
        text = completion(rationale, answer)
        return text.strip() if self.chat else text

    @property
    def _tagged(self) -> bool:
        return TAG in self.questions.text

    def examples(self, records: Records) -> list[dict[str, Any]]:
        """Training records of a teacher that is to know both kinds of prompts; solutions have all prompts in turn."""
        prompts, rows = [self.plain, *self.styles], []
        for i, r in enumerate(records):
            others = [o["question"] for o in draw_shots(records, self.number, self.seed, i, 1)]
            solved = prompts[i % len(prompts)].render(question=r["question"])
            rows.append((self.seeded(records, i), self.shown(others)))
            rows.append((solved, self.solution(r["rationale"], r["answer"])))
        if not self.chat:
            return [{"prompt": asked, "completion": said} for asked, said in rows]
        return [{"messages": [_said("user", asked), _said("assistant", said)]} for asked, said in rows]

    # -- what it writes -------------------------------------------------------------------------------------------

    def ask(
        self,
        context: PipelineContext,
        teacher: Mapping[str, Any],
        asked: Sequence[tuple[str, int]],
        name: str,
        temperature: float,
    ) -> list[tuple[Request, Completion]]:
        """What the teacher writes after prompts, each with a draw, through the request log `logs/NAME.jsonl`."""
        how: Any = {"max_tokens": self.max_tokens, "temperature": temperature}
        contents: list[Any] = [(_said("user", text),) if self.chat else text for text, _ in asked]
        requests = [
            Request(content, f"{name}/{i}", draw, **how)
            for i, (content, (_, draw)) in enumerate(zip(contents, asked, strict=True))
        ]
        return list(zip(requests, context.ask_trained(load_source(teacher, "teacher"), requests, name), strict=True))

    def new_questions(
        self,
        context: PipelineContext,
        teacher: Mapping[str, Any],
        records: Records,
        known: Sequence[str],
        name: str,
        number: int,
        funnel: Funnel,
    ) -> list[Draft]:
        """Up to `number` distinct questions of the teacher, none of which is `known`.

        Raises:
            InputError: it wrote none.
        """
        found, asked = NewQuestions(known), 0
        most = self.tries * math.ceil(number / self.number)
        while len(found.drafts) < number and asked < most:
            more = min(most - asked, math.ceil((number - len(found.drafts)) / self.number))
            prompts = [(self.seeded(records, draw), draw) for draw in range(asked, asked + more)]
            for request, said in self.ask(context, teacher, prompts, name, self.temperature):
                found.add(request, said)
            asked += more
        found.note(f"distinct {name}", funnel)
        if not found.drafts:
            raise InputError(
                f"The teacher wrote no new question after {asked} prompts: mend options.question_prompt so that each stands "
                "on a line of its own or between <question> and </question>, or raise options.max_tokens."
            )
        return list(found.drafts.values())[:number]

    def rationales(
        self,
        context: PipelineContext,
        teacher: Mapping[str, Any],
        drafts: Sequence[Draft],
        number: int,
        checker: Checker,
        name: str,
        funnel: Funnel,
    ) -> list[DraftRationale]:
        """Rationales of each draft: `number` of them, by the style prompts in turn, or one by the plain prompt, greedy.

        Raises:
            InputError: none can be read.
        """
        styles = self.styles if number > 1 else [self.plain]
        places = [(i, j) for i in range(len(drafts)) for j in range(number)]
        prompts = [(styles[j % len(styles)].render(question=drafts[i].question), j) for i, j in places]
        said = self.ask(context, teacher, prompts, name, self.temperature if number > 1 else 0.0)
        found = read_drafts(places, said, checker, funnel, name)
        if not found:
            raise InputError(
                f"None of {len(said)} rationales of the teacher can be read: mend its prompts so that the answer stands behind "
                f"{checker.mark}, or raise options.max_tokens."
            )
        return found


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}
