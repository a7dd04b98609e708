"""Texts about images: records with an `image`, a `prompt` and a completion, or better and worse ones, as rows for a model of
transformers with its processor.

| columns beside `image` and `prompt` | becomes |
|---|---|
| `completion` | one completion |
| `chosen`, `rejected`, or `completions`, `scores`, or `completion`, `label` | scored candidates, as for preferences |

A record without `image` is text alone.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from understudy.data.batch import IGNORE
from understudy.data.class_labels import NamesOf, label_name
from understudy.data.columns import arrange, checked_text, empty, without_prompt
from understudy.data.ends import Ends
from understudy.data.folders import find
from understudy.data.pictures import Pictures, shown
from understudy.data.preferences import candidates
from understudy.data.records import Record, place
from understudy.data.text import TextSplits, check_keys, finish, read_source, repetition
from understudy.data.tokenize import Counts, TextSet, byte_length, check_length, continuation
from understudy.errors import InputError

OPTIONS = {"name", "limit", "columns", "unpaired", "size", "pairs", "seed"}
FORMATS = (
    {"prompt", "chosen", "rejected"},
    {"prompt", "completions", "scores"},
    {"prompt", "completion", "label"},
    {"prompt", "completion"},
)
Embedded = Callable[[Mapping[str, Any]], dict[str, list[Record]]]


def load_image_texts(spec: Mapping[str, Any], embedded: Mapping[str, Embedded], *, lists: bool) -> TextSplits:
    """Read a set of texts about images.

    Args:
        spec: `name` (one of `embedded`, a set in `UNDERSTUDY_DATA`, a file or folder of records, a Hub id), `limit` (most
            training records), `columns` (names of columns), `unpaired` (keep single completions beside pairs); `size`,
            `pairs` and `seed` of embedded sets.
        lists: whether records become scored candidates, `{id, prompt, completions, scores}`; else the best is the
            completion, `{id, prompt, completion}`, and single ones with label 0 are left out. Either may have `pictures`.
    """
    check_keys(spec, OPTIONS)
    name = str(spec["name"])
    notes: list[str] = []
    named: NamesOf = {label_name(spec): {}}
    raw = embedded[name](spec) if name in embedded else read_source(name, spec, tuple(embedded), notes, named)
    path = find(name) if name not in embedded else None
    folder = path.parent if path is not None and path.is_file() else path
    notes += arrange(name, raw, FORMATS, {"image", "images", "log_probs", "weight", "facts"}, spec.get("columns"))
    scored = {
        split: [_scored(name, split, i, record, folder) for i, record in enumerate(records)]
        for split, records in raw.items()
    }
    for split, records in scored.items():
        repeated = sum(r.pop("repeated") for r in records)
        if repeated:
            notes.append(repetition(name, split, repeated))
    splits = finish(name, spec, scored, notes)  # the same split of the data for every method
    if not lists and any("weight" in record for record in splits.train):
        splits.notes.append(f"{name}: the column weight is not read: it is of methods of preferences.")
    paired = any(len(record["completions"]) > 1 for record in splits.train)
    for split in ("train", "validation", "test"):
        records = getattr(splits, split)
        if not lists:
            kept = [record for record in records if record["scores"] != [0.0]]
            if records and not kept:
                raise InputError(
                    f"{name}, {split}: every completion has label 0, and this method learns right ones: give it some, or take "
                    "a method of preferences."
                )
            setattr(splits, split, [_best(record) for record in kept])
            if len(kept) < len(records):
                wrong = len(records) - len(kept)
                notes.append(
                    f"{name}, {split}: {wrong} completions with label 0 were left out: they are no answers to learn."
                )
        elif paired and not spec.get("unpaired"):
            kept = [record for record in records if len(record["completions"]) > 1]
            setattr(splits, split, kept)
            if len(kept) < len(records):
                notes.append(
                    f"{name}, {split}: {len(records) - len(kept)} records with one completion were left out "
                    "(data.unpaired=true keeps them)."
                )
    return splits


def _scored(name: str, split: str, index: int, record: Record, folder: Any) -> Record:
    """A record in the common form of preferences; a completion alone has the score 1."""
    where = place(f"{name}, {split} record {index}", record)
    given = {c: record[c] for c in ("image", "images") if not empty(record.get(c))}
    if len(given) > 1:
        raise InputError(f"{where} has both image and images: name all its images in one of them.")
    image = next(iter(given.values()), None)
    if "completion" in record and "label" not in record:
        record["label"] = 1
    found = candidates(name, split, index, record)
    assert found is not None  # only texts without a prompt column are left out
    for text in (found["prompt"], *found["completions"]):
        if not isinstance(text, str):
            raise InputError(f"{where} holds messages, and texts about images are a prompt and its completion.")
        if not text:
            raise InputError(f"{where} has an empty text: leave the record out.")
        checked_text(where, "its text", text)
    bare = without_prompt(found["prompt"], found["completions"])
    found["repeated"] = bare is not None and all(bare[1])
    if bare is not None and found["repeated"]:
        found["prompt"], found["completions"] = bare
    if image is not None:
        found["pictures"] = Pictures.of(where, image, folder)
    if "facts" in record:
        found["facts"] = record["facts"]
    return found


def _best(record: Record) -> Record:
    best = max(range(len(record["scores"])), key=lambda i: record["scores"][i])
    left = {k: v for k, v in record.items() if k not in ("completions", "scores", "log_probs")}
    return {**left, "completion": record["completions"][best]}


def prompt_text(processor: Any, prompt: str, images: int) -> str:
    """The prompt as the model reads it: by the processor's chat template if it has one, else with a placeholder for each
    image before it, unless the prompt has placeholders itself."""
    token = str(getattr(processor, "image_token", "<image>"))
    placed = prompt.count(token)
    if placed not in (0, images):
        raise InputError(
            f"The prompt {reprlib.repr(prompt)} has {placed} places {token} and its record {images} images: write a place for "
            "each, or none."
        )
    if getattr(processor, "chat_template", None) and not placed:
        content = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
        asked = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))
    return prompt if placed else token * images + prompt


def asked(record: Record, processor: Any) -> dict[str, Any]:
    """The prompt of a record as a row: `input_ids`, and `pictures` and `token_fields` if it has images."""
    tokenizer, pictures = processor.tokenizer, record.get("pictures")
    text = prompt_text(processor, record["prompt"], len(pictures.cells) if pictures is not None else 0)
    found: Mapping[str, Tensor]
    row: dict[str, Any] = {"text": text}
    if pictures is None:
        found = {
            "input_ids": torch.tensor([Ends.of(tokenizer).before(tokenizer(text, add_special_tokens=False).input_ids)])
        }
    else:
        row["pictures"] = Pictures(pictures.cells, pictures.where, text, processor, pictures.key)
        found = row["pictures"].prepared()
    ids = found["input_ids"][0]
    own = {k: v[0] for k, v in found.items() if v.shape == found["input_ids"].shape}
    if len(ids) and int(ids[-1]) == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        own = {k: v[:-1] for k, v in own.items()}  # the answer comes before the end
    row["input_ids"] = own.pop("input_ids")
    own.pop("attention_mask", None)
    return row | ({"token_fields": own} if own else {})


def encode_image_texts(records: list[Record], processor: Any, *, max_length: int) -> tuple[TextSet, Counts]:
    """Rows of records of `load_image_texts`: token rows, or lists of candidates. Only completions are trained on, and each
    ends with EOS. What is longer than `max_length` is truncated at its end; a prompt that fills it is dropped."""
    check_length(max_length)
    counts, rows = Counts(records=len(records)), []
    ends = Ends.of(processor.tokenizer)
    for record in records:
        row = asked(record, processor)
        prompt = row["input_ids"].tolist()
        said = [record["completion"]] if "completion" in record else record["completions"]
        pairs = [_pair(prompt, row["text"], text, processor.tokenizer, ends) for text in said]
        counts.truncated += any(len(ids) > max_length for ids, _ in pairs)
        if len(prompt) >= max_length:
            counts.dropped += 1
            continue
        pairs = [(ids[:max_length], labels[:max_length]) for ids, labels in pairs]
        counts.tokens += sum(len(ids) for ids, _ in pairs)
        counts.longest = max(counts.longest, *(len(ids) for ids, _ in pairs))
        counts.trained += sum(int((labels != IGNORE).sum()) for _, labels in pairs)
        beside = {"id": record["id"], **shown(row)}
        if "completion" in record:
            ((ids, labels),) = pairs
            special = set(processor.tokenizer.all_special_ids)
            counted = [t for t in labels.tolist() if t != IGNORE and t not in special]
            size = byte_length(counted, processor.tokenizer)
            rows.append({**beside, "input_ids": ids, "labels": labels, "bytes": size})
        else:
            beside |= {k: record[k] for k in ("weight",) if k in record}
            rows.append(
                {**beside, "scores": record["scores"], "log_probs": record.get("log_probs"), "sequences": pairs}
            )
    if not rows:
        raise InputError(
            f"Every prompt fills data.max_length ({max_length}) with its images and leaves no room for a completion: raise it."
        )
    counts.rows = len(rows)
    return TextSet(rows), counts


def _pair(prompt: list[int], text: str, said: str, tokenizer: Any, ends: Ends) -> tuple[Tensor, Tensor]:
    own = ends.behind(continuation(tokenizer, text, said))
    return torch.tensor(prompt + own), torch.tensor([IGNORE] * len(prompt) + own)
