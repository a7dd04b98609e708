"""Recipes with one value replaced by a wrong one: each is valid, or refused in one line, and nothing hangs."""

import copy
import math
import random
import time
import traceback
from datetime import date
from pathlib import Path
from reprlib import repr as short

import pytest
import yaml

from engine_cases import DIGITS, TEXT
from understudy.errors import InputError
from understudy.reading import parse_yaml
from understudy.runs.recipe import Recipe, load, make
from understudy.training.arguments import dry_run_arguments, fields

SERVED = {"url": "http://localhost:8000/v1", "api_key_env": "KEY", "timeout": 3.0, "rate": 2.0, "extra": {"top_k": 1}}
MEMBERS = {
    "members": {"a": "mlp:8", "b": {"model": "mlp:4", "train": {"max_steps": 3}}},
    "weights": {"a": 0.5, "b": 0.5},
    "mix": "logits",
}
VALID = [
    {**DIGITS, "method": "kd", "options": {"divergence": "jsd", "temperature": 1.0, "beta": 0.3}, "seed": 1},
    {**DIGITS, "method": "sft", "data": {"name": "digits", "label_noise": 0.1, "label_map": [0, 1] * 5, "seed": 3}},
    {**DIGITS, "method": "kd", "teacher": MEMBERS, "arms": {"kd": {"temperature": 3.0}, "sft": {}}},
    {
        **TEXT,
        "method": "taid",
        "on_policy": {"fraction": 0.5, "replay": {"size": 3}, "adaptive": {"by": 0.2}, "cut": "random"},
        "trainer": {**TEXT["trainer"], "eval_strategy": "steps", "eval_steps": 3, "report_to": "none"},
        "patience": 2,
    },
    {
        **TEXT,
        "method": "kd",
        "options": {"temperature": 1.0},
        "teacher": {"model": "x", "endpoint": SERVED, "score": "top_k:5"},
    },
    {"task": "preferences", "method": "dpo", "options": {"loss_type": "simpo", "gamma": 0.2}, "output": "runs/x"},
    {"task": "preferences", "method": "adpo", "data": {"name": "word_order", "candidates": 3, "packing": "auto"}},
    {"task": "preference_world", "method": "adpo", "data": {"name": "chains", "start": "own"}},
    {"task": "ranking", "method": "margin-mse", "student": {"model": "embedding:8", "options": {"scorer": "dot"}}},
    {
        "task": "node_classification",
        "method": "kd",
        "data": {"name": "topics", "split": "inductive", "normalize": True},
    },
    {"task": "image_generation", "method": "boot", "data": {"name": "ring8", "compare_steps": [1, 2]}},
    {"task": "text_generation", "method": "symbolic-kd", "data": {"name": "events_world", "world_seed": 1}},
    {"task": "statement_generation", "method": "i2d2", "data": {"sentences": 100}, "options": {"num_beams": 4}},
]
TRAINER = [
    *(
        "max_steps",
        "learning_rate",
        "warmup_steps",
        "adam_beta1",
        "report_to",
        "save_total_limit",
        "optim",
        "deepspeed",
    ),
    *(
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "optim_args",
        "logging_steps",
        "save_steps",
        "bf16",
        "debug",
        "hub_token",
    ),
    *("gradient_accumulation_steps", "per_device_train_batch_size", "dataloader_num_workers", "eval_strategy", "seed"),
    *("neftune_noise_alpha", "accelerator_config", "torch_compile_mode", "save_strategy", "data_seed", "max_grad_norm"),
]
WRONG = [
    *(None, True, False, 0, -1, 1, 2**31, 2**32, 2**63, 10**400, -(10**30), 0.5, -0.5, 1e300, 1e-300),
    *(math.nan, math.inf, -math.inf, "", "x", "5e-5", "-1", "nan", "no", "~nouser/x", "a\0b", "\ud800", "[b]x[/b]"),
    *(
        "x" * 100_000,
        "../..",
        "/",
        b"bytes",
        date(2024, 1, 1),
        {1, 2},
        object(),
        3j,
        (1, 2),
        [],
        [[]],
        [None],
        ["x"],
        [3],
    ),
    *({}, {"x": 1}, {3: 4}, {None: None}, {"": ""}, {"max_steps": "x"}, {"model": 3}, {"model": None}, {"name": []}),
]


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def endless():
    value = {}
    value["itself"] = value
    return value


def bomb():
    value = ["x"]
    for _ in range(40):
        value = [value, value]
    return value


WRONG += [nested(60), nested(5000), endless(), bomb()]


