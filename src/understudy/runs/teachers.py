"""The recipe's teacher, of any kind: a model, a cache, a server, an ensemble, or a model with another tokenizer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from understudy.data import Batch, find
from understudy.errors import InputError
from understudy.files import check_seal
from understudy.models import ClassifierAdapter, ModelAdapter
from understudy.models.own import reload
from understudy.models.positions import positions
from understudy.models.weights import is_new
from understudy.runs.recipe import Recipe
from understudy.runs.specs import ModelSpec
from understudy.tasks import Prepared, Task
from understudy.tasks import get as get_task
from understudy.tasks.base import COPY
from understudy.teachers import CachedTeacher, Ensemble, LocalTeacher, OtherTokenizer, ServedTeacher, Teacher
from understudy.teachers.server.scores import Score
from understudy.training import Method
from understudy.training.dry_run import check_room

MEMBERS = "members"
Load = Callable[[str, Recipe], ModelAdapter | Teacher | None]


def teacher_of(
    recipe: Recipe, prepared: Prepared, method: Method, model: ModelAdapter | None, student: ModelAdapter, home: Path
) -> Teacher | None:
    """The teacher if it is a cache or a server; `None` if `model` is used.

    Args:
        model: the loaded teacher, if there is one; an error if it does not provide what the method requires.
        home: folder where the scores of a server are kept and shared.
    """
    if method.requires.teacher == "none" or recipe.teacher is None:
        return None
    if (recipe.teacher.cache is not None or recipe.teacher.served) and method.requires.teacher_model:
        raise InputError(
            f"Method {method.name!r} reads the teacher's own model before training, about every example: give a live teacher, "
            "without teacher.cache or teacher.endpoint."
        )
    if isinstance(model, Ensemble):
        outputs_alone(method, "an ensemble has no inner layer of its own")
    elif isinstance(model, OtherTokenizer):
        outputs_alone(method, "its tokens are not the student's")
        if method.requires.temperature != 1.0:
            raise InputError(
                "Teacher and student have different tokenizers, and the likelihood of a text is taken at temperature 1: "
                f"set options.temperature=1 (it is {method.requires.temperature}), or give a teacher with the student's tokenizer."
            )
    if recipe.teacher.cache is not None:
        return _cached(recipe.teacher.cache, method, prepared)
    if recipe.teacher.served:
        return served(recipe, prepared, home / "store" / "served", student)
    return None


def load_model(task: Task, spec: Any, prepared: Prepared, source: Path | nn.Module | None = None) -> ModelAdapter:
    """A task's model, after comparing its folder with the hashes written with it."""
    folder = find(spec.model) if source is None else source
    if isinstance(folder, Path) and folder.is_dir():
        check_seal(folder)
    return task.model(spec, prepared, reload(source, None) if isinstance(source, Path) else source)


def check_room_first(recipe: Recipe, task: Task, prepared: Prepared) -> None:
    """Refuse texts that are too long for the student, before a teacher is trained that is to write them."""
    spec = recipe.student
    if recipe.on_policy is not None and spec is not None and spec.model != COPY and spec.train is None:
        check_room(recipe.on_policy, {"student": load_model(task, spec, prepared)}, prepared.train)


def member_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """For each member of the recipe's teacher, the recipe with this member only; a routed member learns only its own
    domain."""
    members = recipe.teacher.members if recipe.teacher is not None else None
    found = {}
    for name, spec in (members or {}).items():
        assert recipe.teacher is not None
        own = {"only": name} if recipe.teacher.route is not None else {}
        found[name] = recipe.model_copy(update={"teacher": spec, "data": {**recipe.data, **own}})
    return found


