"""Preference records in TRL's column conventions, brought to one form: a prompt and scored candidates.

| columns | becomes |
|---|---|
| `prompt`, `chosen`, `rejected` (text or messages) | two candidates with scores 1 and 0 |
| `chosen`, `rejected` (text or messages) | the same; the shared beginning is the prompt |
| `prompt`, `completions`, `scores` | as many candidates, of any number |
| `prompt`, `completion`, `label` | one candidate with score 1 or 0 (unpaired) |
| `prompt`, `tree` or `prompt`, `steps`, `scores` | as many candidates, each of several steps (`understudy.data.trees`) |

Messages may also be ShareGPT's (`from`, `value`), the columns LLaMA-Factory's (`conversations` or `instruction` and `input`
beside `chosen` and `rejected`; `messages` and `label`). A record may carry `log_probs`, one per candidate, as recorded
when they were sampled, `tools` for the chat template, `label_smoothing`, the probability (at most ½) that its order is
wrong, `weight`, which its loss is multiplied by (1 if it has none; the divisor stays the number of records), and `ended`, one boolean per candidate of text: false for a part of an answer, behind which no end token is trained.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from understudy.data.class_labels import NamesOf, label_name
from understudy.data.columns import CONVERSATIONS, arrange, readable, without_prompt
from understudy.data.records import Record, Row, place
from understudy.data.tables import LARGEST
from understudy.data.text import (
    TextSplits,
    check_keys,
    finish,
    keep_tools,
    read_source,
    repetition,
    shared_length,
)
from understudy.data.trees import checked_steps, paths
from understudy.errors import InputError

OPTIONS = {"name", "limit", "characters", "candidates", "columns"}
Embedded = Callable[[Mapping[str, Any]], list[Record]]
FORMATS = (
    {"prompt", "chosen", "rejected"},
    {"chosen", "rejected"},
    {"prompt", "completions", "scores"},
    {"prompt", "completion", "label"},
    {"prompt", "tree"},
    {"prompt", "steps", "scores"},
)
_LABELS = ("true", "false", "1", "0", "1.0", "0.0")
EXTRAS = {"log_probs", "tools", "label_smoothing", "weight", "ended"}


def load_preferences(spec: Mapping[str, Any], embedded: Mapping[str, Embedded] = MappingProxyType({})) -> TextSplits:
    """Read a preference set; each record is `{id, prompt, completions, scores}` and, if recorded, `log_probs`,
    `tools`, `label_smoothing`, `weight` and `ended`.

    Args:
        spec: `name` (one of `embedded`, a set in `UNDERSTUDY_DATA`, a file, folder or Hub id), `limit` (most training
            records), `characters` and `candidates` (of synthetic records), `columns` (names of columns, `{ours:
            theirs}`).
        embedded: built-in sets by name, as functions from `spec` to records.
    """
    check_keys(spec, OPTIONS)
    name = str(spec["name"])
    notes: list[str] = []
    named: NamesOf = {label_name(spec): {}}
    raw = (
        {"train": embedded[name](spec)} if name in embedded else read_source(name, spec, tuple(embedded), notes, named)
    )
    _ask_for_prompts(name, raw, spec.get("columns"))
    notes += arrange(name, raw, FORMATS, EXTRAS, spec.get("columns"))
    splits = {split: _kept(name, split, records, notes) for split, records in raw.items()}
    return finish(name, spec, splits, notes)


PROMPTS = ("question", "query", "input", "problem", "context")
"""What others call the column of the prompt, besides those that `arrange` recognises."""


def _ask_for_prompts(name: str, splits: Mapping[str, list[Record]], columns: Any) -> None:
    """Refuse pairs beside a text that is their prompt by its name, and that neither side holds: it would go unused."""
    if isinstance(columns, Mapping) and "prompt" in columns:
        return
    for split, records in splits.items():
        for i, record in enumerate(records):
            named = {"prompt", "instruction", *CONVERSATIONS} & record.keys()
            if named or not {"chosen", "rejected"} <= record.keys():
                continue
            said = str(record["chosen"])
            other = next((c for c in PROMPTS if isinstance(record.get(c), str) and record[c].strip()), None)
            if (
                other is not None
                and record[other].strip() not in said
                and repr(record[other].strip())[1:-1] not in said
            ):
                raise InputError(
                    f"{place(f'{name}, {split} record {i}', record)} has {other!r} beside chosen and rejected, which do not "
                    f"hold it, and no prompt. If it is the prompt, say so: data.columns={{prompt: {other}}}. If not, remove it."
                )


def _kept(name: str, split: str, records: list[Record], notes: list[str]) -> list[Record]:
    """The records of a split in the common form, without those that have no information; changes are noted."""
    kept: list[Record] = []
    left: dict[str, list[int]] = {}
    repeated = unscored = 0
    for i, record in enumerate(records):
        if "tree" in record:
            where = place(f"{name}, {split} record {i}", record)
            record["steps"], record["scores"], leaves = paths(where, record.pop("tree"))
            unscored += leaves
        found = candidates(name, split, i, record)
        if found is None:
            left.setdefault(_EQUAL, []).append(i)
            continue
        whole_texts = all(found["completions"]) and "steps" not in found
        bare = without_prompt(found["prompt"], found["completions"]) if whole_texts else None
        if bare is not None:
            found["prompt"], found["completions"] = bare
            repeated += 1
        if all(found["completions"]):
            kept.append(found)
        else:
            left.setdefault(_EMPTY, []).append(i)
    for why, numbers in left.items():
        more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
        which = f"record {', '.join(map(str, numbers[:5]))}{more}"
        if not kept:
            raise InputError(f"{name}, {split}: no record is left: {why} ({which}). Fix the records.")
        notes.append(f"{name}, {split}: {len(numbers)} records were left out: {why} ({which}).")
    if unscored:
        notes.append(f"{name}, {split}: {unscored} answers of trees were left out: their leaf has no score.")
    if repeated:
        notes.append(repetition(name, split, repeated))
    alike = sum(len(r["completions"]) > 1 and all(c == r["completions"][0] for c in r["completions"]) for r in kept)
    if alike:
        notes.append(f"{name}, {split}: {alike} records have candidates that are all alike: they teach no order.")
    return kept


_EQUAL = "without a prompt column, nothing tells where the prompt of two equal texts ends"
_EMPTY = "a completion is empty"


def candidates(name: str, split: str, index: int, record: Record) -> Record | None:
    """One record, with the columns of a format, in the common form; `None` for two equal texts without a prompt column."""
    where = place(f"{name}, {split} record {index}", record)
    prompt, said, scores = _sides(where, record)
    if said is None:
        return None
    if len(said) != len(scores) or not said:
        raise InputError(f"{where} has {len(said)} completions and {len(scores)} scores: give one score for each.")
    out: Record = Row({"prompt": prompt, "completions": said, "scores": scores}, getattr(record, "at", ""))
    if "steps" in record:
        out["steps"] = record["steps"]
    if "log_probs" in record:
        out["log_probs"] = _numbers(where, "log_probs", record["log_probs"])
        if len(out["log_probs"]) != len(said):
            raise InputError(
                f"{where} has {len(said)} completions and {len(out['log_probs'])} log_probs: give one for each."
            )
    if "label_smoothing" in record:
        out["label_smoothing"] = _number(where, "label_smoothing", record["label_smoothing"])
        if not 0 <= out["label_smoothing"] <= 0.5:
            raise InputError(f"{where}: label_smoothing is {out['label_smoothing']:g} and must lie in [0, 0.5].")
    if "weight" in record:
        out["weight"] = _number(where, "weight", record["weight"])
        if out["weight"] < 0:
            raise InputError(f"{where}: weight is {out['weight']:g} and must be at least 0.")
    if "ended" in record:
        out["ended"] = _ended(where, record["ended"], prompt, said)
    if "tools" in record:
        out["tools"] = record["tools"]
        keep_tools(where, out, any(isinstance(text, list) for text in (prompt, *said)))
    return out


def _ended(where: str, ended: Any, prompt: Any, said: list[Any]) -> list[bool]:
    """Whether each candidate is a whole answer; parts of answers are text."""
    if not isinstance(ended, list) or len(ended) != len(said) or not all(isinstance(e, bool) for e in ended):
        raise InputError(f"{where}: ended must be a list of {len(said)} booleans, one for each completion.")
    if not all(ended) and any(isinstance(text, list) for text in (prompt, *said)):
        raise InputError(f"{where}: ended is false for messages, which a chat template always ends: give text.")
    return ended


def _sides(where: str, record: Record) -> tuple[Any, list[Any] | None, list[float]]:
    """Prompt, completions (`None` for two equal texts without a prompt column) and scores."""
    if "chosen" in record:
        both = [readable(where, side, record[side]) for side in ("chosen", "rejected")]
        if "prompt" in record:
            return readable(where, "the prompt", record["prompt"]), both, [1.0, 0.0]
        if isinstance(both[0], str) and both[0] == both[1]:
            return None, None, []
        return *_common_prompt(where, *both), [1.0, 0.0]
    prompt = readable(where, "the prompt", record["prompt"])
    if "label" in record:
        label = record["label"]
        score = (
            None if isinstance(label, str) and label.strip().lower() not in _LABELS else _number(where, "label", label)
        )
        if score not in (0.0, 1.0):
            raise InputError(f"{where}: label is {reprlib.repr(label)} and must be true or false (1 or 0).")
        return prompt, [readable(where, "the completion", record["completion"])], [score]
    if "steps" in record:
        steps = checked_steps(where, record["steps"])
        return prompt, ["".join(texts) for texts in steps], _numbers(where, "scores", record["scores"])
    said = record["completions"]
    if not isinstance(said, list):
        raise InputError(f"{where}: completions is {type(said).__name__}, not a list of them.")
    return prompt, [readable(where, "a completion", c) for c in said], _numbers(where, "scores", record["scores"])


def _common_prompt(where: str, chosen: Any, rejected: Any) -> tuple[Any, list[Any]]:
    """Prompt and both candidates without a prompt column. As in TRL the prompt is their common prefix: whole messages,
    or characters up to the space before the first difference."""
    if type(chosen) is not type(rejected):
        raise InputError(
            f"{where} has no prompt; chosen is {type(chosen).__name__} and rejected {type(rejected).__name__}: give both "
            "as text or both as messages, or add a prompt column."
        )
    shared = shared_length(chosen, rejected)
    if chosen == rejected:
        shared = max(0, shared - 1)  # the last message is the answer, identical in both
    if isinstance(chosen, str) and chosen[:shared].endswith(" "):
        shared -= 1
    return chosen[:shared], [chosen[shared:], rejected[shared:]]


def _numbers(where: str, column: str, values: Any) -> list[float]:
    if not isinstance(values, list):
        raise InputError(f"{where}: {column} is {type(values).__name__}, not a list of numbers.")
    return [_number(where, column, value) for value in values]


def _number(where: str, column: str, value: Any) -> float:
    """A finite number; files without types store true and false as text."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        value = value.strip().lower() == "true"
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{where}: {column} holds {reprlib.repr(value)}, which is not a number.") from None
    except OverflowError:
        number = float("inf")
    if not abs(number) <= LARGEST:
        raise InputError(
            f"{where}: {column} holds {reprlib.repr(value)}, which is not a finite number in single precision."
        )
    return number
