"""Report of policies that learn from tree searches: their answers round by round, and the trees as drawings."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from understudy.curation import Checker, Funnel, Item
from understudy.curation.step_pairs import TreeNode
from understudy.evaluation.answers import wilson
from understudy.generation import Request, Source
from understudy.training import PipelineContext

DRAWN = 24
"""Most nodes of a drawn tree."""
EXPLAINED = {
    "accuracy": "Share of questions whose greedy answer is right after the last round. What cannot be read is wrong.",
    "start_accuracy": "The same before the first round.",
    "search_accuracy": "Share of the last round's searches whose chosen path ends in a right answer.",
    "pairs_per_question": "Pairs of steps for each searched question, over all rounds.",
    "answers_per_question": "Scored answers of kept trees for each searched question, over all rounds.",
}
_COST = "Cost is that of the last round's training."


class CheckedAnswer(Item):
    """A greedy answer, and whether it is right."""

    text: str
    right: bool


class Searched(NamedTuple):
    """A round of searches: all nodes of its trees, and the number of pairs, or answers, out of them."""

    nodes: Sequence[TreeNode]
    number: int


def policy_report(
    context: PipelineContext,
    splits: Any,
    checker: Checker,
    policies: Sequence[str],
    searched: Sequence[Searched],
    load: Callable[[PipelineContext, str], Source],
    unit: str = "pairs",
) -> dict[str, Any]:
    """The evaluation of a run: greedy answers of the policy of every round, and its searches.

    Args:
        splits: the data's. policies: of the start and after each round. load: a policy as one that writes.
        unit: what came out of the searches.
    """
    split = context.recipe["eval_split"]
    records, most = getattr(splits, split), int(context.recipe["data"]["max_new_tokens"])
    greedy: Any = {"max_tokens": most, "temperature": 0.0}

    def judged(number: int, policy: str, _: Funnel) -> list[CheckedAnswer]:
        requests = [Request(r["prompt"], f"judged-{number}/{i}", **greedy) for i, r in enumerate(records)]
        said = context.ask_trained(load(context, policy), requests, f"judged-{number}")
        golds = [checker.gold(r["answer"]) for r in records]
        right = [a.finish == "stop" and checker.correct(a.text, g) for a, g in zip(said, golds, strict=True)]
        return [CheckedAnswer(text=a.text, right=r) for a, r in zip(said, right, strict=True)]

    found = [context.stage(f"judged-{i}", CheckedAnswer, partial(judged, i, p)) for i, p in enumerate(policies)]
    cost = json.loads((Path(policies[-1]).parent / "evaluation.json").read_text())["cost"]
    return {"split": split, "cost": cost, **search_report(found, searched, unit), "notes": [*splits.notes, _COST]}


def search_report(
    judged: Sequence[Sequence[CheckedAnswer]], searched: Sequence[Searched], unit: str = "pairs"
) -> dict[str, Any]:
    """Metrics, a table of the rounds, and one tree of the first and of the last round.

    Args:
        judged: answers of the policy at the start and after each round. searched: the round before each of the others.
        unit: what came out of the searches.
    """
    found = [wilson(sum(j.right for j in answers), len(answers)) for answers in judged]
    rows = []
    for i, share in enumerate(found):
        after: list[Any] = ["–"] * 3
        if i:
            after = [_trees(searched[i - 1]), searched[i - 1].number, f"{_right(searched[i - 1]):.3f}"]
        name = f"round {i}" if i else "start"
        rows.append([name, *after, f"{share.share:.3f}", f"{share.low:.3f} to {share.high:.3f}"])
    headings = ["policy", "searches before it", unit, "right paths", "greedy accuracy", "interval"]
    total = sum(_trees(s) for s in searched)
    return {
        "metrics": {
            "accuracy": found[-1].share,
            "start_accuracy": found[0].share,
            "search_accuracy": _right(searched[-1]),
            f"{unit}_per_question": sum(s.number for s in searched) / total,
        },
        "explained": EXPLAINED,
        "tables": [{"title": "The policy, round by round", "headings": headings, "rows": rows}],
        "trees": [drawing(searched[i].nodes, i + 1) for i in sorted({0, len(searched) - 1})],
    }


def tree_report(searched: Sequence[Searched]) -> dict[str, Any]:
    """Metrics of trees that nothing has learned from, and one of them."""
    total = sum(_trees(s) for s in searched)
    answers = sum(s.number for s in searched) / total
    metrics = {"search_accuracy": _right(searched[-1]), "answers_per_question": answers}
    explained = {name: EXPLAINED[name] for name in metrics}
    return {"metrics": metrics, "explained": explained, "trees": [drawing(searched[-1].nodes, len(searched))]}


def drawing(nodes: Sequence[TreeNode], number: int) -> dict[str, Any]:
    """The first tree of a round that has two values among its answers, else its first; the most visited nodes of it."""
    trees: dict[int, list[TreeNode]] = {}
    for node in nodes:
        trees.setdefault(node.tree, []).append(node)
    mixed = [t for t in trees.values() if len({n.outcome for n in t if n.outcome is not None}) > 1]
    chosen = (mixed or list(trees.values()))[0]
    ranked = sorted(chosen, key=lambda n: -n.visits)[:DRAWN]  # a parent is visited more often than its children
    kept = {n.number for n in ranked if n.visits}
    shown = [n for n in chosen if n.number in kept and (n.parent is None or n.parent in kept)]
    fields = {"number", "parent", "text", "visits", "q", "chosen"}
    return {
        "title": f"A search of round {number}",
        "nodes": [n.model_dump(include=fields) for n in shown],
        "caption": f"Question {chosen[0].tree} of the training data; the chosen steps are in the second colour. {len(shown)} of "
        f"{len(chosen)} nodes, the most visited ones; all are in stages/round-{number - 1}/trees.jsonl.",
    }


def _trees(searched: Searched) -> int:
    return len({n.tree for n in searched.nodes})


def _right(searched: Searched) -> float:
    """Share of the trees whose chosen path ends in a right answer."""
    return sum(n.chosen and (n.outcome or 0) > 0 for n in searched.nodes) / _trees(searched)
