"""Conversations that a model is to continue: any text set with a prompt, as text or messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from understudy.data.columns import arrange, checked_text, readable
from understudy.data.records import Record, absent, place
from understudy.data.text import TextSplits, check_keys, finish, read_source, split_off, whole
from understudy.errors import InputError

OPTIONS = {"name", "limit", "eval_limit", "columns", "seed"}
WORLD = "support"
_SIZES = {"train": 144, "validation": 120, "test": 400}


def load_conversations(spec: Mapping[str, Any], world: Callable[[int, str, int], list[dict[str, str]]]) -> TextSplits:
    """Read conversations that end with the other side's turn.

    Args:
        spec: `name` (`support`, a set in `UNDERSTUDY_DATA`, a file, a folder or a Hub id), `limit` (most for training),
            `eval_limit` (of validation and test each), `columns` (`{ours: theirs}`); `seed` of `support`.
        world: records of the embedded world by (seed, split, number).

    Returns:
        Records with `conversation`, a list of messages, and where the data have it `type` (a name of what it is about) and
        `persona` (who the customer is, for a simulation).

    Raises:
        InputError: a prompt is empty, or does not end with a message of the user.
    """
    check_keys(spec, OPTIONS)
    name, notes = str(spec["name"]), list[str]()
    if name == WORLD:
        splits: dict[str, list[Record]] = {
            split: list(world(whole(spec, "seed", 0, least=0), split, number)) for split, number in _SIZES.items()
        }
    else:
        if "seed" in spec:
            raise InputError(f"data.seed belongs to {WORLD} and has no effect on {name}: leave it out.")
        splits = read_source(name, spec, (WORLD,), notes)
    notes += arrange(name, splits, ({"prompt"},), {"type", "persona"}, spec.get("columns"))
    for split, records in splits.items():
        for i, record in enumerate(records):
            record["conversation"] = _messages(place(f"{name}, {split} record {i}", record), record)
    split_off(name, splits, notes)
    for split in ("validation", "test"):
        splits[split] = splits[split][: whole(spec, "eval_limit", len(splits[split]))]
    return finish(name, spec, splits, notes)


def _messages(where: str, record: Record) -> list[dict[str, Any]]:
    prompt = readable(where, "prompt", record["prompt"])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not messages or messages[-1]["role"] != "user":
        raise InputError(f"{where}: the conversation does not end with a message of the user, who is to be answered.")
    if not messages[-1]["content"].strip():
        raise InputError(f"{where}: the last message is empty.")
    for key in ("type", "persona"):
        if key in record:
            if absent(record[key]):
                raise InputError(f"{where}: {key} is {record[key]}, not text. Fill it, or leave it empty.")
            record[key] = checked_text(where, key, str(record[key]))
    return [{"role": m["role"], "content": m["content"]} for m in messages]
