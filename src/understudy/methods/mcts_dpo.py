"""26. MCTS-DPO: Monte Carlo Tree Search Boosts Reasoning via Iterative Preference Learning (2024, arXiv 2405.00451).

search     R(s) = C(s) + O(s),  r(s, a) = R(s') − R(s),  p = exp(log π(a | s) / |a|^λ)
           down:  argmax_a Q(s, a) + c p(a | s) √N(s) / (1 + N(s'))        up:  Q = r + γ V(s'),  V = Σ_a N Q / Σ_a N
pairs      at each step of the chosen path: w, l = the siblings of highest and lowest Q
update     −(1 − α) log σ(h) − α log σ(−h),  h = β [log π/π_ref (w) − log π/π_ref (l)],  α = min(N_l / (max(1, N_w) + N_l), ½)
           and the search goes on with the updated π
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from understudy.curation import Checker, Funnel
from understudy.curation.step_pairs import StepPair, TreeNode, step_pairs, tree_nodes
from understudy.errors import InputError
from understudy.evaluation.searches import Judged, Searched, search_report
from understudy.generation import LocalSource, Prompt, Request, Source
from understudy.generation.tree_search import SearchOptions, TreeJournal, search_trees
from understudy.tasks import get as get_task
from understudy.training import Pipeline, PipelineContext, Requirements, Role
from understudy.training.rounds import PreferenceRounds
from understudy.training.step_search import Question, StepProposer

_COST = "Cost is that of the last round's training."
ENDS = {"line": "\n", "sentence": ". "}
Questions = Mapping[str, Question]


class MCTSDPO(Pipeline):
    """A policy searches trees of reasoning steps, and learns by DPO which next step is the better one, in rounds."""

    name = "mcts-dpo"
    paper = 26
    kinds = frozenset({"text"})
    roles: ClassVar[Mapping[str, Role]] = {
        "evaluator": Role("says whether the steps so far are right, in the place of the policy", required=False)
    }
    cost = "simulations · (steps + 3) walks a question, each new state `width` proposals and judgements, at most `calls`; then DPO"
    page: ClassVar[dict[str, str]] = {
        "task": "reasoning",
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
    worst: bool = Field(True, description="The worse side of a pair is the worst sibling, else the second best.")
    pairs: int = Field(8, ge=1, description="Most pairs of a question.")
    smoothing: bool = Field(True, description="Soften the label of a pair by α, from visits.")
    beta: float = Field(0.1, gt=0, description="β of the update.")
    anchor: Literal["start", "round"] = Field(
        "start", description="Reference: the student at its start, or of each round."
    )

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="outputs" if self.searcher == "teacher" else "none")

    def run(self, context: PipelineContext) -> dict[str, Any]:
        task: Any = get_task(context.recipe["task"])
        rounds = self.check(context)
        splits = task.read(context.recipe["data"])
        checker, _ = task.checkers(context.recipe["data"], splits)
        if self.searcher == "teacher":
            first = Request(splits.train[0]["prompt"], "check", max_tokens=1, log_probs=True)
            why = "A search weighs steps by their log-probability"
            context.check_log_probs("teacher", first, why, "search with the student (options.searcher=policy)")
        searched: list[Searched] = []
        start = rounds.start()
        policies = rounds.run(start, partial(self._pairs, searched, splits.train, checker, start))
        return self._evaluation(context, splits, checker, policies, searched)

    def check(self, context: PipelineContext) -> PreferenceRounds:
        """The rounds, if the recipe can be carried out at all."""
        rounds = PreferenceRounds(context, self.rounds, {"beta": self.beta}, self.anchor)
        self.need_answers(context)
        if context.members("evaluator") and not self.self_evaluation:
            raise InputError("roles.evaluator judges steps and options.self_evaluation=false: leave one out.")
        if max(self.width, self.first_width) == 1:
            raise InputError("options.width=1 and options.first_width=1 leave nothing to compare: raise one.")
        rounds.check()
        self._options(1 + self.self_evaluation)
        Prompt.load(self.judge_prompt).render(question="", steps="", solution="")
        return rounds

    def _options(self, calls_per_step: int) -> SearchOptions:
        how = {
            k: getattr(self, k)
            for k in ("simulations", "width", "first_width", "depth", "c", "length_penalty", "calls")
        }
        return SearchOptions(**how, calls_per_step=calls_per_step)

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
        size = self.questions or max(1, len(train) // self.rounds)
        places = [(number * size + i) % len(train) for i in range(min(size, len(train)))]
        asked = {str(i): _question(train[i], checker) for i in places}
        searching = policy if self.searcher == "policy" else start
        nodes = context.stage("trees", TreeNode, partial(self._trees, context, asked, checker, searching, number))
        pairs = context.stage("pairs", StepPair, partial(self._found, asked, nodes))
        searched.append(Searched(nodes, len(pairs)))
        return [pair.record(self.smoothing) for pair in pairs]

    def _trees(
        self, context: PipelineContext, asked: Questions, checker: Checker, policy: str, number: int, funnel: Funnel
    ) -> list[TreeNode]:
        """The searched trees of a round."""
        prompt = Prompt.load(self.judge_prompt)
        how: Any = {
            "draw": number,
            "max_tokens": self.step_tokens,
            "temperature": self.temperature,
            "stop": ENDS[self.step_end],
        }
        how |= {"hint": self.hint, "chat": self.chat, "place": f"{context.prefix}steps/"}
        with self._models(context, policy) as (name, ask, judge):
            proposer = StepProposer(asked, ask, judge, prompt, checker, **how)
            options = self._options(proposer.calls_per_step)
            settings = {"searcher": name, "judge_prompt": prompt.hash, **how, **asdict(options)}
            with TreeJournal(context.folder / "logs" / context.prefix / "nodes.jsonl", settings) as journal:
                found = search_trees(list(asked), proposer, options, journal)
        ends = [tree.path[-1].step.outcome if len(tree.path) > 1 else None for tree in found]
        funnel.note("searches that end in an answer", len(found), sum(end is not None for end in ends))
        funnel.note("answers that are right", len(found), sum((end or 0) > 0 for end in ends))
        return [node for tree in found for node in tree_nodes(tree, context.prefix)]

    @contextmanager
    def _models(self, context: PipelineContext, policy: str) -> Iterator[tuple[str, Any, Any]]:
        """The name of who searches, and the functions that ask it and the evaluator."""
        if self.searcher == "teacher":
            source, asking = context.source("teacher"), context.asking("teacher")
        else:
            source = self._policy(context, policy)
            asking = context.asking_trained(source, "search")
        with asking as ask:
            if not self.self_evaluation:
                yield source.name, ask, None
            elif context.members("evaluator"):
                with context.asking("evaluator") as judge:
                    yield source.name, ask, judge
            else:
                yield source.name, ask, ask

    def _found(self, asked: Questions, nodes: Sequence[TreeNode], funnel: Funnel) -> list[StepPair]:
        """The pairs of a round, and how many questions have any."""
        trees: dict[int, list[TreeNode]] = {}
        for node in nodes:
            trees.setdefault(node.tree, []).append(node)
        found = [step_pairs(t, asked[str(i)].prompt, worst=self.worst, most=self.pairs) for i, t in trees.items()]
        funnel.note("questions with a pair", len(found), sum(map(bool, found)))
        return [pair for part in found for pair in part]

    # -- 4: the policies on the judged questions ------------------------------------------------------------------------

    def _policy(self, context: PipelineContext, model: str) -> Source:
        """A policy that writes; what it writes depends on its weights, and not on where they lie."""
        spec = context.models["student"]
        words = spec.tokenizer if model == spec.model else None
        how: Any = {"dtype": spec.dtype, "device": spec.device, "trust_remote_code": spec.trust_remote_code}
        loaded = LocalSource.load(model, tokenizer=words, **how)
        return LocalSource(loaded.model, loaded.tokenizer, "policy", batch=64)

    def _evaluation(
        self,
        context: PipelineContext,
        splits: Any,
        checker: Checker,
        policies: Sequence[str],
        searched: Sequence[Searched],
    ) -> dict[str, Any]:
        """Greedy answers of the policy of every round."""
        split = context.recipe["eval_split"]
        records, most = getattr(splits, split), int(context.recipe["data"]["max_new_tokens"])
        greedy: Any = {"max_tokens": most, "temperature": 0.0}

        def judged(number: int, policy: str, _: Funnel) -> list[Judged]:
            requests = [Request(r["prompt"], f"judged-{number}/{i}", **greedy) for i, r in enumerate(records)]
            said = context.ask_trained(self._policy(context, policy), requests, f"judged-{number}")
            golds = [checker.gold(r["answer"]) for r in records]
            right = [a.finish == "stop" and checker.correct(a.text, g) for a, g in zip(said, golds, strict=True)]
            return [Judged(text=a.text, right=r) for a, r in zip(said, right, strict=True)]

        found = [context.stage(f"judged-{i}", Judged, partial(judged, i, p)) for i, p in enumerate(policies)]
        cost = json.loads((Path(policies[-1]).parent / "evaluation.json").read_text())["cost"]
        return {"split": split, "cost": cost, **search_report(found, searched), "notes": [*splits.notes, _COST]}


def _question(record: Mapping[str, Any], checker: Checker) -> Question:
    return Question(record["prompt"], record["question"], checker.gold(record["answer"]), record["completion"])
