"""Columns under this project's names: the recipe's mapping, the names of other tools, and the content of messages."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

from understudy.data.records import Record, place, printable
from understudy.errors import InputError, nearest

Format = Set[str]
CONVERSATIONS = ("conversations", "conversation")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Roles of ShareGPT by those of chat templates; others keep their name."""
LISTS = {"messages", "completions", "scores", "log_probs", "tools", "tree", "steps", "ended"}
"""Columns that hold a list; files without lists, such as CSV, hold it as JSON text."""


def arrange(
    name: str,
    splits: Mapping[str, list[Record]],
    formats: Sequence[Format],
    optional: Collection[str],
    columns: Any = None,
) -> list[str]:
    """Rename the columns of every record to those of one format, in place, and remove all others.

    Args:
        formats: names of columns, the first choice first.
        optional: further columns that are kept.
        columns: the recipe's `data.columns`, `{ours: theirs}`.

    Besides the formats' own names, ShareGPT's `conversations` and Alpaca's `instruction`, `input`, `output` (or
    `response`) are recognised.

    Returns:
        Notes: the recognised format, and every unused column.

    Raises:
        InputError: the columns of a record match no format.
    """
    mapping = _checked(columns, formats, optional)
    unused: set[str] = set()
    made: dict[str, None] = {}
    for split, records in splits.items():
        for i, record in enumerate(records):
            where = place(f"{name}, {split} record {i}", record)
            _rename(where, record, mapping)
            wanted = _format(where, record, formats, made)
            used = set(wanted) | {c for c in optional if not empty(record.get(c))}
            for column in LISTS & used:
                record[column] = _parsed(where, column, record[column])
            for extra in record.keys() - used:
                if record[extra] is not None and extra not in optional:
                    unused.add(extra)
                del record[extra]
    notes = [f"{name}: {text}." for text in made]
    if unused:
        notes.append(f"{name}: not used: {'column' if len(unused) == 1 else 'columns'} {names(unused)}.")
    return notes


def empty(value: Any) -> bool:
    """Whether a column holds nothing: null, an empty text or an empty list."""
    return value is None or (isinstance(value, (str, list, tuple)) and not value)


def names(columns: Collection[str]) -> str:
    """Column names for a message, on one line."""
    shown = [printable(str(c))[:40] for c in sorted(columns, key=str)]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def checked_text(where: str, what: str, value: str) -> str:
    """`value`, if it is text that can be encoded as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {what} holds {value[error.start]!r}, half of a character. Write the whole character, or remove it."
        ) from None
    return value


def readable(where: str, what: str, value: Any) -> Any:
    """Text, or messages with role and content.

    A single message becomes a list of one; ShareGPT's `from` and `value` become role and content; a content of text
    parts becomes one text.

    Raises:
        InputError: anything else.
    """
    if isinstance(value, str):
        return checked_text(where, what, value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise InputError(f"{where}: {what} is {type(value).__name__}, not text or messages.")
    return [_message(where, what, message) for message in value]


def conversation(where: str, what: str, value: Any) -> list[dict[str, Any]]:
    """A non-empty list of messages; as `readable`."""
    if not isinstance(value, list):
        raise InputError(f"{where}: {what} is {type(value).__name__}, not messages.")
    if not value:
        raise InputError(f"{where}: {what} is empty. Leave the record out.")
    found: list[dict[str, Any]] = readable(where, what, value)
    return found


def tools(where: str, value: Any) -> list[dict[str, Any]] | None:
    """The tools for a chat template, or `None` without any."""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InputError(f"{where}: tools must be a list of JSON schemas of functions.")
    try:
        found = _without_nulls(value)
        checked_text(where, "tools", json.dumps(found, ensure_ascii=False, default=str))
    except RecursionError:
        raise InputError(f"{where}: tools are nested too deeply. Flatten them.") from None
    return found or None


def without_prompt(prompt: Any, answers: Sequence[Any]) -> tuple[Any, list[Any]] | None:
    """Prompt and answers if every answer begins with the prompt, without this repetition; else `None`.

    Messages are compared by role and content, and system messages may precede the prompt. Text counts as repeated if
    the prompt has at least two words and ends at the end of a word.
    """
    if all(isinstance(a, list) for a in answers):
        asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        for spoken in (asked, [m for m in asked if m["role"] != "system"]):
            found = _without_messages(spoken, answers) if spoken else None
            if found is not None:
                held, said = found
                return held if len(held) > len(asked) else asked, said
        return None
    if not isinstance(prompt, str) or not all(isinstance(a, str) for a in answers):
        return None
    text = prompt.rstrip()
    if len(text.split()) < 2 or not all(a.startswith(text) for a in answers):
        return None
    rests = [a[len(text) :] for a in answers]
    if text[-1].isalnum() and any(r[:1].isalnum() for r in rests):
        return None
    return text, rests


def _without_messages(asked: Sequence[Any], answers: Sequence[Any]) -> tuple[Any, list[Any]] | None:
    systems = next((i for i, m in enumerate(answers[0]) if m["role"] != "system"), len(answers[0]))
    lead = 0 if asked[0]["role"] == "system" else systems
    length = lead + len(asked)
    same = [(m["role"], m["content"].strip()) for m in [*answers[0][:lead], *asked]]
    if not all([(m["role"], m["content"].strip()) for m in a[:length]] == same for a in answers):
        return None
    return answers[0][:length], [a[length:] for a in answers]


def _checked(columns: Any, formats: Sequence[Format], optional: Collection[str]) -> dict[str, str]:
    """`data.columns`, if it maps this project's names to text."""
    if columns is None:
        return {}
    known = set(optional).union(*formats)
    if not isinstance(columns, Mapping) or not all(isinstance(c, str) for pair in columns.items() for c in pair):
        raise InputError("data.columns must map names of columns, as in data.columns={prompt: question}.")
    for ours in columns:
        if ours not in known:
            raise InputError(f"Unknown key data.columns.{ours}.{nearest(ours, known)} Known: {names(known)}.")
    return dict(columns)


