"""Recipes: one typed configuration, read from YAML, `key=value` overrides or Python, with unknown keys refused."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from transformers import TrainingArguments

from understudy.errors import InputError, nearest
from understudy.generation.limits import Endpoint
from understudy.methods import get as get_method
from understudy.runs.specs import ModelSpec, said_no
from understudy.tasks import get as get_task
from understudy.training import Method, OnPolicy


class Recipe(BaseModel):
    """Everything a run depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "kd"
    task: str = "image_classification"
    teacher: ModelSpec | None = None
    student: ModelSpec | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    output: Path = Path("runs/run")
    seed: int = Field(0, ge=0)
    options: dict[str, Any] = Field(default_factory=dict, description="The method's own options.")
    arms: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="For comparisons: `method` and `options` of each arm by a name, or a method's options by its.",
    )
    trainer: dict[str, Any] = Field(default_factory=dict, description="Arguments of transformers' Trainer.")
    patience: int | None = Field(
        None, ge=1, description="End training after this many evaluations without gain; needs `trainer.eval_strategy`."
    )
    reduction: Literal["token_mean", "sequence_mean", "sequence_sum", "sum"] = "token_mean"
    on_policy: OnPolicy | None = Field(None, description="Let the student write a share of the texts it is trained on.")
    eval_split: Literal["test", "validation"] = Field("test", description="The split that evaluation reports.")

    @field_validator("teacher", "student", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @field_validator("data", mode="before")
    @classmethod
    def _data_name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else (value or {})

    @field_validator("trainer", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        return said_no(value)

    @property
    def evaluation_batch(self) -> int:
        """Examples that an evaluation looks at together: `trainer.per_device_eval_batch_size`, 64 if not given."""
        return max(1, int(self.trainer.get("per_device_eval_batch_size", 64)))

    def build_method(self) -> Method:
        """The configured method; a bad option is one line that names it."""
        return validated(get_method(self.method), self.options, f"option of method {self.method!r}")

    def dump(self) -> dict[str, Any]:
        """Plain values, as written to `recipe.yaml`."""
        return self.model_dump(mode="json", exclude_none=True)


def validated(model: type[Any], values: Mapping[str, Any], what: str) -> Any:
    """`model(**values)`, with a bad or unknown value as one line."""
    unknown = [k for k in values if k not in model.model_fields]
    if unknown:
        raise InputError(
            f"Unknown {what}: {unknown[0]!r}.{nearest(unknown[0], model.model_fields)} "
            f"Known: {', '.join(model.model_fields) or 'none'}."
        )
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "value"
        if first["type"] == "extra_forbidden":
            field = model.model_fields.get(str(first["loc"][0]))
            known = ModelSpec.model_fields if field is not None and len(first["loc"]) > 1 else model.model_fields
            known = Endpoint.model_fields if "endpoint" in first["loc"][:-1] else known
            known = OnPolicy.known(first["loc"][1:-1]) if first["loc"][0] == "on_policy" else known
            raise InputError(f"Unknown {what}: {where!r}.{nearest(str(first['loc'][-1]), known)}") from None
        message = first["msg"].removeprefix("Value error, ")
        # A key that was put where it does not belong is not printed either.
        shown = where if "endpoint" in first["loc"] else f"{where} = {first['input']!r}"
        raise InputError(f"Bad {what}: {shown}: {message}.") from None


def training_fields() -> set[str]:
    """The keys that `trainer` may hold."""
    own = {"output_dir", "seed", "remove_unused_columns", "do_train", "do_eval", "do_predict", "resume_from_checkpoint"}
    return {f.name for f in dataclasses.fields(TrainingArguments) if f.init} - own


def check_trainer_keys(values: Mapping[str, Any], where: str = "trainer") -> None:
    """Refuse a key that transformers' Trainer does not know, with the nearest one."""
    known = training_fields()
    for key in values:
        if key not in known:
            raise InputError(f"Unknown key {where}.{key}.{nearest(key, known)} Keys are those of TrainingArguments.")


def make(values: Mapping[str, Any]) -> Recipe:
    """A validated recipe with its task's defaults filled in."""
    if not isinstance(values, Mapping):
        raise InputError(f"A recipe is a mapping of keys to values, not {type(values).__name__}.")
    _refuse_endless(values, "")
    recipe: Recipe = validated(Recipe, dict(values), "recipe key")
    task = get_task(recipe.task)
    check_members(recipe, task)
    filled = task.fill(_with_domains(recipe))
    recipe = validated(Recipe, filled, "recipe key")
    check_trainer_keys(recipe.trainer)
    for where, one in recipe.teacher.parts("teacher").items() if recipe.teacher is not None else ():
        if one.train is not None:
            check_trainer_keys(one.train, f"{where}.train")
    if recipe.patience is not None and recipe.trainer.get("eval_strategy", "no") == "no":
        raise InputError(
            "patience counts evaluations and there are none: set trainer.eval_strategy=steps, or leave it."
        )
    sides = {s: getattr(recipe, s) for s in ("teacher", "student") if getattr(recipe, s) is not None}
    known = task.model_options
    for side, spec in {where: part for s, one in sides.items() for where, part in one.parts(s).items()}.items():
        for key in spec.options or {}:
            if key not in known:
                raise InputError(
                    f"Unknown key {side}.options.{key}.{nearest(key, known)} Known: {', '.join(sorted(known)) or 'none'}."
                )
    method = recipe.build_method()
    _check_on_policy(recipe, method, task.kind)
    if task.kind not in method.kinds:
        raise InputError(
            f"Method {recipe.method!r} works on {'/'.join(sorted(method.kinds))} tasks and {recipe.task!r} is a "
            f"{task.kind} task. Choose another method (`understudy methods`) or task."
        )
    return recipe


def _refuse_endless(values: Any, where: str) -> None:
    """Refuse nan and infinity, which no recipe file could hold: they would be read again as no value at all."""
    if isinstance(values, float) and not math.isfinite(values):
        raise InputError(f"Recipe key {where} is {values}: give a finite number, or leave it out.")
    inside = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inside:
        _refuse_endless(value, f"{where}.{key}" if where else str(key))


def own_training(recipe: Recipe, side: str, output: Path) -> Recipe:
    """The run that trains the recipe's teacher, or the student's start, on the labels first."""
    spec: ModelSpec = getattr(recipe, side)
    assert spec.train is not None
    task = get_task(recipe.task)
    student = ModelSpec(**{**spec.model_dump(), "train": None})
    data = {**recipe.data, **task.start_data}
    if spec.tokenizer is not None:
        data.pop("tokenizer", None)  # its own counts
    values = recipe.dump() | {
        "method": task.baseline,
        "options": {},
        "output": str(output),
        "student": student.model_dump(exclude_none=True),
        "teacher": None,
        "trainer": spec.train,
        "patience": None,
        "seed": 0,
        "data": data,
        "eval_split": "test",
        "arms": {},
        "on_policy": None,
    }
    # The defaults of the task would name a teacher again; a teacher's own run has none.
    return make(values).model_copy(update={"teacher": None})


def check_members(recipe: Recipe, task: Any) -> None:
    """Refuse several teachers that cannot be one, and their keys where there is one teacher."""
    teacher, student = recipe.teacher, recipe.student
    if student is not None and (student.members or student.weights or student.route):
        raise InputError("student.members: a student is one model; several models are a teacher's (teacher.members).")
    if teacher is None:
        return
    if not teacher.members:
        for key in ("members", "weights", "route"):
            if getattr(teacher, key) is not None:
                raise InputError(f"teacher.{key} is about several teachers: name them in teacher.members.")
        return
    if not task.mixes:
        raise InputError(f"Task {recipe.task!r} has no rows of classes that teachers could share: name one teacher.")
    for key in ("cache", "train", "endpoint", "peft", "quantization", "device", "options"):
        if getattr(teacher, key) is not None:
            raise InputError(f"teacher.{key} is one model's: set it in the members (teacher.members.NAME.{key}).")
    for name, member in teacher.members.items():
        if member.members or member.weights or member.route:
            raise InputError(f"teacher.members.{name} has members itself: list all of them in teacher.members.")
        if not re.fullmatch(r"[\w-]+", name):
            raise InputError(f"Member {name!r}: a name is made of letters, digits, _ and -.")
    if teacher.route is not None and teacher.weights is not None:
        raise InputError("teacher.route asks one member about each example: leave teacher.weights out.")


def _with_domains(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values; the column that routes examples to members becomes that of the data's domains."""
    values, route = recipe.dump(), recipe.teacher.route if recipe.teacher is not None else None
    named = values["data"].get("domain_column")
    if route is not None and named not in (None, route):
        raise InputError(f"teacher.route is {route!r} and data.domain_column {named!r}: domains are in one column.")
    if route is not None:
        values["data"]["domain_column"] = route
    return values


def _check_on_policy(recipe: Recipe, method: Method, kind: str) -> None:
    """Refuse own samples where nothing could write or judge them."""
    if recipe.on_policy is None:
        return
    if kind != "text":
        raise InputError(f"on_policy lets the student write text and {recipe.task!r} is a {kind} task: leave it out.")
    if recipe.teacher is None or "teacher" not in method.asks:
        raise InputError(
            f"on_policy has a teacher judge the student's own samples and method {recipe.method!r} asks none: choose a "
            "method with a teacher (kd, taid), or leave it out."
        )
    if recipe.teacher.cache is not None:
        raise InputError(
            f"teacher.cache {recipe.teacher.cache} cannot answer for texts that are written during training: leave out "
            "teacher.cache for a live teacher, or on_policy."
        )
    if recipe.on_policy.adaptive is not None and recipe.trainer.get("eval_strategy", "no") == "no":
        raise InputError("on_policy.adaptive follows the validation loss and there is none: set trainer.eval_strategy.")


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `key=value` overrides (dots reach inside, values are YAML)."""
    values: Any = {}
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise InputError(f"Recipe {file} does not exist. Give a YAML file, or overrides alone: task=... method=...")
        try:
            values = yaml.safe_load(file.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"Recipe {file} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise InputError(f"Recipe {file} must be a mapping of keys to values, not a {type(values).__name__}.")
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise InputError(f"Override {item!r} is not of the form key=value (for example trainer.max_steps=100).")
        try:
            _assign(values, key.split("."), yaml.safe_load(text) if text else None)
        except yaml.YAMLError as error:
            raise InputError(f"Override {item!r}: the value is not valid YAML.") from error
    return make(values)


def _assign(values: dict[str, Any], path: list[str], value: Any) -> None:
    short = {"teacher": "model", "student": "model", "data": "name"}
    for i, key in enumerate(path[:-1]):
        inner = values.get(key)
        if isinstance(inner, str) and i == 0 and key in short:
            inner = {short[key]: inner}
        elif inner is None:
            inner = {}
        elif not isinstance(inner, dict):
            raise InputError(f"Override {'.'.join(path)}: {key!r} holds {inner!r} and has no keys inside.")
        values[key] = inner
        values = inner
    values[path[-1]] = value
