"""Recipes: one typed configuration, read from YAML, `key=value` overrides or Python. Unknown keys are errors."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from understudy.errors import InputError, nearest, with_article
from understudy.evaluation.harness import HarnessSpec, check_run
from understudy.generation import Budget
from understudy.generation.limits import Endpoint
from understudy.masking import masked, remember
from understudy.methods import all_methods, resolve
from understudy.methods import get as get_method
from understudy.models import is_new_causal_lm
from understudy.reading import at_home, brief, check_plain, parse_yaml, read_yaml
from understudy.runs.foreign import check_arguments
from understudy.runs.kinds import check_kinds
from understudy.runs.roles import check_roles
from understudy.runs.specs import ModelSpec, OracleSpec, add_unnamed, said_no, take_unnamed
from understudy.tasks import TASKS
from understudy.tasks import get as get_task
from understudy.tasks.base import COPY, MODULE
from understudy.tasks.data_keys import check_data_keys
from understudy.training import Method, OnPolicy, Pipeline
from understudy.training.arguments import checked_arguments
from understudy.training.arguments import fields as training_fields
from understudy.training.pipeline import ORACLE

log = logging.getLogger(__name__)

RENAMED = {"judge": "eval_split"}
"""Former names of recipe keys, which still work."""
NONE = "none"
"""Value of `teacher` for no teacher, not even the task's default."""


