"""Language modelling: the standard library's own text by default, text sets from `UNDERSTUDY_DATA`, any text set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from understudy.data import TextSplits, collate_text, encode, load_text, show_batch, train_tokenizer
from understudy.data.packing import MULTIPLE
from understudy.errors import InputError, nearest
from understudy.evaluation.leakage import Canaries, Canary, exposed, plant
from understudy.models import (
    CausalLMAdapter,
    EncoderDecoderAdapter,
    ModelAdapter,
    is_encoder_decoder,
    is_new_causal_lm,
    load_causal_lm,
    load_tokenizer,
    tokenizer_hashes,
)
from understudy.models.layouts import Packing
from understudy.models.positions import positions
from understudy.models.tokenizers import compare_tokenizers
from understudy.models.weights import notes_of
from understudy.tasks.base import COPY, MODULE, LabelledTask, Prepared, merged
from understudy.tasks.padding import checked_packing, padding_notes
from understudy.teachers import Aligner, Ensemble
from understudy.training.pipeline import ORACLE

SPLITS = ("train", "validation", "test")
_TRAINER = {
    "max_steps": 300,
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.0,
}
_HOW = {"max_length", "pack", "packing", "truncation", "vocab_size", "tokenizer", "only", "canaries"}
_TEACHER = {"max_steps": 400, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "lr_scheduler_type": "cosine"}


def _only(records: list[Any], only: str | None, domains: Sequence[str], split: str) -> list[Any]:
    """The records of one domain, or all."""
    if only is None:
        return records
    if only not in domains:
        raise InputError(
            f"Unknown domain data.only={only!r}.{nearest(str(only), domains)} Known: {', '.join(domains) or 'none'} "
            "(of the column data.domain_column)."
        )
    found = [r for r in records if r["domain"] == only]
    if not found:
        raise InputError(f"Domain {only!r} has no record in the {split} split.")
    return found


def _planted(recipe: Any, given: Mapping[str, Any] | None, read: dict[str, list[Any]]) -> list[Canary]:
    """Plant secrets in the training records of `read`, or in a part `teacher_train` of its own; returns them."""
    if given is None:
        return []
    spec = Canaries(**given)
    secrets = spec.secrets()
    clean, planted = read["train"], plant(read["train"], secrets, spec.repeats, spec.seed)
    if spec.planted != "student" and (recipe.teacher is None or recipe.teacher.train is None):
        raise InputError(
            f"data.canaries.planted is {spec.planted!r} and no teacher is trained here that could read them: set "
            "data.canaries.planted=student, or teacher.train."
        )
    read["train"] = clean if spec.planted == "teacher" else planted
    read["teacher_train"] = clean if spec.planted == "student" else planted
    return secrets


def _exposed(
    secrets: Sequence[Canary], tokenizer: Any, student: ModelAdapter, teacher: ModelAdapter | None
) -> dict[str, Any]:
    """`exposed`; a teacher of several models has no exposure of its own."""
    one = None if teacher is None or isinstance(teacher, Ensemble) else teacher.model
    return exposed(secrets, tokenizer, student.model, one)


def _alignment(aligner: Aligner, examples: Any, sample: int = 64) -> str:
    """A note on the alignment of two tokenizers, from the first validation examples."""
    rows = [examples[i]["input_ids"].tolist() for i in range(min(sample, len(examples)))]
    single, longer = aligner.shares(rows)
    difference = compare_tokenizers(aligner.student.tokenizer, aligner.teacher.tokenizer)
    return (
        f"Student and teacher have different tokenizers: {difference}. They are aligned by byte offsets: "
        f"{single:.1%} of the bytes are in groups of one token to one, {longer:.1%} in longer groups, which keep the "
        f"text's likelihood alone, and {1 - single - longer:.1%} in none; {len(aligner.partner)} tokens are in both "
        "vocabularies. The student's template is used, and the teacher is not evaluated beside it."
    )


def _also(other: Any) -> dict[str, str]:
    return {"teacher_tokenizer": tokenizer_hashes(other)["tokenizer"]} if other is not None else {}


def _same_ends(first: str, one: Any, name: str, other: Any, records: Sequence[Any]) -> None:
    """Raise an error if two models end a text, or format a conversation, differently: a student cannot learn both."""
    differ = None
    if one.eos_token_id != other.eos_token_id:
        differ = f"{first} ends a text with {one.eos_token!r} and {name} with {other.eos_token!r}"
    elif one.chat_template != other.chat_template and any(isinstance(v, list) for r in records[:1] for v in r.values()):
        differ = f"{first} and {name} have different chat templates"
    if differ is not None:
        raise InputError(f"{differ}: name the tokenizer whose way both are to use (data.tokenizer=FOLDER or Hub id).")


def _check_positions(name: str, model: nn.Module, longest: int) -> None:
    """Raise an error for a model with fewer positions than the longest row has tokens, padding of batches included."""
    most = positions(model)
    if most is not None and most < -(-longest // MULTIPLE) * MULTIPLE:
        raise InputError(
            f"{name} has {most} positions and the longest row has {longest} tokens (rows are padded to a multiple of "
            f"{MULTIPLE}): set data.max_length={most // MULTIPLE * MULTIPLE}, or choose a model with more positions."
        )


class LanguageModeling(LabelledTask):
    """Predict the next token of a text, a conversation or a completion."""

    name = "language_modeling"
    kind = "text"
    unit = "tokens"
    metric = "bits_per_byte"
    higher_is_better = False
    aligns = True
    """Whether a teacher may have another tokenizer."""

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Default: the embedded text with a small Llama trained as teacher."""
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
        data.setdefault("truncation", "end")
        data.setdefault("pack", True)
        data.setdefault("packing", "auto")
        recipe["data"] = data
        recipe["trainer"] = merged(_TRAINER, recipe.get("trainer") or {})
        return recipe

    def first_data(self, data: Mapping[str, Any], side: str) -> dict[str, Any]:
        """Secrets are planted in its texts if they are planted in this side's."""
        found = super().first_data(data, side)
        secrets = found.pop("canaries", None)
        if secrets is not None and Canaries(**secrets).planted in (side, "both"):
            found["canaries"] = {**secrets, "planted": "student"}  # the one that is trained there
        return found

    def prepare(self, recipe: Any) -> Prepared:
        how = {k: v for k, v in recipe.data.items() if k in _HOW}
        return self._prepared(recipe, how, load_text({k: v for k, v in recipe.data.items() if k not in _HOW}))

    def _prepared(self, recipe: Any, how: Mapping[str, Any], splits: TextSplits) -> Prepared:
        """Encoded records. `how` is what of the recipe's data says how to encode them."""
        length, pack, packing = how["max_length"], how["pack"], checked_packing(how["packing"])
        truncation, vocabulary = how["truncation"], how.get("vocab_size", 1024)
        own_tokenizer, only = how.get("tokenizer"), how.get("only")
        notes = list(splits.notes)
        tokenizer, other = self._tokenizers(recipe, own_tokenizer, splits, vocabulary, notes)
        sets: dict[str, Any] = {}
        warnings, longest = [], 0
        read = {name: _only(getattr(splits, name), only, splits.domains, name) for name in SPLITS}
        secrets = _planted(recipe, how.get("canaries"), read)
        for name, records in read.items():
            sets[name], counts = encode(records, tokenizer, max_length=length, pack=pack, truncation=truncation)
            notes.append(f"{name}: {counts}")
            warnings += counts.warnings(name, length)
            longest = max(longest, counts.longest)
        notes += padding_notes(recipe, sets["train"], lambda row: [row["input_ids"]], packing)
        aligner = None
        if other is not None:
            aligner = Aligner(tokenizer, other)
            warnings.append(_alignment(aligner, sets["validation"]))
        return Prepared(
            **{name: sets[name] for name in SPLITS},
            aligner=aligner,
            warnings=warnings,
            teacher_train=sets.get("teacher_train", sets["train"]),
            measure=partial(_exposed, secrets, tokenizer) if secrets else None,
            collate=partial(collate_text, pad_id=tokenizer.pad_token_id or 0, domains=splits.domains),
            domains=splits.domains,
            classes=len(tokenizer),
            tokenizer=tokenizer,
            notes=notes,
            hashes={"data": splits.hash, **tokenizer_hashes(tokenizer), **_also(other)},
            show=lambda batch: show_batch(batch, tokenizer),
            facts={
                "conversations": any("messages" in record for record in splits.train[:1]),
                "packing": packing,
                "chosen": own_tokenizer is not None,
                "longest": longest,
            },
        )

    def _tokenizers(
        self, recipe: Any, own: str | None, splits: Any, vocabulary: int, notes: list[str]
    ) -> tuple[Any, Any]:
        """The tokenizer of a run, and the teacher's if it differs in content (not only in vocabulary size)."""
        found: dict[str, Any] = {}
        if own is not None:
            found["data.tokenizer"] = load_tokenizer(own)
        specs = {s: getattr(recipe, s) for s in ("teacher", "student", "oracle") if getattr(recipe, s) is not None}
        for side, spec in {where: part for s, one in specs.items() for where, part in one.parts(s).items()}.items():
            if spec.model in (COPY, ORACLE) or (spec.model.startswith(MODULE) and spec.tokenizer is None):
                continue
            if spec.endpoint is not None and spec.tokenizer is None:  # compared with the server's own later
                continue
            if spec.tokenizer is not None or not is_new_causal_lm(spec.model):
                found[side] = load_tokenizer(spec.tokenizer or spec.model, trust_remote_code=spec.trust_remote_code)
        if not found and recipe.teacher is not None and recipe.teacher.endpoint is not None:
            raise InputError(
                f"Teacher {recipe.teacher.model!r} is served, and nothing names its tokenizer: set teacher.tokenizer (a folder "
                "or Hub id), or choose a pretrained student of its family."
            )
        if not found:
            return train_tokenizer(splits.texts(), vocabulary), None
        base, theirs = found.get("data.tokenizer") or found.get("student"), None
        if self.aligns and base is not None and "teacher" in found and compare_tokenizers(base, found["teacher"]):
            theirs = found.pop("teacher")
        (first, chosen), *rest = found.items()
        for name, other in rest:
            difference = compare_tokenizers(chosen, other)
            if difference is not None:
                raise InputError(
                    f"{first} and {name} have different tokenizers: {difference}. Choose a student of the teacher's "
                    "family, or a new one (student=llama:hidden=...), which takes the teacher's tokenizer."
                )
            if first != "data.tokenizer":  # else it was chosen for both
                _same_ends(first, chosen, name, other, splits.train)
        return chosen, theirs

    def _same_tokens(self, folder: Path, tokenizer: Any) -> None:
        """Raise an error for a model of an earlier run with other tokens, whose ids would have another meaning."""
        difference = compare_tokenizers(load_tokenizer(str(folder)), tokenizer)
        if difference is not None:
            raise InputError(
                f"The model in {folder} was trained with another tokenizer than this run has: {difference}. Name the one "
                "tokenizer of both (data.tokenizer), and choose another output."
            )

    def _rows(self, model: Any, vocabulary: int, packing: Packing) -> CausalLMAdapter:
        return CausalLMAdapter(model, vocabulary, packing)

    def model(self, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> ModelAdapter:
        if isinstance(source, Path):
            self._same_tokens(source, prepared.tokenizer)
        model = load_causal_lm(
            spec.model if source is None else source,
            tokenizer=prepared.tokenizer,
            dtype=spec.dtype,
            quantization=spec.quantization,
            trust_remote_code=spec.trust_remote_code,
            encoders=True,
        )
        if prepared.aligner is None or prepared.tokenizer is not prepared.aligner.teacher.tokenizer:
            _check_positions(spec.model, model, prepared.facts["longest"])
        if is_encoder_decoder(model):
            prepared.say(notes_of(model))
            return EncoderDecoderAdapter(model, prepared.classes)
        packing = prepared.facts["packing"]
        rows = self._rows(model, prepared.classes, packing)
        notes = notes_of(model)
        if rows.padding:
            notes.append(f"{spec.model}: {rows.padding} padding rows of the head beyond the tokenizer are left out.")
        if rows.own_logits:
            notes.append(
                f"{spec.model}: its hidden states times its head are not its logits ({type(model).__name__} does more), so its "
                "own are used: the logits of a whole batch are held at once, and a loss is not computed piece by piece."
            )
        if packing != "none" and rows.layouts.reason is not None:
            notes.append(f"{spec.model}: batches are computed with their padding, for {rows.layouts.reason}.")
        prepared.say(notes)
        return rows
