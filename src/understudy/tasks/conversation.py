"""Conversations with customers: answers are judged by a model. Embedded, a support desk whose truth is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import DataLoader

from understudy.data import TextSplits
from understudy.data.conversations import WORLD, load_conversations
from understudy.errors import InputError
from understudy.generation import OracleSource, Request, Source
from understudy.models import ModelAdapter
from understudy.synthetic.support import SEEN, SupportWorld, said
from understudy.tasks.base import Prepared, TaskDefaults
from understudy.training.pipeline import ORACLE

WRITE = "what to do in this situation"
"""What a prompt says to the world's teacher that is to write advice, and not to answer."""
TRANSFER_FOLLOWS = 0.7
"""How often another student than the one that the strategies were written for follows them."""


class Conversations(TaskDefaults):
    """Answer a customer."""

    name = "conversation"
    kind = "conversation"
    unit = "answers"
    metric = "satisfaction"
    higher_is_better = True

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """The support desk, where teacher, student and judge are the world's own unless the recipe names others."""
        data = recipe.get("data") or {}
        data.setdefault("name", WORLD)
        recipe["data"] = data
        if data["name"] == WORLD:
            data.setdefault("seed", recipe["seed"])
            recipe["student"] = recipe.get("student") or {"model": ORACLE}
            recipe["roles"] = {"judge": {"model": ORACLE}, **(recipe.get("roles") or {})}
        if recipe.get("student") is None:
            raise InputError(
                f"Data {data['name']!r} needs a student that answers: set student to a causal LM with a chat template, or to a "
                "model behind an endpoint (student.endpoint.url=http://...)."
            )
        return recipe

    def read(self, data: Mapping[str, Any]) -> TextSplits:
        """Conversations of each split; `data` as in a recipe."""
        spec = {k: v for k, v in data.items() if k not in _ORACLE}
        return load_conversations(spec, lambda seed, split, number: SupportWorld(seed).records(split, number))

    def oracle(self, recipe: Mapping[str, Any], role: str) -> Source:
        """The world's own student, teacher, judge, customer, or further students with habits of their own."""
        data = recipe["data"]
        side = role.partition(".")[0]
        if data["name"] != WORLD:
            return super().oracle(recipe, role)
        world, error = SupportWorld(data["seed"]), data.get("teacher_error", 0.05)
        follows = data.get("follows", 0.85) if side == "student" else TRANSFER_FOLLOWS

        def write(request: Request, chance: np.random.Generator) -> str:
            system = "".join(m["content"] for m in request.prompt if m["role"] == "system")  # type: ignore[index]
            asked = request.prompt[-1]["content"]  # type: ignore[index]
            if side == "judge":
                return world.rated(asked, chance)
            if side == "customer":
                return world.request(world.topic(asked), int(chance.integers(SEEN)), chance)
            if side != "teacher":
                return world.answer(role, asked, system, follows, chance)
            action = world.best_known(asked, chance, error)
            if WRITE in asked:
                return f"Where a customer writes about such a thing, {said(action).removeprefix('I will ')}"
            return said(action)

        return OracleSource(f"support {role} {world.seed} {error} {follows}", write)

    def prepare(self, recipe: Any) -> Prepared:
        """The conversations as examples, for `check`. A pipeline uses `read`."""
        found = self.read(recipe.data)
        parts = (found.train, found.validation, found.test)
        return Prepared(*parts, collate=list, classes=0, notes=found.notes, hashes={"data": found.hash})  # type: ignore[arg-type]

    def model(self, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> ModelAdapter:
        """Not available: models of this task are asked for text, and none is trained.

        Raises:
            InputError: always.
        """
        raise InputError("Models of task 'conversation' are asked for text by its methods, and none is trained.")

    def evaluate(self, student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any]) -> dict[str, Any]:
        """As `model`."""
        raise InputError("Runs of task 'conversation' are evaluated by their methods; read evaluation.json.")


_ORACLE = ("teacher_error", "follows")
