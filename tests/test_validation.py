"""Validation during training: looking changes nothing, the best evaluation is what is saved, patience ends a run."""

import json

import pytest
import torch

from engine_cases import DIGITS, killed_run, weights
from understudy import InputError, distill
from understudy.runs.check import evaluate_run

LOOK = {"eval_strategy": "steps", "eval_steps": 2}
BEST = {**LOOK, "load_best_model_at_end": True, "metric_for_best_model": "accuracy", "save_steps": 10}


def recipe(output, trainer, **more):
    """Digits with a high learning rate, so that the last step is not the best, and dropout, so that chance matters."""
    base = {
        **DIGITS,
        "teacher": {"model": "mlp:4", "train": {"max_steps": 5}},
        "method": "sft",
        "student": "mlp:hidden=8,layers=2,dropout=0.3",
        "output": str(output),
    }
    return {**base, "trainer": {**DIGITS["trainer"], "learning_rate": 0.2, **trainer}, **more}


def looks(folder):
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def test_looking_changes_nothing(tmp_path):
    distill(recipe(tmp_path / "blind", {}))
    distill(recipe(tmp_path / "seen", LOOK))
    a, b = weights(tmp_path / "blind"), weights(tmp_path / "seen")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [x["step"] for x in looks(tmp_path / "seen")] == list(range(2, 41, 2))
    assert "Validation accuracy" in (tmp_path / "seen" / "report.html").read_text()
    assert not (tmp_path / "blind" / "validation.jsonl").exists()


@pytest.mark.parametrize("metric,better", [("accuracy", max), ("nll", min)])
def test_the_best_evaluation_is_saved_and_judged(metric, better, tmp_path):
    """Also where it falls between two regular checkpoints, and where all others have gone since."""
    direction = {} if metric == "accuracy" else {"greater_is_better": False}
    result = distill(recipe(tmp_path, {**BEST, "metric_for_best_model": metric, "save_total_limit": 1, **direction}))
    values = [x[metric] for x in looks(tmp_path)]
    assert values[-1] != better(values), "the last is the best: this test would see no difference"
    assert evaluate_run(tmp_path, "validation")["metrics"][metric] == better(values)
    assert evaluate_run(tmp_path)["metrics"] == result.metrics
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # the newest and the best


def test_patience_ends_a_run_which_is_then_done(tmp_path):
    result = distill(recipe(tmp_path, BEST, patience=3))
    values = [x["accuracy"] for x in looks(tmp_path)]
    assert not result.interrupted and json.loads((tmp_path / "run.json").read_text())["status"] == "done"
    assert len(values) < 20 and len(values) - 1 - values.index(max(values)) == 3
    assert evaluate_run(tmp_path, "validation")["metrics"]["accuracy"] == max(values)


@pytest.mark.slow
def test_a_run_that_was_killed_and_moved_ends_in_the_same_best(tmp_path):
    distill(recipe(tmp_path / "whole", BEST, patience=3))
    end = looks(tmp_path / "whole")[-1]["step"]
    cut = recipe(tmp_path / "cut", BEST, patience=3)
    assert killed_run(cut, end - 1, "after")
    (tmp_path / "cut").rename(tmp_path / "moved")
    distill({**cut, "output": str(tmp_path / "moved")})
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "moved")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert looks(tmp_path / "whole") == looks(tmp_path / "moved")


@pytest.mark.parametrize(
    "trainer,more,says",
    [
        ({}, {"patience": 3}, "patience counts evaluations and there are none"),
        (LOOK, {"patience": 0}, "patience = 0"),
        ({**BEST, "metric_for_best_model": "acuracy", "greater_is_better": True}, {}, "Did you mean 'accuracy'"),
        ({**BEST, "metric_for_best_model": "nll"}, {}, "Is a higher nll better"),
        ({**BEST, "save_steps": 3}, {}, "round multiple"),
        ({**BEST, "eval_strategy": "no"}, {}, "save and eval strategy to match"),
    ],
)
def test_bad_input(trainer, more, says, tmp_path):
    with pytest.raises(InputError, match=says):
        distill(recipe(tmp_path, trainer, **more))
