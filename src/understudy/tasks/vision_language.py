"""Texts about images, for any vision-language model of transformers; embedded, scenes of digits of known truth."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Subset

from understudy.data import TextSplits, collate_lists, collate_text, show_batch, train_tokenizer
from understudy.data.image_texts import OPTIONS, asked, encode_image_texts, load_image_texts
from understudy.data.records import Record
from understudy.errors import InputError
from understudy.evaluation.image_texts import (
    EXPLAINED,
    Asked,
    AskedSet,
    answer_table,
    judge_answers,
    write_answers,
)
from understudy.evaluation.preference import evaluate_preferences
from understudy.models import CausalLMAdapter, ModelAdapter, SequenceAdapter, compare_tokenizers, tokenizer_hashes
from understudy.models.vision_language import (
    is_new_vision_language,
    load_processor,
    load_vision_language,
    new_processor,
)
from understudy.models.weights import notes_of
from understudy.synthetic.scenes import DESCRIBE, scenes
from understudy.tasks.base import COPY, MODULE, Prepared, merged
from understudy.tasks.language_modeling import LanguageModeling

WORLD = "scenes"
_TRAINER = {
    "max_steps": 800,
    "per_device_train_batch_size": 32,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.0,
}
_START = {**_TRAINER, "max_steps": 1200}


class VisionLanguage(LanguageModeling):
    """Answer prompts about images. Methods of preferences get lists of candidates, all others completions."""

    name = "vision_language"
    metric = "exact_match"
    higher_is_better = True
    fidelity = ("agreement", "kl")
    preflight_examples = 16  # each is answered
    aligns = False

    @property
    def kinds(self) -> frozenset[str]:
        """`text`, and `preference` for lists of candidates."""
        return frozenset({"text", "preference"})

    def fill(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Default: the scenes, with small LLaVAs of which the teacher, and a student that learns from preferences, are
        first trained on the captions."""
        if recipe.get("on_policy") is not None:
            raise InputError(
                "on_policy is not available for vision_language: its texts are written without their images."
            )
        data = recipe.get("data") or {}
        data.setdefault("name", WORLD)
        data.setdefault("max_length", 64 if data["name"] == WORLD else 2048)
        data.setdefault("max_new_tokens", 28 if data["name"] == WORLD else 64)
        recipe["data"] = data
        if recipe.get("teacher") is None:
            recipe["teacher"] = {"model": "llava:hidden=96,layers=3,heads=4,vision=96", "train": dict(_START)}
        if recipe.get("student") is None:
            recipe["student"] = {"model": "llava:hidden=48,layers=2,heads=4,vision=48"}
        recipe["trainer"] = merged(_TRAINER, recipe.get("trainer") or {})
        return recipe

    def prepare(self, recipe: Any) -> Prepared:
        data = recipe.data
        lists = "text" not in recipe.build_method().kinds
        splits = _read(data, lists)
        notes = list(splits.notes)
        processor = self._processor(recipe, splits, data)
        tokenizer = processor.tokenizer
        sets: dict[str, Any] = {}
        warnings, longest = [], 0
        for name in ("train", "validation", "test"):
            records = getattr(splits, name)
            encoded, counts = encode_image_texts(records, processor, max_length=data["max_length"])
            questions = _asked(records[: data.get("eval_limit", 200)], processor) if name != "train" else []
            sets[name] = AskedSet(encoded.records, questions, tokenizer, data["max_new_tokens"])
            notes.append(f"{name}: {counts}")
            warnings += counts.warnings(name, data["max_length"])
            longest = max(longest, counts.longest)
        pad = tokenizer.pad_token_id or 0
        return Prepared(
            **sets,
            teacher_train=sets["train"],
            collate=partial(collate_lists if lists else collate_text, pad_id=pad),
            classes=len(tokenizer),
            tokenizer=tokenizer,
            notes=notes,
            warnings=warnings,
            hashes={"data": splits.hash, **tokenizer_hashes(tokenizer)},
            show=lambda batch: show_batch(batch, tokenizer),
            facts={"processor": processor, "lists": lists, "longest": longest},
        )

    def _processor(self, recipe: Any, splits: TextSplits, data: Mapping[str, Any]) -> Any:
        """The processor of both models, or a new one for new models."""
        found: dict[str, Any] = {}
        if data.get("processor") is not None:
            found["data.processor"] = load_processor(data["processor"])
        for side in ("teacher", "student"):
            spec = getattr(recipe, side)
            if (
                spec is None
                or spec.model == COPY
                or spec.model.startswith(MODULE)
                or is_new_vision_language(spec.model)
            ):
                continue
            found[side] = load_processor(spec.model, trust_remote_code=spec.trust_remote_code)
        if not found:
            tokenizer = train_tokenizer(_read(data, lists=False).texts(), data.get("vocab_size", 320))
            return new_processor(tokenizer, image=data.get("image_size", 24), patch=data.get("patch_size", 8))
        (first, chosen), *rest = found.items()
        for name, other in rest:
            difference = compare_tokenizers(chosen.tokenizer, other.tokenizer) or _inputs_differ(
                chosen, other, splits.train
            )
            if difference is not None:
                raise InputError(
                    f"{first} and {name} prepare examples differently: {difference}. Choose a student of the teacher's family, "
                    "or a new one (student=llava:hidden=...), which takes the teacher's processor."
                )
        return chosen

    def model(self, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> ModelAdapter:
        if isinstance(source, Path):
            self._same_tokens(source, prepared.tokenizer)
        processor = prepared.facts["processor"]
        model = load_vision_language(
            spec.model if source is None else source,
            processor=processor,
            dtype=spec.dtype,
            quantization=spec.quantization,
            trust_remote_code=spec.trust_remote_code,
        )
        kind: type[CausalLMAdapter] = SequenceAdapter if prepared.facts["lists"] else CausalLMAdapter
        rows = kind(model, prepared.classes)
        rows.processor = processor
        notes = notes_of(model)
        if rows.padding:
            notes.append(f"{spec.model}: {rows.padding} padding rows of the head beyond the tokenizer are left out.")
        prepared.say(notes)
        return rows

    def evaluate(self, student: ModelAdapter, teacher: ModelAdapter | None, loader: DataLoader[Any]) -> dict[str, Any]:
        """Greedy answers, beside the likelihood of the references or the order of the candidates."""
        if isinstance(student, SequenceAdapter):
            found = evaluate_preferences(student, loader)
        else:
            found = super().evaluate(student, teacher, loader)
            metrics = found["metrics"]
            for side in ("", "teacher_"):
                if f"{side}accuracy" in metrics:
                    metrics[f"{side}token_accuracy"] = metrics.pop(f"{side}accuracy")
        data: Any = loader.dataset
        examples: Any = data.dataset if isinstance(data, Subset) else data
        chosen = examples.asked[: 2 * len(data)]
        if not chosen:
            return {**found, "explained": EXPLAINED}
        answers = {}
        for side, model in (("student", student), ("teacher", teacher)):
            if model is not None:
                rows = [one.row for one in chosen]
                answers[side] = write_answers(model, rows, examples.tokenizer, examples.most)
                judged = judge_answers(answers[side], chosen)
                found["metrics"] |= {k if side == "student" else f"teacher_{k}": v for k, v in judged.items()}
        tables = [*found.get("tables", []), answer_table(chosen, examples.tokenizer, answers)]
        return {**found, "tables": tables, "explained": EXPLAINED}


def _read(data: Mapping[str, Any], lists: bool) -> TextSplits:
    return load_image_texts({k: v for k, v in data.items() if k in OPTIONS}, {WORLD: scenes}, lists=lists)


def _asked(records: list[Record], processor: Any) -> list[Asked]:
    """What evaluation asks: the prompts of the records, and of scenes a question about each."""
    found = []
    for record in records:
        facts = record.get("facts")
        digits = tuple(facts["digits"].values()) if facts else ()
        best = record["completion"] if "completion" in record else record["completions"][0]
        if "scores" in record:
            best = record["completions"][record["scores"].index(max(record["scores"]))]
        kind = "describe" if facts and record["prompt"] == DESCRIBE else ""
        found.append(Asked(asked(record, processor), best, kind, digits))
        if facts:
            row = asked({**record, "prompt": facts["question"]}, processor)
            found.append(Asked(row, facts["answer"], "question", digits))
    return found


def _inputs_differ(one: Any, other: Any, records: list[Record]) -> str | None:
    """Whether two processors make different inputs of the first record with images, in words."""
    record = next((r for r in records if "pictures" in r), None)
    if record is None:
        return None
    first, second = (asked(record, p) for p in (one, other))
    if first["text"] != second["text"]:
        return "their chat templates differ"
    made = [row["pictures"].prepared() for row in (first, second)]
    for name in made[0]:
        if name not in made[1] or made[0][name].shape != made[1][name].shape:
            return f"{name} of an image is {tuple(made[0][name].shape)} against {tuple(made[1].get(name, made[0][name][:0]).shape)}"
        if not bool((made[0][name] == made[1][name]).all()):
            return f"{name} of an image has other values"
    return None
