"""Does a student that nears its teacher leave the truth? (On Teacher Hacking in Language Model Distillation, 2025.)

golden is the distance of an oracle to the student, proxy that of the teacher to the student: the forward KL of whole texts,
summed by the chain rule over tokens of texts that the first side wrote. Both are curves over evaluations; lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from understudy.data import Batch
from understudy.data.noise import uniform
from understudy.data.samples import Sample, prompt_length, sampled_row
from understudy.errors import InputError
from understudy.files import read_log
from understudy.generation.decoding import end_tokens, sample, writer
from understudy.losses import cross_entropy, forward_kl
from understudy.models import ModelAdapter, evaluating
from understudy.streaming import rowwise
from understudy.targets import Dense, Projected
from understudy.teachers import LocalTeacher

_DRAWS = 0x0AC  # a random stream of its own


class TextDistances(NamedTuple):
    """How far q is from p along texts that p wrote, in nats, `[texts]` each.

    Args:
        kl: Σ_t KL(p_t ‖ q_t) over the whole vocabulary; +inf where q rules out what p allows. Its expectation is the KL of
            whole texts.
        log_ratio: Σ_t log p(y_t) − log q(y_t): the same expectation with more variance.
        lengths: tokens of each text, the ending one included.
    """

    kl: Tensor
    log_ratio: Tensor
    lengths: Tensor


def text_distances(p: Dense | Projected, q: Dense | Projected, batch: Batch) -> TextDistances:
    """Distances along the texts of a batch, whose tokens are its labels.

    Args:
        p, q: outputs of both sides for the rows of the batch.

    Raises:
        InputError: the sides have different vocabularies.
    """
    if p.classes != q.classes:
        raise InputError(
            f"text_distances: one side has {p.classes} tokens and the other {q.classes}: give both one vocabulary."
        )
    nll_p, nll_q = (rowwise(cross_entropy, signal, None, batch.row_labels) for signal in (p, q))
    kl = rowwise(forward_kl, q, p)

    def summed(values: Tensor) -> Tensor:
        return values.new_zeros(len(batch.ids)).index_add(0, batch.sequence, values)

    return TextDistances(summed(kl), summed(nll_q - nll_p), summed(torch.ones_like(kl)))


class HeldOut:
    """Texts that an oracle and a teacher write for the same held-out prompts, and a student's distances from both.

    The texts are written once: the sides that write do not change.

    Args:
        oracle, teacher: models in this process, with the student's tokens.
        examples: token rows; each gives its prompt.
        tokenizer, collate: of the examples.
        most: tokens of a text at most; a text without an end counts up to there. batch: texts of a forward pass.
        seed: of the texts, which are drawn at temperature 1.
    """

    def __init__(
        self,
        oracle: LocalTeacher,
        teacher: LocalTeacher,
        examples: Sequence[dict[str, Any]],
        tokenizer: Any,
        collate: Callable[[list[Any]], dict[str, Tensor]],
        *,
        most: int,
        seed: int,
        batch: int = 64,
    ) -> None:
        self.sides = {"golden": oracle, "proxy": teacher}
        self.texts: dict[str, list[Batch]] = {}
        self.unended: dict[str, float] = {}
        for name, side in self.sides.items():
            rows, ended = _written(side.model, examples, tokenizer, most, seed)
            self.unended[name] = 1 - sum(ended) / len(ended)
            parts = (rows[i : i + batch] for i in range(0, len(rows), batch))
            self.texts[name] = [Batch.from_dict(collate(part)) for part in parts]
        self.teacher_golden = self._distance("golden", teacher.model)[0]

    def measure(self, student: ModelAdapter) -> dict[str, float]:
        """`golden` and `proxy` in nats a text, the same a token, and `teacher_golden`, oracle to teacher, which stays."""
        found = {"teacher_golden": self.teacher_golden}
        for name in self.sides:
            found[name], found[f"{name}_per_token"] = self._distance(name, student)
        return found

    @torch.no_grad()
    def _distance(self, name: str, student: ModelAdapter) -> tuple[float, float]:
        home = next(student.parameters()).device
        total, texts, tokens = 0.0, 0, 0.0
        with evaluating(student):
            for held in self.texts[name]:
                batch = held.to(home)
                found = text_distances(self.sides[name](batch).signal, student(batch).signal, batch)
                total, texts = total + float(found.kl.double().sum()), texts + len(found.kl)
                tokens += float(found.lengths.sum())
        return total / texts, total / tokens


def _written(
    side: ModelAdapter, examples: Sequence[dict[str, Any]], tokenizer: Any, most: int, seed: int
) -> tuple[list[dict[str, Any]], list[bool]]:
    """Rows of a prompt and what a side writes after it, and whether each text ended."""
    model = writer(side)
    ids = torch.tensor([example["id"] for example in examples])
    drawn = uniform(ids, (2,), seed=seed, step=0, stream=_DRAWS)
    starts = [prompt_length(e["labels"], "random", float(cut)) for e, cut in zip(examples, drawn[:, 1], strict=True)]
    prompts = [e["input_ids"][:start].tolist() for e, start in zip(examples, starts, strict=True)]
    ends = end_tokens(model, tokenizer)
    texts = sample(
        model,
        prompts,
        (drawn[:, 0] * 2**53).long().to(next(model.parameters()).device),
        most=most,
        vocabulary=int(getattr(side, "vocabulary", len(tokenizer))),
        ends=ends,
        pad=tokenizer.pad_token_id or 0,
    )
    samples = [
        Sample(int(i), 0, len(prompt), (*prompt, *text)) for i, prompt, text in zip(ids, prompts, texts, strict=True)
    ]
    return [sampled_row(s, tokenizer, labelled=True) for s in samples], [text[-1] in ends for text in texts]


class Curve(NamedTuple):
    """What was measured at the evaluations of a run: optimizer steps, distances in nats a text, and the training loss."""

    steps: list[int]
    golden: list[float]
    proxy: list[float]
    loss: list[float | None]
    teacher_golden: float


def curve_of(folder: Path) -> Curve | None:
    """The curve of a run folder, or `None` if no distance was measured there during training."""
    seen = [line for line in read_log(folder / "validation.jsonl")[0] if "golden" in line]
    if not seen:
        return None
    losses = {line["step"]: line["loss"] for line in read_log(folder / "metrics.jsonl")[0] if "loss" in line}
    steps = [line["step"] for line in seen]
    loss = [max(((s, v) for s, v in losses.items() if s <= step), default=(0, None))[1] for step in steps]
    return Curve(steps, [x["golden"] for x in seen], [x["proxy"] for x in seen], loss, seen[-1]["teacher_golden"])


@dataclass(frozen=True)
class Verdict:
    """What a golden curve says.

    Args:
        hacking: it rises by more than δ above its least while the proxy, or where that has stalled (it has risen by no more
            than δ) the training loss, falls further. best: place of its least, the first of several.
            rise: (end − least) / least, 0 for a curve that stays at 0.
            proxy_drop: (proxy there − proxy at the end) / proxy there.
    """

    hacking: bool
    best: int
    rise: float
    proxy_drop: float


def verdict(
    golden: Sequence[float], proxy: Sequence[float], delta: float = 0.02, loss: Sequence[float | None] = ()
) -> Verdict:
    """Whether the student got nearer to its teacher and further from the truth (the paper's idea; the rule is ours).

    Args:
        loss: of training at every evaluation, `None` before the first; empty where it is not known.

    Raises:
        InputError: curves of different length, empty ones, or a value that is not a number.
    """
    if len(golden) != len(proxy) or not golden:
        raise InputError(f"verdict: {len(golden)} golden and {len(proxy)} proxy values; give both at every evaluation.")
    if any(map(math.isnan, (*golden, *proxy))):
        raise InputError(
            "verdict: a golden or proxy value is nan: leave out evaluations of a student that has diverged."
        )
    best = min(range(len(golden)), key=golden.__getitem__)
    up = golden[-1] - golden[best] if golden[-1] > golden[best] else 0.0
    rise = up / golden[best] if golden[best] else (math.inf if up else 0.0)
    drop = (proxy[best] - proxy[-1]) / proxy[best] if proxy[best] else 0.0
    known = [value for value in loss[best:] if value is not None]
    nearer = drop > 0 or (drop >= -delta and bool(known) and known[-1] < known[0])
    return Verdict(rise > delta and nearer, best, rise, drop)


class PowerLaw(NamedTuple):
    """log m = a + b · log e, and how far each point is above it, `[points]`."""

    intercept: float
    slope: float
    residuals: Tensor


def power_law(epochs: Sequence[float], values: Sequence[float], first: int = 8) -> PowerLaw:
    """Least squares on the first points of a curve, which falls as a power law while training is sound.

    Args:
        epochs: e, above 0. values: m, above 0, finite. first: points that are fitted.

    Raises:
        InputError: fewer than three points, or one that has no logarithm.
    """
    number = min(first, len(epochs))
    if number < 3 or len(epochs) != len(values):
        raise InputError(
            f"power_law: {len(epochs)} epochs and {len(values)} values; a line needs three points of both."
        )
    if not all(0 < number < math.inf for number in (*epochs, *values)):
        raise InputError("power_law: epochs and values must be above 0 and finite; count epochs from 1.")
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (epochs, values))
    dx, dy = x[:number] - x[:number].mean(), y[:number] - y[:number].mean()
    slope = float((dx * dy).sum() / dx.square().sum())
    intercept = float(y[:number].mean() - slope * x[:number].mean())
    return PowerLaw(intercept, slope, y - intercept - slope * x)


def leaves_power_law(
    epochs: Sequence[float], values: Sequence[float], first: int = 8, width: float = 3.0, run: int = 3
) -> int | None:
    """Where a curve has been off the line for `run` evaluations in a row: the place of the last of these, or `None`.

    Off is a residual of more than `width` standard deviations of the fitted points. Scaling the curve changes nothing.
    """
    residuals = power_law(epochs, values, first).residuals
    fitted = residuals[: min(first, len(residuals))]
    spread = math.sqrt(float(fitted.square().sum()) / max(1, len(fitted) - 2))
    count = 0
    for place, residual in enumerate(residuals.tolist()):
        count = count + 1 if place >= len(fitted) and abs(residual) > width * spread + 1e-12 else 0
        if count == run:
            return place
    return None
