"""What a method needs of the data is told by `check`, and by a run before a teacher is trained for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from understudy.data.memory import keep
from understudy.errors import InputError
from understudy.runs import run as runs
from understudy.runs.check import check_recipe
from understudy.runs.recipe import make

TINY = "llama:hidden=16,layers=1,heads=2"
TEXTS = [{"text": f"text number {i} is here", "topic": "ab"[i % 2]} for i in range(40)]
LISTS = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(30)]
EQUAL = [{"prompt": f"p{i}", "completions": [f"a{i}", f"b{i}"], "scores": [1.0, 1.0]} for i in range(30)]
SINGLE = [{"prompt": f"p{i}", "completion": f"a{i}", "label": bool(i % 2)} for i in range(30)]
TRAINED = {"model": TINY, "train": {"max_steps": 1}}


def test_a_part_of_a_model_that_the_task_names_by_its_name_alone() -> None:
    """`teacher.train` or `student.peft` without a model is of the task's own, which may be one word."""
    recipe = make(
        {"task": "text_world", "method": "kd", "data": {"name": "markov"}, "student": {"train": {"max_steps": 1}}}
    )
    assert recipe.student is not None and recipe.student.model == "bigram:20"
    assert (recipe.student.train or {})["max_steps"] == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "text_world", "data": {"name": "markov"}, "method": "swing"}, "options.score=detector reads text"),
        (
            {"method": "swing", "options": {"score": "domains", "private_domains": ["a"]}, "data": TEXTS},
            r"names \['a'\]; known: none \(set data.domain_column\)",
        ),
        ({"method": "ddk", "data": TEXTS}, "ddk' weighs domains and the data name none: set data.domain_column"),
        ({"task": "preferences", "method": "dpo", "data": EQUAL}, "has one candidate or equal scores"),
        ({"task": "preferences", "method": "dpo-pg", "data": EQUAL}, "has one candidate or equal scores"),
        ({"task": "preferences", "method": "rank-responses", "data": EQUAL}, "has one candidate or equal scores"),
        ({"task": "preferences", "method": "adpo", "data": SINGLE}, "every training example has one candidate"),
        (
            {"task": "preferences", "method": "adpa", "options": {"objective": "dckd"}, "data": SINGLE},
            "has one answer: give a better and a worse one",
        ),
        (
            {
                "method": "seqkd",
                "student": "llama:hidden=16,layers=1,heads=2,context=64",
                "data": LISTS,
                "on_policy": {"max_new_tokens": 100},
            },
            r"on_policy.max_new_tokens=100 are more than the 64 positions of the student",
        ),
    ],
    ids=["tokens", "no domains", "ddk", "dpo", "dpo-pg", "rank-responses", "adpo", "adpa", "positions"],
)
def test_data_that_a_method_cannot_learn_from(
    changes: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `check`, and by a run before any teacher is trained."""

    def untold(*args: Any, **more: Any) -> None:
        raise AssertionError("A teacher was trained first.")

    monkeypatch.setattr(runs, "train_first", untold)
    values = {"task": "language_modeling", "student": TINY, "teacher": TRAINED, "output": str(tmp_path / "run")}
    if changes.get("task") == "text_world":
        values = {"output": str(tmp_path / "run")}
    data = changes.get("data")
    if isinstance(data, list):
        if changes["method"] == "seqkd":
            data = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in data]
        changes = {**changes, "data": {"name": keep(data), "max_length": 32, "vocab_size": 300}}
    recipe = make({**values, **changes})
    with pytest.raises(InputError, match=says):
        check_recipe(recipe)
    with pytest.raises(InputError, match=says):
        runs.run(recipe)