def ensemble(recipe: Recipe, prepared: Prepared, load: Load) -> Ensemble | None:
    """The recipe's ensemble of teachers; `None` if `load` does not have a member yet.

    Args:
        load: returns a member, by its name and the recipe with this member only; not called for captured ones.
    """
    spec = recipe.teacher
    assert spec is not None
    members: dict[str, ModelAdapter | Teacher] = {}
    devices: dict[str, str] = {}
    for name, own in member_recipes(recipe).items():
        member: ModelSpec | None = own.teacher
        assert member is not None
        found = _cached(member.cache, recipe.build_method(), prepared) if member.cache is not None else load(name, own)
        if found is None:
            return None
        members[name] = found
        if member.device is not None:
            devices[name] = member.device
    domains = prepared.domains if spec.route is not None else None
    idle = [n for n in members if domains is not None and n not in domains]
    if idle:
        prepared.warnings.append(f"No example names teacher.members.{idle[0]} in column {spec.route!r}.")
    geometric = spec.mix == "logits"
    return Ensemble(members, weights=spec.weights, geometric=geometric, domains=domains, devices=devices)


def standing(recipe: Recipe, prepared: Prepared, folder: Path | None = None) -> ModelAdapter | None:
    """The recipe's teacher without training anything: `None` if it does not exist yet, or does not cover all examples.

    Args:
        folder: of a run that may have trained it.
    """
    task = get_task(recipe.task)
    shown = for_teacher(recipe, prepared)

    def load(own: Recipe, home: Path | None) -> ModelAdapter | None:
        assert own.teacher is not None
        if own.teacher.endpoint is not None:
            return None
        first = home / "teacher" / "student" if home is not None else None
        if own.teacher.train is None:
            return trained(own, load_model(task, own.teacher, shown))
        return load_model(task, own.teacher, shown, first) if first is not None and first.is_dir() else None

    if recipe.teacher is None or prepared.aligner is not None:
        return None
    if not recipe.teacher.members:
        return comparable(load(recipe, folder), prepared)
    below = folder / MEMBERS if folder is not None else None
    return comparable(
        ensemble(recipe, prepared, lambda name, own: load(own, below / name if below is not None else None)),
        prepared,
    )


def _of_any_classes(recipe: Recipe) -> bool:
    """Whether the teacher's head may be of other classes, or new: the method reads its inner layers alone, or nothing."""
    assert recipe.student is not None
    requires = recipe.build_method().requires
    return recipe.student.model != COPY and (requires.teacher == "none" or not requires.teacher_classes)


def for_teacher(recipe: Recipe, prepared: Prepared) -> Prepared:
    """The data in the form that the recipe's teacher is loaded with."""
    return prepared.of_any_classes() if _of_any_classes(recipe) else prepared


def trained(recipe: Recipe, teacher: ModelAdapter) -> ModelAdapter:
    """The teacher, unless it has untrained weights, whose outputs would be random.

    Raises:
        InputError: the recipe uses it untrained, its head is new, and the method reads its outputs.
    """
    spec = recipe.teacher
    assert spec is not None
    if spec.train is None and is_new(teacher) and not _of_any_classes(recipe):
        raise InputError(
            f"Teacher {spec.model} has no head of its own for this task, and a new one would teach at random: train it first "
            "(teacher.train={max_steps: 1000}), or name a model that was trained for it."
        )
    return teacher


def comparable(teacher: ModelAdapter | None, prepared: Prepared) -> ModelAdapter | None:
    """The teacher, if it returns whole distributions over the data's classes for any example, so that it can be evaluated
    beside the student."""
    if isinstance(teacher, OtherTokenizer) or (isinstance(teacher, Ensemble) and not teacher.complete):
        return None
    if isinstance(teacher, ClassifierAdapter) and (teacher.classes != prepared.classes or is_new(teacher)):
        return None
    return teacher


def copy_of(teacher: ModelAdapter | None) -> ModelAdapter:
    """A student that is a copy of its teacher."""
    if isinstance(teacher, (Ensemble, OtherTokenizer)):
        raise InputError(
            f"student={COPY} begins as a copy of one model of its tokens; this teacher is none: name a student."
        )
    if teacher is None:
        raise InputError(f"student={COPY} begins as a copy of the teacher, and there is none: set `teacher`.")
    return copy.deepcopy(teacher)


