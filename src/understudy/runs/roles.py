"""The models that a procedure asks beside teacher and student: what a recipe says of them against what its method has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from understudy.errors import InputError, nearest
from understudy.generation import Budget
from understudy.runs.specs import ModelSpec
from understudy.training import Method, Pipeline


def check_roles(
    name: str, method: Method, teacher: ModelSpec | None, roles: Mapping[str, ModelSpec], budget: Budget | None
) -> None:
    """Refuse roles that the method does not have, lacks, or has for one model alone; a budget of nothing; and the training of
    a teacher that is to write.

    Args:
        name: of the method, as the recipe has it.

    Raises:
        InputError: with what the role does and where it is named.
    """
    if budget is not None and not isinstance(method, Pipeline):
        raise InputError(f"budget bounds what a procedure asks and method {name!r} is none: leave it out.")
    writes = isinstance(method, Pipeline) and method.teacher_writes
    if writes and teacher is not None and teacher.train is not None:
        raise InputError(f"Method {name!r} asks its teacher to write and trains none: leave out teacher.train.")
    for role, spec in roles.items():
        if role not in method.roles:
            has = f"it has {', '.join(method.roles)}" if method.roles else "it has none"
            raise InputError(f"Method {name!r} has no role {role!r}: {has}.{nearest(role, method.roles)}")
        if spec.members and not method.roles[role].many:
            raise InputError(f"roles.{role} is one model in method {name!r}: leave out roles.{role}.members.")
        for member in spec.members or {}:
            if not re.fullmatch(r"[\w-]+", member):
                raise InputError(f"Member {member!r} of roles.{role}: a name is made of letters, digits, _ and -.")
    for role, wanted in method.roles.items():
        if wanted.required and role not in roles:
            raise InputError(f"Method {name!r} needs a model that {wanted.does}: set roles.{role}.")


def models_of(recipe: Any) -> dict[str, ModelSpec]:
    """Every model that a recipe names, by role; several of one role are `ROLE.NAME`."""
    sides = {"teacher": recipe.teacher, "student": recipe.student, **(recipe.roles or {})}
    parts = {role: spec.parts(role) for role, spec in sides.items() if spec is not None}
    return {where.replace(".members.", "."): one for part in parts.values() for where, one in part.items()}
