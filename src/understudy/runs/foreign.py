"""What callers of transformers, TRL and sentence-transformers know by other names: their arguments and their objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from transformers import TrainingArguments

from understudy.errors import InputError

_DATA = 'write data, which may be a Dataset, a list of records, or {"train": ..., "validation": ...}'
_BATCHES = "the task makes the batches; its columns have the names in data.columns, or options of data for images"
_OPTIMISER = "write trainer.optim, trainer.learning_rate and trainer.lr_scheduler_type"
ARGUMENTS = {
    "model": "write student, which may be a model, a function that makes one, a folder or a name",
    "teacher_model": "write teacher",
    "ref_model": "the reference is the student as it starts; another one is the teacher, with options.reference=teacher",
    "args": "write trainer, a mapping of the keys of TrainingArguments",
    "train_dataset": _DATA,
    "eval_dataset": _DATA,
    "dataset": _DATA,
    "tokenizer": "write data.tokenizer, a folder or a name",
    "processing_class": "write data.tokenizer, a folder or a name",
    "data_collator": _BATCHES,
    "formatting_func": _BATCHES,
    "peft_config": "write student.peft, as in {r: 8}",
    "compute_metrics": "a Method of your own returns further metrics from finish; others are read from the result's student",
    "preprocess_logits_for_metrics": "a Method of your own returns further metrics from finish",
    "compute_loss_func": "write a Method with a loss (CONTRIBUTING.md shows one)",
    "optimizers": _OPTIMISER,
    "optimizer_cls_and_kwargs": _OPTIMISER,
    "epochs": "write trainer.num_train_epochs",
    "steps": "write trainer.max_steps",
    "batch_size": "write trainer.per_device_train_batch_size",
    "lr": "write trainer.learning_rate",
}
"""Arguments of trainers elsewhere, and what stands in their place in a recipe."""


def check_arguments(values: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse an argument that other trainers take, with what stands in its place.

    Args:
        known: keys of a recipe.

    Raises:
        InputError: there is such an argument.
    """
    for key in values:
        if key in ARGUMENTS and key not in known:
            raise InputError(f"Unknown recipe key: {key!r} is an argument of other trainers: {ARGUMENTS[key]}.")


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values with mappings in the place of `TrainingArguments` and `LoraConfig`, and names of dtypes."""
    found = dict(values)
    arguments = found.get("trainer")
    if isinstance(arguments, TrainingArguments):
        found.setdefault("output", arguments.output_dir)
        found["trainer"] = _set_by_hand(arguments, type(arguments)(output_dir=arguments.output_dir))
    for side in ("teacher", "student"):
        spec = found.get(side)
        if isinstance(spec, Mapping):
            found[side] = {key: _plain(value) for key, value in spec.items()}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if dataclasses.is_dataclass(value) and type(value).__module__.startswith("peft."):
        kind: Any = type(value)
        return _set_by_hand(value, kind())
    return value


def _set_by_hand(given: Any, usual: Any) -> dict[str, Any]:
    """The fields of an object that differ from one with its defaults, as a recipe writes them."""
    found = {}
    for field in dataclasses.fields(given):
        value = getattr(given, field.name, None)
        if not field.init or value == getattr(usual, field.name, None):
            continue
        value = value.value if isinstance(value, Enum) else value
        found[field.name] = sorted(value) if isinstance(value, (set, frozenset)) else value
    return found
