"""The monitor of preference training whose likelihoods collapse: when it speaks, and how it ends a run (paper 28, REDI)."""

import json
import logging
import math

import pytest
import torch

from engine_cases import killed_run, weights
from understudy import InputError, distill
from understudy.files import read_json
from understudy.methods.redi import REDI
from understudy.runs.check import evaluate_run
from understudy.runs.recipe import make
from understudy.training.alarm import new_alarm
from understudy.training.collapse import collapse

TERMS = ("logps/chosen", "logps/rejected")
WORLD = {
    "task": "preference_world",
    "data": {"name": "chains"},
    "method": "redi",
    "trainer": {"max_steps": 80, "learning_rate": 5e-3, "save_steps": 10, "logging_steps": 1},
}
BEST = {**WORLD["trainer"], "eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True, "save_steps": 10}
HIGH, LOW = {"alpha": 1.0, "learning_rate": 5e-2}, {"alpha": 1.0, "learning_rate": 1e-3}


def logs(chosen, rejected, norms):
    rows = zip(chosen, rejected, norms, strict=True)
    return [{"loss": 0.0, TERMS[0]: c, TERMS[1]: r, "grad_norm": g} for c, r, g in rows]


def test_a_collapse_is_a_fall_of_both_sides_and_a_rise_of_the_gradient():
    falls, rises = [-2.0, -2.5, -3.0, -3.0, -3.5, -4.0], [0.9, 1.0, 1.1, 1.9, 2.0, 2.1]  # by 1 nat, to twice
    still, level = [-2.0] * 6, [1.0] * 6

    def found(*columns, fall=1.0, rise=2.0):
        return collapse(logs(*columns), TERMS, fall, rise)

    seen = found(falls, falls, rises)
    assert seen[TERMS[0]] == seen[TERMS[1]] == pytest.approx((-2.5, -3.5)) and seen["grad_norm"] == pytest.approx(
        (1, 2)
    )
    assert found(falls, still, rises) is found(still, falls, rises) is found(falls, falls, level) is None
    assert found(falls, falls, rises, fall=1.01) is None and found(falls, falls, rises, rise=2.01) is None
    assert found(falls, falls, [math.nan] * 6) is None
    assert collapse(logs(falls, falls, rises)[1:], TERMS, 1.0, 1.0) is None  # five logs are too few
    others = [{"eval_return": 1.0}, {"loss": 1.0, "grad_norm": 9.0}]  # of evaluations and of other terms
    assert collapse([*others, *logs(falls, falls, rises), *others], TERMS, 1.0, 2.0) == seen
    long = logs(falls[:3] + [-9.0] * 50 + [-2.5] * 3, falls[:3] + [-9.0] * 50 + [-2.5] * 3, [1.0] * 53 + [9.0] * 3)
    assert collapse(long, TERMS, 1.0, 2.0) is None  # it has recovered


def test_only_the_first_log_of_a_collapse_is_new(caplog):
    history = logs([-2.0] * 3 + [-4.0] * 5, [-2.0] * 3 + [-4.0] * 5, [1.0] * 3 + [3.0] * 5)
    method = REDI(collapse_fall=2.0)
    said = [new_alarm(method, history[: i + 1]) for i in range(8)]
    assert [i for i, alarm in enumerate(said) if alarm is not None] == [5] and len(caplog.records) == 1
    assert said[5].says.startswith("redi: the likelihood of both sides collapses") and not said[5].ends
    for words in (
        "logps/chosen from -2 to -4 and logps/rejected from -2 to -4",
        "from 1 to 3",
        "Lower the learning rate",
    ):
        assert words in said[5].says and "\n" not in said[5].says
    stop = REDI(collapse_fall=2.0, collapse_monitor="stop")
    assert stop.alarm(history).ends and "as no evaluation came before" in stop.alarm(history).says
    assert "weights of the best evaluation are kept" in stop.alarm([{"eval_return": 1.0}, *history]).says
    assert REDI(collapse_monitor="off").alarm(history) is None


def test_bad_input():
    with pytest.raises(
        InputError, match=r"none are kept: set trainer\.eval_strategy=steps and trainer\.load_best_model_at"
    ):
        make({**WORLD, "options": {"collapse_monitor": "stop"}})
    assert make({**WORLD, "options": {"collapse_monitor": "stop"}, "trainer": BEST})
    for options, says in (
        ({"collapse_fall": 2.0, "collapse_monitor": "off"}, "collapse_fall has no effect with collapse_monitor=off"),
        ({"collapse_fall": 0.0}, "collapse_fall"),
        ({"collapse_rise": 0.9}, "collapse_rise"),
        ({"collapse_monitor": "end"}, "collapse_monitor"),
    ):
        with pytest.raises(InputError, match=says):
            make({**WORLD, "options": options})


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_high_learning_rate_is_told_and_a_low_one_is_not(tmp_path, caplog):
    for name, options in (("high", HIGH), ("low", LOW)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            distill({**WORLD, "options": options, "output": str(tmp_path / name)})
        found = [line for line in lines(tmp_path / name) if "alarm" in line]
        said = [r.message for r in caplog.records if "collapses" in r.message]
        assert said == [line["alarm"] for line in found] and len(said) == (name == "high")
        notes = read_json(tmp_path / name / "evaluation.json")["notes"]
        assert [note for note in notes if "collapses" in note] == said
        assert len(lines(tmp_path / name)) == 80
    assert found == [] and lines(tmp_path / "high")[-1]["terms"]["logps/chosen"] < -4


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    recipe = {**WORLD, "trainer": BEST, "options": {**HIGH, "collapse_monitor": "stop"}}
    return recipe, distill({**recipe, "output": str(folder)}), folder


def test_stopping_keeps_the_weights_of_the_best_evaluation(stopped, tmp_path):
    recipe, result, folder = stopped
    assert read_json(folder / "run.json")["status"] == "done" and not result.interrupted
    last = lines(folder)[-1]
    assert 46 <= last["step"] < 80 and "Training ends here and the weights of the best" in last["alarm"]
    looked = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    values = [line["value"] for line in looked if line["step"] > 40]
    assert values[-1] < max(values), "the last is the best: this test would see no difference"
    assert evaluate_run(folder, "validation")["metrics"]["value"] == max(values)
    assert distill({**recipe, "output": str(folder)}).metrics == result.metrics
    low = distill({**recipe, "options": {**LOW, "collapse_monitor": "stop"}, "output": str(tmp_path)})
    assert lines(tmp_path)[-1]["step"] == 80 and low.metrics != result.metrics


@pytest.mark.slow
def test_a_killed_run_stops_at_the_same_step_with_the_same_weights(stopped, tmp_path):
    recipe, result, folder = stopped
    end = lines(folder)[-1]["step"] - 40  # steps count from the phase on
    cut = {**recipe, "output": str(tmp_path / "cut")}
    assert killed_run(cut, end - 1, "after")
    assert distill(cut).metrics == result.metrics
    a, b = weights(folder), weights(tmp_path / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert lines(folder) == lines(tmp_path / "cut")