def other_side(prepared: Prepared) -> Prepared:
    """The data in the form that a teacher with another tokenizer is loaded with."""
    tokenizer = prepared.aligner.teacher.tokenizer
    return dataclasses.replace(prepared, tokenizer=tokenizer, classes=len(tokenizer))


def other_tokenizer(model: ModelAdapter, prepared: Prepared) -> OtherTokenizer:
    """The teacher wrapped with the alignment of both tokenizers."""
    return OtherTokenizer(model, prepared.aligner, limit=positions(model.model))


def _cached(folder: str, method: Method, prepared: Prepared) -> CachedTeacher:
    """The teacher's cache, after checking that the method supports stored targets and the tokens are those of the
    capture."""
    path = find(folder)
    if path is None:
        raise InputError(f"Cache {folder} does not exist. Capture it with `understudy cache capture` and this recipe.")
    outputs_alone(method, "a cache only keeps its outputs")
    return CachedTeacher(path, {**_tokens(prepared), "classes": prepared.classes})


def outputs_alone(method: Method, reason: str) -> None:
    """Raise an error for a method that reads inner layers, if only the teacher's outputs are available."""
    if method.requires.teacher_features or method.requires.teacher_layers:
        raise InputError(f"Method {method.name!r} reads inside the teacher and {reason}: give the live teacher.")


def writing_teacher(teacher: Teacher | None) -> LocalTeacher:
    """The teacher, if it is one model in this process that can write the student's tokens.

    Raises:
        InputError: it is none, or of another kind.
    """
    if not isinstance(teacher, LocalTeacher) or isinstance(teacher.model, (Ensemble, OtherTokenizer)):
        raise InputError(
            "The teacher writes texts here, which one live model with the student's tokenizer does: name such a teacher, "
            "without cache, endpoint and members."
        )
    if not hasattr(teacher.model.model, "generate"):
        raise InputError(
            f"{type(teacher.model.model).__name__} has no generate and cannot write: name another teacher."
        )
    return teacher


def _tokens(prepared: Prepared) -> dict[str, Any]:
    """What a teacher's answers depend on beside the teacher."""
    return {
        key: prepared.hashes[key] for key in ("tokenizer", "template", "ends", "class_names") if key in prepared.hashes
    }


def served(recipe: Recipe, prepared: Prepared, folder: Path, student: ModelAdapter | None = None) -> ServedTeacher:
    """The recipe's teacher on its server, checked against the run's tokenizer and data; scores are kept in `folder`."""
    spec, method = recipe.teacher, recipe.build_method()
    assert spec is not None and spec.endpoint is not None and spec.score is not None
    if prepared.aligner is not None:
        raise InputError(
            "teacher.tokenizer is not the student's, and a server scores the student's tokens: serve a teacher of the "
            "student's family, or give this one as a live model."
        )
    if prepared.tokenizer is None or get_task(recipe.task).kind != "text":
        raise InputError(f"teacher.score is for tokens of text and {recipe.task!r} has none: leave it out.")
    if "teacher_prompt" in prepared.train[0]:
        raise InputError(
            "A server scores the student's texts, and teacher_prompt gives the teacher others: name a live teacher."
        )
    outputs_alone(method, "a server only gives scores of tokens")
    asked = method.requires.temperature
    if asked != 1.0:
        raise InputError(
            f"A server scores at temperature 1 and method {method.name!r} asks for {asked}: set options.temperature=1.0."
        )
    identity = {"format": 1, "task": recipe.task, "teacher_name": spec.model, "classes": prepared.classes}
    teacher = ServedTeacher(
        spec.model,
        spec.endpoint,
        Score.parse(spec.score),
        folder,
        identity | _tokens(prepared),
        prepared.tokenizer,
        student,
    )
    example = Batch.from_dict(prepared.collate([prepared.train[0]]))
    teacher.start(example, conversations=bool(prepared.facts.get("conversations")))
    return teacher
