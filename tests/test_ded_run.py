"""Paper 16 as a procedure on the running sums: the choice of the teacher, stages, resume, controls, bad input."""

import json

import pytest

from procedure_cases import lines, refused, stopped_and_resumed
from understudy import InputError, distill
from understudy.data.reasoning_world import STYLES, digits_of, running_sums
from understudy.generation import LocalSource, OracleSource
from understudy.tasks.reasoning import Reasoning

MODEL = "llama:hidden=16,layers=1,heads=2"
TRAINER = {"max_steps": 4, "per_device_train_batch_size": 8, "save_strategy": "no"}
TINY = {
    "method": "ded",
    "task": "reasoning",
    "data": {"size": 24, "eval_limit": 4, "samples": 0, "digits": [4, 5], "max_new_tokens": 8, "teacher_error": 0.2},
    "student": {"model": MODEL, "train": TRAINER},
    "teacher": {"members": dict.fromkeys(("partial", "ordered", "shuffled"), "oracle")},
    "trainer": TRAINER,
}
SMALL = {
    "smoke_questions": 10,
    "smoke_steps": 2,
    "attempts": 2,
    "samples": 3,
    "traces": 2,
    "temperature": 1.0,
    "start_data": {"digits": [3, 4], "size": 12},
    "other_data": {"digits": [3, 4], "size": 4, "eval_limit": 3},
}


