"""Fidelity: how closely the student matches its teacher: classes, answers, rationales; at which confidence."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from fractions import Fraction
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from understudy.errors import InputError

EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def by_confidence(confidence: Tensor, agree: Tensor, kl: Tensor) -> dict[str, list[Any]]:
    """Agreement and mean KL(teacher ‖ student) in bins of the student's confidence; `None` in empty ones."""
    edges = torch.tensor(EDGES[1:-1], dtype=confidence.dtype)
    which = torch.bucketize(confidence, edges)
    out: dict[str, list[Any]] = {"edges": list(EDGES), "agreement": [], "kl": [], "count": []}
    for i in range(len(EDGES) - 1):
        inside = which == i
        number = int(inside.sum())
        out["count"].append(number)
        out["agreement"].append(float(agree[inside].mean()) if number else None)
        out["kl"].append(float(kl[inside].mean()) if number else None)
    return out


def by_teacher(agree: Tensor, teacher_correct: Tensor) -> dict[str, Any]:
    """Agreement on the rows that the teacher has right, and on those it has wrong; `None` where there are none (paper 14).

    Args:
        agree: `[rows]`, 1 where both have the same top class. teacher_correct: `[rows]`, 1 where the teacher's is the label.
    """
    right = teacher_correct > 0
    parts = {"right": agree[right], "wrong": agree[~right]}
    return {
        **{name: float(part.mean()) if len(part) else None for name, part in parts.items()},
        "count": {name: len(part) for name, part in parts.items()},
    }


def answers_agree(first: str | None, second: str | None) -> bool:
    """Whether two final answers are the same, once parsed: numbers to 1e-3, text without case; none equals none alone.

    Args:
        first, second: canonical answers as `curation.Checker` writes them, `None` for one that cannot be read.
    """
    if first is None or second is None:
        return first is second
    if first.casefold() == second.casefold():
        return True
    try:
        return abs(Fraction(first) - Fraction(second)) <= Fraction(1, 1000)
    except (ValueError, ZeroDivisionError):  # not two numbers
        return False


def answer_agreement(first: Sequence[str | None], second: Sequence[str | None]) -> float:
    """Share of items on which two models give the same final answer, right or wrong.

    Raises:
        InputError: they answered different numbers of items, or none.
    """
    if len(first) != len(second) or not first:
        raise InputError(f"One model has {len(first)} answers and the other {len(second)}: let both answer each item.")
    return sum(map(answers_agree, first, second)) / len(first)


def sentence_bleu(reference: Sequence[Hashable], written: Sequence[Hashable], most: int = 4) -> float:
    """BLEU of one text against one reference, 0 to 100 (Papineni et al. 2002; +1/+1 smoothing of Lin and Och 2004).

    exp(Σ_n log p_n / 4) · min(1, exp(1 − r / h)), with p_n = (matches + 1) / (n-grams + 1) for n ≥ 2.

    Args:
        reference, written: tokens, r and h of them. most: the longest n-gram.

    Returns:
        100 for the reference itself; 0 without a common token, and for an empty text.
    """
    logs = 0.0
    for n in range(1, most + 1):
        known, said = _grams(reference, n), _grams(written, n)
        matches, total = (known & said).total(), said.total()
        if n == 1 and not matches:
            return 0.0
        smooth = int(n > 1)
        logs += math.log((matches + smooth) / (total + smooth))
    brevity = min(0.0, 1 - len(reference) / len(written))
    return 100 * math.exp(logs / most + brevity)


def _grams(tokens: Sequence[Hashable], n: int) -> Counter[tuple[Hashable, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def rationale_bleu(teacher: Sequence[str], student: Sequence[str]) -> float:
    """Mean sentence BLEU of the student's rationales, with the teacher's as references, 0 to 100.

    Tokens are words and signs without case. This is BLEU itself, not the similarity of embeddings that the paper's
    repository calls so.

    Raises:
        InputError: different numbers of rationales, or none.
    """
    if len(teacher) != len(student) or not teacher:
        raise InputError(
            f"The teacher has {len(teacher)} rationales and the student {len(student)}: give both of each."
        )
    return fmean(sentence_bleu(words(t), words(s)) for t, s in zip(teacher, student, strict=True))


def words(text: str) -> list[str]:
    """Words and signs of a text, without case."""
    return _WORD.findall(text.casefold())


_WORD = re.compile(r"\w+|[^\w\s]")
