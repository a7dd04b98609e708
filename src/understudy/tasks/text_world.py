"""Worlds of texts whose truth is known and is what `teacher: oracle` names: a random network, which `oracle: oracle` asks for texts
too, or a chain that looks two tokens back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from understudy.data import collate_text, show_batch
from understudy.data.noise import uniform
from understudy.data.samples import Sample, sampled_row
from understudy.data.tokenize import TextSet
from understudy.errors import InputError
from understudy.evaluation import evaluate
from understudy.generation.decoding import sample
from understudy.models import ModelAdapter, tokenizer_hashes
from understudy.synthetic.letters import letter_oracle, letter_tokenizer
from understudy.synthetic.markov import ChainAdapter, chain_adapter, markov
from understudy.tasks.base import Prepared, merged
from understudy.tasks.language_modeling import LanguageModeling
from understudy.training.pipeline import ORACLE

PROMPT, MOST = 6, 8
"""Letters of a prompt, and tokens after it at most."""
_ADAM = {"learning_rate": 3e-3, "lr_scheduler_type": "constant", "weight_decay": 0.0}
_CHAIN = {
    "max_steps": 600,
    "per_device_train_batch_size": 64,
    "learning_rate": 2e-2,
    "lr_scheduler_type": "linear",
}
_START = {**_ADAM, "per_device_train_batch_size": 64}


class TextWorld(LanguageModeling):
    """Learn to write as a teacher does, in a world that knows the truth which the teacher learned from."""

    name = "text_world"
    metric = "nll"
    unit = "tokens"
    start_data: Mapping[str, Any] = MappingProxyType({"for_teacher": True})

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Of letters few prompts to distil on; teacher and student have learned from other texts of the oracle before, the
        student briefly. Of the chain the teacher is the truth, and the student a new bigram. Each seed is a world of its own."""
        data = recipe.get("data") or {}
        data.setdefault("name", "letters")
        data.setdefault("seed", recipe["seed"])
        recipe["data"] = data
        if data["name"] == "markov":
            recipe["teacher"], recipe["student"] = recipe.get("teacher") or ORACLE, recipe.get("student") or "bigram:20"
            recipe["trainer"] = merged({**_CHAIN, "weight_decay": 0.0}, recipe.get("trainer") or {})
            return recipe
        for side, steps in (("teacher", 200), ("student", 60)):
            if recipe.get(side) is None:
                recipe[side] = {
                    "model": "llama:hidden=64,layers=2,heads=4,context=32",
                    "train": {**_START, "max_steps": steps},
                }
        recipe["trainer"] = merged(
            {**_ADAM, "max_steps": 300, "per_device_train_batch_size": 20}, recipe.get("trainer") or {}
        )
        return recipe

    def prepare(self, recipe: Any) -> Prepared:
        data = {"prompts": 20, "texts": 2000, "held_out": 500, **recipe.data}
        if data["name"] == "markov":
            return _chain(recipe.data, data)
        if data["name"] != "letters":
            raise InputError(f"No world {data['name']!r}. Known: letters, markov.")
        tokenizer, chance = letter_tokenizer(), torch.Generator().manual_seed(data["seed"])
        oracle = letter_oracle(len(tokenizer), chance)
        sizes = {
            "train": data["prompts"],
            "clean": data["texts"],
            "validation": data["held_out"],
            "test": data["held_out"],
        }
        splits, first = {}, 0
        for name, number in sizes.items():
            prompts = torch.randint(1, len(tokenizer), (number, PROMPT), generator=chance)
            splits[name] = _texts(oracle, tokenizer, prompts, first, data["seed"])
            first += number
        return Prepared(
            train=splits["clean" if data.get("for_teacher") else "train"],
            validation=splits["validation"],
            test=splits["test"],
            teacher_train=splits["clean"],
            collate=partial(collate_text, pad_id=tokenizer.pad_token_id),
            classes=len(tokenizer),
            tokenizer=tokenizer,
            hashes={
                "data": hashlib.sha256(repr(sorted(data.items())).encode()).hexdigest(),
                **tokenizer_hashes(tokenizer),
            },
            show=lambda batch: show_batch(batch, tokenizer),
            facts={"packing": "none", "longest": PROMPT + MOST, "oracle": oracle},
        )

    def model(self, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> ModelAdapter:
        """As for any language model; `oracle` is the world's own. In `markov` a policy of transitions."""
        if (world := prepared.facts.get("world")) is not None:
            return chain_adapter(spec.model, source, world, table=spec.model == ORACLE)
        own = prepared.facts["oracle"] if source is None and spec.model == ORACLE else source
        return super().model(spec, prepared, own)

    def evaluate(self, student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any]) -> dict[str, Any]:
        """As for any language model; in `markov` with the exact distances from the truth, in nats a text."""
        if not isinstance(student, ChainAdapter):
            return super().evaluate(student, teacher, loader)
        found = evaluate(student, teacher, loader, kind=self.kind)
        return {**found, "metrics": found["metrics"] | student.distances()}


def _chain(given: Mapping[str, Any], data: Mapping[str, Any]) -> Prepared:
    """The world of a chain: its texts."""
    if "prompts" in given:
        raise InputError("data.prompts belongs to letters: markov distils on data.texts texts. Leave it out.")
    world = markov(data["seed"], number=data["texts"], held_out=data["held_out"])
    splits = world.texts
    return Prepared(
        train=splits["clean" if data.get("for_teacher") else "train"],
        validation=splits["validation"],
        test=splits["test"],
        teacher_train=splits["clean"],
        collate=collate_text,
        classes=len(world.log_p),
        hashes={"data": hashlib.sha256(repr(sorted(data.items())).encode()).hexdigest()},
        facts={"world": world},
    )


def _texts(oracle: Any, tokenizer: Any, prompts: torch.Tensor, first: int, seed: int) -> TextSet:
    """Rows of prompts `[texts, letters]` with what the oracle writes after them, numbered from `first`."""
    ids = torch.arange(first, first + len(prompts))
    keys = (uniform(ids, (1,), seed=seed, step=0)[:, 0] * 2**53).long()
    asked = prompts.tolist()
    texts = sample(oracle, asked, keys, most=MOST, vocabulary=len(tokenizer), ends={0}, pad=0, in_flight=500)
    rows = [Sample(i, 0, PROMPT, (*p, *text)) for i, p, text in zip(ids.tolist(), asked, texts, strict=True)]
    return TextSet([sampled_row(row, tokenizer, labelled=True) for row in rows])
