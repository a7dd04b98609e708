"""5. ARTE: Aligning Teacher with Student Preferences for Tailored Training Data Generation (2024, arXiv 2406.19227).

probes      D_pref: the k validation questions with the largest α in  P(i answers j) = σ(α_j (θ_i − β_j))
drafts      questions q ~ teacher(seeds), rationales r ~ teacher(q, style),  n styles a question
preference  s_r = mean over D_pref of 1[student(q, r; q') = a'],  s_q = mean over r of s_r;  or, with `scorer=sft_step`,
            s_r = mean over D_pref of log p(a' | q'; θ − η ∇ CE(r | q)) − log p(a' | q'; θ), a token
alignment   DPO of the teacher, −log σ(β [log π/π₀ (better) − log π/π₀ (worse)]), on the best against the worst quarter of the
            questions, and on the best against the worst rationale of each, asked by the plain prompt ("prompt erasure")
student     cross-entropy on what the aligned teacher writes by the same prompts
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field

from understudy.curation import Funnel
from understudy.curation.drafts import (
    Draft,
    DraftRationale,
    Preference,
    Probe,
    one_of_each,
    preference_records,
    question_preferences,
    rationale_preferences,
    scores_of,
)
from understudy.data.text import write_records
from understudy.errors import InputError
from understudy.evaluation.tailoring import discriminating, few_shot_accuracy, stepped, tailoring_report, tried
from understudy.generation import Prompt
from understudy.models import is_new_causal_lm
from understudy.tasks.reasoning import Questions, Reasoning
from understudy.training import Pipeline, PipelineContext, Role
from understudy.training.arguments import TrainerOptions
from understudy.training.drafting import BARE, Drafting
from understudy.training.pipeline import ORACLE
from understudy.training.solvers import Solver, corpus_run, first_trained, other_data, student_of, write_corpus

Spec = Mapping[str, Any]
_COST = "Cost is that of the student's last training; drafts, probes and the teacher's alignment come before it."


class ARTE(Pipeline):
    """A teacher that is aligned with what helps the student as an example writes the student's training data."""

    name = "arte"
    paper = 5
    kinds = frozenset({"text"})
    teacher_writes = False  # it is trained here, so it is a model of its own and no oracle
    roles: ClassVar[Mapping[str, Role]] = {
        "examinee": Role("answers the validation questions, to tell which discriminate", required=False, many=True)
    }
    cost = (
        "drafts × rationales texts of the teacher, and a student's answer (`sft_step`: likelihood) for each of them and each "
        "probe; DPO of the teacher; as many texts again; the student's training"
    )
    used_with: ClassVar[dict[str, Any]] = {
        "draft_choice": {"align": ("none",)},
        "step_rate": {"scorer": ("sft_step",)},
        "quartile": {"align": ("both", "questions")},
    }
    example: ClassVar[dict[str, Any]] = {"task": "reasoning", "student": {"train": {"max_steps": 800}}, "options": BARE}
    page: ClassVar[dict[str, str]] = {
        "when": "The teacher can be trained, some hundred labelled questions are at hand, and the student is small: what helps "
        "it is not what a larger model finds good.",
        "not": "Where the student cannot use an example in its prompt, all scores are equal: take `scorer=sft_step`, for which "
        "the style of the probes' own solutions counts. With 40 probes a share of right answers has a standard error of 0.08: "
        "use many drafts. An aligned teacher may write few different questions.",
        "deviations": "There is no released code; the method is reconstructed. Abilities and difficulties have Gaussian priors. "
        "The student itself is an examinee. Drafts that are also validation or test questions are left out, so no probe is seen as "
        "an example. A question's pair is of single questions, though the prompt may ask for several.",
    }

    drafts: int = Field(250, ge=4, description="m, draft questions.")
    rationales: int = Field(4, ge=2, description="n, for each of them; the style prompts in turn.")
    probes: int = Field(40, ge=1, description="k, validation questions that examples are tried on.")
    validation_questions: int = Field(100, ge=1, description="Those of which the k most discriminating are chosen.")
    shots: tuple[int, ...] = Field((0, 1, 2, 3), description="Examples in the prompts of an examinee's runs.")
    scorer: Literal["in_context", "sft_step"] = Field("in_context", description="s_r: as example, or by a step on it.")
    step_rate: float = Field(0.1, gt=0, description="η, the learning rate of that step of SGD.")
    align: Literal["both", "rationales", "questions", "none"] = Field(
        "both", description="What the teacher is aligned by; `none` trains on a drafted rationale each."
    )
    draft_choice: Literal["best", "first"] = Field("best", description="Without alignment: best-scored or first one.")
    quartile: float = Field(0.25, gt=0, le=0.5, description="Share of best, and of worst, questions.")
    question_pairs: int = Field(50, ge=1, description="Pairs of questions.")
    beta: float = Field(0.1, gt=0, description="β of DPO.")
    alignment: TrainerOptions = Field(
        {
            "learning_rate": 1e-7,
            "num_train_epochs": 1,
            "max_steps": -1,
            "per_device_train_batch_size": 16,
            "warmup_steps": 0.1,
            "lr_scheduler_type": "cosine",
        },
        description="Arguments of Trainer for DPO; raise the rate for a small teacher.",
    )
    examples: int | None = Field(None, ge=1, description="Tailored questions; as many as drafts if not given.")
    per_prompt: int = Field(5, ge=1, description="Questions that a prompt asks for.")
    seeds: int = Field(3, ge=1, description="Training questions in that prompt.")
    tries: int = Field(5, ge=1, description="Times the prompts that would do if all they bring were new, at most.")
    temperature: float = Field(1.0, gt=0, description="Of questions, and of drafted rationales.")
    max_tokens: int = Field(512, ge=1, description="Of a text of the teacher.")
    question_prompt: str = Field("write_questions", description="File with slots `questions` and maybe `number`.")
    style_prompts: tuple[str, ...] = Field(
        ("solve_steps", "solve_parts", "solve_facts", "solve_briefly"), description="Files with the slot `question`."
    )
    plain_prompt: str = Field("solve_steps", description="File with the slot `question`, for the alignment.")
    chat: bool = Field(True, description="Ask the teacher in a chat; off, prompts are texts to be continued.")
    teacher_data: dict[str, Any] = Field({}, description="Keys of `data` that differ for `teacher.train`.")
    student_data: dict[str, Any] = Field({}, description="Keys of `data` that differ for `student.train`.")
    eval_shots: int = Field(3, ge=0, description="Examples in the prompts of the student's few-shot accuracy.")

    def run(self, context: PipelineContext) -> dict[str, Any]:
        recipe, draft = context.recipe, self.check(context)
        given = Reasoning().questions(recipe["data"])
        known = [r["question"] for r in (*given.splits.validation, *given.splits.test)]
        student, teacher = first_trained(context, "student", self.student_data), self._started(context, draft)
        records, train = given.splits.validation[: self.validation_questions], given.splits.train
        find = lambda _: discriminating(  # noqa: E731
            context, Solver.load(student, given.data), train, records, self.shots, self.probes, given.checker
        )
        probes = [records[p.question] for p in context.stage("probes", Probe, find)]
        score = partial(self._scored, context, given, student, probes)

        def ask(who: Spec, name: str, number: int) -> list[Draft]:
            return context.stage(name, Draft, partial(draft.new_questions, context, who, train, known, name, number))

        def write(who: Spec, questions: Sequence[Draft], name: str, number: int) -> list[DraftRationale]:
            make = partial(draft.rationales, context, who, questions, number, given.checker, name)
            return context.stage(name, DraftRationale, make)

        drafts = questions = ask(teacher, "drafts", self.drafts)
        scored = score(drafts, write(teacher, drafts, "rationales", self.rationales), "scores")
        tailored = one_of_each(scored, best=self.draft_choice == "best")
        if self.align != "none":
            pairs = context.stage("pairs", Preference, partial(self._pairs, draft, given, drafts, scored))
            aligned = self._aligned(context, draft, teacher, pairs)
            if self.align != "rationales":
                questions = ask(aligned, "questions", self.examples or self.drafts)
            tailored = write(aligned, questions, "tailored", 1)
        some = score(questions, [r for r in tailored if r.draft < self.drafts], "tailored_scores")
        solutions = [{**r.model_dump(), "question": questions[r.draft].question} for r in tailored]
        write_corpus(context.folder / "corpus", solutions, given.splits)
        run = context.train("training", corpus_run(recipe, student, context.folder / "corpus", given.checker))
        found = json.loads((run.folder / "evaluation.json").read_text())
        metrics, table = tailoring_report({"drafts": scored, "tailored": some}, self.scorer)
        evaluated = getattr(given.splits, recipe["eval_split"])
        solver = Solver.load(student_of(run, student), given.data)
        few = (train, evaluated, self.eval_shots, given.checker, "few_shot")
        metrics |= {"few_shot_accuracy": few_shot_accuracy(context, solver, *few), "examples": len(solutions)}
        notes = [*given.splits.notes, *found.get("notes", []), _COST]
        tables = [*found.get("tables", []), table]
        return {**found, "metrics": {**found["metrics"], **metrics}, "tables": tables, "notes": notes}

    def check(self, context: PipelineContext) -> Drafting:
        """How the teacher is asked, if the recipe can be carried out at all."""
        recipe, sides = context.recipe, {side: context.models.get(side) for side in ("teacher", "student")}
        self.need_answers(context)
        if recipe["eval_split"] == "validation":
            raise InputError("The teacher is aligned on validation questions, so leave out eval_split: it is test.")
        for side, spec in sides.items():
            if spec is None or spec.endpoint is not None or spec.model == ORACLE:
                raise InputError(f"Method {self.name!r} trains its {side}: name one model here, without an endpoint.")
            if is_new_causal_lm(spec.model) and spec.train is None:
                raise InputError(
                    f"Method {self.name!r} asks its {side}, and {spec.model!r} is new and knows nothing: name a pretrained one, "
                    f"or train it first ({side}.train)."
                )
            if self.scorer == "sft_step" and side == "student" and spec.quantization is not None:
                raise InputError("scorer=sft_step moves all weights of the student: leave student.quantization out.")
        styles, plain = [Prompt.load(p) for p in self.style_prompts], Prompt.load(self.plain_prompt)
        how: Any = self.model_dump(include={"temperature", "max_tokens", "chat", "tries"})
        ask, seed = Prompt.load(self.question_prompt), recipe["seed"]
        draft = Drafting(ask, self.per_prompt, self.seeds, plain, styles, seed=seed, **how)
        draft.examples([{"question": "", "rationale": "", "answer": ""}] * len([plain, *styles]))  # each has its slots
        return draft

    def _started(self, context: PipelineContext, draft: Drafting) -> Spec:
        """The teacher, which `teacher.train` first trains to write questions and solutions of the data."""
        if "train" not in context.recipe["teacher"]:
            return first_trained(context, "teacher", {})
        data, corpus = context.recipe["data"], context.folder / "first" / "corpus"
        records = draft.examples(Reasoning().read(other_data(data, self.teacher_data)).train)
        write_records(corpus / "train.jsonl", records)
        how = {k: data[k] for k in ("vocab_size", "tokenizer") if k in data}
        how |= {"name": str(corpus), "pack": False, "max_length": int(data["max_length"]) + self.max_tokens}
        return first_trained(context, "teacher", {}, task="language_modeling", data=how)

    def _scored(
        self,
        context: PipelineContext,
        given: Questions,
        student: Spec,
        probes: Sequence[Mapping[str, Any]],
        drafts: Sequence[Draft],
        rationales: Sequence[DraftRationale],
        name: str,
    ) -> list[DraftRationale]:
        """How much each rationale helps the student on the probes."""
        texts, load = [d.question for d in drafts], partial(Solver.load, student, given.data)
        step = partial(stepped, max_length=int(given.data["max_length"]), rate=self.step_rate)
        score = step if self.scorer == "sft_step" else partial(tried, checker=given.checker)
        make = lambda f: score(context, load(), rationales, texts, probes, funnel=f)  # noqa: E731
        return context.stage(name, DraftRationale, make)

    def _pairs(
        self,
        draft: Drafting,
        given: Questions,
        drafts: Sequence[Draft],
        scored: Sequence[DraftRationale],
        funnel: Funnel,
    ) -> list[Preference]:
        """What the teacher is to prefer, each under the prompt that it will be asked by."""
        scores, found = scores_of(scored, len(drafts), self.rationales), []
        if self.align != "rationales":
            prompts = [draft.seeded(given.splits.train, i) for i in range(self.question_pairs)]
            texts = [draft.shown([d.question]) for d in drafts]
            found += question_preferences(drafts, scores, self.quartile, prompts, texts, draft.seed)
        if self.align != "questions":
            prompts = [draft.plain.render(question=d.question) for d in drafts]
            texts = [draft.solution(r.rationale, r.answer) for r in scored]
            found += rationale_preferences(scored, scores, prompts, texts, funnel)
        if not found:
            raise InputError("The preferences carry no signal: all rationales of each question help the student alike.")
        return found

    def _aligned(self, context: PipelineContext, draft: Drafting, teacher: Spec, pairs: Sequence[Preference]) -> Spec:
        """The teacher after DPO on the pairs, with itself before it as the reference."""
        for split, records in preference_records(pairs, self.chat).items():
            write_records(context.folder / "preferences" / f"{split}.jsonl", records)
        most = int(context.recipe["data"]["max_length"]) + self.max_tokens
        values = {
            "task": "preferences",
            "method": "dpo",
            "options": {"beta": self.beta},
            "data": {"name": str(context.folder / "preferences"), "max_length": most},
            "student": dict(teacher),
            "trainer": self.alignment,
            "seed": context.recipe["seed"],
        }
        return student_of(context.train("alignment", values), teacher)
