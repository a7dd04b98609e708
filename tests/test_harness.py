"""Tasks of lm-evaluation-harness: the same numbers as its own call on the saved student, in every file of a run; bad input."""

import json
import re

import pytest
import yaml

from engine_cases import TEXT
from understudy import InputError, distill
from understudy.cli.main import main
from understudy.evaluation import harness
from understudy.runs.recipe import make

SHORT = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
CHOICES = {
    "task": "tiny_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
}
WRITTEN = {
    "task": "tiny_writing",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks on a file beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"def f{i}(self):", "choices": [" return", " pass", " import os"], "answer": i % 3}
        for i in range(12)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}}}
    for task in (CHOICES, WRITTEN):
        text = yaml.safe_dump({**task, **data, "test_split": "test", "metadata": {"version": 1.0}})
        (folder / f"{task['task']}.yaml").write_text(text)
    lost = {**CHOICES, **data, "task": "tiny_lost", "test_split": "test"}
    lost["dataset_kwargs"] = {"data_files": {"test": str(folder / "lost.jsonl")}}
    (folder / "tiny_lost.yaml").write_text(yaml.safe_dump(lost))
    return folder


@pytest.fixture
def names(monkeypatch, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra understudy[lm-eval]")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return ["tiny_choice", "tiny_writing"]


def recipe(folder, **more):
    return {**TEXT, "method": "sft", "trainer": SHORT, "output": str(folder), **more}


@pytest.mark.slow
def test_a_run_ends_with_the_numbers_that_the_harness_itself_gives(tasks, names, tmp_path, capsys):
    spec = {"tasks": ",".join(names), "include_path": str(tasks), "num_fewshot": 1, "limit": 10}
    result = distill(recipe(tmp_path / "run", lm_eval=spec))
    import lm_eval
    from lm_eval.tasks import TaskManager

    own = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "run" / "student"), "dtype": "float32"},
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        num_fewshot=1,
        limit=10,
        batch_size=4,
        device="cpu",
    )["results"]
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    rows = {(row["task"], row["metric"]): row for row in evaluation["lm_eval"]["rows"]}
    assert set(rows) == {("tiny_choice", "acc"), ("tiny_choice", "acc_norm"), ("tiny_writing", "exact_match")}
    for (task, metric), row in rows.items():
        assert row["value"] == pytest.approx(own[task][f"{metric},none"], abs=1e-12)
        assert row["stderr"] == pytest.approx(own[task][f"{metric}_stderr,none"], abs=1e-12)
        assert row["documents"] == 10 and row["num_fewshot"] == 1
        assert result.metrics[f"lm_eval/{task}/{metric}"] == row["value"]
    assert "tiny_choice" in (tmp_path / "run" / "report.html").read_text()
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    value = rows["tiny_choice", "acc"]["value"]
    assert re.search(rf"\| tiny_choice \| 1.0 \| none \| 1 \| 10 \| acc \| {value:.4f} \|", card)
    front = yaml.safe_load(card.split("---")[1])
    named = [r["dataset"]["name"] for r in front["model-index"][0]["results"]]
    assert "tiny_choice (lm-evaluation-harness)" in named and not any("lm_eval/" in m for m in front["metrics"])
    # The command gives the same, from the saved weights.
    capsys.readouterr()
    words = ["--tasks", ",".join(names), "--include-path", str(tasks), "--num-fewshot", "1", "--limit", "10", "--json"]
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(tmp_path / "run"), *words])
    assert stop.value.code == 0
    again = json.loads(capsys.readouterr().out)
    assert [row["value"] for row in again["rows"]] == [row["value"] for row in evaluation["lm_eval"]["rows"]]


@pytest.mark.slow
def test_training_and_metrics_do_not_change_by_it(tasks, names, tmp_path):
    spec = {"tasks": names[:1], "include_path": str(tasks), "limit": 2}
    found = [distill(recipe(tmp_path / "with", lm_eval=spec)), distill(recipe(tmp_path / "without"))]
    ours = {k: v for k, v in found[0].metrics.items() if not k.startswith("lm_eval/")}
    assert ours == found[1].metrics


@pytest.mark.slow
def test_the_student_is_asked_as_it_was(tasks, names, tmp_path):
    """Random states, mode and tokenizer."""
    import torch

    from understudy.runs.check import saved_student

    distill(recipe(tmp_path / "run"))
    _, prepared, student = saved_student(tmp_path / "run")
    student.train()
    before, tokens = torch.random.get_rng_state(), len(prepared.tokenizer)
    spec = harness.HarnessSpec(tasks="tiny_writing", include_path=str(tasks), limit=2)
    found = harness.evaluate_tasks(student, prepared.tokenizer, spec)
    assert found["settings"]["tasks"] == ["tiny_writing"] and student.training
    assert torch.equal(torch.random.get_rng_state(), before) and len(prepared.tokenizer) == tokens


def test_without_the_package_it_says_so_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"need the extra: pip install understudy\[lm-eval\]"):
        distill(recipe(tmp_path / "run", lm_eval="tiny_choice"))
    assert not (tmp_path / "run" / "teacher").exists() and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"tasks": "tiny_choise"}, "no task 'tiny_choise'. Did you mean 'tiny_choice'"),
        ({"include_path": "nowhere"}, "lm_eval.include_path nowhere is no folder"),
        ({"tasks": "tiny_lost"}, "task 'tiny_lost' cannot be loaded"),
        ({"tasks": ""}, "lm_eval.tasks"),
        ({"limit": 0}, "lm_eval.limit"),
        ({"fewshots": 1}, "Unknown recipe key: 'lm_eval.fewshots'"),
    ],
)
def test_bad_settings(tasks, names, changes, says, tmp_path):
    spec = {"tasks": "tiny_choice", "include_path": str(tasks), **changes}
    with pytest.raises(InputError, match=re.escape(says)):
        distill(recipe(tmp_path / "run", lm_eval=spec))


@pytest.mark.parametrize(
    "values,says",
    [
        ({"task": "image_classification", "method": "sft"}, "the batches of 'image_classification' are image"),
        ({"task": "reasoning", "method": "ded"}, "makes several"),
    ],
)
def test_students_that_are_no_language_models(values, says):
    with pytest.raises(InputError, match="lm_eval") as found:
        make({**values, "lm_eval": "hellaswag"})
    assert says in str(found.value)


def test_a_model_of_another_kind_is_refused(tmp_path):
    class Model:
        model = object()

    with pytest.raises(InputError, match="the student is object: leave lm_eval out"):
        harness.check_student(Model(), None)
