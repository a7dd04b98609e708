"""Preference trees for TPO (paper 24), built from a model's own searches, and a policy that learns from them.

search     a tree of steps for each question, by the policy or a teacher; the reference solution is one of its branches
scores     every answer of a tree: ±100 by the check of its final answer, or a grade from −100 to 100 by a model
trees      those with two scores, as records of `understudy.data.trees`
update     TPO on these trees, and the search goes on with the updated policy
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field

from understudy.curation import Checker, Funnel
from understudy.curation.preference_trees import (
    HIGHEST,
    LOWEST,
    PreferenceTree,
    ScoredAnswer,
    finished_answers,
    graded,
    preference_trees,
)
from understudy.curation.step_pairs import TreeNode
from understudy.errors import InputError
from understudy.evaluation.searches import Searched, policy_report, tree_report
from understudy.generation import Prompt, Request
from understudy.tasks import get as get_task
from understudy.training import PipelineContext, Role
from understudy.training.rounds import PreferenceRounds
from understudy.training.step_rounds import Questions, StepRounds


class TPOTrees(StepRounds):
    """Build trees of scored answers in several steps from searches of a model, and learn from them by TPO."""

    name = "tpo-trees"
    kinds = frozenset({"text"})
    roles: ClassVar[Mapping[str, Role]] = {
        "evaluator": Role(
            "grades answers, and says whether the steps so far are right where it is asked", required=False
        )
    }
    cost = "simulations · (steps + 3) walks a question, each new state `width` proposals, at most `calls`; a grade an answer; then TPO"
    example: ClassVar[dict[str, Any]] = {"task": "reasoning"}
    page: ClassVar[dict[str, str]] = {
        "when": "Trees for `tpo` are wanted and nobody has written them. They are in `round-N/corpus`, read by task=preferences, "
        "and each names its nodes and requests. With `learn=false` they are all that is made.",
        "not": "Where no answer is right, or all are: a tree of one score is dropped, unless a model grades it.",
        "deviations": "The paper cuts the reference solution at a random step and has a model go on, with a known wrong answer beside; "
        "here a tree search branches at every step of the solution and of what the model writes. The check of answers scores 100 "
        "or −100 and not at most 95; grades are a model's, at temperature 0.8. Grades that cannot be read are dropped and counted.",
    }

    rounds: int = Field(1, ge=1, description="Of search and training.")
    simulations: int = Field(8, ge=1, description="Of each step; 4 times as many of the first.")
    c: float = Field(
        100.0, ge=0, description="Weight of exploration; large, searches spread over steps by their probability alone."
    )
    self_evaluation: bool = Field(
        False, description="Steps are judged while searching, by the policy or roles.evaluator; else outcomes alone."
    )
    solution: bool = Field(
        True, description="The reference solution's steps are among those proposed behind its beginning."
    )
    scores: Literal["answer", "evaluator"] = Field(
        "answer", description="The check of final answers, 100 or −100, or grades of roles.evaluator."
    )
    grade_prompt: str = Field(
        "grade_answer",
        description="File with `question`, `steps`, `solution`; the answer is a number from −100 to 100.",
    )
    grade_temperature: float = Field(0.8, ge=0, description="Of grades.")
    answers: int = Field(5, ge=2, description="N, most answers of a tree: best, worst and those evenly between.")
    learn: bool = Field(True, description="Learn from the trees; off, build them alone.")
    beta: float = Field(0.5, gt=0, description="β of tpo.")
    step_weights: Literal["adaptive", "one_minus_cos", "uniform"] = Field("adaptive", description="Of tpo.")

    def run(self, context: PipelineContext) -> dict[str, Any]:
        task: Any = get_task(context.recipe["task"])
        rounds = self.check(context)
        splits = task.read(context.recipe["data"])
        checker, _ = task.checkers(context.recipe["data"], splits)
        self.check_searcher(context, splits.train)
        searched: list[Searched] = []
        start = rounds.start() if self.learn or self.searcher != "teacher" else ""
        collect = partial(self._records, searched, splits.train, checker, start)
        if self.learn:
            policies = rounds.run(start, collect)
            return policy_report(context, splits, checker, policies, searched, self.policy, "answers")
        rounds.write(0, collect(context.round(0), 0, start))
        return {**tree_report(searched), "split": "train", "notes": splits.notes}

    def check(self, context: PipelineContext) -> PreferenceRounds:
        """The rounds, if the recipe can be carried out at all."""
        options = {"beta": self.beta, "step_weights": self.step_weights, "score_range": [LOWEST, HIGHEST]}
        rounds = PreferenceRounds(context, self.rounds, options, self.anchor, "tpo")
        self.check_search(context)
        wanted = self.self_evaluation or self.scores == "evaluator"
        if context.members("evaluator") and not wanted:
            raise InputError("roles.evaluator is asked nothing: set options.scores=evaluator, or leave it out.")
        if self.scores == "evaluator" and not context.members("evaluator"):
            raise InputError("options.scores=evaluator needs a model that grades answers: set roles.evaluator.")
        if not self.learn and self.rounds > 1:
            raise InputError(
                f"options.learn=false changes no policy between {self.rounds} rounds: set options.rounds=1."
            )
        Prompt.load(self.grade_prompt).render(question="", steps="", solution="")
        rounds.check()
        return rounds

    def _records(
        self,
        searched: list[Searched],
        train: Sequence[Mapping[str, Any]],
        checker: Checker,
        start: str,
        context: PipelineContext,
        number: int,
        policy: str,
    ) -> list[dict[str, Any]]:
        """A round's preference records."""
        asked = self.asked(train, checker, number)
        searching = policy if self.searcher == "policy" else start
        search = partial(self.trees, context, asked, checker, searching, number, solution=self.solution)
        nodes = context.stage("trees", TreeNode, search)
        answers = context.stage("answers", ScoredAnswer, partial(self._scored, context, asked, nodes))
        prompts = {int(i): q.prompt for i, q in asked.items()}
        build = partial(preference_trees, nodes, answers, prompts, self.answers)
        trees = context.stage("preference_trees", PreferenceTree, build)
        searched.append(Searched(nodes, sum(len(t.ended) for t in trees)))
        return [tree.record() for tree in trees]

    def _scored(
        self, context: PipelineContext, asked: Questions, nodes: Sequence[TreeNode], funnel: Funnel
    ) -> list[ScoredAnswer]:
        """The answers of all trees with their scores, or what is wrong with them."""
        answers = finished_answers(nodes, funnel)
        if self.scores == "answer":
            right = {n.id: (n.outcome or 0.0) > 0 for n in nodes}
            scores = [HIGHEST if right[a.parents[-1]] else LOWEST for a in answers]
            return [a.model_copy(update={"score": s}) for a, s in zip(answers, scores, strict=True)]
        prompt, requests = Prompt.load(self.grade_prompt), []
        for answer in answers:
            question = asked[str(answer.tree)]
            solution = question.solution if self.hint else ""
            text = prompt.render(question=question.text, steps=answer.text.rstrip("\n"), solution=solution)
            content: Any = ({"role": "user", "content": text},) if self.chat else text
            name = f"{answer.parents[-1]}/grade"
            requests.append(Request(content, name, max_tokens=8, temperature=self.grade_temperature))
        said = context.ask("evaluator", requests)
        return [graded(a, s.text, r.id) for a, s, r in zip(answers, said, requests, strict=True)]
