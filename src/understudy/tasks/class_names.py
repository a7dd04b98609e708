"""The names of the data's classes, and those that a classifier has for its own."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from understudy.data import Batch
from understudy.errors import InputError
from understudy.models import ClassifierAdapter
from understudy.models.classifier_heads import reorder_classes
from understudy.tasks.base import Prepared


def name_classes(rows: ClassifierAdapter, prepared: Prepared, name: str) -> None:
    """Number a model's classes as the data do, and give it their names, for whoever loads it later.

    A model that has the names of the data in another order gets its outputs permuted. Names that are mere numbers, or
    mere `LABEL_0`, say nothing of the order.

    Raises:
        InputError: the order differs, and the model has no linear head that could be permuted.
    """
    names: list[str] = prepared.facts["names"]
    facts: dict[str, Any] | None = getattr(rows.model, "understudy", None)
    config: Any = getattr(rows.model, "config", None)
    config = config if isinstance(config, PreTrainedConfig) else None
    own = _own_names(facts, config)
    numbers = all(n.isdigit() for n in names)
    if own is not None and len(own) == len(names) and not numbers:
        _number(rows, own, names, prepared, name)
    if facts is not None and len(names) == facts["classes"]:
        facts["labels"] = list(names)
    if config is not None and len(config.id2label or {}) == len(names) and (own is None or not numbers):
        config.id2label, config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}


def _own_names(facts: dict[str, Any] | None, config: Any) -> list[str] | None:
    """The names that a model has for its classes, by number; `None` where it has none of its own."""
    named: dict[int, str] = (config.id2label or {}) if config is not None else {}
    own = (facts or {}).get("labels") or [str(named[i]) for i in sorted(named)]
    return None if all(label == f"LABEL_{i}" or label.isdigit() for i, label in enumerate(own)) else list(own)


def _number(rows: ClassifierAdapter, own: list[str], names: list[str], prepared: Prepared, name: str) -> None:
    here, there = ([n.casefold() for n in names] for names in (own, names))
    if here == there:
        return
    some = ", ".join(own[:3]) + ", ..."
    if sorted(here) != sorted(there) or len(set(here)) < len(here):
        said = f"{name} names its classes {some}, and the data {', '.join(names[:3])}, ...: they are taken to be in the same order."
        prepared.warnings += [said] if said not in prepared.warnings else []
        return
    batch = Batch.from_dict(prepared.collate([prepared.train[i] for i in range(min(2, len(prepared.train)))]))
    if not reorder_classes(rows, [here.index(n) for n in there], batch):
        raise InputError(
            f"{name} numbers the classes otherwise than the data ({some}), and its head is no linear layer that could be "
            f"put in their order ({', '.join(names[:3])}, ...): number the data's classes as it does."
        )
    prepared.say([f"{name} numbers the classes otherwise than the data ({some}): its outputs were put in their order."])
