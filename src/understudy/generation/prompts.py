"""Prompts as files: templates with named slots, few-shot lists with an open last item, and names of people."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from understudy.errors import InputError, nearest

PACKAGED = Path(__file__).parent.parent / "prompts"
_OPEN = "\x00"


class Prompt:
    """A template with named slots, `{{ slot }}`, in Jinja's sandbox. Exactly its slots must be given.

    Args:
        text: the template.
        name: for messages.
    """

    def __init__(self, text: str, name: str = "prompt") -> None:
        self.text, self.name = text, name
        self._jinja = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        try:
            self.slots = frozenset(meta.find_undeclared_variables(self._jinja.parse(text)))
            self._template = self._jinja.from_string(text)
        except TemplateError as error:
            raise InputError(f"Prompt {name} is not a valid template: {' '.join(str(error).split())}") from None

    @classmethod
    def load(cls, name: str | Path) -> Prompt:
        """Load a text file, or one of the package's prompts by name without `.txt`.

        One newline at the end of the file is removed.
        """
        path = Path(name)
        if not path.is_file():
            path = PACKAGED / f"{name}.txt"
        if not path.is_file():
            known = sorted(p.stem for p in PACKAGED.glob("*.txt"))
            raise InputError(
                f"Prompt {str(name)!r} is neither a file nor one of the package's ({', '.join(known) or 'none yet'})."
                f"{nearest(str(name), known)}"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"Prompt {path} is not UTF-8 text.") from None
        return cls(text.removesuffix("\n"), str(name))

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the template, for the run folder."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def render(self, values: Mapping[str, Any] | None = None, **more: Any) -> str:
        """The text with its slots filled.

        Raises:
            InputError: a slot is missing or unknown, or the template fails.
        """
        given = {**(values or {}), **more}
        missing, unknown = sorted(self.slots - set(given)), sorted(set(given) - self.slots)
        if missing:
            raise InputError(
                f"Prompt {self.name} needs slot {missing[0]!r}; given: {', '.join(sorted(given)) or 'none'}."
                f"{nearest(missing[0], unknown)}"
            )
        if unknown:
            raise InputError(
                f"Prompt {self.name} has no slot {unknown[0]!r}.{nearest(unknown[0], self.slots)} "
                f"Slots: {', '.join(sorted(self.slots)) or 'none'}."
            )
        try:
            return self._template.render(given)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InputError(f"Prompt {self.name} cannot be filled: {' '.join(str(error).split())}") from None


def few_shot(
    item: Prompt,
    examples: Sequence[Mapping[str, Any]],
    query: Mapping[str, Any],
    *,
    open_slot: str,
    instruction: str = "",
    separator: str = "\n",
) -> str:
    """Complete examples, numbered if `item` has the slot `number`, and a last one that is left open for the model.

    Args:
        item: template of one example.
        examples: the slots of each example, in order.
        query: the slots of the last one except `open_slot`, where the text ends (without trailing space).
        instruction: text before the first example, followed by `separator`.
    """
    if open_slot not in item.slots:
        raise InputError(
            f"Prompt {item.name} has no slot {open_slot!r} to leave open.{nearest(open_slot, item.slots)} "
            f"Slots: {', '.join(sorted(item.slots)) or 'none'}."
        )
    number = lambda i: {"number": i} if "number" in item.slots else {}  # noqa: E731
    parts = [item.render(example, **number(i)) for i, example in enumerate(examples, start=1)]
    last = item.render({**query, open_slot: _OPEN}, **number(len(examples) + 1))
    parts.append(last[: last.index(_OPEN)].rstrip())
    return separator.join([instruction, *parts] if instruction else parts)


def draw_names(
    roles: Sequence[str], pool: Sequence[str], generator: np.random.Generator, avoid: str = ""
) -> dict[str, str]:
    """A different name from the pool for each role (`PersonX` → `Alex`), none of which occurs in the text `avoid`."""
    free = [name for name in dict.fromkeys(pool) if name not in roles and not _words([name]).search(avoid)]
    if len(free) < len(roles):
        raise InputError(
            f"{len(roles)} names are needed and the pool has {len(free)} that are not in the text. Give a larger pool."
        )
    return dict(zip(roles, map(str, generator.permutation(free)), strict=False))


def name_people(text: str, names: Mapping[str, str]) -> str:
    """Replace roles by names, whole words only, in one pass.

    Raises:
        InputError: two roles share a name, or a name occurs in the text, so that it could not be mapped back.
    """
    if len(set(names.values())) < len(names):
        raise InputError(f"Two roles share a name: {', '.join(f'{k} → {v}' for k, v in names.items())}.")
    found = _words(list(names.values())).search(text) if names else None
    if found and found.group() not in names:
        raise InputError(
            f"The text holds the name {found.group()!r} already; draw another (draw_names(..., avoid=text))."
        )
    return _swap(text, names)


def restore_people(text: str, names: Mapping[str, str]) -> str:
    """Replace names by roles, whole words only: Alex, but not Alexander."""
    return _swap(text, {name: role for role, name in names.items()})


def _words(words: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")


def _swap(text: str, table: Mapping[str, str]) -> str:
    return _words(list(table)).sub(lambda match: table[match.group()], text) if table else text