def places(value, path=()):
    """Every place inside nested values, itself first."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from places(one, (*path, key))


def mutated(lot):
    """A valid recipe with one wrong thing in it, and what was done."""
    recipe = copy.deepcopy(lot.choice(VALID))
    wrong = lot.choice(WRONG)
    kind = lot.choice(("replace", "replace", "trainer", "unknown", "drop", "options"))
    if kind == "trainer":
        key = lot.choice(TRAINER + sorted(fields()))
        recipe["trainer"] = {**recipe.get("trainer", {}), key: wrong}
        return recipe, f"trainer.{key} = {short(wrong)}"
    if kind == "options":
        key = lot.choice(sorted(Recipe.model_fields))
        recipe[key] = wrong
        return recipe, f"{key} = {short(wrong)}"
    path = lot.choice([p for p in places(recipe) if p])
    inner = recipe
    for key in path[:-1]:
        inner = inner[key]
    if kind == "drop":
        del inner[path[-1]]
    elif kind == "unknown" and isinstance(inner, dict):
        inner[lot.choice(["x", "nme", "", "max_step", 3, None, "api_key", "loss_type"])] = wrong
    else:
        inner[path[-1]] = wrong
    return recipe, f"{kind} {path} = {short(wrong)}"


def check_mutation(recipe, said):
    began = time.perf_counter()
    try:
        made = make(recipe)
        dry_run_arguments(made.trainer)
        again = make(yaml.safe_load(yaml.safe_dump(made.dump())))
        assert again.dump() == made.dump(), said
    except InputError as error:
        text = str(error)
        assert text and "\n" not in text.strip() and "\0" not in text and len(text) < 3000, said
        text.encode()
    assert time.perf_counter() - began < 5, said


def fuzz(seed, number):
    lot = random.Random(seed)
    for i in range(number):
        recipe, what = mutated(lot)
        said = f"seed {seed}, mutation {i}: {short(recipe.get('method'))}, {what}"
        try:
            check_mutation(recipe, said)
        except Exception as error:  # without its frames: a report of them would unfold what the recipe holds
            lines = traceback.extract_tb(error.__traceback__)[-3:]
            where = ", ".join(f"{Path(line.filename).name}:{line.lineno}" for line in lines)
            raise AssertionError(f"{said}: {type(error).__name__}: {error}"[:2000] + f" ({where})") from None


def test_the_recipes_themselves_are_valid():
    for recipe in VALID:
        dry_run_arguments(make(recipe).trainer)


def test_wrong_values_are_refused_in_one_line_or_valid():
    fuzz(0, 200)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_wrong_values_are_refused_in_one_line_or_valid(seed):
    fuzz(seed, 250)


OVERRIDES = [
    *(
        "=",
        "=x",
        "a",
        ".=1",
        "a..b=1",
        "trainer.=1",
        ".trainer=1",
        "trainer.max_steps",
        "trainer.max_steps=[",
        "seed={a: b",
    ),
    *("seed=*x", "seed=&a [*a]", "seed=!!python/object:os.system {}", "seed=!!binary x", "data=!!set {a}", "seed=0x10"),
    *("trainer.learning_rate=5e-5", "trainer.learning_rate.x=1", "teacher.train.max_steps=x", "teacher.model.x.y=1"),
    *(
        "trainer={max_steps: 1, max_steps: 2}",
        "output=\0",
        "seed=2024-01-01",
        "seed=1:30",
        "data.name=~",
        "x" * 10_000 + "=1",
    ),
    *(
        "seed=" + "[" * 5000,
        "seed=" + "{a: " * 3000,
        "seed=\t",
        "seed='",
        "seed=\ud800",
        "seed=? ?",
        "seed=<<: 1",
        "seed=--- 1",
    ),
    *(
        "seed={<<: {a: 1}}",
        "seed={<<: 3}",
        "data={? [a, b] : c}",
        "seed=9" + "9" * 5000,
        "seed=!!float x",
        "seed=!!timestamp x",
    ),
]


@pytest.mark.parametrize("number", range(len(OVERRIDES)))
def test_overrides_are_refused_in_one_line_or_valid(number):
    try:
        load(None, [OVERRIDES[number]])
    except InputError as error:
        assert str(error) and "\n" not in str(error).strip()


def test_text_that_is_a_number_is_one():
    assert parse_yaml("[5e-5, 1E3, -2e+4, 1.5e3, .5e1]", "text") == [5e-5, 1e3, -2e4, 1.5e3, 5.0]
    assert parse_yaml("[e5, 1e, 5e-, v1e3, 0x1e3]", "text") == ["e5", "1e", "5e-", "v1e3", 0x1E3]
    assert load(None, ["trainer.learning_rate=5e-5"]).trainer["learning_rate"] == 5e-5
    made = make({"trainer": {"learning_rate": "5e-5", "max_steps": "30", "adam_beta1": 0}}).trainer
    assert made["learning_rate"] == 5e-5 and made["max_steps"] == 30 and isinstance(made["adam_beta1"], float)