def tiny(output, **options):
    return {**TINY, "output": str(output), "options": {**SMALL, **options}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return distill(tiny(tmp_path_factory.mktemp("whole") / "run"))


def test_the_teacher_is_chosen_by_its_students_and_the_corpus_is_small_and_diverse(whole):
    folder, m = whole.folder, whole.metrics
    trials = lines(folder / "stages" / "teachers.jsonl")
    assert [t["role"] for t in trials] == ["teacher.partial", "teacher.ordered", "teacher.shuffled"]
    for t in trials:
        run = json.loads((folder / "smoke" / t["role"] / "0" / "evaluation.json").read_text())
        assert t["accuracies"] == [run["metrics"]["accuracy"]] and run["split"] == "validation"
        assert (
            t["entropy"] > 0
            and t["shift"] > 0
            and "max_steps: 2" in (folder / "smoke" / t["role"] / "0" / "recipe.yaml").read_text()
        )
    assert trials[0]["accuracy"] == trials[2]["accuracy"] == 1 and trials[1]["accuracy"] < 1
    best = max(range(3), key=lambda i: trials[i]["accuracies"][0])
    assert m["chosen_teacher"] == best and m["chosen_teacher_accuracy"] == trials[best]["accuracy"]
    kept, corpus = lines(folder / "stages" / "questions.jsonl"), lines(folder / "stages" / "corpus.jsonl")
    assert all(q["rate"] <= 0.5 for q in kept) and {t["question"] for t in corpus} <= {q["question"] for q in kept}
    assert m["traces"] == len(corpus) <= 2 * m["questions"]
    for row in lines(folder / "corpus" / "train.jsonl"):
        assert row["answer"] == str(running_sums(digits_of(row["question"]))[-1]) and row["rationale"]
    page = (folder / "report.html").read_text()
    for text in ("Teachers by what their traces teach", "Questions out of domain", "nearer to the others"):
        assert text in page
    assert {"other_accuracy", "other_accuracy_before", "other_shift"} <= set(m) and m["other_shift"] > 0
    assert f"model: {folder / 'first' / 'student' / 'student'}" in (folder / "training" / "recipe.yaml").read_text()


EACH = ("first/student", "smoke/teacher.ordered/0", "teachers", "pass_rates", "traces", "training", "asked:other_")


@pytest.mark.parametrize("cuts", [("corpus",), pytest.param(EACH, marks=pytest.mark.slow)], ids=("one", "each"))
def test_stopped_at_any_stage_it_asks_nothing_twice_and_ends_alike(tmp_path, monkeypatch, cuts, whole):
    asked, complete, write = [], OracleSource.complete, LocalSource._completion
    monkeypatch.setattr(OracleSource, "complete", lambda self, r: asked.append(r.key(self.name)) or complete(self, r))
    monkeypatch.setattr(
        LocalSource, "_completion", lambda self, r, *rest: asked.append(r.key(self.name)) or write(self, r, *rest)
    )
    done = stopped_and_resumed(tiny(tmp_path / "cut"), *cuts)
    assert len(asked) == len(set(asked)) > 3 * 10
    assert done.metrics == whole.metrics
    for file in ("stages/corpus.jsonl", "training/student/model.safetensors"):
        assert (whole.folder / file).read_bytes() == (done.folder / file).read_bytes()


def test_one_teacher_and_a_new_student_need_no_smoke_test_and_no_attempts(tmp_path):
    recipe = tiny(tmp_path / "run", traces=1, other_data=None, start_data={})
    done = distill({**recipe, "teacher": "oracle", "student": MODEL})
    assert not (done.folder / "smoke").exists() and not (done.folder / "logs" / "attempts.jsonl").exists()
    assert "chosen_teacher" not in done.metrics and "other_accuracy" not in done.metrics
    traces, corpus = (lines(done.folder / "stages" / f"{n}.jsonl") for n in ("traces", "corpus"))
    assert len(corpus) == len({t["question"] for t in traces}) == done.metrics["traces"]


def test_controls_choose_by_benchmark_and_keep_as_many_questions_at_random(tmp_path, whole):
    done = distill(tiny(tmp_path / "run", choose_by="benchmark", questions="random"))
    assert done.metrics["chosen_teacher"] == 0 and done.metrics["chosen_teacher_accuracy"] == 1
    ours, theirs = (lines(r.folder / "stages" / "questions.jsonl") for r in (done, whole))
    assert len(ours) == len(theirs)


@pytest.fixture
def writes(monkeypatch):
    """Put another teacher in the place of the world's."""

    def put(write):
        monkeypatch.setattr(
            Reasoning, "oracle", lambda self, recipe, role: OracleSource(role, lambda r, c: write(role))
        )

    return put


def test_a_teacher_without_a_usable_trace_is_named_and_never_chosen(tmp_path, writes):
    writes(lambda role: "I think 7")
    with pytest.raises(InputError, match=r"No trace is left.*mend options\.teacher_prompt"):
        distill(tiny(tmp_path / "run"))
    assert all(t["accuracies"] == [0.0] for t in lines(tmp_path / "run" / "stages" / "teachers.jsonl"))


def test_bad_input_is_one_line_before_anything_is_asked(tmp_path):
    def refuse(says, **keys):
        refused({**tiny(tmp_path / "run"), **keys}, says)

    refuse("checks final answers and task 'language_modeling' has none", task="language_modeling", data={})
    refuse("options.samples above 1 at options.temperature=0", options={**SMALL, "temperature": 0})
    refuse("Teachers are compared on validation: leave out eval_split", eval_split="validation")
    trained = {"model": MODEL, "train": {"max_steps": 1}}
    refuse("leave out teacher.a.train", teacher={"members": {"a": trained, "b": "oracle"}})
    refuse("Prompt 'nope' is neither a file", options={**SMALL, "teacher_prompt": "nope"})
    refuse(r"Unknown key data.nope", options={**SMALL, "other_data": {"nope": 1}})
    plain = {**SMALL, "start_data": {}}
    members = {"members": {"ordered": "oracle", "orderly": "oracle"}}
    refuse("no teacher that writes 'orderly'. Did you mean 'ordered'", teacher=members, student=MODEL, options=plain)


def test_a_student_that_passes_every_question_has_nothing_to_learn(tmp_path):
    with pytest.raises(InputError, match="The student already solves the set: it passes each of 24 questions"):
        distill({**tiny(tmp_path / "run", threshold=-1.0), "teacher": "oracle"})


def test_the_worlds_styles_end_in_the_right_answer():
    import numpy as np

    for name, write in STYLES.items():
        text = write([3, 5, 2, 9], np.random.default_rng(0))
        assert text == "" if name == "bare" else (name == "partial" or text[-1] == "9")
