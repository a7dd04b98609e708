"""Comparisons of named arms: one method under several options, the old form, and what is refused."""

import json

import pytest
import yaml

from engine_cases import DIGITS
from understudy.cli.main import main
from understudy.errors import InputError
from understudy.files import write_json
from understudy.runs.comparison import compare
from understudy.runs.folder import take

ARMS = {
    "kd τ=1": {"method": "kd", "options": {"temperature": 1.0}},
    "kd τ=4": {"method": "kd", "options": {"temperature": 4.0}},
    "sft": {},
}


def small(folder, **keys):
    trainer = {**DIGITS["trainer"], "max_steps": 4}
    teacher = {"model": "mlp:8", "train": {"max_steps": 2}}
    return {**DIGITS, "teacher": teacher, "trainer": trainer, "output": str(folder), **keys}


@pytest.fixture
def untrained(monkeypatch):
    """Runs that take no time, for what is asked of them alone."""

    def run_all(plans, shared, *rest):
        for plan in plans:
            folder = plan.output
            folder.mkdir(parents=True, exist_ok=True)
            take(plan)
            cost = {"steps": 4, "forwards": {"student": 1, "teacher": 0}, "time_share": {"train": 1.0}}
            taught = 0.3 if plan.method == "pld" else 0.9  # as if of a teacher of the method's own
            metrics = {"accuracy": 0.5, "value": 0.5, "teacher_accuracy": taught}
            write_json(folder / "evaluation.json", {"metrics": metrics, "cost": cost})
            write_json(folder / "run.json", {"status": "done", "versions": {}})
        return [json.loads((p.output / "evaluation.json").read_text()) for p in plans]

    monkeypatch.setattr("understudy.runs.comparison._run_all", run_all)


def recipe_of(comparison, run):
    return yaml.safe_load((comparison.folder / run["folder"] / "recipe.yaml").read_text())


@pytest.mark.slow
def test_one_method_at_two_temperatures(tmp_path):
    found = compare(small(tmp_path), seeds=1, arms=ARMS)
    assert [row["method"] for row in found.table] == list(ARMS) and found.data["baseline"] == "kd τ=1"
    assert found.table[1]["difference"] is not None and len(found.data["runs"]) == 3
    asked = {run["method"]: recipe_of(found, run) for run in found.data["runs"]}
    assert [asked[name]["options"].get("temperature") for name in ARMS] == [1.0, 4.0, None]
    assert [asked[name]["method"] for name in ARMS] == ["kd", "kd", "sft"]
    assert found.data["arms"] == {**ARMS, "sft": {"method": "sft", "options": {}}}
    html = (tmp_path / "report.html").read_text()
    assert "kd τ=1" in html and "kd τ=4" in html
    values = {run["method"]: run["metrics"]["nll"] for run in found.data["runs"]}
    assert len(set(values.values())) == 3  # they are three students
    # Started again, finished runs are read: nothing in a run folder is written.
    folder = tmp_path / found.data["runs"][0]["folder"]
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}
    again = compare(small(tmp_path), ["kd τ=4", "kd τ=1"], 1, arms=ARMS)
    assert again.table[1]["mean"] == found.table[0]["mean"] and again.data["baseline"] == "kd τ=4"
    assert before == {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


def test_the_teacher_is_the_recipes_and_not_one_that_a_method_trains(untrained, tmp_path):
    found = compare(small(tmp_path), ["sft", "pld"], 2)
    assert found.data["teacher"] == {"name": "mlp:8", "accuracy": 0.9}


def test_two_losses_of_one_method_in_a_preference_world(untrained, tmp_path):
    recipe = {
        "method": "dpo",
        "task": "preference_world",
        "data": {"name": "chains"},
        "output": str(tmp_path),
        "arms": {"dpo": {}, "simpo": {"method": "dpo", "options": {"loss_type": "simpo"}}},
    }
    found = compare(recipe, seeds=1, baseline="simpo")
    assert [(row["method"], row["difference"] is None) for row in found.table] == [("dpo", False), ("simpo", True)]
    asked = [recipe_of(found, run) for run in found.data["runs"]]
    assert [(a["method"], a["options"]) for a in asked] == [("dpo", {}), ("dpo", {"loss_type": "simpo"})]


def test_arms_of_a_recipe_on_the_command_line(untrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arms = {"soft / 4": {"method": "kd", "options": {"temperature": 4.0}}, "kd": {"temperature": 2.0}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small("all", arms=arms), allow_unicode=True))

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            main(["compare", "recipe.yaml", *words, "--seeds", "1", "--json", "out.json"])
        assert stop.value.code == 0, capsys.readouterr()
        data = json.loads((tmp_path / "out.json").read_text())
        return {name: (arm["method"], arm["options"]) for name, arm in data["arms"].items()}

    assert call() == {"soft / 4": ("kd", {"temperature": 4.0}), "kd": ("kd", {"temperature": 2.0})}
    assert (tmp_path / "all" / "runs" / "soft-4-s0").is_dir()
    some = call("output=some", "--methods", "sft, soft / 4")
    assert some == {"sft": ("sft", {}), "soft / 4": ("kd", {"temperature": 4.0})}


def test_without_named_arms_it_is_as_before(untrained, tmp_path):
    """The old form, and none: `sft` and `kd`, the latter with the options of its name or of the recipe."""
    found = compare(small(tmp_path / "a", arms={"kd": {"temperature": 2.0}, "taid": {"alpha": 0.1}}), seeds=1)
    assert found.data["arms"] == {
        "sft": {"method": "sft", "options": {}},
        "kd": {"method": "kd", "options": {"temperature": 2.0}},
    }
    own = small(tmp_path / "b", method="kd", options={"temperature": 3.0})
    found = compare(own, ["kd"], 1)
    assert found.data["arms"] == {"kd": {"method": "kd", "options": {"temperature": 3.0}}}


@pytest.mark.parametrize(
    ("methods", "arms", "says"),
    [
        (["kd", "kd"], {}, "'kd' is named twice.*arms: {'kd a'"),
        (["kd", "sfft"], {}, "No method 'sfft', and no arm of that name. Did you mean 'sft'"),
        (["softt"], {"soft": {"method": "kd"}}, "Did you mean 'soft'.*Arms of the recipe: soft"),
        (None, {"soft": {"temperature": 2.0}}, "Arm 'soft' names no method.*'soft': {method: NAME"),
        (None, {"soft": {"options": {"temperature": 2.0}}}, "Unknown method 'soft'"),
        (None, {"soft": {"method": "kdd"}}, "Did you mean 'kd'"),
        (None, {"soft": {"method": "kd", "temperature": 2.0}}, "Unknown key arms.soft.temperature.*below options"),
        (None, {"soft": {"method": "kd", "options": [1]}}, "arms.soft.options is \\[1\\]"),
        (None, {"soft": {"method": "kd", "options": {"temprature": 2.0}}}, "Did you mean 'temperature'"),
        (None, {"a b": {"method": "kd"}, "a/b": {"method": "sft"}}, "'a b' and 'a/b' would share the folder 'a-b'"),
        (None, {"soft": 4}, "arms.soft"),
        ([], {}, "at least one method"),
    ],
)
def test_bad_arms_are_one_line_before_anything_runs(tmp_path, methods, arms, says):
    with pytest.raises(InputError, match=says) as error:
        compare(small(tmp_path / "out", arms=arms), methods, 1)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
