"""21. QCRD: Quality-guided Contrastive Rationale Distillation for Large Language Models (2024, arXiv 2405.13014).

K rationales of a question are sampled from the teacher. Those whose answer is the majority's are positives, the others
negatives; so is what the student wrote some iterations ago, at a high temperature. A discriminator D tells positives from
negatives, is fitted anew in every iteration, and weighs them:

    l⁺ = min over positives of ℓ(r),      l⁻ = min(ℓ(r⁻) − δ, 0),  r⁻ the negative with the largest ℓ
    L = α₁ L_label + α₂ mean [ D(r⁺) l⁺ − β (1 − D(r⁻)) l⁻ ],     ℓ(r) = −log π(r | x) / |r|
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from understudy.curation import Checker, Funnel
from understudy.curation.rationales import (
    Rationale,
    answer_list,
    contrast_lists,
    rationale_report,
    read_rationale,
    sort_rationales,
    without_positives,
)
from understudy.data.text import write_records
from understudy.errors import InputError
from understudy.evaluation.answers import wilson
from understudy.generation import Completion, LocalSource, Prompt, Request
from understudy.tasks import get as get_task
from understudy.training import Pipeline, PipelineContext
from understudy.training.contrast import ContrastOptions
from understudy.training.discriminator import DiscriminatorFit, update_discriminator

_COST = "Cost is that of the last iteration's training; what the teacher wrote has a table of its own."


class QCRD(ContrastOptions, Pipeline):
    """A teacher's rationales, denoised by vote, against the student's own mistakes, weighed by a discriminator."""

    name = "qcrd"
    paper = 21
    kinds = frozenset({"text"})
    cost = "samples completions a question; an iteration: a sample of the student a question, a fit of D, training"
    example: ClassVar[dict[str, Any]] = {"task": "reasoning"}
    page: ClassVar[dict[str, str]] = {
        "when": "A teacher that errs at random and can be asked several times, and a student that is to answer alone.",
        "not": "Where the teacher errs alike every time: the vote then confirms the error. With `beta` the contrast can hurt: "
        "compare with `beta=0`.",
        "deviations": "There is no released code; the method is reconstructed. The student is a causal model with a prompt for "
        "the answer and one for the rationale in the place of prefixes. An iteration is a run of its own, with a new optimiser "
        "and schedule. D has its own optimiser (AdamW, which does not see the scale of a loss): α₃ is left out and its decay is "
        "that of D's learning rate. A rationale includes its answer. What cannot be read is dropped, and a question without "
        "rationales is learned by its answer alone, outside the contrast's mean. A pretrained D pools in its own way.",
    }

    samples: int = Field(5, ge=1, description="K, rationales of the teacher for each question.")
    temperature: float = Field(0.7, ge=0, description="Of the teacher.")
    max_tokens: int = Field(512, ge=1, description="Of a rationale.")
    agree: Literal["vote", "gold"] = Field("vote", description="Positives have the majority's answer, or the data's.")
    iterations: int = Field(10, ge=1, description="Parts of training; negatives and D are renewed for each.")
    age: int = Field(5, ge=1, description="Iterations since the student that writes negatives.")
    negative_temperature: float = Field(1.5, gt=0, description="Of the student's negatives.")
    discriminator: str = Field("bytes", description="`bytes:width=N,layers=N` (new), or a sequence classifier.")
    discriminator_steps: int = Field(500, ge=1, description="Of its first fit; later fits take a tenth.")
    discriminator_rate: float = Field(1e-3, gt=0, description="Learning rate; 5e-5 suits a pretrained one.")
    discriminator_decay: float = Field(0.9, gt=0, le=1, description="Of that rate, an iteration.")
    corruption: float = Field(0.3, gt=0, le=1, description="Changed share of a positive, for extra negatives of D.")
    teacher_prompt: str = Field("solve_steps", description="File with the slot `question`, for the teacher.")
    rationale_prompt: str = Field("explain", description="File with the slot `question`: the student's rationale.")
    answer_prompt: str = Field("predict", description="File with the slot `question`: the student's answer alone.")
    chat: bool = Field(True, description="Ask the teacher in a chat; off, the prompt is text to be continued.")

    def decay_of(self, iteration: int) -> float:
        """The factor of the discriminator's objective in an iteration."""
        return self.discriminator_decay**iteration

    def run(self, context: PipelineContext) -> dict[str, Any]:
        recipe = context.recipe
        steps = self.check(context)
        task: Any = get_task("reasoning")
        splits = task.read(recipe["data"])
        checker, _ = task.checkers(recipe["data"], splits)
        records = [{**r, "gold": checker.gold(r["answer"])} for r in splits.train]
        taught = context.stage("rationales", Rationale, partial(self._taught, context, records, checker))
        students: list[Path] = []
        for i in range(self.iterations):
            inner, sets = context.round(i), list(taught)
            if self.beta and students:
                writer = students[max(0, i - self.age)]
                make = partial(self._own, inner, records, checker, writer, taught)
                sets += inner.stage("negatives", Rationale, make)
            if self.quality:
                judge = partial(self._judged, inner, i, records, sets)
                sets = inner.stage("qualities", Rationale, judge)
            self._write(context.folder / f"round-{i}" / "corpus", splits, sets)
            share = (i + 1) * steps // self.iterations - i * steps // self.iterations
            students.append(inner.train("training", self._student(recipe, i, students, share, context.folder)).folder)
        return self._evaluation(context, splits, checker, sets, students[-1])

    def check(self, context: PipelineContext) -> int:
        """The student's steps, if the recipe can be carried out at all."""
        recipe = context.recipe
        steps = int(recipe["trainer"].get("max_steps", 0))
        self.need_answers(context)
        if self.samples > 1 and self.temperature == 0:
            raise InputError("options.samples above 1 at options.temperature=0 are all alike: raise the temperature.")
        if steps < self.iterations:
            raise InputError(
                f"trainer.max_steps is {steps} and options.iterations {self.iterations}: give each at least one step."
            )
        if "peft" in recipe["student"] and self.iterations > 1:
            raise InputError("student.peft is for one iteration: set options.iterations=1, or train all weights.")
        for prompt in (self.teacher_prompt, self.rationale_prompt, self.answer_prompt):
            Prompt.load(prompt).render(question="")
        return steps

    def _taught(
        self, context: PipelineContext, records: Sequence[Mapping[str, Any]], checker: Checker, funnel: Funnel
    ) -> list[Rationale]:
        """The teacher's rationales, positive or negative by vote."""
        prompt, requests = Prompt.load(self.teacher_prompt), []
        how: Any = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        for i, record in enumerate(records):
            text = prompt.render(question=record["question"])
            asked: Any = ({"role": "user", "content": text},) if self.chat else text
            requests += [Request(asked, f"rationales/{i}/{k}", k, **how) for k in range(self.samples)]
        said = zip(requests, context.ask("teacher", requests), strict=True)
        places = [n // self.samples for n in range(len(requests))]
        found = [read_rationale(*s, i, records[i]["gold"], checker) for s, i in zip(said, places, strict=True)]
        kept = sort_rationales(found, self.samples, self.agree == "vote", funnel)
        if not kept:
            raise InputError(
                f"None of {len(found)} rationales of the teacher can be read: mend options.teacher_prompt so that the "
                f"answer stands behind {checker.mark}, or raise options.max_tokens."
            )
        return kept

    def _own(
        self,
        context: PipelineContext,
        records: Sequence[Mapping[str, Any]],
        checker: Checker,
        writer: Path,
        taught: Sequence[Rationale],
        funnel: Funnel,
    ) -> list[Rationale]:
        """What an earlier student writes at a high temperature."""
        said = self._said(context, writer, records, "rationale", "negatives", self.negative_temperature)
        found = [read_rationale(*pair, i, records[i]["gold"], checker) for i, pair in enumerate(said)]
        return without_positives(found, taught, funnel)

    def _judged(
        self,
        context: PipelineContext,
        number: int,
        records: Sequence[Mapping[str, Any]],
        rationales: Sequence[Rationale],
        funnel: Funnel,
    ) -> list[Rationale]:
        """The rationales with log D, after D has been fitted to them from its present weights on."""
        folder = context.folder / "discriminator"
        pairs = [(records[r.question]["question"], r.text.strip()) for r in rationales]
        fit = DiscriminatorFit(
            steps=self.discriminator_steps if number == 0 else max(1, self.discriminator_steps // 10),
            lr=self.discriminator_rate * self.decay_of(number),
            corruption=self.corruption,
            seed=context.recipe["seed"] * 1000 + number,
        )
        start = folder / str(number - 1) if number else self.discriminator
        values = update_discriminator(start, pairs, [r.good for r in rationales], fit, folder / str(number))
        return [
            r.model_copy(update={"id": "", "parents": (r.id,), "log_quality": q})
            for r, q in zip(rationales, values, strict=True)
        ]

    def _write(self, corpus: Path, splits: Any, rationales: Sequence[Rationale]) -> None:
        """What `rationale-contrast` trains on; the other splits hold answers alone."""
        answer, explain = (Prompt.load(p) for p in (self.answer_prompt, self.rationale_prompt))
        used = [r for r in rationales if r.good or self.beta]
        write_records(corpus / "train.jsonl", contrast_lists(splits.train, used, answer, explain))
        for name in ("validation", "test"):
            rows = [answer_list(answer, r) for r in getattr(splits, name)]
            write_records(corpus / f"{name}.jsonl", rows)

    def _student(
        self, recipe: Mapping[str, Any], number: int, students: Sequence[Path], steps: int, folder: Path
    ) -> dict[str, Any]:
        """An iteration of training, from the student of the one before."""
        student, kept = dict(recipe["student"]), ("max_length", "packing", "vocab_size", "tokenizer")
        if students:
            loaded = ("dtype", "device", "trust_remote_code")
            student = {"model": str(students[-1] / "student"), **{k: student[k] for k in loaded if k in student}}
        data = {k: recipe["data"][k] for k in kept if k in recipe["data"]}
        return {
            "task": "preferences",
            "method": "rationale-contrast",
            "options": self.model_dump(include=set(ContrastOptions.model_fields)),
            "data": {**data, "name": str(folder / f"round-{number}" / "corpus")},
            "student": student,
            "trainer": {**recipe["trainer"], "max_steps": steps},
            "seed": (recipe["seed"] + 1_000_003 * number) % 2**32,
            "eval_split": recipe["eval_split"],
        }

    def _said(
        self,
        context: PipelineContext,
        student: Path,
        records: Sequence[Mapping[str, Any]],
        what: Literal["rationale", "answer"],
        name: str,
        temperature: float = 0.0,
    ) -> list[tuple[Request, Completion]]:
        """A student's rationale of each question, or its answer alone, with the request."""
        loaded = LocalSource.load(str(student / "student"))
        source = LocalSource(loaded.model, loaded.tokenizer, "student", batch=64)  # draws do not depend on the folder
        prompt = Prompt.load(self.rationale_prompt if what == "rationale" else self.answer_prompt)
        how: Any = {"max_tokens": int(context.recipe["data"]["max_new_tokens"]), "temperature": temperature}
        requests = [
            Request(prompt.render(question=r["question"]), f"{name}/{i}", i, **how) for i, r in enumerate(records)
        ]
        return list(zip(requests, context.ask_trained(source, requests, name), strict=True))

    def _evaluation(
        self, context: PipelineContext, splits: Any, checker: Checker, sets: Sequence[Rationale], student: Path
    ) -> dict[str, Any]:
        """Greedy answers to the judged questions, alone and behind a rationale; the teacher's, and what D tells apart."""
        rows, metrics, records = [], {}, getattr(splits, split := context.recipe["eval_split"])
        for what, name in (("answer", "accuracy"), ("rationale", "rationale_accuracy")):
            said = self._said(context, student, records, what, f"judged_{what}")  # type: ignore[arg-type]
            pairs = zip(said, (checker.gold(r["answer"]) for r in records), strict=True)
            right = [a.finish == "stop" and checker.correct(a.text, gold) for (_, a), gold in pairs]
            found = wilson(sum(right), len(right))
            metrics[name] = found.share
            rows.append([what, f"{found.share:.3f}", f"{found.low:.3f} to {found.high:.3f}", len(right)])
        metrics |= rationale_report([r for r in sets if r.sampled], len(splits.train), self.samples)
        table = {
            "title": "The student on the judged questions",
            "headings": ["asked for", "accuracy", "interval", "questions"],
            "rows": rows,
        }
        cost = json.loads((student / "evaluation.json").read_text())["cost"]
        return {"split": split, "metrics": metrics, "tables": [table], "cost": cost, "notes": [*splits.notes, _COST]}
