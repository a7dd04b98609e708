"""The names of the data's classes in the configuration of a classifier."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from understudy.tasks.base import Prepared


def name_classes(model: nn.Module, names: list[str], prepared: Prepared, name: str) -> None:
    """Give a model the names of the data's classes, for whoever loads it later; mere numbers do not replace its own."""
    facts: dict[str, Any] | None = getattr(model, "understudy", None)
    if facts is not None and len(names) == facts["classes"]:
        facts["labels"] = list(names)
    config = getattr(model, "config", None)
    own: dict[int, str] = getattr(config, "id2label", None) or {}
    if not isinstance(config, PreTrainedConfig) or len(own) != len(names):
        return
    generic = all(label == f"LABEL_{i}" for i, label in own.items())
    if not generic and all(n.isdigit() for n in names):
        return
    here = [own[i].casefold() for i in sorted(own)]
    there = [n.casefold() for n in names]
    if here != there and sorted(here) == sorted(there):
        prepared.warnings.append(f"{name} numbers the classes otherwise than the data: {', '.join(here[:3])}, ...")
    config.id2label, config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