def _rename(where: str, record: Record, mapping: Mapping[str, str]) -> None:
    values = {}
    for ours, theirs in mapping.items():
        if theirs not in record:
            raise InputError(
                f"{where} has no column {theirs!r}, which data.columns.{ours} names.{nearest(theirs, record)} Its columns "
                f"are {names(record)}."
            )
        values[ours] = record[theirs]
    for theirs in mapping.values():
        record.pop(theirs, None)
    record.update(values)


def _format(where: str, record: Record, formats: Sequence[Format], made: dict[str, None]) -> Format:
    """The first format that matches the record, under its own names or those of other tools."""
    other = _recognised(record)
    for wanted in formats:
        if wanted <= record.keys() | other.keys():
            taken = {column: other[column] for column in sorted(wanted & other.keys())}
            values = {column: value(where) for column, (_, value) in taken.items()}
            for column, (sources, _) in taken.items():
                made.setdefault(f"{column} was made of {' and '.join(sources)}")
                for source in sources:
                    record.pop(source, None)
            record.update(values)
            return wanted
    accepted = "; ".join(" + ".join(sorted(f)) for f in formats)
    raise InputError(
        f"{where} has columns {names(record) or 'none'}; expected one of: {accepted}. Columns under other names are named "
        "in data.columns, as in data.columns={prompt: question, completion: answer}."
    )


def _recognised(record: Record) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Columns that can be converted from those of other tools: the source columns, and the conversion."""
    found: dict[str, tuple[tuple[str, ...], Any]] = {}
    chat = next((c for c in CONVERSATIONS if c in record), None)
    if chat is not None:
        sources = (chat, "system") if record.get("system") else (chat,)
        found["messages"] = sources, lambda where: _sharegpt(where, chat, record)
    if isinstance(record.get("instruction"), str):
        sources = ("instruction", "input") if "input" in record else ("instruction",)
        found["prompt"] = sources, lambda where: _instruction(where, record)
    elif chat is not None and "chosen" in record:
        found["prompt"] = found["messages"]
    answer = next((c for c in ("response", "output") if c in record), None)
    if answer is not None:
        found["completion"] = (answer,), lambda where: record[answer]
    if "messages" in record and "label" in record:  # single answers in LLaMA-Factory's format
        found |= {
            "completion": (("messages",), lambda where: _last(where, record, True)),
            "prompt": (("messages",), lambda where: _last(where, record, False)),
        }
    return {column: how for column, how in found.items() if column not in record}


def _sharegpt(where: str, column: str, record: Record) -> list[Any]:
    turns = conversation(where, column, _parsed(where, column, record[column]))
    system = record.get("system")
    return [{"role": "system", "content": system}, *turns] if system else turns


def _instruction(where: str, record: Record) -> str:
    """Instruction and input on separate lines, as LLaMA-Factory joins them."""
    parts = [record["instruction"], record.get("input") or ""]
    if not isinstance(parts[1], str):
        raise InputError(f"{where}: input is {type(parts[1]).__name__}, not text.")
    return "".join(f"{part}\n" for part in parts if part)


def _last(where: str, record: Record, last: bool) -> list[Any]:
    turns = conversation(where, "messages", _parsed(where, "messages", record["messages"]))
    return turns[-1:] if last else turns[:-1]


def _parsed(where: str, column: str, value: Any) -> Any:
    """A list, also if it is given as JSON text."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: {column} holds text that is not a JSON list. Fix it.") from None


def _message(where: str, what: str, message: Any) -> dict[str, Any]:
    if isinstance(message, dict) and {"from", "value"} <= message.keys() and "role" not in message:
        role = message["from"]
        rest = {k: v for k, v in message.items() if k not in ("from", "value")}
        message = {
            **rest,
            "role": ROLES.get(role, role) if isinstance(role, str) else role,
            "content": message["value"],
        }
    if not isinstance(message, dict) or "role" not in message or not {"content", "tool_calls"} & message.keys():
        raise InputError(f"{where}: {what} holds {reprlib.repr(message)}, not a message with role and content.")
    role, content = message["role"], message.get("content")
    if not isinstance(role, str):
        raise InputError(f"{where}: {what} holds a message whose role is {type(role).__name__}, not text.")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = "".join(_part(where, what, part) for part in content)
    if not isinstance(content, str):
        raise InputError(f"{where}: {what} holds a message whose content is {type(content).__name__}, not text.")
    try:
        more = _without_nulls({k: v for k, v in message.items() if k not in ("role", "content")})
        if more:
            checked_text(where, what, json.dumps(more, ensure_ascii=False, default=str))
    except RecursionError:
        raise InputError(f"{where}: {what} holds a message that is nested too deeply. Flatten it.") from None
    if more.get("weight", 1) not in (0, 1):
        raise InputError(
            f"{where}: {what} holds a message of weight {reprlib.repr(more['weight'])}: 1 trains on it, as without one, 0 does not."
        )
    return {"role": checked_text(where, what, role), "content": checked_text(where, what, content), **more}


def _part(where: str, what: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else part
    raise InputError(
        f"{where}: {what} holds a part of a message that is no text ({reprlib.repr(kind)}): only text is read."
    )


def _without_nulls(value: Any) -> Any:
    """Remove the empty values that tables add, since they give every object the keys of all objects."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
