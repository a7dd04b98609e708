"""Preference trees out of searched ones: which answers are kept with what score, as records of `understudy.data.trees`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from understudy.curation.answers import numbers
from understudy.curation.filters import Funnel
from understudy.curation.items import Item
from understudy.curation.pairs import by_group
from understudy.curation.step_pairs import TreeNode

LOWEST, HIGHEST = -100.0, 100.0
"""Scores of a wrong and of a right answer, and the range of grades."""


class ScoredAnswer(Item):
    """A finished answer of a searched tree. `parents` are the nodes on its path, the last of them its leaf.

    Args:
        tree: place of the question in the training data. text: the whole answer. ended: it came to its own end.
        score: in [−100, 100]; `None` where there is none, and `problem` says why.
    """

    tree: int
    text: str
    ended: bool
    score: float | None = None
    problem: str | None = None


class PreferenceTree(Item):
    """A question with the scored answers of its tree. `parents` are the leaves; `requests` are those of all its nodes and grades.

    Args:
        tree: place of the question in the training data. prompt: the question's. nodes: as in the column `tree`, each with the
            `id` of the searched node. ended: of each answer, in order.
    """

    tree: int
    prompt: str
    nodes: list[dict[str, Any]]
    ended: list[bool]

    def record(self) -> dict[str, Any]:
        """As a preference record."""
        return {"prompt": self.prompt, "tree": self.nodes, "ended": self.ended}


def finished_answers(nodes: Sequence[TreeNode], funnel: Funnel) -> list[ScoredAnswer]:
    """The answers of searched trees, each text of a tree once, in the order of their leaves; not yet scored.

    Args:
        nodes: of any number of trees, parents first.
    """
    by_id = {(n.tree, n.number): n for n in nodes}
    inner = {(n.tree, n.parent) for n in nodes}
    leaves = [n for n in nodes if (n.tree, n.number) not in inner and n.parent is not None]
    ends = funnel.sieve("answers", leaves, lambda n: "unfinished" if n.outcome is None else None)
    found = []
    for leaf in ends:
        path, above = [leaf], leaf.parent
        while above is not None and (node := by_id[leaf.tree, above]).parent is not None:
            path.insert(0, node)
            above = node.parent
        found.append(
            ScoredAnswer(
                tree=leaf.tree,
                text="".join(n.text for n in path),
                ended=leaf.ended,
                parents=tuple(n.id for n in path),
                requests=tuple(dict.fromkeys(r for n in path for r in n.requests)),
            )
        )
    seen: set[tuple[int, str]] = set()

    def again(answer: ScoredAnswer) -> str | None:
        key = answer.tree, " ".join(answer.text.split())
        known = key in seen
        seen.add(key)
        return "written before" if known else None

    return funnel.sieve("distinct answers", found, again)


def graded(answer: ScoredAnswer, said: str, request: str) -> ScoredAnswer:
    """An answer with the grade that a model wrote: the one number in its text, from −100 to 100.

    Args:
        request: id of the grade's request.
    """
    found = [float(Fraction(n)) for n in numbers(said)]
    problem = None if len(found) == 1 else "no grade" if not found else "several grades"
    if problem is None and not LOWEST <= found[0] <= HIGHEST:
        problem = "grade beyond -100 to 100"
    score = found[0] if problem is None else None
    return answer.model_copy(update={"score": score, "problem": problem, "requests": (*answer.requests, request)})


def preference_trees(
    nodes: Sequence[TreeNode], answers: Sequence[ScoredAnswer], prompts: Mapping[int, str], most: int, funnel: Funnel
) -> list[PreferenceTree]:
    """The trees that have a better and a worse answer.

    Args:
        nodes: of all searched trees, parents first. answers: of `finished_answers`, scored. prompts: of each tree's question.
        most: answers of one tree; of more, the best, the worst and those evenly between them by rank are kept.
    """
    scored = funnel.sieve("scored answers", answers, lambda a: a.problem)
    trees = [[scored[i] for i in places] for places in by_group([a.tree for a in scored]).values()]

    def problem(tree: list[ScoredAnswer]) -> str | None:
        if len(tree) < 2:
            return "one answer"
        return "all scores equal" if len({a.score for a in tree}) == 1 else None

    kept = [_spread(tree, most) for tree in funnel.sieve("trees of two scores", trees, problem)]
    funnel.note("answers of these trees", len([a for t in trees if problem(t) is None for a in t]), sum(map(len, kept)))
    by_id = {n.id: n for n in nodes}
    return [_tree(tree, by_id, prompts[tree[0].tree]) for tree in kept]


def _spread(answers: Sequence[ScoredAnswer], most: int) -> list[ScoredAnswer]:
    """At most so many answers (at least 2), from the best to the worst evenly by rank, in their first order."""
    if len(answers) <= most:
        return list(answers)
    ranked = sorted(range(len(answers)), key=lambda i: -(answers[i].score or 0.0))
    chosen = {ranked[round(k * (len(ranked) - 1) / (most - 1))] for k in range(most)}
    return [answers[i] for i in sorted(chosen)]


def _tree(answers: Sequence[ScoredAnswer], by_id: Mapping[str, TreeNode], prompt: str) -> PreferenceTree:
    """Answers of one question as nested nodes; beginnings that they share are one."""
    top: list[dict[str, Any]] = []
    placed: dict[str, dict[str, Any]] = {}
    for answer in answers:
        level = top
        for name in answer.parents:
            if name not in placed:
                placed[name] = {"id": name, "text": by_id[name].text}
                level.append(placed[name])
            if name != answer.parents[-1]:
                level = placed[name].setdefault("children", [])
        placed[answer.parents[-1]]["score"] = answer.score
    ended = {a.parents[-1]: a.ended for a in answers}
    return PreferenceTree(
        tree=answers[0].tree,
        prompt=prompt,
        nodes=top,
        ended=[ended[name] for name in _leaves(top)],
        parents=tuple(a.parents[-1] for a in answers),
        requests=tuple(dict.fromkeys(r for a in answers for r in a.requests)),
    )


def _leaves(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ids of the leaves, in the order in which the answers of a tree are read."""
    return [name for n in nodes for name in (_leaves(n["children"]) if "children" in n else [n["id"]])]