class Recipe(BaseModel):
    """Everything a run depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(
        "kd",
        description="What the student learns by: `understudy methods` lists them. Where `kd` does not apply, the task's baseline or only method.",
    )
    task: str = Field("image_classification", description="The kind of problem, with its data, models and metric.")
    teacher: ModelSpec | None = Field(None, description="The model to learn from; keys below.")
    student: ModelSpec | None = Field(None, description="The model that is trained; keys below.")
    oracle: OracleSpec | None = Field(
        None, description="A stronger model that no one learns from: measures whether the student leaves the truth."
    )
    roles: dict[str, ModelSpec] | None = Field(
        None, description="Further models that a procedure asks (a critic, a judge), by role; keys below."
    )
    budget: Budget | None = Field(
        None, description="What all models that a procedure asks may use together; keys below."
    )
    data: dict[str, Any] = Field(default_factory=dict, description="What to train on; keys below.")
    output: Path = Field(Path("runs/run"), description="The run folder.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of initial weights, order, augmentation and noise.")
    options: dict[str, Any] = Field(default_factory=dict, description="The method's own options.")
    arms: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="For comparisons: `method` and `options` of each arm by a name, or a method's options by its.",
    )
    trainer: dict[str, Any] = Field(default_factory=dict, description="Arguments of transformers' Trainer.")
    patience: int | None = Field(
        None, ge=1, description="End training after this many evaluations without gain; needs `trainer.eval_strategy`."
    )
    reduction: Literal["token_mean", "sequence_mean", "sequence_sum", "sum"] = Field(
        "token_mean", description="What an update divides its loss by."
    )
    on_policy: OnPolicy | None = Field(None, description="Let the student write a share of the texts it is trained on.")
    eval_split: Literal["test", "validation"] = Field("test", description="The split that evaluation reports.")
    lm_eval: HarnessSpec | None = Field(
        None,
        description="Tasks of lm-evaluation-harness for the trained student; `a,b` alone are its `tasks`; keys below.",
    )

    @field_validator("teacher", "student", "oracle", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        if isinstance(value, str) and value.casefold() == NONE:  # Python's None is a text in YAML
            return None
        return {"model": value} if isinstance(value, str) else value

    @field_validator("roles", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        named = (
            {k: {"model": v} if isinstance(v, str) else v for k, v in value.items()}
            if isinstance(value, dict)
            else value
        )
        return named or None

    @field_validator("data", mode="before")
    @classmethod
    def _data_name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else (value or {})

    @field_validator("trainer", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        return said_no(value)

    @field_validator("output")
    @classmethod
    def _home(cls, value: Path) -> Path:
        return at_home(value)

    @property
    def evaluation_batch(self) -> int:
        """Examples per evaluation batch: `trainer.per_device_eval_batch_size`, 64 if not given."""
        return max(1, int(self.trainer.get("per_device_eval_batch_size", 64)))

    def build_method(self) -> Method:
        """The configured method; an invalid option is an `InputError` of one line that names it."""
        return validated(get_method(self.method), self.options, f"option of method {self.method!r}")

    def dump(self) -> dict[str, Any]:
        """Plain values as written to `recipe.yaml`, which also say if a method runs without its optional teacher."""
        values = self.model_dump(mode="json", exclude_none=True)
        method = self.build_method()
        if self.teacher is None and method.requires.teacher == "optional":
            values["teacher"] = NONE
        return values

    def shown(self) -> dict[str, Any]:
        """Plain values as stored and displayed, with secrets masked."""
        found: dict[str, Any] = masked(self.dump())
        return found


def validated(model: type[Any], values: Mapping[str, Any], what: str) -> Any:
    """`model(**values)`; a bad or unknown value is an `InputError` of one line."""
    unknown = [k for k in values if k not in model.model_fields]
    if unknown:
        raise InputError(
            f"Unknown {what}: {unknown[0]!r}.{nearest(str(unknown[0]), model.model_fields)} "
            f"Known: {', '.join(model.model_fields) or 'none'}."
        )
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, Endpoint.shown(first["loc"]))) or "value"
        if first["type"] == "extra_forbidden":
            field = model.model_fields.get(str(first["loc"][0]))
            known = OracleSpec.model_fields if field is not None and len(first["loc"]) > 1 else model.model_fields
            known = Endpoint.model_fields if "endpoint" in first["loc"][:-1] else known
            known = OnPolicy.known(first["loc"][1:-1]) if first["loc"][0] == "on_policy" else known
            known = HarnessSpec.model_fields if first["loc"][0] == "lm_eval" else known
            raise InputError(f"Unknown {what}: {where!r}.{nearest(str(first['loc'][-1]), known)}") from None
        message = first["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list").rstrip(".")
        if not first["loc"]:  # what is wrong is how several keys go together
            raise InputError(f"Bad {what}: {message}.") from None
        # An API key at the wrong place must not be printed either.
        shown = where if "endpoint" in first["loc"] else f"{where} = {brief(masked(first['input']))}"
        raise InputError(f"Bad {what}: {shown}: {message}.") from None


def make(values: Mapping[str, Any]) -> Recipe:
    """A validated recipe with its task's defaults."""
    if not isinstance(values, Mapping):
        raise InputError(f"A recipe is a mapping of keys to values, not {type(values).__name__}.")
    check_arguments(values, Recipe.model_fields)
    check_plain(values)
    remember(values)
    values = _with_defaults(_placed(resolved(_with_method(values))))
    unnamed = take_unnamed(values)
    recipe: Recipe = validated(Recipe, values, "recipe key")
    task = get_task(recipe.task)
    check_data_keys(recipe.task, recipe.data)
    check_members(recipe, task)
    requires = recipe.build_method().requires
    alone = recipe.teacher is None and ("teacher" in values or requires.teacher == "none")
    if alone and requires.needs_teacher:
        raise InputError(
            f"Method {recipe.method!r} learns from a teacher and the recipe says there is none: name one, leave `teacher` out "
            f"for the task's own, or choose a method without (method={task.baseline})."
        )
    given = _with_domains(recipe)
    method = recipe.build_method()
    if isinstance(method, Pipeline) and method.teacher_writes and requires.needs_teacher:
        given.setdefault("teacher", {"model": ORACLE})  # where the task has none it says so
    filled = task.fill(given)
    if alone:
        filled["teacher"] = None
    add_unnamed(filled, unnamed)
    recipe = validated(Recipe, _with_arguments(filled), "recipe key")
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
    check_roles(recipe.method, method, recipe.teacher, recipe.roles or {}, recipe.budget)
    check_kinds(recipe.method, method, task)
    method.check_trainer(recipe.trainer)
    _check_on_policy(recipe, method, task.kind)
    _check_oracle(recipe, method, task.kind)
    if recipe.lm_eval is not None:
        check_run(method, recipe.task, task.kind)
    return recipe


