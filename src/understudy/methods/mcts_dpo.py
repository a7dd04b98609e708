"""26. MCTS-DPO: Monte Carlo Tree Search Boosts Reasoning via Iterative Preference Learning (2024, arXiv 2405.00451).

search     R(s) = C(s) + O(s),  r(s, a) = R(s') − R(s),  p = exp(log π(a | s) / |a|^λ)
           down:  argmax_a Q(s, a) + c p(a | s) √N(s) / (1 + N(s'))        up:  Q = r + γ V(s'),  V = Σ_a N Q / Σ_a N
pairs      at each step of the chosen path: w, l = the siblings of highest and lowest Q
update     −(1 − α) log σ(h) − α log σ(−h),  h = β [log π/π_ref (w) − log π/π_ref (l)],  α = min(N_l / (max(1, N_w) + N_l), ½)
           and the search goes on with the updated π
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from pydantic import Field

from understudy.curation import Checker, Funnel
from understudy.curation.step_pairs import StepPair, TreeNode, step_pairs
from understudy.errors import InputError
from understudy.evaluation.searches import Searched, policy_report
from understudy.tasks import get as get_task
from understudy.training import PipelineContext
from understudy.training.rounds import PreferenceRounds
from understudy.training.step_rounds import Questions, StepRounds


class MCTSDPO(StepRounds):
    """A policy searches trees of reasoning steps, and learns by DPO which next step is the better one, in rounds."""

    name = "mcts-dpo"
    paper = 26
    kinds = frozenset({"text"})
    cost = "simulations · (steps + 3) walks a question, each new state `width` proposals and judgements, at most `calls`; then DPO"
    example: ClassVar[dict[str, Any]] = {"task": "reasoning"}
    page: ClassVar[dict[str, str]] = {
        "when": "Answers can be checked (arithmetic, multiple choice) and nobody has labelled steps. Searches are stored "
        "(`stages/round-N/trees.jsonl`), drawn in the report, and each pair names its nodes and requests.",
        "not": "Where the policy never reaches a right answer, or always: siblings then have one value and give no pair. A policy too "
        "small to judge its own steps: set `self_evaluation=false`, or name roles.evaluator.",
        "deviations": "Steps continue plain text, without a chat template. The search is the released code's (unvisited children count once in V, the root counts twice), the paper "
        "weighs by N. Near-duplicates are compared as words, without embeddings. Siblings of one Q give no pair. Beginnings that "
        "both steps share cancel in h, and are not cut off. Steps are cut as text, so a step may begin inside what a tokenizer "
        "would join. C is the probability of the one letter that the evaluator says. Each round is a run with a new optimiser and "
        "schedule, and a round's questions are searched before it trains. The reference solution is shown while searching alone.",
    }

    worst: bool = Field(True, description="The worse side of a pair is the worst sibling, else the second best.")
    pairs: int = Field(8, ge=1, description="Most pairs of a question.")
    smoothing: bool = Field(True, description="Soften the label of a pair by α, from visits.")
    beta: float = Field(0.1, gt=0, description="β of the update.")

    def run(self, context: PipelineContext) -> dict[str, Any]:
        task: Any = get_task(context.recipe["task"])
        rounds = self.check(context)
        splits = task.read(context.recipe["data"])
        checker, _ = task.checkers(context.recipe["data"], splits)
        self.check_searcher(context, splits.train)
        searched: list[Searched] = []
        start = rounds.start()
        policies = rounds.run(start, partial(self._pairs, searched, splits.train, checker, start))
        return policy_report(context, splits, checker, policies, searched, self.policy)

    def check(self, context: PipelineContext) -> PreferenceRounds:
        """The rounds, if the recipe can be carried out at all."""
        rounds = PreferenceRounds(context, self.rounds, {"beta": self.beta}, self.anchor)
        if context.members("evaluator") and not self.self_evaluation:
            raise InputError("roles.evaluator judges steps and options.self_evaluation=false: leave one out.")
        self.check_search(context)
        rounds.check()
        return rounds

    # -- 1: search, 2: pairs ------------------------------------------------------------------------------------------

    def _pairs(
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
        nodes = context.stage("trees", TreeNode, partial(self.trees, context, asked, checker, searching, number))
        pairs = context.stage("pairs", StepPair, partial(self._found, asked, nodes))
        searched.append(Searched(nodes, len(pairs)))
        return [pair.record(self.smoothing) for pair in pairs]

    def _found(self, asked: Questions, nodes: Sequence[TreeNode], funnel: Funnel) -> list[StepPair]:
        """The pairs of a round, and how many questions have any."""
        trees: dict[int, list[TreeNode]] = {}
        for node in nodes:
            trees.setdefault(node.tree, []).append(node)
        found = [step_pairs(t, asked[str(i)].prompt, worst=self.worst, most=self.pairs) for i, t in trees.items()]
        funnel.note("questions with a pair", len(found), sum(map(bool, found)))
        return [pair for part in found for pair in part]
