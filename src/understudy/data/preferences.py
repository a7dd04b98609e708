"""Preference records in TRL's column conventions, brought to one form: a prompt and scored candidates.

| columns | becomes |
|---|---|
| `prompt`, `chosen`, `rejected` (text or messages) | two candidates with scores 1 and 0 |
| `chosen`, `rejected` (text or messages) | the same; the shared beginning is the prompt |
| `prompt`, `completions`, `scores` | as many candidates, of any number |
| `prompt`, `completion`, `label` | one candidate with score 1 or 0 (unpaired) |

A record may carry `log_probs`, one per candidate, as recorded when they were sampled.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from typing import Any

from understudy.data.text import Record, TextSplits, read_source, shared_length, split_off, stdlib
from understudy.errors import InputError, nearest

OPTIONS = {"name", "limit", "characters", "candidates"}
FORMATS = (
    {"prompt", "chosen", "rejected"},
    {"chosen", "rejected"},
    {"prompt", "completions", "scores"},
    {"prompt", "completion", "label"},
)


def load_preferences(spec: Mapping[str, Any]) -> TextSplits:
    """Read a preference set; each record is `{id, prompt, completions, scores}` and, if recorded, `log_probs`.

    Args:
        spec: `name` (`word_order`, a set in `UNDERSTUDY_DATA`, a file, folder or Hub id), `limit` (most training
            records), `characters` and `candidates` (of `word_order`).
    """
    for key in spec:
        if key not in OPTIONS:
            raise InputError(f"Unknown key data.{key}.{nearest(key, OPTIONS)} Known: {', '.join(sorted(OPTIONS))}.")
    name = str(spec["name"])
    notes: list[str] = []
    if name == "word_order":
        raw = {"train": word_order(int(spec.get("characters", 300_000)), int(spec.get("candidates", 2)))}
    else:
        raw = read_source(name, spec, ("word_order",), notes)
    splits: dict[str, list[Record]] = {}
    for split, records in raw.items():
        kept = [x for x in (candidates(name, split, i, r) for i, r in enumerate(records)) if x is not None]
        if len(kept) < len(records):
            notes.append(
                f"{name}, {split}: {len(records) - len(kept)} records were left out: without a prompt column, nothing "
                "tells where the prompt of two equal texts ends."
            )
        splits[split] = kept
        alike = sum(len(r["completions"]) > 1 and all(c == r["completions"][0] for c in r["completions"]) for r in kept)
        if alike:
            notes.append(f"{name}, {split}: {alike} records have candidates that are all alike: they teach no order.")
    split_off(name, splits, notes)
    limit = spec.get("limit")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise InputError(f"data.limit is {limit!r} and must be a whole number of at least 1.")
    splits["train"] = splits["train"][:limit]
    for number, record in enumerate(r for records in splits.values() for r in records):
        record["id"] = number
    digest = hashlib.sha256(json.dumps(splits, sort_keys=True, default=str).encode()).hexdigest()
    return TextSplits(splits["train"], splits["validation"], splits["test"], notes, digest)


def candidates(name: str, split: str, index: int, record: Record) -> Record | None:
    """One record in the common form; `None` for two equal texts without a prompt column."""
    where = f"{name}, {split} record {index}"
    wanted = next((f for f in FORMATS if f <= record.keys()), None)
    if wanted is None:
        accepted = "; ".join(" + ".join(sorted(f)) for f in FORMATS)
        raise InputError(f"{where} has columns {', '.join(sorted(record))}; expected one of: {accepted}.")
    if "chosen" in wanted:
        if "prompt" not in record and isinstance(record["chosen"], str) and record["chosen"] == record["rejected"]:
            return None
        prompt, said = _pair(where, record)
        scores = [1.0, 0.0]
    elif "label" in wanted:
        prompt, said = record["prompt"], [record["completion"]]
        scores = [_number(where, "label", record["label"])]
        if scores[0] not in (0.0, 1.0):
            raise InputError(f"{where}: label is {record['label']!r} and must be true or false (1 or 0).")
    else:
        prompt, said = record["prompt"], list(record["completions"])
        scores = [_number(where, "scores", s) for s in record["scores"]]
    if len(said) != len(scores) or not said:
        raise InputError(f"{where} has {len(said)} completions and {len(scores)} scores: give one score for each.")
    _readable(where, "the prompt", prompt)
    for text in said:
        if not text:
            raise InputError(f"{where}: a completion is empty, not text or messages. Leave the record out.")
        _readable(where, "a completion", text)
    out: Record = {"prompt": prompt, "completions": said, "scores": scores}
    if record.get("log_probs") is not None:
        out["log_probs"] = [_number(where, "log_probs", v) for v in record["log_probs"]]
    return out


def _readable(where: str, what: str, text: Any) -> None:
    """Refuse what is neither text nor messages with role and content."""
    if isinstance(text, str):
        return
    if not isinstance(text, list):
        raise InputError(f"{where}: {what} is {type(text).__name__}, not text or messages.")
    for message in text:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"{where}: {what} holds {str(message)[:60]!r}, not a message with role and content.")


def _pair(where: str, record: Record) -> tuple[Any, list[Any]]:
    """Prompt and both candidates; without a prompt column what both begin with is the prompt, as in TRL: whole messages,
    or characters up to the space before the first that differs. A prompt column that only repeats the first message of
    both is none."""
    chosen, rejected = record["chosen"], record["rejected"]
    asked = [{"role": "user", "content": record.get("prompt")}]
    if "prompt" in record and not (isinstance(chosen, list) and chosen[:1] == rejected[:1] == asked):
        return record["prompt"], [chosen, rejected]
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise InputError(
            f"{where} has no prompt; chosen is {type(chosen).__name__} and rejected {type(rejected).__name__}: give both "
            "as text or both as messages, or add a prompt column."
        )
    shared = shared_length(chosen, rejected)
    if chosen == rejected and isinstance(chosen, list):
        shared = max(0, shared - 1)  # the last turn is the answer, the same twice
    if isinstance(chosen, str) and chosen[:shared].endswith(" "):
        shared -= 1
    return chosen[:shared], [chosen[shared:], rejected[shared:]]


def _number(where: str, column: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{where}: {column} holds {value!r}, which is not a number.") from None
    if number != number or abs(number) == float("inf"):
        raise InputError(f"{where}: {column} holds {number}, which is not a finite number.")
    return number


def word_order(characters: int, number: int) -> list[Record]:
    """Passages of the standard library: given the beginning, the true words in order are best.

    Candidate k has k thirds of its words displaced (at least two), and the share of words in their place as score.
    """
    if number < 2:
        raise InputError(f"data.candidates is {number} and must be at least 2.")
    records: list[Record] = []
    chance = random.Random(0)
    for passage in stdlib(characters):
        words = passage["text"].split()
        for start in range(0, len(words) - 24, 24):
            prompt, rest = words[start : start + 12], words[start + 12 : start + 24]
            made = [list(rest)]
            for k in range(1, number):
                moved = list(rest)
                places = chance.sample(range(len(rest)), max(2, round(len(rest) * k / (number - 1))))
                taken = [moved[p] for p in places]
                for place, word in zip(places, taken[1:] + taken[:1], strict=True):
                    moved[place] = word
                made.append(moved)
            scores = [sum(a == b for a, b in zip(m, rest, strict=True)) / len(rest) for m in made]
            order = chance.sample(range(number), number)  # the best is not always first
            records.append(
                {
                    "prompt": " ".join(prompt),
                    "completions": [" " + " ".join(made[i]) for i in order],
                    "scores": [scores[i] for i in order],
                }
            )
    return records