def _with_method(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values with a method that works on their task, where none is named: the default, the task's baseline, or its only
    method."""
    default = Recipe.model_fields["method"].default
    name = values.get("task")
    if "method" in values or not isinstance(name, str) or name not in TASKS:
        return values
    task = TASKS[name]
    fits = [name for name in (default, task.baseline) if task.kinds & get_method(name).kinds]
    if not fits:
        others = [name for name, method in all_methods().items() if task.kinds & method.kinds]
        fits = others if len(others) == 1 else []
    return {**values, "method": fits[0]} if fits and fits[0] != default else values


def resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with former names of keys replaced, and the name of a variant (`kto`, `simpo`) replaced by its method
    and options."""
    found = dict(values)
    for old, new in RENAMED.items():
        if old in found:
            if new in found:
                raise InputError(f"{old} is the former name of {new}, and the recipe has both: leave {old} out.")
            log.warning("Recipe key %s is called %s now; the old name goes with the next version.", old, new)
            found[new] = found.pop(old)
    if isinstance(found.get("method"), str):
        found["method"], options = resolve(found["method"])
        given = found.get("options")
        if options and isinstance(given, Mapping | None):
            other = next((k for k in options if k in (given or {}) and (given or {})[k] != options[k]), None)
            if other is not None:
                raise InputError(
                    f"method={values['method']} is method={found['method']} with options.{other}={options[other]}, and "
                    f"options.{other} is {brief((given or {})[other])}: leave one of them out."
                )
            found["options"] = {**(given or {}), **options}
    return found


def _placed(values: dict[str, Any]) -> dict[str, Any]:
    """The values; a top-level key that belongs to the method or the trainer is an error that names its place."""
    for key in values:
        if key in Recipe.model_fields:
            continue
        name = values.get("method", Recipe.model_fields["method"].default)
        options = get_method(name).model_fields if isinstance(name, str) else {}
        place = f"options.{key}" if key in options else f"trainer.{key}" if key in training_fields() else None
        if place is not None:
            owner = f"an option of method {name!r}" if key in options else "an argument of transformers' Trainer"
            raise InputError(f"Unknown recipe key: {key!r} is {owner}: write {place}.")
    return values


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The values, with the method's own defaults of recipe keys below those that are given."""
    name = values.get("method")
    for key, own in get_method(name).defaults.items() if isinstance(name, str) else ():
        given = values.get(key)
        if given is None or isinstance(given, Mapping):
            values[key] = {**own, **(given or {})}
    return values


def _with_arguments(filled: dict[str, Any]) -> dict[str, Any]:
    """The recipe's values with all arguments of Trainer checked and parsed: those of the run and of models trained
    first."""
    filled["trainer"] = checked_arguments(filled.get("trainer") or {}, "trainer")
    for side in ("teacher", "student"):
        spec = filled.get(side)
        if isinstance(spec, dict):
            members = {f"{side}.members.{n}": m for n, m in (spec.get("members") or {}).items()}
            for where, part in {side: spec, **members}.items():
                if part.get("train") is not None:
                    part["train"] = checked_arguments(part["train"], f"{where}.train")
    return filled


def own_training(recipe: Recipe, side: str, output: Path) -> Recipe:
    """The run that first trains the recipe's teacher, or the student's initial weights, on the labels."""
    spec: ModelSpec = getattr(recipe, side)
    assert spec.train is not None
    task = get_task(recipe.task)
    student = ModelSpec(**{**spec.model_dump(), "train": None})
    data = task.first_data(recipe.data, side)
    if spec.tokenizer is not None:
        data.pop("tokenizer", None)  # it keeps its own
    elif task.kind in ("text", "preference") and is_new_causal_lm(spec.model) and "tokenizer" not in data:
        other: ModelSpec | None = recipe.student if side == "teacher" else recipe.teacher
        first = next((o for o in other.parts("").values() if _brings_tokenizer(o)), None) if other is not None else None
        if first is not None:  # a new model uses the tokenizer of the other one
            data["tokenizer"] = first.tokenizer or first.model
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
        "oracle": None,
        "lm_eval": None,
        "roles": None,
        "budget": None,
    }
    return make(values)


def _brings_tokenizer(spec: ModelSpec) -> bool:
    named = spec.endpoint is None and spec.model not in (COPY, ORACLE) and not spec.model.startswith(MODULE)
    return spec.tokenizer is not None or (named and not is_new_causal_lm(spec.model))


