"""Preference trees: answers of several steps that share beginnings, with a score at each leaf.

    {"prompt": "2 + 3 · 4 = ?", "tree": [
        {"text": "3 · 4 = 12. ", "children": [{"text": "2 + 12 = 14.", "score": 100}, {"text": "2 + 12 = 24.", "score": -50}]},
        {"text": "2 + 3 = 5. ", "children": [{"text": "5 · 4 = 20.", "score": -90}]}]}

Every path from the top to a leaf is an answer, and each text on it a step. The same without shared beginnings is
`prompt`, `steps` (a list of texts for each answer) and `scores`.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from understudy.data.columns import checked_text
from understudy.data.tokenize import byte_starts
from understudy.errors import InputError


def paths(where: str, tree: Any) -> tuple[list[list[str]], list[Any], int]:
    """The answers of a tree from the first branch to the last: their steps, their scores, and how many have no score.

    Raises:
        InputError: something that is no node, a node with both children and a score, or no scored leaf.
    """
    nodes = tree if isinstance(tree, list) else [tree]
    found: list[list[str]] = []
    scores: list[Any] = []
    unscored = 0
    open_nodes: list[tuple[tuple[str, ...], Any]] = [((), node) for node in reversed(nodes)]
    while open_nodes:
        before, node = open_nodes.pop()
        if not isinstance(node, dict) or not isinstance(node.get("text"), str) or not node["text"]:
            raise InputError(
                f"{where}: a node of tree below step {len(before)} is no object with text, the step's words."
            )
        steps = (*before, checked_text(where, "a step", node["text"]))
        score = node.get("score")
        children: list[Any] | None = node.get("children")
        if children is not None and not isinstance(children, list):
            raise InputError(f"{where}: children of a node of tree is {type(children).__name__}, not a list of nodes.")
        if children and score is not None:
            raise InputError(f"{where}: a node of tree has children and a score: score the leaves alone.")
        open_nodes += [(steps, child) for child in reversed(children or [])]
        if not children and score is None:
            unscored += 1
        elif not children:
            found.append(list(steps))
            scores.append(score)
    if not found:
        raise InputError(f"{where}: no leaf of tree has a score. Score them, or leave the record out.")
    return found, scores, unscored


def checked_steps(where: str, steps: Any) -> list[list[str]]:
    """Steps of each answer, if that is what they are.

    Raises:
        InputError: not a list of lists of texts, an answer without a step, or an empty step.
    """
    if not isinstance(steps, list) or not all(isinstance(answer, list) for answer in steps):
        raise InputError(f"{where}: steps must be a list of answers, each a list of texts.")
    for answer in steps:
        if not answer or not all(isinstance(text, str) and text for text in answer):
            raise InputError(f"{where}: an answer of steps is empty or holds an empty step. Leave it out.")
        for text in answer:
            checked_text(where, "a step", text)
    return steps


def token_steps(ids: list[int], steps: list[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The step of each token of an answer, from 1 on: that in which it begins; what follows the text is of the last step.

    Args:
        ids: of the answer's tokens with its end. steps: its texts.
    """
    ends = list(accumulate(len(text.encode()) for text in steps))[:-1]
    starts = byte_starts(ids, tokenizer)[:-1]
    return torch.tensor([1 + bisect_right(ends, start) for start in starts], dtype=torch.long)
