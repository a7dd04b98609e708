"""Reasoning: questions answered step by step, judged by their final answer; embedded, running sums of known truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Subset

from understudy.curation import Checker, kind_of
from understudy.curation.in_context import draw_shots, with_shots
from understudy.data import TextSplits
from understudy.data.reasoning import MARK, WORLD, completion, load_reasoning
from understudy.data.reasoning_world import STYLES, attempt, digits_of, on_the_way, running_sums, shown
from understudy.errors import InputError, nearest
from understudy.evaluation.reasoning import Grading, QuestionSet, compare_answers, judge, write_answers
from understudy.generation import Completion, OracleSource, Prompt, Request, Source
from understudy.models import ModelAdapter
from understudy.tasks.base import Prepared, merged
from understudy.tasks.language_modeling import LanguageModeling

_TRAINER = {
    "max_steps": 800,
    "per_device_train_batch_size": 64,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.0,
}
_MODEL = "llama:hidden=64,layers=2,heads=4,init=0.1"
STEPS = "step by step"
"""What a prompt says to the world's oracle that is to write its steps, and not the answer alone."""
GRADES = "from -100 to 100"
"""What a prompt says to the world's evaluator that is to grade, and not to say A or B."""
EXPLAINED = {
    "accuracy": "Share of questions whose greedy answer, in the trained format, is right. What cannot be read is wrong.",
    "accuracy_lenient": "The same where the last answer in the text counts, wherever it stands.",
    "unparsed": "Share of greedy answers that cannot be read in the trained format.",
    "token_accuracy": "Share of the reference's tokens that are the likeliest ones, given those before.",
    "answer_agreement": "Share of questions on which student and teacher give the same final answer, right or wrong.",
    "rationale_bleu": "Mean BLEU of the student's rationales against the teacher's, 0 to 100. 100 is the same words.",
    "answer_tokens": "Mean length of a greedy answer with its rationale, in tokens.",
}


@dataclass(frozen=True)
class Questions:
    """What a procedure needs to know of the data.

    Args:
        data: as in a recipe. prompt: with the slot `question`, as the student is asked. splits: records with prompt and
            completion. checker: reads answers in the trained format. golds: canonical answers of the training questions.
    """

    data: Mapping[str, Any]
    prompt: Prompt
    splits: TextSplits
    checker: Checker
    golds: Sequence[str]


def _add_shots(splits: TextSplits, prompt: Prompt, number: int) -> None:
    """Put solved training questions of a question's style before it."""
    pools: dict[Any, list[dict[str, Any]]] = {}
    for record in splits.train:
        pools.setdefault(record.get("style"), []).append(record)
    for part, records in enumerate((splits.train, splits.validation, splits.test)):
        for i, record in enumerate(records):
            pool = pools.get(record.get("style"), [])
            drawn = draw_shots(pool, number + 1, part, i)  # one more, where the question itself is among them
            others = [r for r in drawn if r["question"] != record["question"]]
            record["prompt"] = with_shots(prompt, others[:number], record["question"])
    splits.hash += f" {number} shots"


