"""Text generation: a teacher generates text about seed events and relations. Embedded: a small world with known truth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import DataLoader

from understudy.curation import binary_labels, recall_curve
from understudy.data.knowledge import Relation, load_events, load_labels, load_relations
from understudy.errors import InputError, nearest
from understudy.generation import Completion, OracleSource, Request, Source
from understudy.models import ModelAdapter, is_new_causal_lm
from understudy.synthetic.events import EventsWorld
from understudy.tasks.base import Prepared, TaskDefaults, merged
from understudy.training.pipeline import ORACLE

_OPTIONS = ("name", "relations", "labels", "world_seed", "max_length", "vocab_size", "tokenizer", "columns")
_TRAINER = {
    "max_steps": 1500,
    "per_device_train_batch_size": 32,
    "learning_rate": 4e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "weight_decay": 0.0,
}


@dataclass
class Material:
    """The inputs of the generation.

    Args:
        seeds: events for prompts.
        relations: by name.
        labels: triples with human labels, or `None`.
        is_valid: whether (head, relation, tail) is true, if that is known.
        source: the world's own teacher, or `None`.
        notes: sentences for the report.
        hash: of all inputs.
    """

    seeds: list[str]
    relations: dict[str, Relation]
    labels: list[dict[str, Any]] | None = None
    is_valid: Callable[[str, str, str], bool] | None = None
    source: Source | None = None
    notes: list[str] = field(default_factory=list)
    hash: str = ""

    def check(self, filter_: str, asks_critic: bool) -> None:
        """Refuse a filter that these data cannot serve.

        Raises:
            InputError: it needs a known truth, or labels of both classes for a critic.
        """
        if filter_ == "oracle" and self.is_valid is None:
            raise InputError(
                "options.filter=oracle needs data whose truth is known (an embedded world): use critic or none."
            )
        if asks_critic and self.is_valid is None and self.labels is None:
            raise InputError(
                f"options.filter={filter_} needs labels for the critic: set data.labels to a file of head, relation, "
                "tail and label. To get triples to label, run with options.filter=none first (to_label.jsonl), and set "
                "options.log to a folder in both runs, so that nothing is written twice."
            )
        if asks_critic and self.labels is not None:
            good = binary_labels([t["label"] for t in self.labels])
            recall_curve(good, [0.0] * len(good))


class TextGeneration(TaskDefaults):
    """A teacher generates a corpus, which is filtered, and a small model is trained on it."""

    name = "text_generation"
    kind = "generation"
    unit = "tokens"
    metric = "student_valid"
    higher_is_better = True

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Default: the embedded world with its oracle as teacher and a small Llama. Another teacher does not know that
        world: its prompts use the relations' own examples."""
        data = recipe.get("data") or {}
        teacher = recipe.get("teacher")
        data.setdefault("name", "events_world" if teacher is None or teacher["model"] == ORACLE else "events")
        data.setdefault("max_length", 64)
        if recipe.get("teacher") is None and data["name"] == "events_world":
            recipe["teacher"] = {"model": ORACLE}
        if recipe.get("student") is None:
            recipe["student"] = {"model": "llama:hidden=64,layers=1,heads=4,init=0.1"}
        recipe["data"] = data
        recipe["trainer"] = merged(_TRAINER, recipe.get("trainer") or {})
        return recipe

    def material(self, recipe: Mapping[str, Any]) -> Material:
        """Read seeds, relations and labels. `recipe` is plain values, with `data`, `teacher` and `seed`."""
        data, teacher = recipe["data"], recipe.get("teacher")
        for key in data:
            if key not in _OPTIONS:
                raise InputError(f"Unknown key data.{key}.{nearest(key, _OPTIONS)} Known: {', '.join(_OPTIONS)}.")
        embedded = data["name"] == "events_world"
        if teacher is None or (teacher["model"] == ORACLE and not embedded):
            raise InputError(
                f"Data {data['name']!r} needs a teacher that generates text: set teacher to a causal LM, or to a model behind an "
                "endpoint (teacher.endpoint.url=http://...). The oracle knows nothing but events_world."
            )
        found = self._world(data, recipe["seed"], teacher["model"] == ORACLE) if embedded else self._events(data)
        if data.get("labels") is not None:
            found.labels = load_labels(str(data["labels"]), found.relations)
        wording = {n: [r.text, r.ask, r.examples] for n, r in found.relations.items()}
        text = json.dumps([dict(data), found.seeds, wording, found.labels])
        found.hash = hashlib.sha256(text.encode()).hexdigest()
        return found

    def _world(self, data: Mapping[str, Any], seed: int, oracle: bool) -> Material:
        if data.get("relations") is not None:
            raise InputError("data.relations has no effect on events_world, which has its own. Leave it out.")
        number = data.get("world_seed", seed)
        if not isinstance(number, int) or number < 0:
            raise InputError(f"data.world_seed is {number!r} and must be a whole number of at least 0.")
        world = EventsWorld(number)
        relations = world.relations()
        seeds = list(dict.fromkeys(head for relation in relations.values() for head, _ in relation.examples))
        source = _oracle(world, f"events_world {number} {seed}") if oracle else None
        note = f"World {number}: {len(world.heads)} events, {len(relations)} relations; " + (
            "its truth is known." if oracle else "its made-up truth says nothing of what this teacher writes."
        )
        return Material(seeds, relations, is_valid=world.valid if oracle else None, source=source, notes=[note])

    def _events(self, data: Mapping[str, Any]) -> Material:
        if "world_seed" in data:
            raise InputError("data.world_seed belongs to events_world and has no effect on other data. Leave it out.")
        relations = load_relations(data.get("relations"))
        if data["name"] == "events":  # the events of the relations' own examples
            seeds = list(dict.fromkeys(head for relation in relations.values() for head, _ in relation.examples))
        else:
            seeds = load_events(str(data["name"]), data.get("columns"))
        return Material(seeds, relations, notes=[f"{len(seeds)} seed events, {len(relations)} relations."])

    def oracle(self, recipe: Mapping[str, Any], role: str) -> Source:
        """The world's own teacher."""
        source = self.material(recipe).source if role == "teacher" else None
        return source if source is not None else super().oracle(recipe, role)

    def vocabulary(self, recipe: Mapping[str, Any]) -> int:
        """Of the tokenizer that is trained for a new student."""
        return int(recipe["data"].get("vocab_size", 1024))

    def student_recipe(self, recipe: Mapping[str, Any], corpus: Path, tokenizer: Path) -> dict[str, Any]:
        """The student's own run: language modelling on a corpus. A new model takes `tokenizer`, unless the recipe names one."""
        data = {"vocab_size": self.vocabulary(recipe), **recipe["data"]}
        if is_new_causal_lm(recipe["student"]["model"]):
            data.setdefault("tokenizer", str(tokenizer))
        passed = {k: data[k] for k in ("max_length", "vocab_size", "tokenizer") if k in data}
        passed |= {"name": str(corpus), "pack": False}
        own = {k: recipe[k] for k in ("student", "trainer", "seed", "reduction", "eval_split")}
        return {"task": "language_modeling", "method": "sft", "data": passed, **own}

    def prepare(self, recipe: Any) -> Prepared:
        """The seed events as examples, for `check`. A pipeline uses `material`."""
        found = self.material(recipe.dump())
        empty: Any = list
        seeds = found.seeds
        return Prepared(seeds, seeds, seeds, empty, 0, notes=found.notes, hashes={"data": found.hash})

    def model(self, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> ModelAdapter:
        """Not available: a pipeline trains a model on the generated data.

        Raises:
            InputError: always.
        """
        raise InputError("Models of text_generation are trained by its methods, in runs below the run folder.")

    def evaluate(self, student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any]) -> dict[str, Any]:
        """As `model`."""
        raise InputError(
            "Runs of text_generation are evaluated by their methods; read evaluation.json of the run folder."
        )


def _oracle(world: EventsWorld, name: str) -> OracleSource:
    """The world's teacher. About one event in fifty is truncated at the maximum length."""

    def write(request: Request, generator: np.random.Generator) -> Completion:
        assert isinstance(request.prompt, str)
        draws = generator.random(3).tolist()
        question = request.prompt.rsplit("\n", 1)[-1]
        text, log_prob = world.write(question, draws[:2], request.temperature, request.top_p)
        cut_off = draws[2] < 0.02 and "Event:" in question
        finish: Any = "length" if cut_off else "stop"
        return Completion(f" {text}", finish, log_prob, len(request.prompt.split()), len(text.split()))

    return OracleSource(name, write)
