"""Statement generation: a causal LM writes generic statements about concepts. Embedded: a small world with known truth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from understudy.data.knowledge import Relation, generic_words, load_events, load_labels
from understudy.data.text import write_records
from understudy.errors import InputError
from understudy.models import ModelAdapter, is_new_causal_lm
from understudy.synthetic.generics import RELATIONS, GenericsWorld
from understudy.tasks.base import Prepared, TaskDefaults, merged
from understudy.tasks.text_generation import Material

WORLD = "generics_world"
_TRAINER = {
    "max_steps": 200,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.0,
}
_START = {
    "max_steps": 800,
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "weight_decay": 0.0,
}


@dataclass
class StatementMaterial(Material):
    """`Material` whose seeds are concepts, and whose relations are phrases.

    Args:
        world: the embedded one, or `None`.
    """

    world: GenericsWorld | None = field(default=None)

    def check(self, filter_: str, asks_critic: bool) -> None:
        """As `Material.check`."""
        if asks_critic and self.is_valid is None and self.labels is None:
            raise InputError(
                f"options.filter={filter_} needs labels for the critic: set data.labels to a file of head, relation, tail and "
                "label. To get statements to label, run with options.filter=none options.rounds=0 first (to_label.jsonl)."
            )
        super().check(filter_, asks_critic)


class StatementGeneration(TaskDefaults):
    """A model writes statements, which are filtered, and is trained on those that are kept."""

    name = "statement_generation"
    kind = "statements"
    unit = "tokens"
    metric = "accuracy"
    higher_is_better = True

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Default: the embedded world with a small Llama that is first trained on its text; a pretrained student writes
        about the concepts of `generics`."""
        data = recipe.get("data") or {}
        own = recipe.get("student")  # a pretrained one does not know the world, whose truth is not that of its texts
        data.setdefault("name", WORLD if own is None or is_new_causal_lm(str(own.get("model"))) else "generics")
        data.setdefault("max_length", 32)
        if recipe.get("student") is None:
            recipe["student"] = {"model": "llama:hidden=64,layers=1,heads=4,init=0.1"}
        recipe["data"] = data
        recipe["trainer"] = merged(_TRAINER, recipe.get("trainer") or {})
        return recipe

    def material(self, recipe: Mapping[str, Any]) -> StatementMaterial:
        """Read concepts, relational phrases and labels. `recipe` is plain values, with `data` and `seed`."""
        data = recipe["data"]
        if data["name"] == WORLD:
            if data.get("relations") is not None:
                raise InputError(f"data.relations has no effect on {WORLD}, which has its own. Leave it out.")
            world = GenericsWorld(data.get("world_seed", recipe["seed"]))
            note = f"World {world.seed}: {len(world.concepts)} concepts; its truth is known."
            found = StatementMaterial(
                world.concepts, _phrases(RELATIONS), is_valid=world.valid, notes=[note], world=world
            )
        else:
            for key in ("world_seed", "sentences"):
                if key in data:
                    raise InputError(f"data.{key} belongs to {WORLD} and has no effect on other data. Leave it out.")
            own = generic_words()
            seeds = (
                list(own["concepts"]) if data["name"] == "generics" else load_events(data["name"], data.get("columns"))
            )
            named = data.get("relations")
            phrases = list(own["relations"]) if named is None else load_events(named, key="data.relations")
            note = f"{len(seeds)} concepts, {len(phrases)} relational phrases."
            found = StatementMaterial(seeds, _phrases(phrases), notes=[note])
        if data.get("labels") is not None:
            found.labels = load_labels(str(data["labels"]), found.relations)
        text = json.dumps([dict(data), found.seeds, list(found.relations), found.labels])
        found.hash = hashlib.sha256(text.encode()).hexdigest()
        return found

    def start_recipe(self, recipe: Mapping[str, Any], material: StatementMaterial, folder: Path) -> dict[str, Any]:
        """The run that trains a new model on the world's text, which is written to `folder`.

        Raises:
            InputError: the data have no text to train on.
        """
        if material.world is None:
            raise InputError(
                f"student={recipe['student']['model']} is new and knows nothing about the concepts of data "
                f"{recipe['data']['name']}: name a pretrained causal LM, or data={WORLD}."
            )
        sentences = material.world.text(recipe["data"].get("sentences", 20_000))
        write_records(folder / "train.jsonl", [{"text": text} for text in sentences])
        return {**self._recipe(recipe, recipe["student"], folder), "trainer": dict(_START)}

    def student_recipe(self, recipe: Mapping[str, Any], model: str, folder: Path) -> dict[str, Any]:
        """The run that trains `model` on a corpus in `folder`."""
        return {**self._recipe(recipe, {**recipe["student"], "model": model}, folder), "trainer": recipe["trainer"]}

    def _recipe(self, recipe: Mapping[str, Any], student: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        data = {k: recipe["data"][k] for k in ("max_length", "vocab_size", "tokenizer") if k in recipe["data"]}
        data = data if is_new_causal_lm(student["model"]) else {"max_length": data["max_length"]}
        data |= {"name": str(folder), "pack": False}
        return {
            "task": "language_modeling",
            "method": "sft",
            "data": data,
            "student": student,
            **{k: recipe[k] for k in ("seed", "reduction", "eval_split")},
        }

    def prepare(self, recipe: Any) -> Prepared:
        """The concepts as examples, for `check`. A pipeline uses `material`."""
        found = self.material(recipe.dump())
        empty: Any = list
        return Prepared(found.seeds, found.seeds, found.seeds, empty, 0, notes=found.notes, hashes={"data": found.hash})

    def model(self, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> ModelAdapter:
        """Not available: a pipeline trains a model on the generated data.

        Raises:
            InputError: always.
        """
        raise InputError("Models of statement_generation are trained by its methods, in runs below the run folder.")

    def evaluate(self, student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any]) -> dict[str, Any]:
        """As `model`."""
        raise InputError(
            "Runs of statement_generation are evaluated by their methods; read evaluation.json of the run folder."
        )


def _phrases(names: Iterable[str]) -> dict[str, Relation]:
    return {name: Relation(name, name, "", ()) for name in names}