def check_members(recipe: Recipe, task: Any) -> None:
    """Raise an error for several teachers that cannot be combined, and for keys of several teachers if there is one."""
    teacher, student = recipe.teacher, recipe.student
    if student is not None and (student.members or student.weights or student.route):
        raise InputError("student.members: a student is one model; several models are a teacher's (teacher.members).")
    if teacher is None:
        return
    asked = recipe.build_method().requires.members
    if asked and set(teacher.members or ()) != set(asked):
        raise InputError(
            f"Method {recipe.method!r} reads {len(asked)} teachers one by one: name a model for each of "
            f"{', '.join(f'teacher.members.{name}' for name in asked)}."
        )
    if not teacher.members:
        for key in ("members", "weights", "route"):
            if getattr(teacher, key) is not None:
                raise InputError(f"teacher.{key} is about several teachers: name them in teacher.members.")
        return
    if not task.mixes and not asked:
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
        raise InputError("teacher.route uses one member for each example: leave teacher.weights out.")


def _with_domains(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values; the column that routes examples to members is set as the data's domain column."""
    values, route = (
        recipe.model_dump(mode="json", exclude_none=True),
        recipe.teacher.route if recipe.teacher is not None else None,
    )
    named = values["data"].get("domain_column")
    if route is not None and named not in (None, route):
        raise InputError(f"teacher.route is {route!r} and data.domain_column {named!r}: domains are in one column.")
    if route is not None:
        values["data"]["domain_column"] = route
    return values


def _check_on_policy(recipe: Recipe, method: Method, kind: str) -> None:
    """Raise an error for on-policy samples if nothing could generate or score them."""
    if recipe.on_policy is None:
        return
    if kind != "text":
        raise InputError(
            f"on_policy lets the student write text and {recipe.task!r} is {with_article(kind)} task: leave it out."
        )
    if recipe.teacher is None or not method.requires.in_steps:
        raise InputError(
            f"on_policy needs a teacher's outputs for the student's samples and method {recipe.method!r} uses none: choose a "
            "method with a teacher (kd, taid), or leave it out."
        )
    if recipe.teacher.cache is not None:
        raise InputError(
            f"teacher.cache {recipe.teacher.cache} cannot answer for texts that are written during training: leave out "
            "teacher.cache for a live teacher, or on_policy."
        )
    if recipe.on_policy.adaptive is not None and recipe.trainer.get("eval_strategy", "no") == "no":
        raise InputError("on_policy.adaptive follows the validation loss and there is none: set trainer.eval_strategy.")


def _check_oracle(recipe: Recipe, method: Method, kind: str) -> None:
    """Raise an error for an oracle if there are no texts, or no teacher beside it."""
    if recipe.oracle is None:
        return
    if kind != "text":
        raise InputError(
            f"oracle compares what models write and {recipe.task!r} is {with_article(kind)} task: leave it out."
        )
    if recipe.teacher is None or not method.requires.in_steps:
        raise InputError(
            f"oracle measures what learning from a teacher does to the truth and method {recipe.method!r} has no teacher in "
            "its steps: choose a method with one (kd), or leave oracle out."
        )


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply `key=value` overrides (dots reach inside, values are YAML)."""
    return make(read_values(path, overrides))


def read_values(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a YAML recipe with `key=value` overrides, not validated yet."""
    values: Any = {}
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise InputError(
                f"Recipe {file} does not exist or is no file. Give a YAML file, or only overrides: task=... method=..."
            )
        values = read_yaml(file, "Recipe") or {}
        if not isinstance(values, dict):
            raise InputError(f"Recipe {file} must be a mapping of keys to values, not a {type(values).__name__}.")
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise InputError(f"Override {item!r} is not of the form key=value (for example trainer.max_steps=100).")
        _assign(values, key.split("."), parse_yaml(text, f"Override {item!r}") if text else None)
    found: dict[str, Any] = values
    return found


def _assign(values: dict[str, Any], path: list[str], value: Any) -> None:
    short = {"teacher": "model", "student": "model", "oracle": "model", "data": "name"}
    for i, key in enumerate(path[:-1]):
        inner = values.get(key)
        if isinstance(inner, str) and ((i == 0 and key in short) or (i == 1 and path[0] == "roles")):
            inner = {short.get(key, "model"): inner}
        elif inner is None:
            inner = {}
        elif not isinstance(inner, dict):
            raise InputError(f"Override {'.'.join(path)}: {key!r} holds {brief(masked(inner))} and has no keys inside.")
        values[key] = inner
        values = inner
    values[path[-1]] = value
