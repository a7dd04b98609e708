"""Paper 36: the loss and the accuracies of its golden vectors, and the procedure on the running sums."""

import json

import pytest
import torch

from golden_vectors import close, golden, reduce
from understudy import InputError, distill
from understudy.curation import Checker
from understudy.data.reasoning_world import digits_of, running_sums, shown
from understudy.data.tokenize import collate_text
from understudy.evaluation.reasoning import Attempt, Grading, judge
from understudy.generation import Completion, OracleSource
from understudy.losses import cross_entropy
from understudy.runs.recipe import make
from understudy.streaming import rowwise
from understudy.targets import Dense
from understudy.tasks import get
from understudy.tasks.reasoning import STEPS, Reasoning
from understudy.training import PipelineContext

TINY = {
    "method": "frontier-synthetic",
    "task": "reasoning",
    "data": {"size": 40, "eval_limit": 6, "samples": 0, "digits": [3, 4], "max_new_tokens": 8, "teacher_error": 0.1},
    "student": "llama:hidden=16,layers=1,heads=2",
    "trainer": {"max_steps": 4, "per_device_train_batch_size": 8, "save_strategy": "no"},
}


def tiny(output, **options):
    return {**TINY, "output": str(output), "options": options}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.golden
def test_the_loss_is_the_golden_one_over_any_padding_and_split():
    g = golden("36-frontier-synthetic")
    logits, labels = g["logits"].clone().requires_grad_(), g["labels"]
    cuts = zip(g["input_ids"], g["prompt_len"].tolist(), g["total_len"].tolist(), strict=True)
    items = [
        {"input_ids": ids[:end], "labels": torch.cat([torch.full((start,), -100), ids[start:end]]), "id": 0, "bytes": 0}
        for ids, start, end in cuts
    ]
    padded = collate_text(items, multiple=labels.shape[1])["labels"]
    assert torch.equal(padded, labels)
    counted = labels[:, 1:] != -100  # the logits at t are of the token at t + 1
    values = rowwise(cross_entropy, Dense(logits[:, :-1][counted]), None, labels[:, 1:][counted])
    close(values, g["token_nll"][counted])
    assert len(values) == g["n_target_tokens"]
    total = reduce(values, "token_mean")
    close(total, g["loss"])
    (gradient,) = torch.autograd.grad(total, logits)
    close(gradient, g["grad_logits"])
    assert not gradient[:, :-1][~counted].any() and not gradient[:, -1].any()
    rows = counted.nonzero()[:, 0]
    for row, expected in enumerate(g["per_example_nll"]):
        if expected.isfinite():
            close(values[rows == row].mean(), expected)
    parts = [reduce(values[rows == row], "token_mean", count=len(values)) for row in rows.unique()]
    close(torch.stack(parts).sum(), g["loss"])


@pytest.mark.golden
def test_strict_and_lenient_accuracy_are_the_golden_ones():
    g = golden("36-frontier-synthetic")
    texts = [
        f"#### {p}" if strict else f"it is {p}" if lenient else "who knows"
        for p, strict, lenient in zip(g["pred"], g["parsed_strict"], g["parsed_lenient"], strict=True)
    ]
    rows = [{"gold": str(int(answer)), "level": None} for answer in g["gold"]]
    grading = Grading(Checker("number"), Checker("number", "last"), None, 4, 0, 1.0)
    metrics = judge([[Attempt(t, 1, True)] for t in texts], rows, grading)["metrics"]
    assert metrics["accuracy"] == pytest.approx(float(g["acc_strict"]))
    assert metrics["accuracy_lenient"] == pytest.approx(float(g["acc_lenient"]))
    assert metrics["accuracy"] == pytest.approx((1 - metrics["unparsed"]) * float(g["acc_given_parsed"]))


def test_targets_come_from_the_elaborate_prompt_and_are_learned_with_the_short_one(tmp_path):
    done = distill(tiny(tmp_path / "run"))
    targets = lines(done.folder / "stages" / "targets.jsonl")
    assert len(targets) == 40 and all(t["requests"] == [f"targets/reasoning/{i}/0"] for i, t in enumerate(targets))
    right = sum(t["answer"] == str(running_sums(digits_of(t["question"]))[-1]) for t in targets) / 40
    assert done.metrics["target_accuracy"] == right == sum(t["right"] for t in targets) / 40 and 0.5 < right < 1
    assert 0 <= done.metrics["teacher_answer_accuracy"] <= 1 and "teacher_reasoning_accuracy" in done.metrics
    corpus = lines(done.folder / "corpus" / "train.jsonl")
    assert corpus[0]["rationale"][-1] == corpus[0]["answer"] == targets[0]["answer"]
    judged = lines(done.folder / "corpus" / "test.jsonl")  # the data's own answers, and not the teacher's
    assert all(r["answer"] == str(running_sums(digits_of(r["question"]))[-1]) for r in judged) and len(judged) == 6
    inner = json.loads((done.folder / "training" / "evaluation.json").read_text())
    assert done.metrics["accuracy"] == inner["metrics"]["accuracy"]
    recipe = (done.folder / "training" / "recipe.yaml").read_text()
    assert "prompt: bare" in recipe and "teacher" not in recipe
    page = (done.folder / "report.html").read_text()
    for text in ("answers that can be read", "What the models were asked", "The teacher on the judged questions"):
        assert text in page


