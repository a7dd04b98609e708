"""Dry runs: whether the method's loss can be computed for this student, teacher and data, before expensive work starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from understudy.data import IGNORE, Batch
from understudy.data.samples import Sample, prompt_length, sampled_row
from understudy.errors import InputError
from understudy.generation.continuous import sample_continuously
from understudy.generation.decoding import writer
from understudy.models import ModelOutput, evaluating
from understudy.models.positions import positions
from understudy.teachers import CachedTeacher, Ensemble, Teacher
from understudy.training import checkpoint as ck
from understudy.training.on_policy import OnPolicy
from understudy.training.train_module import TrainModule

TOKENS = 16


def dry_run(
    policy: OnPolicy,
    train_module: TrainModule,
    teacher: Teacher,
    examples: Any,
    tokenizer: Any,
    collate: Callable[[list[Any]], dict[str, Tensor]],
) -> None:
    """Compute the method's loss on two short texts as if they had been generated; nothing is changed. With the
    `continuous` engine it generates a few tokens first, since not every model supports that engine.

    Raises:
        InputError: the student cannot generate, the texts would be too long for a model, or the method needs labels.
    """
    student, method = train_module.student, train_module.method
    if not hasattr(student.model, "generate"):
        raise InputError(f"{type(student.model).__name__} has no generate and cannot write: leave out on_policy.")
    if "labels" not in examples[0] or examples[0]["labels"].dim() != 1:
        raise InputError("on_policy writes the completion of a token row, and these examples are none: leave it out.")
    check_room(policy, {"student": student, "teacher": getattr(teacher, "model", None)}, examples)
    rows = []
    for example in (examples[i] for i in range(min(2, len(examples)))):
        start = prompt_length(example["labels"], policy.cut, 0.5)
        ids = example["input_ids"][max(0, start - TOKENS) : start + TOKENS].tolist()
        text = Sample(int(example["id"]), 0, min(start, TOKENS), tuple(ids))
        rows.append(sampled_row(text, tokenizer, labelled=policy.teacher_share == 1))
    if policy.engine == "continuous":
        texts = [row["input_ids"].tolist() for row in rows]
        keys, known = torch.arange(len(rows)), len(tokenizer)
        sample_continuously(writer(student), texts, keys, most=2, vocabulary=known, ends=set(), temperature=0.0)
    mark = {"source": torch.ones(len(rows), dtype=torch.long), "sampled": torch.zeros(len(rows), dtype=torch.long)}
    batch = Batch.from_dict({**collate(rows), **mark}).to(next(student.parameters()).device)
    try:
        _try(train_module, batch, teacher(batch) if method.requires.teacher == "outputs" else None)
    except InputError as error:
        raise InputError(
            f"Method {method.name!r} cannot learn from the student's own samples, which have no labels: {error} Choose "
            "kd or taid, or leave out on_policy."
        ) from None


def dry_run_stored(train_module: TrainModule, teacher: CachedTeacher | Ensemble, example: Batch) -> None:
    """Compute the method's loss on an example with a placeholder target of the kind that the cache, or each member,
    stores.

    Raises:
        InputError: the method's losses are not defined for that kind of target, or the members' kinds cannot be
            combined.
    """
    numbered = any(column.lengths is not None for column in train_module.train_state.columns.values())
    batch = (example if numbered else _beginning(example)).to(next(train_module.student.parameters()).device)
    try:
        _try(train_module, batch, teacher.imagined(batch))
    except InputError as error:
        whose = "this ensemble" if isinstance(teacher, Ensemble) else f"{teacher.name}, which keeps {teacher.support}"
        raise InputError(f"Method {train_module.method.name!r} cannot learn from {whose}: {error}") from None


def _beginning(batch: Batch) -> Batch:
    """Of a text batch a few tokens around the first label, since the student may be large and not yet on its device."""
    if type(batch) is not Batch or batch.kind != "text":
        return batch
    first = int((batch.labels != IGNORE).any(0).int().argmax())
    cut = slice(max(0, first - TOKENS), first + TOKENS)
    inputs = {k: v[:, cut] if v.shape[:2] == batch.labels.shape else v for k, v in batch.inputs.items()}
    return replace(batch, inputs=inputs, labels=batch.labels[:, cut])


def _try(train_module: TrainModule, batch: Batch, rows: ModelOutput | None) -> None:
    """Compute the losses of a batch without changing any state."""
    state, random = train_module.train_state.method_state, ck.rng_state()
    before = state.state_dict() if state is not None else None
    try:
        with evaluating(train_module):
            train_module(batch, rows)
    finally:
        ck.set_rng_state(random)
        if state is not None and before is not None:
            state.load_state_dict(before)


def check_room(policy: OnPolicy, sides: Mapping[str, Any], examples: Any) -> None:
    """Refuse texts that would be longer than the positions of a model.

    Args:
        sides: the models by side; one without a number of positions, or none, has room.
    """
    if not len(examples) or "labels" not in examples[0] or examples[0]["labels"].dim() != 1:
        return
    longest = max(prompt_length(examples[i]["labels"], policy.cut, 1.0) for i in range(len(examples)))
    for side, rows in sides.items():
        most = positions(getattr(rows, "model", None))
        if most is not None and longest + policy.max_new_tokens > most:
            raise InputError(
                f"A prompt of {longest} tokens and on_policy.max_new_tokens={policy.max_new_tokens} are more than the "
                f"{most} positions of the {side}. Lower on_policy.max_new_tokens or data.max_length."
            )
