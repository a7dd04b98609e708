"""Paper 5 as a procedure on the running sums: drafts, preferences, alignment, resume, ablations, bad input."""

import pytest

from procedure_cases import lines, refused, stopped_and_resumed
from understudy import InputError, distill
from understudy.data.reasoning import same_question
from understudy.generation import LocalSource
from understudy.tasks import get

MODEL = "llama:hidden=32,layers=1,heads=2,init=0.1"
FIRST = {"per_device_train_batch_size": 16, "learning_rate": 1e-2, "save_strategy": "no"}
TINY = {
    "method": "arte",
    "task": "reasoning",
    "data": {"size": 60, "eval_limit": 8, "samples": 0, "digits": [4, 4], "max_new_tokens": 12, "max_length": 64},
    "student": {"model": MODEL, "train": {**FIRST, "max_steps": 40}},
    "teacher": {"model": MODEL, "train": {**FIRST, "max_steps": 80}},
    "trainer": {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no"},
}
SMALL = {
    "drafts": 6,
    "rationales": 3,
    "probes": 5,
    "question_pairs": 3,
    "per_prompt": 1,
    "tries": 20,
    "max_tokens": 16,
    "chat": False,
    "question_prompt": "write_bare",
    "style_prompts": ("bare",),
    "plain_prompt": "bare",
    "teacher_data": {"styles": {"ordered": 1, "bare": 1}},
    "student_data": {"styles": {"bare": 1.0}, "shots": 1},
    "alignment": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
    "eval_shots": 1,
}


def tiny(output, **options):
    return {**TINY, "output": str(output), "options": {**SMALL, **options}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return distill(tiny(tmp_path_factory.mktemp("whole") / "run"))


def test_the_teacher_is_aligned_with_what_helps_the_student_and_writes_its_data(whole):
    folder, m = whole.folder, whole.metrics
    drafts, scores = (lines(folder / "stages" / f"{n}.jsonl") for n in ("drafts", "scores"))
    judged = {same_question(r["question"]) for n in ("validation", "test") for r in lines(folder / f"corpus/{n}.jsonl")}
    assert len({d["question"] for d in drafts}) == 6 and not {same_question(d["question"]) for d in drafts} & judged
    probes = lines(folder / "stages" / "probes.jsonl")
    assert len({p["question"] for p in probes}) == 5 and all(p["discrimination"] > 0 for p in probes)
    assert all(len(r["right"]) == 5 for r in scores)
    share = {r["id"]: sum(r["right"]) / 5 for r in scores}
    assert m["drafts_score"] == pytest.approx(sum(share.values()) / len(share))
    pairs = lines(folder / "stages" / "pairs.jsonl")
    assert [p["kind"] for p in pairs[:3]] == ["question"] * 3
    for p in pairs:
        assert p["chosen_score"] > p["rejected_score"]
        if p["kind"] == "rationale":  # under the plain prompt, of one question
            better, worse = (next(r for r in scores if r["id"] == i) for i in p["parents"])
            assert better["draft"] == worse["draft"] and p["prompt"] == drafts[better["draft"]]["question"]
            assert (share[better["id"]], share[worse["id"]]) == (p["chosen_score"], p["rejected_score"])
        else:
            assert p["prompt"].count("=") == 3 and p["chosen"].startswith("\n")
    recipe = (folder / "alignment" / "recipe.yaml").read_text()
    assert "method: dpo" in recipe and f"model: {folder / 'first' / 'teacher' / 'student'}" in recipe
    tailored, corpus = lines(folder / "stages" / "tailored.jsonl"), lines(folder / "corpus" / "train.jsonl")
    assert m["examples"] == len(corpus) == len(tailored) > 0
    assert f"model: {folder / 'first' / 'student' / 'student'}" in (folder / "training" / "recipe.yaml").read_text()
    assert {"few_shot_accuracy", "tailored_score", "accuracy"} <= set(m)
    page = (folder / "report.html").read_text()
    assert "Rationales as examples for the student" in page and "distinct questions" in page
    assert "answers of the student that can be read" in page


EACH = ("first/teacher", "probes", "drafts", "rationales", "pairs", "alignment", "questions", "tailored", "training")


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [("scores",), EACH], ids=("one", "each"))
def test_stopped_at_any_stage_it_asks_nothing_twice_and_ends_alike(tmp_path, monkeypatch, cuts, whole):
    asked, write = [], LocalSource._completion
    monkeypatch.setattr(
        LocalSource, "_completion", lambda self, r, *rest: asked.append(r.key(self.name)) or write(self, r, *rest)
    )
    done = stopped_and_resumed(tiny(tmp_path / "cut"), *cuts)
    assert len(asked) > 6 * 5
    logs = {file.stem: [row["key"] for row in lines(file)[1:]] for file in (done.folder / "logs").glob("*.jsonl")}
    assert len(asked) == sum(map(len, logs.values())) and all(len(k) == len(set(k)) for k in logs.values())
    assert done.metrics == whole.metrics
    for file in ("stages/tailored.jsonl", "training/student/model.safetensors"):
        assert (whole.folder / file).read_bytes() == (done.folder / file).read_bytes()


BY_STEPS = {"scorer": "sft_step", "step_rate": 0.5}


@pytest.fixture(scope="module")
def by_steps(tmp_path_factory):
    return distill(tiny(tmp_path_factory.mktemp("steps") / "run", **BY_STEPS))


def test_a_step_of_training_can_score_in_place_of_an_answer(by_steps):
    folder, m = by_steps.folder, by_steps.metrics
    scores, pairs = (lines(folder / "stages" / f"{n}.jsonl") for n in ("scores", "pairs"))
    assert all(len(r["gains"]) == 5 and not r["right"] for r in scores)
    assert not (folder / "logs" / "in_context.jsonl").exists()  # nothing was asked
    mean = {r["id"]: sum(r["gains"]) / 5 for r in scores}
    assert m["drafts_score"] == pytest.approx(sum(mean.values()) / len(mean)) and len(set(mean.values())) > 1
    rationales = [p for p in pairs if p["kind"] == "rationale"]
    assert rationales and all(p["chosen_score"] > p["rejected_score"] for p in pairs)
    for p in rationales:
        assert [mean[i] for i in p["parents"]] == pytest.approx([p["chosen_score"], p["rejected_score"]])
    keys = [row["key"] for row in lines(folder / "logs" / "sft_step.jsonl")[1:]]
    assert len(keys) == len(set(keys)) and len(keys) % 5 == 0
    assert {"tailored_score", "few_shot_accuracy", "accuracy"} <= set(m)
    page = (folder / "report.html").read_text()
    assert "gain by a step on one (nats a token)" in page and "likelier by a step" in page


@pytest.mark.slow
def test_stopped_while_it_scores_by_steps_it_ends_alike(tmp_path, by_steps):
    done = stopped_and_resumed(tiny(tmp_path / "cut", **BY_STEPS), "scores", "tailored_scores")
    assert done.metrics == by_steps.metrics
    file = "training/student/model.safetensors"
    assert (by_steps.folder / file).read_bytes() == (done.folder / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("align", ["none", "rationales"])
def test_ablations_leave_out_what_they_say(tmp_path, align):
    done = distill(tiny(tmp_path / "run", align=align))
    folder = done.folder
    assert (folder / "alignment").exists() == (align != "none") and not (folder / "stages" / "questions.jsonl").exists()
    drafts, corpus = lines(folder / "stages" / "drafts.jsonl"), lines(folder / "corpus" / "train.jsonl")
    assert {r["question"] for r in corpus} <= {d["question"] for d in drafts}
    if align == "none":
        scores = lines(folder / "stages" / "scores.jsonl")
        for row in corpus:
            mine = [r for r in scores if drafts[r["draft"]]["question"] == row["question"]]
            assert row["rationale"] == max(mine, key=lambda r: sum(r["right"]))["rationale"]  # the first of equals
    else:
        pairs = lines(folder / "stages" / "pairs.jsonl")
        assert pairs and {p["kind"] for p in pairs} == {"rationale"}


def test_bad_input_is_one_line_before_anything_is_asked(tmp_path):
    def refuse(says, **keys):
        refused({**tiny(tmp_path / "run"), **keys}, says, asked="first")

    refuse("checks final answers and task 'language_modeling' has none", task="language_modeling", data={})
    refuse("so leave out eval_split", eval_split="validation")
    refuse("trains its teacher: name one model here", teacher="oracle")
    refuse("is new and knows nothing: name a pretrained one, or train it first", student=MODEL)
    refuse("step_rate has no effect with scorer=in_context", options={**SMALL, "step_rate": 0.5})
    whole = {"model": MODEL, "train": FIRST, "quantization": {"load_in_8bit": True}}
    refuse("leave student.quantization out", student=whole, options={**SMALL, **BY_STEPS})
    refuse("Prompt 'nope' is neither a file", options={**SMALL, "plain_prompt": "nope"})
    refuse("Prompt bare needs slot 'question'", options={**SMALL, "question_prompt": "bare"})


def test_a_teacher_that_writes_no_question_is_told_the_remedy(tmp_path):
    with pytest.raises(InputError, match=r"wrote no new question after 6 prompts: mend options\.question_prompt"):
        distill(tiny(tmp_path / "run", max_tokens=1, tries=1))


def test_solved_examples_of_a_questions_style_stand_before_it():
    data = {"name": "sums", "prompt": "bare", "size": 30, "digits": [4, 4], "styles": {"ordered": 1, "bare": 1}}
    task = get("reasoning")
    plain, shown = task.read(data), task.read({**data, "shots": 2})
    assert {r["style"] for r in plain.train} == {"ordered", "bare"} and plain.hash != shown.hash
    known = {f"{r['prompt']}{r['completion']}\n": r["style"] for r in plain.train}
    for split in ("train", "test"):
        for before, after in zip(getattr(plain, split), getattr(shown, split), strict=True):
            examples = after["prompt"].removesuffix(before["prompt"])
            texts = [t for t in known if t in examples]
            assert len(texts) == 2 and {known[t] for t in texts} == {before["style"]}
            assert before["prompt"] not in examples and after["completion"] == before["completion"]
    with pytest.raises(InputError, match=r"has no known style 'orderd'\. Did you mean 'ordered'"):
        task.read({**data, "styles": {"orderd": 1.0}})