@pytest.mark.parametrize("targets", ["answer", "gold"])
def test_controls_learn_the_answer_alone(tmp_path, targets):
    done = distill(tiny(tmp_path / "run", targets=targets, judge_teacher=False))
    corpus = lines(done.folder / "corpus" / "train.jsonl")
    assert not any(r["rationale"] for r in corpus) and "teacher_answer_accuracy" not in done.metrics
    assert (done.metrics["target_accuracy"] == 1) == (targets == "gold")
    assert (done.folder / "logs" / "teacher.jsonl").is_file() == (targets == "answer")


def test_stopped_after_the_teacher_it_asks_nothing_twice_and_ends_alike(tmp_path, monkeypatch):
    whole, asked = distill(tiny(tmp_path / "whole")), []
    complete, train = OracleSource.complete, PipelineContext.train
    monkeypatch.setattr(OracleSource, "complete", lambda self, r: asked.append(r.id) or complete(self, r))

    def stopped(self, name, values):
        raise KeyboardInterrupt

    monkeypatch.setattr(PipelineContext, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        distill(tiny(tmp_path / "cut"))
    monkeypatch.setattr(PipelineContext, "train", train)
    done = distill(tiny(tmp_path / "cut"))
    assert len(asked) == len(set(asked)) == 40 + 2 * 6
    assert done.metrics == whole.metrics
    for file in ("stages/targets.jsonl", "training/student/model.safetensors"):
        assert (whole.folder / file).read_bytes() == (done.folder / file).read_bytes()


@pytest.fixture
def writes(monkeypatch):
    """Put another teacher in the place of the world's."""

    def put(write):
        monkeypatch.setattr(Reasoning, "oracle", lambda self, recipe, role: OracleSource("other", write))

    return put


def test_what_does_not_end_cannot_be_read_or_is_not_new_is_dropped(tmp_path, writes):
    def write(request, chance):
        question = request.prompt[-1]["content"]
        sums = running_sums(digits_of(question))
        number = int(request.id.split("/")[2])
        said = "The sums: " if request.id.endswith("/0") else "the  sums: "  # alike but for spaces and case
        text = f"{said}{shown(sums)}\n#### {sums[-1] if number % 5 else (sums[-1] + 1) % 10}"
        if number == 7:
            return Completion(text, "length", None, 1, 9)
        return Completion(shown(sums) if number == 8 else text, "stop", None, 1, 9)

    writes(write)
    options = {"samples": 2, "temperature": 1.0, "reject_wrong": True, "judge_teacher": False}
    done = distill(tiny(tmp_path / "run", **options))
    rows = json.loads((done.folder / "stages" / "targets.json").read_text())["funnel"]
    assert [(r["after"], r["dropped"]) for r in rows] == [
        (76, {"cut off": 2, "no mark": 2}),
        (60, {"wrong": 16}),
        (30, {"written before": 30}),
    ]
    assert done.metrics["target_accuracy"] == 1 and done.metrics["targets"] == 30


def test_a_teacher_that_cannot_be_read_stops_the_run_with_advice(tmp_path, writes):
    writes(lambda request, chance: "I think it is 7")
    with pytest.raises(InputError, match=r"40 of 40 answers of the teacher cannot be read \(40 no mark\): mend"):
        distill(tiny(tmp_path / "a"))
    writes(lambda request, chance: "#### 11")
    with pytest.raises(InputError, match="None of 40 answers of the teacher is right"):
        distill(tiny(tmp_path / "b", reject_wrong=True))


def test_bad_input_is_one_line_before_anything_is_asked(tmp_path, writes):
    def refused(says, **keys):
        with pytest.raises(InputError, match=says) as caught:
            distill({**tiny(tmp_path / "run"), **keys})
        assert "\n" not in str(caught.value) and not (tmp_path / "run" / "logs").exists()
        (tmp_path / "run" / "recipe.yaml").unlink(missing_ok=True)

    refused("checks final answers and task 'language_modeling' has none", task="language_modeling", data={})
    refused("options.samples above 1 at options.temperature=0", options={"samples": 2})
    refused("leave out teacher.train", teacher={"model": "llama:hidden=8,layers=1,heads=2", "train": {"max_steps": 1}})
    refused("Prompt 'nope' is neither a file", options={"reasoning_prompt": "nope"})
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"question": f"q {i}", "answer": i}) + "\n" for i in range(30))
    )
    refused("Task 'reasoning' has no oracle for teacher: name a model", data={"name": str(tmp_path / "d.jsonl")})


def test_the_oracle_is_the_default_teacher_and_its_prompt_asks_for_steps():
    recipe = make({"method": "frontier-synthetic", "task": "reasoning"})
    assert recipe.teacher.model == "oracle" and make({"method": "kd", "task": "reasoning"}).teacher.train is not None
    requests = recipe.build_method()._requests("solve_steps", [{"question": "352="}], "x", 1)
    assert STEPS in requests[0].prompt[0]["content"] and get("reasoning").prepare(recipe).train[0]["gold"]
