"""Paper 21 as a procedure on the running sums: stages, resume, controls, bad input; and the training of one iteration."""

import json

import pytest
import torch

from engine_cases import weights
from procedure_cases import lines, refused, stopped_and_resumed
from understudy import InputError, distill
from understudy.data.reasoning_world import digits_of, running_sums
from understudy.generation import OracleSource
from understudy.tasks.reasoning import Reasoning

TINY = {
    "method": "qcrd",
    "task": "reasoning",
    "data": {"size": 20, "eval_limit": 4, "digits": [3, 4], "max_new_tokens": 10, "teacher_error": 0.3},
    "student": "llama:hidden=16,layers=1,heads=2",
    "trainer": {"max_steps": 4, "per_device_train_batch_size": 8, "save_strategy": "no", "logging_steps": 1},
}
SMALL = {"iterations": 2, "samples": 3, "discriminator": "bytes:width=8,layers=1", "discriminator_steps": 4}


def tiny(output, **options):
    return {**TINY, "output": str(output), "options": {**SMALL, **options}}


def test_rationales_are_voted_on_weighed_and_set_against_the_students_own(tmp_path):
    done = distill(tiny(tmp_path / "run"))
    folder = done.folder
    taught = lines(folder / "stages" / "rationales.jsonl")
    assert len(taught) == 60 and {r["good"] for r in taught} == {True, False}
    for r in taught:
        digits = digits_of(lines(folder / "round-0" / "corpus" / "train.jsonl")[2 * r["question"]]["prompt"])
        assert r["right"] == (r["answer"] == str(running_sums(digits)[-1])) and r["text"].endswith(
            f"#### {r['answer']}"
        )
    assert not (folder / "stages" / "round-0" / "negatives.jsonl").exists()
    own = lines(folder / "stages" / "round-1" / "negatives.jsonl")
    assert own and not any(r["good"] for r in own)
    judged = lines(folder / "stages" / "round-1" / "qualities.jsonl")
    assert len(judged) == 60 + len(own) and all(r["log_quality"] < 0 for r in judged)
    rows = lines(folder / "round-1" / "corpus" / "train.jsonl")
    assert rows[0]["prompt"].startswith("Predict: ") and rows[0]["scores"] == [0]
    assert rows[1]["prompt"].startswith("Explain: ") and set(rows[1]["scores"]) <= {1, -1}
    assert (
        "model: " + str(folder / "round-0" / "training" / "student")
        in (folder / "round-1/training/recipe.yaml").read_text()
    )
    m = done.metrics
    assert m["teacher_sample_accuracy"] == sum(r["right"] for r in taught) / 60 < 0.9
    assert set(m) >= {"accuracy", "rationale_accuracy", "teacher_vote_accuracy", "discriminator_auc"}
    assert (
        0 <= m["rationale_accuracy"] <= 1
        and "The student on the judged questions" in (folder / "report.html").read_text()
    )


def test_controls_ask_for_no_negatives_and_fit_no_discriminator(tmp_path):
    done = distill(tiny(tmp_path / "run", samples=1, beta=0.0, quality=False, iterations=1))
    rows = lines(done.folder / "round-0" / "corpus" / "train.jsonl")
    assert all(r["scores"] in ([0], [1]) for r in rows) and len(rows) == 40
    assert (
        not (done.folder / "discriminator").exists()
        and not (done.folder / "logs" / "round-0" / "negatives.jsonl").exists()
    )


EACH = ("rationales", "round-0/training", "round-1/negatives", "asked:judged")


@pytest.mark.parametrize(
    "cuts", [("round-1/qualities",), pytest.param(EACH, marks=pytest.mark.slow)], ids=("one", "each")
)
def test_stopped_at_any_stage_it_asks_nothing_twice_and_ends_alike(tmp_path, monkeypatch, cuts, whole):
    asked, complete = [], OracleSource.complete
    monkeypatch.setattr(OracleSource, "complete", lambda self, r: asked.append(r.id) or complete(self, r))
    done = stopped_and_resumed(tiny(tmp_path / "cut"), *cuts)
    assert len(asked) == len(set(asked)) == 60
    assert done.metrics == whole.metrics
    for file in ("stages/round-1/negatives.jsonl", "round-1/training/student/model.safetensors"):
        assert (whole.folder / file).read_bytes() == (done.folder / file).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return distill(tiny(tmp_path_factory.mktemp("whole") / "run"))


def test_bad_input_is_one_line_before_anything_is_asked(tmp_path):
    def refuse(says, **keys):
        refused({**tiny(tmp_path / "run"), **keys}, says)

    refuse("checks final answers and task 'language_modeling' has none", task="language_modeling", data={})
    refuse("options.samples above 1 at options.temperature=0", options={"temperature": 0, "iterations": 1})
    refuse("max_steps is 4 and options.iterations 7: give each at least one step", options={"iterations": 7})
    refuse("Prompt 'nope' is neither a file", options={**SMALL, "rationale_prompt": "nope"})
    refuse("student.peft is for one iteration", student={"model": TINY["student"], "peft": {"r": 2}})


def test_a_teacher_that_cannot_be_read_stops_the_run_with_advice(tmp_path, monkeypatch):
    monkeypatch.setattr(Reasoning, "oracle", lambda *_: OracleSource("other", lambda request, chance: "I think 7"))
    with pytest.raises(
        InputError, match=r"None of 60 rationales of the teacher can be read: mend options\.teacher_prompt"
    ):
        distill(tiny(tmp_path / "run"))


def contrast(folder, rows, **keys):
    (folder / "d").mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        (folder / "d" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = {
        "task": "preferences",
        "method": "rationale-contrast",
        "data": {"name": str(folder / "d"), "max_length": 40, "vocab_size": 260},
        "student": TINY["student"],
        "trainer": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"},
        "output": str(folder / "run"),
    }
    return distill({**recipe, **keys})


def list_of(*scores, prompt="Explain: 12="):
    said = [f" {i}{i}" for i in range(len(scores))]
    return {"prompt": prompt, "completions": said, "scores": list(scores), "log_probs": [-0.5] * len(scores)}


def test_scores_that_are_no_kind_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"are \[1.0, 0.3\]: give 1 for a positive"):
        contrast(tmp_path, [list_of(1, 0.3)])
    bare = {k: v for k, v in list_of(1, -1).items() if k != "log_probs"}
    with pytest.raises(InputError, match="log_probs, one for each candidate"):
        contrast(tmp_path, [bare], output=str(tmp_path / "other"))


def test_any_split_of_a_batch_trains_alike(tmp_path):
    rows = [
        list_of(1, -1),
        list_of(0, prompt="Predict: 12="),
        list_of(1, 1, -1, prompt="Explain: 34="),
        list_of(-1, prompt="Explain: 5="),
    ]
    trainer = {"max_steps": 1, "learning_rate": 1e-2, "save_strategy": "no", "optim": "sgd"}
    one = contrast(tmp_path, rows, trainer={**trainer, "per_device_train_batch_size": 4}, output=str(tmp_path / "one"))
    more = {**trainer, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    many = contrast(tmp_path, rows, trainer=more, output=str(tmp_path / "many"))
    for (name, a), b in zip(weights(one.folder).items(), weights(many.folder).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_it_learns_the_positive_and_lets_go_of_the_negative(tmp_path):
    done = contrast(
        tmp_path,
        [list_of(1, -1)],
        options={"quality": False, "beta": 1.0},
        trainer={"max_steps": 40, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "save_strategy": "no"},
    )
    assert done.metrics["accuracy"] == 1 and done.metrics["nll"] < 0.3
