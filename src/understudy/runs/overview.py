"""An overview of a recipe's inputs on one screen: files, splits, columns, masks, special tokens, processor, template,
teacher."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

from understudy.data import Batch, find
from understudy.models import ModelAdapter
from understudy.runs.preflight import sample_loader
from understudy.runs.recipe import Recipe
from understudy.tasks import Prepared
from understudy.training import Method, Pipeline


def overview(
    recipe: Recipe, prepared: Prepared, method: Method, student: ModelAdapter | None, teacher: ModelAdapter | None
) -> dict[str, str]:
    """One line per topic of the recipe. What was dropped or changed is in the notes."""
    source = find(str(recipe.data["name"]))
    splits = {s: len(prepared.split(s)) for s in ("train", "validation", "test")}
    splits |= {name: len(data) for name, data in prepared.more_tests.items()}
    found = {
        "files": _files(str(recipe.data["name"]), source),
        "columns": _columns(source) if source is not None else "",
        "splits": ", ".join(f"{n:,} {s}" for s, n in splits.items()),
        "masks": _masks(prepared) if student is not None else "",
        "special tokens": _special_tokens(prepared.tokenizer),
        "template": _template(prepared.tokenizer),
        "processor": _processor(prepared, student),
        "teacher scores": _teacher(recipe, method, teacher),
    }
    return {topic: said for topic, said in found.items() if said}


def _files(name: str, source: Path | None) -> str:
    if source is None:
        return f"{name}: no path and not in UNDERSTUDY_DATA; built in, or from the Hub"
    if source.is_file():
        return f"{source}, {source.stat().st_size:,} bytes"
    inside = [f for f in source.rglob("*") if f.is_file() and not f.relative_to(source).parts[0].startswith(".")]
    kinds = Counter(f.suffix or "no ending" for f in inside)
    return f"{source}: {len(inside):,} files ({', '.join(f'{n:,} {kind}' for kind, n in kinds.most_common(5))})"


def _columns(source: Path) -> str:
    """The columns of a table, or of the first table of a folder."""
    tables = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.suffix in _READERS)
    if not tables or tables[0].suffix not in _READERS:
        return ""
    try:
        return f"{', '.join(map(str, _READERS[tables[0].suffix](tables[0])))} (of {tables[0].name})"
    except (
        OSError,
        ValueError,
        TypeError,
        RecursionError,
        StopIteration,
    ):  # the data reader reports errors, or reads another format
        return ""


def _of_parquet(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    return list(pq.read_schema(path).names)


def _of_json_lines(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return list(json.loads(next(line for line in file if line.strip())))


def _of_csv(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file))


_READERS = {".parquet": _of_parquet, ".jsonl": _of_json_lines, ".csv": _of_csv}


def _masks(prepared: Prepared, number: int = 64) -> str:
    """The fraction of tokens of the first training examples that is trained on."""
    batches = [Batch.from_dict(b) for b in sample_loader(prepared, "train", number, 8)]
    examples = sum(len(b.ids) for b in batches)
    kept = [b.inputs["attention_mask"] for b in batches if "attention_mask" in b.inputs]
    lengths = [lengths for b in batches if (lengths := getattr(b, "lengths", None)) is not None]
    if not kept:
        return f"{sum(b.num_items for b in batches):,} rows count in the first {examples:,} training examples"
    tokens = int(sum(int(mask.sum()) for mask in kept))
    trained = int(sum(int(n.sum()) for n in lengths)) if lengths else sum(b.num_items for b in batches)
    return (
        f"{trained:,} of {tokens:,} tokens ({trained / max(1, tokens):.0%}) of the first {examples:,} training examples are "
        "trained on; padding, prompts and others' messages are not"
    )


def _special_tokens(tokenizer: Any) -> str:
    if tokenizer is None:
        return ""
    named = {side: (getattr(tokenizer, f"{side}_token"), getattr(tokenizer, f"{side}_token_id")) for side in _SPECIAL}
    said = ", ".join(
        f"{side} {text} ({number})" if text is not None else f"no {side}" for side, (text, number) in named.items()
    )
    ids = tokenizer("a")["input_ids"]
    ends = [
        [side for side in sides if ids and ids[at] == getattr(tokenizer, f"{side}_token_id")] for sides, at in _ADDED
    ]
    added = " and ".join(f"{found[0]} {getattr(tokenizer, found[0] + '_token')}" for found in ends if found)
    return f"{said}; the tokenizer adds {added or 'none'} by itself"


_SPECIAL = ("bos", "eos", "pad", "unk")
_ADDED = (("bos", "cls"), 0), (("eos", "sep"), -1)


def _template(tokenizer: Any) -> str:
    if tokenizer is None:
        return ""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return "the tokenizer has no chat template: conversations would be refused"
    return f"chat template of the tokenizer, {len(str(template)):,} characters; plain text does not pass through it"


def _processor(prepared: Prepared, student: ModelAdapter | None) -> str:
    if len(prepared.input_shape or ()) != 3:  # nodes and points are no images
        return ""
    shape = " × ".join(map(str, prepared.input_shape))
    normalise = getattr(student, "normalise", None)
    scaled = "as they are" if normalise is None else f"less {_numbers(normalise[0])}, over {_numbers(normalise[1])}"
    augmented = "augmented in training" if prepared.augmentation is not None else "not augmented"
    return f"images {shape} in [0, 1], {augmented}; the student sees them {scaled}; {prepared.classes} classes"


def _numbers(values: Any) -> str:
    return "/".join(f"{float(v):g}" for v in values)


def _teacher(recipe: Recipe, method: Method, teacher: ModelAdapter | None) -> str:
    """The kind of teacher, the outputs used, and whether it was run here."""
    spec = recipe.teacher
    if isinstance(method, Pipeline):
        who = spec.model if spec is not None else "the embedded world's own, or none"
        return f"what the stages of {recipe.method} ask for, of {who}"
    use = method.requires.teacher
    if spec is None and use == "optional":
        return "those that the data hold, if any: the recipe names no teacher"
    if spec is None or use == "none":
        named = f"; {spec.model} is evaluated beside the student" if spec is not None and teacher is not None else ""
        return f"nothing: method {recipe.method} uses no teacher's outputs in training{named}"
    what = "rows of every training batch" if recipe.on_policy is None else "training rows and the student's own samples"
    if not method.requires.in_steps:
        what = "of the training examples, once before the first step"
    if method.requires.teacher_features:
        what += ", with inner layers"
    if spec.cache is not None:
        return f"{what}, answered from the cache {spec.cache}"
    if spec.served:
        return f"{what}, by the server of {spec.model}: {spec.score} a token"
    who = f"{len(spec.members)} members ({', '.join(spec.members)})" if spec.members else spec.model
    later = ", which is trained first" if any(p.train is not None for p in spec.parts("teacher").values()) else ""
    return f"{what}, by {who}{later}"
