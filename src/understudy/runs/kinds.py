"""What kinds of task a method and the values of its options work on, against the task of a recipe."""

from __future__ import annotations

from typing import Any, get_args

from understudy.errors import InputError, with_article
from understudy.tasks import TASKS
from understudy.training import Method


def check_kinds(name: str, method: Method, task: Any) -> None:
    """Refuse a method that does not work on the task, or the value of an option that does not (`Method.value_kinds`).

    Args:
        name: of the method, as the recipe has it.

    Raises:
        InputError: with the tasks that it works on, or the option's values that work on this one.
    """
    if not task.kinds & method.kinds:
        raise InputError(
            f"Method {name!r} works on {'/'.join(sorted(method.kinds))} tasks and {task.name!r} is "
            f"{with_article(task.kind)} task. Choose another method (`understudy methods`), or of the tasks "
            f"{', '.join(one for one, other in TASKS.items() if other.kinds & method.kinds)}."
        )
    for option, kinds in method.value_kinds.items():
        value = getattr(method, option)
        if value not in kinds or task.kinds & kinds[value]:
            continue
        every = get_args(type(method).model_fields[option].annotation)
        others = [str(other) for other in every if other not in kinds or task.kinds & kinds[other]]
        raise InputError(
            f"options.{option}={value} works on {'/'.join(sorted(kinds[value]))} tasks and {task.name!r} is "
            f"{with_article(task.kind)} task: set options.{option} to {' or '.join(others)}, or choose another task."
        )
