"""36. Knowledge Distillation Using Frontier Open-source LLMs: Generalizability and the Role of Synthetic Data (2024).

targets y ~ teacher(π_adv(x)): reasoning and answer;  controls: teacher(π_vanilla(x)), the answer alone, and the gold answer
kept: what ends, can be read and is new; optionally, what is right
student: L = −(1/N) Σ_{b,t in completion} log p(y_bt | x_b, y_b<t) on the plain, short prompt; N: completion tokens of the batch
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field

from understudy.curation import Checker, Funnel, Item
from understudy.data.text import write_records
from understudy.errors import InputError
from understudy.evaluation.answers import wilson
from understudy.generation import Completion, Prompt, Request
from understudy.tasks import get as get_task
from understudy.training import Pipeline, PipelineContext
from understudy.training.solvers import WORLD_KEYS

_COST = "Cost is that of the student's training; what the teacher wrote is in the table of what the models were asked."
_KEYS = ("student", "trainer", "seed", "reduction", "eval_split")


class Target(Item):
    """What a student is to write for a question.

    Args:
        question: its text. right: whether the answer is the reference's.
    """

    question: str
    rationale: str
    answer: str
    right: bool


class FrontierSynthetic(Pipeline):
    """A teacher's reasoning, asked for by an elaborate prompt, becomes what a student writes for a short one."""

    name = "frontier-synthetic"
    paper = 36
    kinds = frozenset({"text"})
    cost = "samples completions a question; two more a judged question; the student's training"
    example: ClassVar[dict[str, Any]] = {"task": "reasoning"}
    page: ClassVar[dict[str, str]] = {
        "when": "The baseline of all that learns from a teacher's text: questions whose answers can be checked, a teacher "
        "behind an endpoint, and a student that is to answer by itself what the teacher needs a long prompt for.",
        "not": "Where the teacher errs in a systematic way: unsystematic noise averages out, a systematic error is copied. "
        "Narrow training costs a chat model its other abilities.",
        "deviations": "The paper's code is not released: prompts, filters and settings are reconstructed. Questions with final "
        "answers only: neither summaries (chain of density) nor dialogues; metrics of summaries and of judges are in "
        "`understudy.evaluation.summaries` and `understudy.evaluation.answers`. The student is judged with its own short prompt, "
        "the teacher with both of its prompts.",
    }

    targets: Literal["reasoning", "answer", "gold"] = Field(
        "reasoning",
        description="What is learned: the teacher's reasoning, its answer alone, or the data's answer alone.",
    )
    samples: int = Field(1, ge=1, description="Targets that are asked for each question.")
    temperature: float = Field(0.0, ge=0, description="Of the teacher; above 0 with several samples.")
    max_tokens: int = Field(512, ge=1, description="Of what the teacher writes.")
    reasoning_prompt: str = Field("solve_steps", description="File with the slot `question`, for reasoning.")
    answer_prompt: str = Field("solve_answer", description="File with the slot `question`, for the answer alone.")
    chat: bool = Field(True, description="Ask in a chat; off, the prompt is text to be continued.")
    reject_wrong: bool = Field(False, description="Keep only targets whose answer is the data's.")
    most_unread: float = Field(
        0.2, ge=0, le=1, description="Stop where a larger share of what the teacher wrote cannot be read."
    )
    judge_teacher: bool = Field(True, description="Ask the teacher the judged questions too, with both prompts.")

    def check(self, context: PipelineContext) -> None:
        """Refuse a recipe that cannot be carried out."""
        self.need_answers(context)
        if self.samples > 1 and self.temperature == 0:
            raise InputError("options.samples above 1 at options.temperature=0 are all alike: raise the temperature.")

    def run(self, context: PipelineContext) -> dict[str, Any]:
        recipe = context.recipe
        task: Any = get_task(recipe["task"])
        self.check(context)
        splits, split = task.read(recipe["data"]), recipe["eval_split"]
        checker, _ = task.checkers(recipe["data"], splits)
        targets = context.stage("targets", Target, partial(self._targets, context, splits.train, checker))
        corpus = context.folder / "corpus"
        columns = ("question", "rationale", "answer", "level")
        write_records(corpus / "train.jsonl", [t.model_dump(include=set(columns)) for t in targets])
        for name in ("validation", "test"):
            write_records(
                corpus / f"{name}.jsonl", [{k: r[k] for k in columns if k in r} for r in getattr(splits, name)]
            )
        student = context.train("training", self._student(recipe, str(corpus), checker))
        inner = json.loads((student.folder / "evaluation.json").read_text())
        metrics = {"targets": float(len(targets)), "target_accuracy": sum(t.right for t in targets) / len(targets)}
        tables = list(inner.get("tables", []))
        if self.judge_teacher:
            taught = context.stage("teacher", Target, lambda _: self._teacher(context, getattr(splits, split), checker))
            judged = len(getattr(splits, split))
            found = {n: wilson(sum(t.right for t in taught if t.id.startswith(f"{n}/")), judged) for n in self._prompts}
            metrics |= {f"teacher_{n}_accuracy": s.share for n, s in found.items()}
            rows = [[n, f"{s.share:.3f}", f"{s.low:.3f} to {s.high:.3f}", judged] for n, s in found.items()]
            tables.append({"title": "The teacher on the judged questions", "headings": _HEADINGS, "rows": rows})
        notes = [*splits.notes, *inner.get("notes", []), _COST]
        return {**inner, "metrics": {**inner["metrics"], **metrics}, "tables": tables, "notes": notes}

    @property
    def _prompts(self) -> dict[str, str]:
        return {"reasoning": self.reasoning_prompt, "answer": self.answer_prompt}

    def _requests(self, prompt: str, records: Sequence[Mapping[str, Any]], place: str, samples: int) -> list[Request]:
        """One request a question and sample."""
        template, found = Prompt.load(prompt), []
        for i, record in enumerate(records):
            text = template.render(question=record["question"])
            asked: Any = ({"role": "user", "content": text},) if self.chat else text
            how = {"max_tokens": self.max_tokens, "temperature": self.temperature}
            found += [Request(asked, f"{place}/{i}/{draw}", draw, **how) for draw in range(samples)]  # type: ignore[arg-type]
        return found

    def _targets(
        self, context: PipelineContext, records: Sequence[Mapping[str, Any]], checker: Checker, funnel: Funnel
    ) -> list[Target]:
        """What the teacher writes for the training questions, as far as it ends, can be read and is new."""
        if self.targets == "gold":
            return [Target(question=r["question"], rationale="", answer=r["answer"], right=True) for r in records]
        requests = self._requests(self._prompts[self.targets], records, f"targets/{self.targets}", self.samples)
        answers = context.ask("teacher", requests)
        asked = [record for record in records for _ in range(self.samples)]
        items = list(zip(requests, answers, asked, strict=True))
        read = funnel.sieve("answers that can be read", items, lambda item: _problem(item[1], checker))
        if len(read) < (1 - self.most_unread) * len(items) or not read:
            reasons = "; ".join(f"{n} {reason}" for reason, n in funnel.rows[-1]["dropped"].items())
            raise InputError(
                f"{len(items) - len(read)} of {len(items)} answers of the teacher cannot be read ({reasons}): mend "
                f"options.{self.targets}_prompt so that the answer stands behind {checker.mark}, raise options.max_tokens, or "
                "allow more (options.most_unread)."
            )
        targets = [_target(r, a, record, checker, self.targets == "reasoning") for r, a, record in read]
        if self.reject_wrong:
            targets = funnel.sieve("right answers", targets, lambda t: None if t.right else "wrong")
        seen: set[tuple[str, ...]] = set()

        def again(target: Target) -> str | None:
            said = (target.question, target.rationale, target.answer)
            key = tuple(" ".join(text.casefold().split()) for text in said)
            known = key in seen
            seen.add(key)
            return "written before" if known else None

        kept = funnel.sieve("new targets", targets, again)
        if not kept:
            raise InputError(f"None of {len(items)} answers of the teacher is right: leave out options.reject_wrong.")
        return kept

    def _teacher(
        self, context: PipelineContext, records: Sequence[Mapping[str, Any]], checker: Checker
    ) -> list[Target]:
        """The teacher's own answers to the judged questions, with each of its prompts; what cannot be read is wrong."""
        found = []
        for name, prompt in self._prompts.items():
            requests = self._requests(prompt, records, f"judged/{name}", 1)
            for i, (r, a, record) in enumerate(zip(requests, context.ask("teacher", requests), records, strict=True)):
                target = _target(r, a, record, checker, True)
                found.append(target.model_copy(update={"id": f"{name}/{i}"}))
        return found

    def _student(self, recipe: Mapping[str, Any], corpus: str, checker: Checker) -> dict[str, Any]:
        """The student's own run: supervised on the targets, judged on the data's own questions."""
        data = {k: v for k, v in recipe["data"].items() if k not in WORLD_KEYS}
        data |= {"name": corpus, "answers": checker.kind, "rationale": self.targets == "reasoning"}
        return {"task": "reasoning", "method": "sft", "data": data, **{k: recipe[k] for k in _KEYS}}


_HEADINGS = ["prompt", "accuracy", "interval", "questions"]


def _problem(answer: Completion, checker: Checker) -> str | None:
    """Why an answer of the teacher is no target."""
    return "cut off" if answer.finish == "length" else checker.parse(answer.text).reason


def _target(
    request: Request, answer: Completion, record: Mapping[str, Any], checker: Checker, rationale: bool
) -> Target:
    value = checker.parse(answer.text).value if answer.finish == "stop" else None
    text, _, said = answer.text.rpartition(checker.mark)
    return Target(
        question=record["question"],
        rationale=text.strip() if rationale else "",
        answer=said.strip().split("\n")[0].strip(),
        right=value == checker.gold(record["answer"]),
        requests=(request.id,),
    )
