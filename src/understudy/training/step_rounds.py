"""Procedures that search trees of reasoning steps with a policy, learn from them and search again: what they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, ClassVar, Literal

from pydantic import Field

from understudy.curation import Checker, Funnel
from understudy.curation.step_pairs import TreeNode, tree_nodes
from understudy.errors import InputError
from understudy.generation import LocalSource, Prompt, Request, Source
from understudy.generation.tree_search import SearchOptions, TreeJournal, search_trees
from understudy.training.method import Requirements, Role
from understudy.training.pipeline import Pipeline, PipelineContext
from understudy.training.step_search import Question, StepProposer

ENDS = {"line": "\n", "sentence": ". "}
Questions = Mapping[str, Question]


class StepRounds(Pipeline):
    """Base of procedures that search trees of steps."""

    roles: ClassVar[Mapping[str, Role]] = {
        "evaluator": Role("says whether the steps so far are right, in the place of the policy", required=False)
    }

    rounds: int = Field(4, ge=1, description="Of search and training.")
    questions: int | None = Field(
        None,
        ge=1,
        description="Training questions of a round, in order and from the first again; an equal share if not given.",
    )
    searcher: Literal["policy", "start", "teacher"] = Field(
        "policy", description="Who searches: the student as it is, as it was at the start (offline), or the teacher."
    )
    simulations: int = Field(64, ge=1, description="Of each step; 4 times as many of the first.")
    width: int = Field(2, ge=1, description="Proposed steps from a state.")
    first_width: int = Field(2, ge=1, description="Proposed first steps.")
    depth: int = Field(3, ge=1, description="Most steps of an answer.")
    calls: int | None = Field(None, ge=1, description="Most model calls for the search of one question.")
    c: float = Field(1.0, ge=0, description="Weight of exploration.")
    length_penalty: float = Field(1.25, ge=0, description="λ of the prior.")
    step_tokens: int = Field(128, ge=1, description="Most tokens of a step.")
    step_end: Literal["line", "sentence"] = Field("line", description="What ends a step before its most tokens.")
    temperature: float = Field(1.0, gt=0, description="Of proposed steps.")
    self_evaluation: bool = Field(
        True, description="Steps are judged, by the policy or roles.evaluator; else outcomes alone."
    )
    hint: bool = Field(True, description="The evaluator sees the reference solution.")
    judge_prompt: str = Field(
        "judge_steps", description="File with `question`, `steps`, `solution`; the answer is A or B."
    )
    chat: bool = Field(False, description="Ask the evaluator in a chat; off, its prompt is text to be continued.")
    anchor: Literal["start", "round"] = Field(
        "start", description="Reference: the student at its start, or of each round."
    )

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="outputs" if self.searcher == "teacher" else "none")

    def check_search(self, context: PipelineContext) -> None:
        """Refuse a task without answers and searches that cannot be carried out.

        Raises:
            InputError: nothing to compare, or a budget that does not cover the first proposals.
        """
        self.need_answers(context)
        if max(self.width, self.first_width) == 1:
            raise InputError("options.width=1 and options.first_width=1 leave nothing to compare: raise one.")
        self._search_options(1 + self.self_evaluation)
        Prompt.load(self.judge_prompt).render(question="", steps="", solution="")

    def check_searcher(self, context: PipelineContext, train: Sequence[Mapping[str, Any]]) -> None:
        """Ask a teacher that is to search for a log-probability, before all else."""
        if self.searcher == "teacher":
            first = Request(train[0]["prompt"], "check", max_tokens=1, log_probs=True)
            why = "A search weighs steps by their log-probability"
            context.check_log_probs("teacher", first, why, "search with the student (options.searcher=policy)")

    def asked(self, train: Sequence[Mapping[str, Any]], checker: Checker, number: int) -> dict[str, Question]:
        """The questions of a round, by the id of their tree: their place in the training data."""
        size = self.questions or max(1, len(train) // self.rounds)
        places = [(number * size + i) % len(train) for i in range(min(size, len(train)))]
        return {str(i): _question(train[i], checker) for i in places}

    def trees(
        self,
        context: PipelineContext,
        asked: Questions,
        checker: Checker,
        policy: str,
        number: int,
        funnel: Funnel,
        **how: Any,
    ) -> list[TreeNode]:
        """The searched trees of a round.

        Args:
            policy: who searches, unless the teacher does. number: of the round. how: of `StepProposer`, beside the options.
        """
        prompt = Prompt.load(self.judge_prompt)
        how |= {
            "draw": number,
            "max_tokens": self.step_tokens,
            "temperature": self.temperature,
            "stop": ENDS[self.step_end],
        }
        how |= {"hint": self.hint, "chat": self.chat, "place": f"{context.prefix}steps/"}
        with self._models(context, policy) as (name, ask, judge):
            proposer = StepProposer(asked, ask, judge, prompt, checker, **how)
            options = self._search_options(proposer.calls_per_step)
            settings = {"searcher": name, "judge_prompt": prompt.hash, **how, **asdict(options)}
            with TreeJournal(context.folder / "logs" / context.prefix / "nodes.jsonl", settings) as journal:
                found = search_trees(list(asked), proposer, options, journal)
        ends = [tree.path[-1].step.outcome if len(tree.path) > 1 else None for tree in found]
        funnel.note("searches that end in an answer", len(found), sum(end is not None for end in ends))
        funnel.note("answers that are right", len(found), sum((end or 0) > 0 for end in ends))
        return [node for tree in found for node in tree_nodes(tree, context.prefix)]

    def policy(self, context: PipelineContext, model: str) -> Source:
        """A policy that writes; what it writes depends on its weights, and not on where they lie."""
        spec = context.models["student"]
        words = spec.tokenizer if model == spec.model else None
        how: Any = {"dtype": spec.dtype, "device": spec.device, "trust_remote_code": spec.trust_remote_code}
        loaded = LocalSource.load(model, tokenizer=words, **how)
        return LocalSource(loaded.model, loaded.tokenizer, "policy", batch=64)

    def _search_options(self, calls_per_step: int) -> SearchOptions:
        how = {
            k: getattr(self, k)
            for k in ("simulations", "width", "first_width", "depth", "c", "length_penalty", "calls")
        }
        return SearchOptions(**how, calls_per_step=calls_per_step)

    @contextmanager
    def _models(self, context: PipelineContext, policy: str) -> Iterator[tuple[str, Any, Any]]:
        """The name of who searches, and the functions that ask it and the evaluator of steps."""
        if self.searcher == "teacher":
            source, asking = context.source("teacher"), context.asking("teacher")
        else:
            source = self.policy(context, policy)
            asking = context.asking_trained(source, "search")
        with asking as ask:
            if not self.self_evaluation:
                yield source.name, ask, None
            elif context.members("evaluator"):
                with context.asking("evaluator") as judge:
                    yield source.name, ask, judge
            else:
                yield source.name, ask, ask


def _question(record: Mapping[str, Any], checker: Checker) -> Question:
    return Question(record["prompt"], record["question"], checker.gold(record["answer"]), record["completion"])
