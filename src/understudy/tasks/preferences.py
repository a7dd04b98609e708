"""Preferences: pairs, lists or unpaired examples for any causal LM. Embedded: the order of words in real text."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from understudy.data import collate_lists, encode_lists, load_preferences, show_batch
from understudy.evaluation.preference import evaluate_preferences
from understudy.models import CausalLMAdapter, ModelAdapter, SequenceAdapter, tokenizer_hashes
from understudy.models.layouts import Packing
from understudy.synthetic.word_order import word_order
from understudy.tasks.base import Prepared, merged
from understudy.tasks.language_modeling import LanguageModeling
from understudy.tasks.padding import checked_packing, padding_notes

_TRAINER = {
    "max_steps": 150,
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
}
_START = {"max_steps": 300, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "lr_scheduler_type": "cosine"}


class Preferences(LanguageModeling):
    """Learn which of several completions is better."""

    name = "preferences"
    kind = "preference"
    unit = "lists"
    metric = "accuracy"
    higher_is_better = True
    mixes = aligns = False

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Default: word order, with a small Llama that is first trained on the best candidates."""
        data = recipe.get("data") or {}
        data.setdefault("name", "word_order")
        data.setdefault("max_length", 128 if data["name"] == "word_order" else 512)
        data.setdefault("packing", "auto")
        recipe["data"] = data
        if recipe.get("student") is None:
            recipe["student"] = {"model": "llama:hidden=64,layers=2,heads=4", "train": dict(_START)}
        recipe["trainer"] = merged(_TRAINER, recipe.get("trainer") or {})
        return recipe

    def prepare(self, recipe: Any) -> Prepared:
        data = dict(recipe.data)
        length, vocabulary = data.pop("max_length"), data.pop("vocab_size", 1024)
        own_tokenizer, packing = data.pop("tokenizer", None), checked_packing(data.pop("packing"))
        splits = load_preferences(data, {"word_order": word_order})
        notes = list(splits.notes)
        tokenizer, _ = self._tokenizers(recipe, own_tokenizer, splits, vocabulary, notes)
        sets: dict[str, Any] = {}
        warnings, longest = [], 0
        for name in ("train", "validation", "test"):
            sets[name], counts = encode_lists(getattr(splits, name), tokenizer, max_length=length)
            notes.append(f"{name}: {counts}")
            warnings += counts.warnings(name, length)
            longest = max(longest, counts.longest)
        notes += padding_notes(recipe, sets["train"], lambda row: [ids for ids, _ in row["sequences"]], packing)
        return Prepared(
            **sets,
            teacher_train=sets["train"],
            collate=partial(collate_lists, pad_id=tokenizer.pad_token_id or 0),
            classes=len(tokenizer),
            tokenizer=tokenizer,
            notes=notes,
            warnings=warnings,
            hashes={"data": splits.hash, **tokenizer_hashes(tokenizer)},
            show=lambda batch: show_batch(batch, tokenizer),
            facts={"packing": packing, "chosen": own_tokenizer is not None, "longest": longest},
        )

    def _rows(self, model: Any, vocabulary: int, packing: Packing) -> CausalLMAdapter:
        return SequenceAdapter(model, vocabulary, packing)

    def evaluate(self, student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any]) -> dict[str, Any]:
        """Order of the candidates, and the distance from the reference model if `setup` computed its log-probabilities."""
        return evaluate_preferences(student, loader)
