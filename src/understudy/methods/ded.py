"""16. Beyond Scaling Law: A Data-Efficient Distillation Framework for Reasoning (DED, 2025, arXiv 2508.09883).

teacher    T* = argmax over teachers of the accuracy of a student trained on T's traces, under one small budget
traces     kept: at most L tokens, reasoning and then one answer, and that answer right
questions  kept: pass rate of the student ρ(q) = (1/N) Σ 1[right] ≤ threshold
diversity  P of a question's M traces, mutually far by edit distance:  maximin, or argmax Σ d
student    cross-entropy on what is left
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from understudy.curation import Funnel
from understudy.curation.diversity import Rule
from understudy.curation.traces import (
    PassRate,
    TeacherTrial,
    Trace,
    diverse_traces,
    hard_enough,
    pass_rates,
    sift_traces,
)
from understudy.data.reasoning import completion
from understudy.errors import InputError
from understudy.evaluation.forgetting import hidden_shift, out_of_domain, readings
from understudy.evaluation.teacher_choice import choose_teacher, trial_metrics, trial_notes, trial_table
from understudy.generation import Prompt, Request
from understudy.models import is_new_causal_lm, load_tokenizer
from understudy.tasks.data_keys import check_data_keys
from understudy.tasks.reasoning import Questions, Reasoning
from understudy.training import Pipeline, PipelineContext
from understudy.training.pipeline import ORACLE
from understudy.training.solvers import Solver, corpus_run, first_trained, other_data, solved, student_of, write_corpus

Spec = Mapping[str, Any]
_COST = "Cost is that of the last training; what the teachers wrote has a table of its own."


class DED(Pipeline):
    """A few reasoning traces, of the teacher whose traces teach best, for questions that the student fails."""

    name = "ded"
    paper = 16
    kinds = frozenset({"text"})
    cost = (
        "smoke_samples completions a smoke question and a short training for each of several teachers; attempts of the student a "
        "question; samples completions a kept question; the student's training"
    )
    example: ClassVar[dict[str, Any]] = {"task": "reasoning"}
    page: ClassVar[dict[str, str]] = {
        "when": "Several reasoning models could be the teacher (`teacher.members.NAME`), answers can be checked, and the "
        "student is to learn from hundreds of traces rather than many thousands and keep its other abilities.",
        "not": "Where questions are many and cheap to answer: with the same teacher more data is better. A smoke test too small "
        "to move the student ranks noise; the report then says `undecided`.",
        "deviations": "There is no released code; the method is reconstructed from the paper and digests of it. Questions are "
        "chosen before the traces are asked for, which keeps the same ones and pays for fewer. There is no grader beside "
        "the rule-based check. How P traces are chosen is not said in the paper: `maximin` is ours. Hidden states are means over "
        "an answer's tokens.",
    }

    choose_by: Literal["student", "benchmark"] = Field(
        "student", description="Choose the teacher by its smoke student, or, as a control, by its own accuracy."
    )
    smoke_questions: int = Field(200, ge=1, description="Training questions of the smoke test.")
    smoke_samples: int = Field(1, ge=1, description="Traces of each teacher for each of them.")
    smoke_steps: int = Field(200, ge=1, description="Optimiser steps of a smoke student.")
    smoke_runs: int = Field(1, ge=1, description="Smoke students of each teacher, with different seeds.")
    attempts: int = Field(8, ge=1, description="N, of the student at each question, for its pass rate.")
    threshold: float = Field(0.5, description="Largest pass rate of a question that is kept; 1 keeps all.")
    questions: Literal["hard", "random"] = Field(
        "hard", description="Keep the questions that the student fails, or, as a control, as many at random."
    )
    samples: int = Field(8, ge=1, description="M, traces of the chosen teacher for each kept question.")
    traces: int = Field(4, ge=1, description="P, of these kept; of one, the shortest.")
    diversity: Rule = Field("maximin", description="How they are chosen; `random` and `nearest` are controls.")
    temperature: float = Field(0.7, ge=0, description="Of teachers.")
    attempt_temperature: float = Field(0.7, gt=0, description="Of the student's attempts.")
    max_tokens: int = Field(16_384, ge=1, description="Most tokens of a trace.")
    teacher_prompt: str = Field("solve_steps", description="File with the slot `question`, for teachers.")
    chat: bool = Field(True, description="Ask teachers in a chat; off, the prompt is text to be continued.")
    start_data: dict[str, Any] = Field(
        {}, description="Keys of `data` that differ where `student.train` trains it first."
    )
    other_data: dict[str, Any] | None = Field(
        None, description="Keys of `data` that differ for questions out of domain, asked before and after training."
    )

    def run(self, context: PipelineContext) -> dict[str, Any]:
        roles = self.check(context)
        task, data = Reasoning(), context.recipe["data"]
        inputs, other = task.questions(data), self.other_data
        far = task.questions(other_data(data, other)) if other is not None else None
        base = first_trained(context, "student", self.start_data)
        known = not is_new_causal_lm(base["model"])
        trials, notes = [], [*inputs.splits.notes, _COST]
        if len(roles) > 1:
            trials = context.stage("teachers", TeacherTrial, partial(self._tried, context, inputs, base, known, roles))
            choice = choose_teacher([t.accuracies for t in trials], len(inputs.splits.validation))
            notes += trial_notes(trials, choice.decided)
        best = self._best(trials)
        rates = context.stage("pass_rates", PassRate, lambda _: self._rates(context, inputs, base, known))
        kept = context.stage("questions", PassRate, partial(self._kept, context.recipe["seed"], rates))
        sample = partial(self._sampled, context, inputs, roles[best], [q.question for q in kept], self.samples)
        traces = context.stage("traces", Trace, lambda funnel: sample(funnel)[0])
        corpus = context.stage("corpus", Trace, lambda funnel: self._diverse(context, base, known, traces, funnel)[0])
        run = context.train("training", self._training(context, inputs, base, "corpus", corpus))
        found = json.loads((run.folder / "evaluation.json").read_text())
        metrics, tables = self._diverse(context, base, known, traces, Funnel())[1], list(found.get("tables", []))
        metrics |= {"traces": len(corpus), "questions": len({t.question for t in corpus})}
        if trials:
            metrics |= trial_metrics(trials, best)
            tables.append(trial_table(trials, best))
        if far is not None:
            models = {**({"before": base} if known else {}), "after": student_of(run, base)}
            beside, table = out_of_domain(context, models, far.data, far.splits, far.checker)
            metrics, tables = {**metrics, **beside}, [*tables, table]
        notes = [*found.get("notes", []), *notes]
        return {**found, "metrics": {**found["metrics"], **metrics}, "tables": tables, "notes": notes}

    def check(self, context: PipelineContext) -> list[str]:
        """The teachers' roles, if the recipe can be carried out at all."""
        recipe, roles = context.recipe, context.members("teacher")
        self.need_answers(context)
        if self.temperature == 0 and max(self.samples, self.smoke_samples) > 1:
            raise InputError("options.samples above 1 at options.temperature=0 are all alike: raise the temperature.")
        if len(roles) > 1 and recipe["eval_split"] == "validation":
            raise InputError(
                "Teachers are compared on validation: leave out eval_split, so the run is evaluated on test."
            )
        for role in roles:
            if context.models[role].train is not None:
                raise InputError(f"Method {self.name!r} asks its teachers to write: leave out {role}.train.")
            if context.models[role].model == ORACLE:
                context.source(role)  # it says if it does not know the data
        Prompt.load(self.teacher_prompt).render(question="")
        check_data_keys("reasoning", self.other_data or {})
        return roles

    # -- 1: which teacher -----------------------------------------------------------------------------------------

    def _tried(
        self, context: PipelineContext, inputs: Questions, base: Spec, known: bool, roles: Sequence[str], funnel: Funnel
    ) -> list[TeacherTrial]:
        """Every teacher's traces for the same questions, and what they do to students, under one budget."""
        recipe, train, found = context.recipe, inputs.splits.train, []
        order = np.random.default_rng([recipe["seed"], 0xDED]).permutation(len(train))
        how: Any = {"eval_split": "validation", "data": {"samples": 0}}
        how["trainer"] = {**recipe["trainer"], "max_steps": self.smoke_steps}
        for role in roles:
            chosen = sorted(order[: self.smoke_questions].tolist())
            traces, accuracy = self._sampled(context, inputs, role, chosen, self.smoke_samples, funnel)
            runs = []
            for i in range(self.smoke_runs if traces else 0):
                seed, place = (recipe["seed"] + 1_000_003 * (i + 1)) % 2**32, f"smoke/{role}"
                values = self._training(context, inputs, base, f"{place}/corpus", traces, seed=seed, **how)
                runs.append(context.train(f"{place}/{i}", values))
            trained = student_of(runs[0], base) if runs else base
            said = [{**train[t.question], "completion": completion(t.rationale, t.answer)} for t in traces]
            most, probes = int(recipe["data"]["max_length"]), inputs.splits.validation
            trial = TeacherTrial(
                role=role,
                accuracies=[run.metrics["accuracy"] for run in runs] or [0.0] * self.smoke_runs,
                accuracy=accuracy,
                traces=len(traces),
                answered=len({t.question for t in traces}) / len(chosen),
                tokens=fmean(t.tokens for t in traces) if traces else None,
                entropy=readings(base if known else trained, said, most).entropy if traces else None,
                shift=hidden_shift(base, trained, probes, most) if known and runs else None,
            )
            found.append(trial)
        return found

    def _best(self, trials: Sequence[TeacherTrial]) -> int:
        """The place of the chosen teacher; of equals the first."""
        by = {"student": lambda i: fmean(trials[i].accuracies), "benchmark": lambda i: trials[i].accuracy}
        return max(range(len(trials)), key=by[self.choose_by]) if trials else 0

    def _sampled(
        self, context: PipelineContext, inputs: Questions, role: str, chosen: Sequence[int], draws: int, funnel: Funnel
    ) -> tuple[list[Trace], float]:
        """A teacher's traces for the chosen questions that are kept, and the share of all that is right."""
        prompt, asked = Prompt.load(self.teacher_prompt), []
        how: Any = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        for q in chosen:
            text = prompt.render(question=inputs.splits.train[q]["question"])
            content: Any = ({"role": "user", "content": text},) if self.chat else text
            asked += [(q, Request(content, f"traces/{q}/{draw}", draw, **how)) for draw in range(draws)]
        said = context.ask(role, [request for _, request in asked])
        right = [solved(a, inputs.golds[q], inputs.checker) for (q, _), a in zip(asked, said, strict=True)]
        traces = sift_traces(asked, said, inputs.golds, inputs.checker, self.max_tokens, funnel, role)
        return traces, sum(right) / len(right)

    # -- 2: which questions, and which of their traces ---------------------------------------------------------------

    def _rates(self, context: PipelineContext, inputs: Questions, base: Spec, known: bool) -> list[PassRate]:
        """The student's pass rates before it learns; a new student passes nothing."""
        train = inputs.splits.train
        if not known:
            return [PassRate(question=q, rate=0.0) for q in range(len(train))]
        solver = Solver.load(base, inputs.data)
        right = solver.right(context, train, inputs.checker, "attempts", self.attempts, self.attempt_temperature)
        return [PassRate(question=q, rate=rate) for q, rate in enumerate(pass_rates(right).tolist())]

    def _kept(self, seed: int, rates: Sequence[PassRate], funnel: Funnel) -> list[PassRate]:
        """The questions that are hard enough, or as many others."""
        problem = lambda r: None if hard_enough(r.rate, self.threshold) else "too easy"  # noqa: E731
        hard = funnel.sieve("hard questions", rates, problem)
        if not hard:
            raise InputError(
                f"The student already solves the set: it passes each of {len(rates)} questions at a rate above "
                f"options.threshold={self.threshold}. Give harder questions, or raise it."
            )
        if self.questions == "random":
            order = np.random.default_rng([seed, 0xDED, 1]).permutation(len(rates))[: len(hard)]
            hard = [rates[i] for i in sorted(order.tolist())]
        return [r.model_copy(update={"id": "", "parents": (r.id,)}) for r in hard]

    def _diverse(
        self, context: PipelineContext, base: Spec, known: bool, traces: Sequence[Trace], funnel: Funnel
    ) -> tuple[list[Trace], dict[str, float]]:
        """Traces far from each other in the student's tokens; of a new student, in characters."""
        encode: Any = load_tokenizer(base.get("tokenizer", base["model"])).encode if known else list
        seed = context.recipe["seed"]
        kept, distances = diverse_traces(traces, self.traces, self.diversity, seed, encode, funnel)
        return [t.model_copy(update={"id": "", "parents": (t.id,)}) for t in kept], distances

    # -- 3: the student --------------------------------------------------------------------------------------------

    def _training(
        self, context: PipelineContext, inputs: Questions, base: Spec, place: str, traces: Sequence[Trace], **keys: Any
    ) -> dict[str, Any]:
        """A student's own run on traces, evaluated on the data's questions."""
        if not traces:
            raise InputError(
                "No trace is left: mend options.teacher_prompt, raise options.max_tokens, or name another teacher."
            )
        solutions = [{**inputs.splits.train[t.question], "rationale": t.rationale, "answer": t.answer} for t in traces]
        write_corpus(context.folder / place, solutions, inputs.splits)
        return corpus_run(context.recipe, base, context.folder / place, inputs.checker, **keys)
