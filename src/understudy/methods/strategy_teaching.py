"""34. Using Advanced LLMs to Enhance Smaller LLMs: An Interpretable Knowledge Distillation Approach (2024).

scenarios  s: conversations up to each turn of the student, who answers with the library as it is
advice     a_t ~ teacher(s, student(s, a_{t−1}), teacher(s), a_{t−1}),   t = 1 … T
           until judge(student(s, a_t)) ≥ judge(teacher(s)) − tolerance; the best-scoring a_t is kept
library    {s → a}: without near-duplicates, cos(e(s), e(s')) < τ, read and edited by people; again with new scenarios
inference  student(s, the k nearest a with cosine ≥ min_score); no weights change
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field

from understudy.curation import Funnel
from understudy.curation.refining import NOTHING, Attempt, Scenario
from understudy.curation.strategies import (
    Strategy,
    StrategyLibrary,
    merged,
    read_library,
    refusal,
    transcript,
)
from understudy.data.text import write_records
from understudy.errors import InputError
from understudy.evaluation.conversations import Judged, conversation_report
from understudy.generation import Prompt
from understudy.models.text_vectors import WORDS, text_vectors
from understudy.tasks import get as get_task
from understudy.training import Pipeline, PipelineContext, Role
from understudy.training.dialogue import Dialogue, asked
from understudy.training.pipeline import ORACLE


class StrategyTeaching(Pipeline):
    """A teacher writes strategies for the situations in which a student falls short; the student retrieves them."""

    name = "strategy-teaching"
    paper = 34
    kinds = frozenset({"conversation"})
    roles: ClassVar[Mapping[str, Role]] = {
        "judge": Role("rates an answer from 1 to 10"),
        "customer": Role("answers the student in a simulated conversation", required=False),
        "transfer": Role("is another student that uses the same library", required=False, many=True),
    }
    cost = (
        "a student's answer a scenario and turn; for each scenario two judgements and a teacher's answer, and for each refinement "
        "one text of teacher, student and judge; two answers and judgements an evaluated conversation"
    )
    page: ClassVar[dict[str, str]] = {
        "when": "Weights may not or cannot change, and people must be able to read, edit and ban what the small model is told. "
        "Only text is needed of all models. `understudy.curation.strategies.StrategyLibrary` serves a finished library.",
        "not": "Where the student follows no advice, or a wrong one harms: advice for the wrong situation lowers satisfaction. "
        "A teacher that judges prefers its own advice: name another judge.",
        "deviations": "The paper's code is not released: prompts, stop rule and thresholds are reconstructed. A scenario is the "
        "conversation itself and not a summary of it, entries are not clustered, and a strategy is refined by itself, without "
        "others beside it. A judgement that is no number is asked for again, then dropped.",
    }

    rounds: int = Field(
        2, ge=0, description="Of scenarios and strategies; the student answers with the library so far."
    )
    scenarios: int | None = Field(
        None, ge=1, description="Training conversations of a round; an equal share if not given."
    )
    turns: int = Field(1, ge=1, description="Of the student in each; above 1 the customer is simulated.")
    refinements: int = Field(5, ge=0, description="T. Most versions of a strategy.")
    tolerance: float = Field(0.0, ge=0, description="How far below the teacher's score the student's may end.")
    library: str | None = Field(None, description="Library to begin with, as written by a run and edited.")
    audit: bool = Field(
        False, description="Stop after each round until people have approved or banned all new entries."
    )
    deny: tuple[str, ...] = Field((), description="Words that no strategy may contain.")
    longest: int = Field(60, ge=1, description="Most words of a strategy.")
    near_duplicate: float = Field(0.95, description="τ. A scenario at least so similar to an earlier one is left out.")
    coverage: float = Field(0.7, description="End once every new scenario is at least so similar to an entry.")
    k: int = Field(3, ge=0, description="Most strategies in a prompt.")
    min_score: float = Field(0.25, ge=-1, le=1, description="Least cosine similarity of a retrieved strategy.")
    most_words: int = Field(200, ge=1, description="Of all strategies in a prompt.")
    retrieval: Literal["similar", "random", "global"] = Field(
        "similar", description="Controls: `random` strategies, or `global`, the same for all turns."
    )
    encoder: str = Field(WORDS, description="Of scenarios: `words` counts them; else a text encoder.")
    use_prompt: str = Field("strategy_use", description="File with the slot `strategies`, for the student.")
    write_prompt: str = Field("strategy_write", description="With `conversation`, `student`, `teacher` and `strategy`.")
    judge_prompt: str = Field("strategy_judge", description="With `conversation` and `answer`.")
    customer_prompt: str = Field("strategy_customer", description="With `conversation` and `persona`.")
    judge_tries: int = Field(3, ge=1, description="Judgements until one is a number; then the turn is dropped.")
    temperature: float = Field(0.0, ge=0, description="Of student and teacher.")
    max_tokens: int = Field(256, ge=1, description="Of every text.")

    def run(self, context: PipelineContext) -> dict[str, Any]:
        task: Any = get_task(context.recipe["task"])
        splits = task.read(context.recipe["data"])
        self.check(context)
        parts = self._parts(splits.train)
        encode = text_vectors(self.encoder)
        entries = context.stage("given", Strategy, lambda _: read_library(self.library) if self.library else [])
        for number, records in enumerate(parts):
            turn, library = context.round(number), self._retrieval(entries, encode, context)
            scenarios = turn.stage("scenarios", Scenario, partial(self._met, turn, records, library))
            if bool((library.similarity([s.text for s in scenarios]) >= self.coverage).all()):
                break
            new = turn.stage("strategies", Strategy, partial(self._written, turn, scenarios, library))
            entries = turn.stage("library", Strategy, partial(self._audited, turn, entries, new, encode))
        write_records(context.folder / "library.jsonl", [e.model_dump(mode="json") for e in entries])
        library, records = self._retrieval(entries, encode, context), getattr(splits, context.recipe["eval_split"])
        judged = {
            role: context.stage(f"judged/{role}", Judged, partial(self._judged, context, role, records, library))
            for role in ("student", *context.members("transfer"))
        }
        return conversation_report(judged, entries, context.spent(), [*splits.notes, *self._notes(context)])

    # -- 1: what the student meets, and says with the library as it is ------------------------------------------------

    def _parts(self, records: Sequence[Mapping[str, Any]]) -> list[Sequence[Mapping[str, Any]]]:
        """The conversations of each round, none twice."""
        size = self.scenarios or max(1, len(records) // max(1, self.rounds))
        if self.rounds * size > len(records):
            raise InputError(
                f"{self.rounds} rounds of {size} conversations need {self.rounds * size} and the data train on "
                f"{len(records)}: lower options.rounds or options.scenarios."
            )
        return [records[n * size : (n + 1) * size] for n in range(self.rounds)]

    def _met(
        self, context: PipelineContext, records: Sequence[Mapping[str, Any]], library: StrategyLibrary, _: Funnel
    ) -> list[Scenario]:
        personas = [r.get("persona", "") for r in records]
        starts = [r["conversation"] for r in records]
        met = self._dialogue(context).simulate(starts, personas, library.prompts, self.turns)
        types = [r.get("type") for r in records] * self.turns
        return [Scenario(conversation=tuple(c), answer=a, type=t) for (c, a), t in zip(met, types, strict=True)]

    # -- 2: the teacher's strategies, refined until the student is as good as the teacher -----------------------------

    def _written(
        self, context: PipelineContext, scenarios: Sequence[Scenario], library: StrategyLibrary, funnel: Funnel
    ) -> list[Strategy]:
        talk, met = self._dialogue(context), [s.conversation for s in scenarios]
        answers = talk.say("teacher", met, "answer")
        goals = talk.rate(met, answers, "goal")
        starts = talk.rate(met, [s.answer for s in scenarios], "refined-0")
        attempts = [
            Attempt(s, answer, goal, s.answer, [start])
            for s, answer, goal, start in zip(scenarios, answers, goals, starts, strict=True)
            if goal is not None and start is not None
        ]
        funnel.note("scenarios with readable judgements", len(scenarios), len(attempts))
        for t in range(1, self.refinements + 1):
            below = [a for a in attempts if not a.ended and a.state(self.tolerance).converged_at < 0]
            self._refine(talk, below, library, t)
        gains = lambda a: None if a.state(self.tolerance).best else "no gain"  # noqa: E731
        better = funnel.sieve("strategies that help", attempts, gains)
        entries = [(a.entry(self.tolerance, self.audit), a.answer) for a in better]
        allowed = lambda pair: refusal(pair[0].strategy, pair[1], self.deny, self.longest)  # noqa: E731
        return [entry for entry, _ in funnel.sieve("strategies that may be stored", entries, allowed)]

    def _refine(self, talk: Dialogue, attempts: Sequence[Attempt], library: StrategyLibrary, t: int) -> None:
        """One more version of each strategy: the teacher compares the answers, the student answers with it, the judge rates."""
        write = Prompt.load(self.write_prompt)
        advice = talk.say("teacher", [asked(write.render(a.slots)) for a in attempts], f"refined-{t}", t)
        for attempt, text in zip(attempts, advice, strict=True):
            attempt.ended = text.strip(" .\n") in ("", NOTHING)
            attempt.advice.append(text.strip())
        given = [a for a in attempts if not a.ended]
        met = [a.scenario.conversation for a in given]
        advised = [library.advised(a.scenario.conversation, a.advice[-1:]) for a in given]
        answers = talk.say("student", advised, f"refined-{t}", t)
        for attempt, answer, score in zip(given, answers, talk.rate(met, answers, f"refined-{t}"), strict=True):
            attempt.said, attempt.ended = answer, score is None
            attempt.scores += [] if score is None else [score]

    # -- 3: the library as people left it -----------------------------------------------------------------------------

    def _audited(
        self, context: PipelineContext, old: Sequence[Strategy], new: Sequence[Strategy], encode: Any, funnel: Funnel
    ) -> list[Strategy]:
        file = context.folder / context.prefix / "library.jsonl"
        entries = merged(old, new, encode, self.near_duplicate, funnel)
        if not file.is_file():
            write_records(file, [e.model_dump(mode="json") for e in entries])
        entries = read_library(file)
        waiting = sum(e.status == "pending" for e in entries)
        if self.audit and waiting:
            raise InputError(
                f"{waiting} of {len(entries)} strategies in {file} are pending (options.audit): set the status of each to "
                "approved or banned, edit what you like, and start the same command again."
            )
        return entries

    # -- 4: the same conversations with and without it -----------------------------------------------------------------

    def _judged(
        self,
        context: PipelineContext,
        role: str,
        records: Sequence[Mapping[str, Any]],
        library: StrategyLibrary,
        funnel: Funnel,
    ) -> list[Judged]:
        talk, met = self._dialogue(context), [r["conversation"] for r in records]
        plain = talk.say(role, met, "judged-plain")
        advised = talk.say(role, library.prompts(met), "judged-advised")
        scores = [talk.rate(met, said, f"judged-{role}-{n}") for n, said in (("plain", plain), ("advised", advised))]
        found = library.retrieve([transcript(c) for c in met])
        items = [Judged.of(*row) for row in zip(records, found, plain, advised, *scores, strict=True)]
        return funnel.sieve(f"{role}: readable judgements", items, Judged.problem)

    def _retrieval(self, entries: Sequence[Strategy], encode: Any, context: PipelineContext) -> StrategyLibrary:
        how: Any = {key: getattr(self, key) for key in ("k", "min_score", "most_words")}
        how |= {"audited": self.audit, "choose": self.retrieval, "seed": context.recipe["seed"]}
        return StrategyLibrary(entries, encode, Prompt.load(self.use_prompt), **how)

    def _dialogue(self, context: PipelineContext) -> Dialogue:
        prompts = Prompt.load(self.judge_prompt), Prompt.load(self.customer_prompt)
        return Dialogue(context, *prompts, self.max_tokens, self.temperature, self.judge_tries)

    def check(self, context: PipelineContext) -> None:
        """What can be known to fail before anything is asked."""
        if self.turns > 1 and not context.members("customer"):
            raise InputError(
                f"options.turns={self.turns} needs a model that speaks for the customer: set roles.customer."
            )
        for prompt, slots in (
            (self.use_prompt, ("strategies",)),
            (self.write_prompt, ("conversation", "student", "teacher", "strategy")),
            (self.judge_prompt, ("conversation", "answer")),
            (self.customer_prompt, ("conversation", "persona")),
        ):
            Prompt.load(prompt).render(dict.fromkeys(slots, ""))

    def _notes(self, context: PipelineContext) -> list[str]:
        judge, teacher = (context.models[role] for role in ("judge", "teacher"))
        same = judge.model != ORACLE and (judge.model, judge.endpoint) == (teacher.model, teacher.endpoint)
        return ["The judge is the teacher, which prefers its own advice: name another roles.judge."] if same else []
