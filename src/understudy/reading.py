"""Reading configuration: YAML and JSON as plain values, with each failure as one line that names file, record and line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from understudy.errors import InputError

LARGEST = 100_000
"""Most values in one configuration, with aliases expanded."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads `5e-5` as a number, as YAML 1.2 does."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for _first in "-+.0123456789":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).append(
        ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"))
    )


def parse_yaml(text: str, what: str, rules: type[yaml.SafeLoader] = _Loader) -> Any:
    """The plain values of a YAML text.

    Args:
        rules: those of YAML 1.2 for numbers, or PyYAML's own for what it has written.

    Raises:
        InputError: invalid YAML, a duplicate key, or a size that is too large after its aliases are expanded. `what`
            names the text.
    """
    try:
        loader = rules(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _measure(node, what, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise InputError(f"{what}{where}: not valid YAML ({error.problem or error.context}).") from None
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{what} is nested too deep to be a configuration.") from None
    except Exception as error:  # the constructors of tags raise any type
        raise InputError(f"{what}: not valid YAML ({' '.join(str(error).split())}).") from None


def read_yaml(path: Path, what: str) -> Any:
    """The plain values of a YAML file; see `parse_yaml`."""
    return parse_yaml(read_text(path, what), f"{what} {path}")


def parse_json(text: str | bytes, what: str) -> Any:
    """The plain values of a JSON text; a failure is one line that begins with `what` and names the line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{what}, line {error.lineno}: not valid JSON ({error.msg}).") from None
    except UnicodeDecodeError:
        raise InputError(f"{what} is not UTF-8 text.") from None
    except ValueError as error:  # a number with thousands of digits
        raise InputError(f"{what}: not valid JSON ({error}).") from None
    except RecursionError:
        raise InputError(f"{what} is nested too deep.") from None


def read_text(path: Path, what: str) -> str:
    """The text of a file.

    Raises:
        InputError: it is missing, not a file, unreadable, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{what} {path} is not UTF-8 text.") from None
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{what} {path} does not exist.") from None
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror or error}.") from None


def _measure(node: yaml.Node, what: str, known: dict[int, int]) -> int:
    """Number of values of a node after its aliases are expanded; each node is counted once, and its size is added for
    each alias."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        if known[id(node)] == 0:
            raise InputError(f"{what}, line {node.start_mark.line + 1}: an alias holds itself.")
        return known[id(node)]
    known[id(node)] = 0
    inside = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
    size = 1 + sum(_measure(n, what, known) for n in inside)
    if size > LARGEST:
        raise InputError(
            f"{what}, line {node.start_mark.line + 1}: more than {LARGEST:,} values once its aliases are unfolded; a "
            "configuration holds a few hundred."
        )
    if isinstance(node, yaml.MappingNode):
        _refuse_twice(node, what)
    known[id(node)] = size
    return size


def _refuse_twice(node: yaml.MappingNode, what: str) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.value in seen:
            raise InputError(f"{what}, line {key.start_mark.line + 1}: key {key.value!r} stands twice. Leave one out.")
        seen.add(key.value)


_PLAIN = (bool, int, float, str, Path)
_DEEPEST = 50


def check_plain(values: Any) -> None:
    """Raise an error for values that a recipe file cannot hold: nan, infinity, huge numbers, invalid text, objects,
    deep nesting."""
    stack: list[tuple[Any, str, int]] = [(values, "", 0)]
    number = 0
    while stack:
        value, where, depth = stack.pop()
        number += 1
        name = f"Recipe key {where}" if where else "The recipe"
        if number > LARGEST or depth > _DEEPEST:
            raise InputError(f"{name} is larger or nested deeper than a recipe can be.")
        if isinstance(value, str):
            _check_text(value, name)
        elif isinstance(value, (int, float)) and not abs(value) < 2**63:
            raise InputError(f"{name} is {brief(value)}: give a finite number below 2^63, or leave it out.")
        elif isinstance(value, Mapping):
            for key, inside in value.items():
                if not isinstance(key, str):
                    raise InputError(f"{name}: key {brief(key)} is {_named(key)}, and keys are text. Put it in quotes.")
                _check_text(key, f"{name}: key {key!a}")
                stack.append((inside, f"{where}.{key}" if where else key, depth + 1))
        elif isinstance(value, (list, tuple)):
            stack.extend((inside, f"{where}.{i}", depth + 1) for i, inside in enumerate(value))
        elif value is not None and not isinstance(value, _PLAIN):
            raise InputError(
                f"{name} is {_named(value)}: a recipe holds text, numbers, true, false, null, lists and mappings."
            )


def _check_text(text: str, name: str) -> None:
    if "\0" in text:
        raise InputError(f"{name} holds a NUL character, which no name or path can: take it out.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} holds half a surrogate pair, which is no Unicode text: take it out.") from None


def _named(value: Any) -> str:
    """The kind of a value, with its article."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def brief(value: Any) -> str:
    """A value for a message, truncated if it is long."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return "a number of more than 18 digits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def at_home(path: Path) -> Path:
    """The path with `~` expanded.

    Raises:
        InputError: there is no such user.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise InputError(f"{path}: there is no user of this name, so no home folder. Write the whole path.") from None
