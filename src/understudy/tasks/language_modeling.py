"""Language modelling: the standard library's own text by default, text sets from `UNDERSTUDY_DATA`, any text set."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from understudy.data import collate_text, encode, load_text, show_batch, train_tokenizer
from understudy.errors import InputError
from understudy.models import CausalLMRows, RowModel, is_new_causal_lm, load_causal_lm, load_tokenizer, tokenizer_hashes
from understudy.models.layouts import Packing
from understudy.models.tokenizers import compare_tokenizers
from understudy.tasks.base import MODULE, Prepared, RowTask, merged
from understudy.tasks.padding import checked_packing, padding_notes

_TRAINER = {
    "max_steps": 300,
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.0,
}
_TEACHER = {"max_steps": 400, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "lr_scheduler_type": "cosine"}


class LanguageModeling(RowTask):
    """Predict the next token of a text, a conversation or a completion."""

    name = "language_modeling"
    kind = "text"
    unit = "tokens"
    metric = "bits_per_byte"
    higher_is_better = False

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """The embedded text with a small Llama trained as teacher, unless the recipe names others."""
        data = recipe.get("data") or {}
        data.setdefault("name", "stdlib")
        teacher = recipe.get("teacher")
        if teacher is None:
            if data["name"] == "lm_domains":
                recipe["teacher"] = {"model": "lm_domains_6m"}
            else:
                recipe["teacher"] = {"model": "llama:hidden=128,layers=3,heads=4", "train": dict(_TEACHER)}
        if recipe.get("student") is None:
            recipe["student"] = {"model": "llama:hidden=48,layers=2,heads=4"}
        data.setdefault("max_length", 128)
        data.setdefault("pack", True)
        data.setdefault("packing", "auto")
        recipe["data"] = data
        recipe["trainer"] = merged(_TRAINER, recipe.get("trainer") or {})
        return recipe

    def prepare(self, recipe: Any) -> Prepared:
        data = dict(recipe.data)
        length, pack, packing = data.pop("max_length"), data.pop("pack"), checked_packing(data.pop("packing"))
        truncation, vocabulary = data.pop("truncation", "end"), data.pop("vocab_size", 1024)
        own_tokenizer = data.pop("tokenizer", None)
        splits = load_text(data)
        notes = list(splits.notes)
        tokenizer = self._tokenizer(recipe, own_tokenizer, splits, vocabulary, notes)
        sets: dict[str, Any] = {}
        for name in ("train", "validation", "test"):
            records = getattr(splits, name)
            sets[name], counts = encode(records, tokenizer, max_length=length, pack=pack, truncation=truncation)
            notes.append(f"{name}: {counts}")
        notes += padding_notes(recipe, sets["train"], lambda row: [row["input_ids"]], packing)
        return Prepared(
            **sets,
            teacher_train=sets["train"],
            collate=partial(collate_text, pad_id=tokenizer.pad_token_id or 0),
            classes=len(tokenizer),
            tokenizer=tokenizer,
            notes=notes,
            hashes={"data": splits.hash, **tokenizer_hashes(tokenizer)},
            show=lambda batch: show_batch(batch, tokenizer),
            facts={"packing": packing},
        )

    def _tokenizer(self, recipe: Any, own: str | None, splits: Any, vocabulary: int, notes: list[str]) -> Any:
        """The one tokenizer of a run. Two pretrained sides must agree by content, not by vocabulary size."""
        found: dict[str, Any] = {}
        if own is not None:
            found["data.tokenizer"] = load_tokenizer(own)
        for side in ("teacher", "student"):
            spec = getattr(recipe, side)
            if spec is None or (spec.model.startswith(MODULE) and spec.tokenizer is None):
                continue
            if not is_new_causal_lm(spec.model):
                found[side] = load_tokenizer(spec.tokenizer or spec.model, trust_remote_code=spec.trust_remote_code)
        if not found:
            return train_tokenizer(splits.texts(), vocabulary)
        (first, chosen), *rest = found.items()
        for name, other in rest:
            difference = compare_tokenizers(chosen, other)
            if difference is not None:
                raise InputError(
                    f"{first} and {name} have different tokenizers: {difference}. Choose a student of the teacher's "
                    "family, or a new one (student=llama:hidden=...), which takes the teacher's tokenizer."
                )
            if chosen.chat_template != other.chat_template:
                notes.append(f"{first} and {name} have different chat templates: that of {first} is used for both.")
        return chosen

    def _rows(self, model: Any, vocabulary: int, packing: Packing) -> CausalLMRows:
        return CausalLMRows(model, vocabulary, packing)

    def model(self, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> RowModel:
        model = load_causal_lm(
            spec.model if source is None else source,
            tokenizer=prepared.tokenizer,
            dtype=spec.dtype,
            quantization=spec.quantization,
            trust_remote_code=spec.trust_remote_code,
        )
        packing = prepared.facts["packing"]
        rows = self._rows(model, prepared.classes, packing)
        notes = []
        if rows.padding:
            notes.append(f"{spec.model}: {rows.padding} padding rows of the head beyond the tokenizer are left out.")
        if packing != "none" and rows.layouts.reason is not None:
            notes.append(f"{spec.model}: batches are computed with their padding, for {rows.layouts.reason}.")
        prepared.notes.extend(note for note in notes if note not in prepared.notes)
        return rows