class Reasoning(LanguageModeling):
    """Answer questions step by step."""

    name = "reasoning"
    metric = "accuracy"
    higher_is_better = True
    fidelity = ("answer_agreement", "rationale_bleu")
    preflight_examples = 16  # each is written

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """The running sums, with a small Llama trained as teacher, unless the recipe names others."""
        data = recipe.get("data") or {}
        data.setdefault("name", WORLD)
        embedded = data["name"] == WORLD
        data.setdefault("max_length", 48 if embedded else 512)
        data.setdefault("max_new_tokens", 32 if embedded else 256)
        if embedded:
            data.setdefault("vocab_size", 260)  # a token a character
        data.setdefault("prompt", "bare" if embedded else "question")
        data.setdefault("truncation", "start")
        data.setdefault("packing", "auto")
        recipe["data"] = data
        if recipe.get("teacher") is None:
            recipe["teacher"] = {"model": _MODEL, "train": dict(_TRAINER)}
        if recipe.get("student") is None:
            recipe["student"] = {"model": _MODEL}
        recipe["trainer"] = merged(_TRAINER, recipe.get("trainer") or {})
        return recipe

    def read(self, data: Mapping[str, Any]) -> TextSplits:
        """Questions, with the prompt and completion that a student is trained on. `data` as in a recipe."""
        own = ("prompt", "rationale", "shots", *_HOW, *_GRADED)
        splits = load_reasoning({k: v for k, v in data.items() if k not in own})
        prompt, keep = Prompt.load(data["prompt"]), data.get("rationale", True)
        for records in (splits.train, splits.validation, splits.test):
            for record in records:
                record["prompt"] = prompt.render(question=record["question"])
                record["completion"] = completion(record["rationale"] if keep else "", record["answer"])
        splits.hash = f"{splits.hash} {prompt.hash[:16]} {keep}"
        if data.get("shots", 0):
            _add_shots(splits, prompt, data["shots"])
        return splits

    def checkers(self, data: Mapping[str, Any], splits: TextSplits) -> tuple[Checker, Checker]:
        """What reads an answer in the trained format, and wherever it stands last."""
        answers = [r["answer"] for r in (*splits.train, *splits.validation, *splits.test)]
        kind = data.get("answers") or kind_of(answers)
        return Checker(kind), Checker(kind, "last")

    def questions(self, data: Mapping[str, Any]) -> Questions:
        """Everything of `data` that a procedure needs."""
        splits = self.read(data)
        checker, _ = self.checkers(data, splits)
        return Questions(
            data, Prompt.load(data["prompt"]), splits, checker, [checker.gold(r["answer"]) for r in splits.train]
        )

    def prepare(self, recipe: Any) -> Prepared:
        splits = self.read(recipe.data)
        strict, lenient = self.checkers(recipe.data, splits)
        every = [*splits.train, *splits.validation, *splits.test]
        golds = {r["id"]: (strict.gold(r["answer"]), r.get("level")) for r in every}
        how = {k: recipe.data[k] for k in _HOW if k in recipe.data}
        prepared = self._prepared(recipe, {**how, "pack": False}, splits)
        most, samples = recipe.data["max_new_tokens"], recipe.data.get("samples", 4)
        grading = Grading(strict, lenient, prepared.tokenizer, most, samples, recipe.data.get("temperature", 0.7))
        for split in ("train", "validation", "test"):
            rows = prepared.split(split).records
            for row in rows:
                row["gold"], row["level"] = golds[row["id"]]
            setattr(prepared, split, QuestionSet(rows, grading))
        prepared.teacher_train = prepared.train
        prepared.say([f"Answers are read as {strict.kind}, behind {MARK}."])
        return prepared

    def evaluate(self, student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any]) -> dict[str, Any]:
        """Final answers, beside likelihood and calibration of the reference's tokens."""
        found = super().evaluate(student, teacher, loader)
        metrics = found["metrics"]
        for side in ("", "teacher_"):
            if f"{side}accuracy" in metrics:
                metrics[f"{side}token_accuracy"] = metrics.pop(f"{side}accuracy")
        data = loader.dataset
        examples: Any = data.dataset if isinstance(data, Subset) else data
        rows, grading = [data[i] for i in range(len(data))], examples.grading  # type: ignore[arg-type]
        written = write_answers(student, rows, grading, range(1 + grading.samples))
        judged = judge(written, rows, grading)
        found["metrics"] = {**judged["metrics"], **metrics}
        if teacher is not None:
            said = write_answers(teacher, rows, grading, [0])
            taught = judge(said, rows, grading)["metrics"]
            found["metrics"] |= compare_answers(written, said, grading)
            found["metrics"] |= {f"teacher_{n}": taught[n] for n in ("accuracy", "accuracy_lenient", "unparsed")}
        return {**found, "tables": judged["tables"], "explained": EXPLAINED}

    def oracle(self, recipe: Mapping[str, Any], role: str) -> Source:
        """Of the running sums: the teacher, who answers and errs; one that writes in the style that its name in
        `teacher.members` says and is always right (`ordered` errs too); and the evaluator, who says A or B of steps and is
        unsure."""
        data, (side, _, style) = recipe["data"], role.partition(".")
        if data["name"] != WORLD or side not in ("teacher", "evaluator"):
            return super().oracle(recipe, role)
        if side == "evaluator":
            return _evaluator(data.get("evaluator_noise", 0.35))
        if style and style not in STYLES:
            raise InputError(
                f"The running sums have no teacher that writes {style!r}.{nearest(style, STYLES)} Known: {', '.join(STYLES)}."
            )
        error, always = data.get("teacher_error", 0.03), data.get("systematic_error")

        def write(request: Request, chance: np.random.Generator) -> str:
            text = request.prompt if isinstance(request.prompt, str) else request.prompt[-1]["content"]
            digits = digits_of(text)
            if style in ("", "ordered"):
                sums = attempt(digits, error, chance, always)
                return completion(shown(sums) if STEPS in text else "", str(sums[-1]))
            rationale = STYLES[style](digits, chance) if STEPS in text else ""
            return completion(rationale, str(running_sums(digits)[-1]))

        errs = f"sums {error}" if always is None else f"sums {error} and {always[0]}+{always[1]}"
        return OracleSource(errs if style in ("", "ordered") else f"sums {style}", write)


_HOW = ("max_length", "packing", "truncation", "vocab_size", "tokenizer")
_GRADED = (
    "answers",
    "max_new_tokens",
    "samples",
    "temperature",
    "teacher_error",
    "systematic_error",
    "evaluator_noise",
)


def _evaluator(noise: float) -> Source:
    """Who says whether the steps of a sum are right (B) or not (A), or grades them; `noise` deviates its probability."""

    def says(request: Request, chance: np.random.Generator) -> Completion:
        text = request.prompt if isinstance(request.prompt, str) else request.prompt[-1]["content"]
        p = min(0.99, max(0.01, (0.65 if on_the_way(text) else 0.35) + noise * chance.normal()))
        if GRADES in text:
            return Completion(str(round(200 * p - 100)), "stop", None, len(text.split()), 1)
        return Completion("B" if p > 0.5 else "A", "stop", math.log(max(p, 1 - p)), len(text.split()), 1)

    return OracleSource(f"sums judged {noise}", says)
