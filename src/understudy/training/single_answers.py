"""Single answers with a label, as KTO learns from them, and the prompts with answers of others that estimate its KL."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from understudy.data import ListBatch, mismatched
from understudy.errors import InputError
from understudy.models import ModelAdapter
from understudy.training.method import TrainState
from understudy.training.reference import attach, finite
from understudy.training.setup import SetupContext

log = logging.getLogger(__name__)
BALANCED = 1.0, 4 / 3
"""Least and most weight of all desirable examples over that of all others (Ethayarajh et al. 2024, Eq. 9)."""


def are_single(data: Any) -> bool:
    """Whether the data are single answers.

    Raises:
        InputError: lists beside them.
    """
    rows = [(split, row) for split, examples in data.splits.items() for row in examples.records]
    lists = [(split, row) for split, row in rows if len(row["scores"]) > 1]
    if lists and len(lists) < len(rows):
        (split, row), number = lists[0], len(rows) - len(lists)
        raise InputError(
            f"dpo: {split} example {row['id']} has {len(row['scores'])} candidates and {number} others have one. Give kto "
            "pairs (or lists) alone, or single answers with labels alone."
        )
    return not lists


def check_balance(context: SetupContext, desirable: float, undesirable: float) -> None:
    """Warn where the training examples of one label outweigh those of the other. `desirable`, `undesirable`: weight of one
    example."""
    labels = [row["scores"][0] > 0.5 for row in context.splits["train"].records]
    good, bad = labels.count(True), labels.count(False)
    if not good or not bad:
        return
    ratio, (least, most) = desirable * good / (undesirable * bad), BALANCED
    if not least <= round(ratio, 2) <= most:
        log.warning(
            "The %d desirable examples weigh %.2f times the %d others, and kto expects 1 to 1.33: with "
            "options.desirable_weight=%.3g they would weigh the same.",
            good,
            ratio,
            bad,
            undesirable * bad / good,
        )


def add_strays(context: SetupContext, scorer: ModelAdapter) -> None:
    """Give each training example its prompt with the answer of another one, and the reference model's log-probability of it."""
    train, strays = context.splits["train"], mismatched(context.splits["train"])
    attach(replace(context, splits={"mismatched": strays}), {"reference": scorer})
    for row, stray in zip(train.records, strays.records, strict=True):
        row["stray"] = stray


def stray_sums(batch: ListBatch, state: TrainState) -> Tensor:
    """Sum and number, `[2]`, of the log-ratios of a micro-batch's prompts with the answers of other examples. No gradient.

    KTO's z is the mean over an update, or 0 where that is negative.
    """
    strays = batch.strays
    assert strays is not None and strays.reference is not None and state.student is not None  # the data stage made them
    with torch.no_grad():
        said = finite(state.student(strays).signal.values, strays)
    ratio = said - strays.reference.to(said.dtype)
    return torch.stack([ratio.sum(), ratio.new_tensor(ratio.numel())])
