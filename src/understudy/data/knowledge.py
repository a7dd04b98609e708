"""Knowledge as triples (head event, relation, tail): relations with their wording, labelled triples, and their text."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from transformers import AddedToken, PreTrainedTokenizerFast

from understudy.data.columns import arrange, checked_text
from understudy.data.folders import find
from understudy.data.records import place, read_records
from understudy.data.tokenize import train_tokenizer
from understudy.errors import InputError
from understudy.reading import read_yaml

PEOPLE = ("PersonX", "PersonY")
NAMES = (
    "Alex Avery Bailey Blake Cameron Casey Charlie Chris Dana Drew Eden Emery Finley Frankie Hayden Jamie Jordan Kai Kelly "
    "Kim Lee Logan Morgan Noel Parker Pat Quinn Reese Riley Robin Rowan Sage Sam Skyler Sydney Taylor Terry Tracy"
).split()
"""First names."""


@dataclass(frozen=True)
class Relation:
    """A relation.

    Args:
        name: in the student's text.
        text: wording for a critic.
        ask: ends a prompt for a tail.
        examples: (head, tail) pairs for few-shot prompts.
    """

    name: str
    text: str
    ask: str
    examples: tuple[tuple[str, str], ...]


def bracketed(head: str, relation: str) -> str:
    """The prompt of a student of paper 11: `<head> h </head> <relation> r </relation> [GEN]`."""
    return f"<head> {head} </head> <relation> {relation} </relation> [GEN]"


MARKS = ("<head>", "</head>", "<relation>", "</relation>", "[GEN]")


def marked_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A new tokenizer for bracketed texts, where each mark is one token that includes the space before it."""
    tokenizer = train_tokenizer(texts, vocab_size)
    tokenizer.add_tokens([AddedToken(mark, lstrip=True, special=True) for mark in MARKS], special_tokens=True)
    return tokenizer


def load_relations(name: str | None = None) -> dict[str, Relation]:
    """Relations from a YAML file (`NAME: {text, ask, examples: [[head, tail], …]}`), or the seven built-in ones."""
    if name is None:
        values = yaml.safe_load((files("understudy") / "recipes" / "relations.yaml").read_text(encoding="utf-8"))
    else:
        path = find(name)
        if path is None or not path.is_file():
            raise InputError(
                f"data.relations {name!r} is not a file. Give a YAML file, or leave it out for ATOMIC's seven."
            )
        values = read_yaml(path, "data.relations")
    if not isinstance(values, Mapping) or not values:
        raise InputError(f"data.relations {name} must map names of relations to text, ask and examples.")
    return {str(key): _relation(str(key), value, name) for key, value in values.items()}


@cache
def generic_words() -> dict[str, tuple[str, ...]]:
    """For generic statements: concepts, relational phrases, quantifiers, function words and connectives."""
    values = yaml.safe_load((files("understudy") / "recipes" / "generics.yaml").read_text(encoding="utf-8"))
    return {name: tuple(words) for name, words in values.items()}


def _relation(name: str, value: Any, file: str | None) -> Relation:
    keys = {"text", "ask", "examples"}
    if not isinstance(value, Mapping) or set(value) != keys:
        raise InputError(f"Relation {name!r} of {file} must have exactly the keys {', '.join(sorted(keys))}.")
    examples = value["examples"]
    pairs = isinstance(examples, list) and all(isinstance(e, list) and len(e) == 2 for e in examples)
    if not pairs or not examples:
        raise InputError(f"Relation {name!r} of {file}: examples must be a list of [head, tail], at least one.")
    return Relation(name, str(value["text"]), str(value["ask"]), tuple((str(h), str(t)) for h, t in examples))


def load_events(name: str, columns: Any = None, key: str = "data.name") -> list[str]:
    """Seed events or phrases: one per line of a text file, or the column `event` (or `text`) of a file of records.

    Args:
        columns: the recipe's `data.columns`, `{ours: theirs}`. key: that names the file, for messages.
    """
    path = _file(key, name)
    if path.suffix == ".txt":
        records = [{"text": line} for record in read_records(path) for line in record["text"].splitlines()]
    else:
        records = read_records(path)
        arrange(name, {"events": records}, ({"event"}, {"text"}), (), columns)
    events = []
    for i, record in enumerate(records):
        (value,) = record.values()
        if value is not None and not isinstance(value, str):
            raise InputError(f"{place(f'{path}, record {i}', record)}: the event is {type(value).__name__}, not text.")
        events.append(checked_text(str(path), "an event", (value or "").strip()))
    events = list(dict.fromkeys(e for e in events if e))
    if not events:
        raise InputError(f"{path} holds no event: give one a line, or records with a column event or text.")
    return events


def load_labels(name: str, relations: Mapping[str, Relation]) -> list[dict[str, Any]]:
    """Labelled triples: records with `head`, `relation`, `tail` and `label` (2, 1, −1, −2, −9, or 1 and 0)."""
    path = _file("data.labels", name)
    rows = read_records(path)
    for i, row in enumerate(rows):
        where = place(f"{path}, record {i}", row)
        for key in ("head", "relation", "tail", "label"):
            if row.get(key) is None:
                raise InputError(f"{where}: {key} is missing; labels have head, relation, tail and label.")
            if key != "label" and not isinstance(row[key], str):
                raise InputError(f"{where}: {key} is {type(row[key]).__name__}, not text.")
        if row["relation"] not in relations:
            raise InputError(f"{where}: relation {reprlib.repr(row['relation'])} is none of {', '.join(relations)}.")
        try:
            label = float(row["label"])
            row["label"] = int(label)
        except (TypeError, ValueError, OverflowError):
            label = float("nan")
        if label != row["label"]:
            raise InputError(f"{where}: label {reprlib.repr(row['label'])} is not a whole number.")
    if not rows:
        raise InputError(f"{path} holds no labelled triple.")
    return rows


def _file(key: str, name: str) -> Path:
    path = find(name)
    if path is None or not path.is_file():
        raise InputError(f"{key} {name!r} is not a file. Give a path, or a file below UNDERSTUDY_DATA.")
    return path
