"""The task `reasoning`: the world of running sums, users' files, known sets, what is judged and how."""

import json

import numpy as np
import pytest

from understudy import InputError, distill
from understudy.curation import Checker
from understudy.data.reasoning import load_reasoning
from understudy.data.reasoning_world import attempt, digits_of, questions, running_sums
from understudy.data.text import write_records
from understudy.evaluation.reasoning import Attempt, Grading, judge
from understudy.generation import Prompt, Request
from understudy.runs.recipe import make
from understudy.tasks import get
from understudy.tasks.reasoning import completion

TINY = {
    "task": "reasoning",
    "method": "sft",
    "data": {"size": 64, "eval_limit": 6, "samples": 2, "digits": [3, 4], "max_new_tokens": 8},
    "student": "llama:hidden=16,layers=1,heads=2",
    "trainer": {"max_steps": 3, "per_device_train_batch_size": 8, "save_strategy": "no"},
}


def tiny(output, **data):
    return {**TINY, "output": str(output), "data": {**TINY["data"], **data}}


def test_the_sums_are_what_they_say():
    assert running_sums([3, 5, 2, 9]) == [3, 8, 0, 9] and digits_of("1+1=\nsolve 352=") == [3, 5, 2]
    made = list(questions((3, 5), 300, 1))
    assert len(set(made)) == 300 and made == list(questions((3, 5), 300, 1)) != list(questions((3, 5), 300, 2))
    assert [len(q) - 1 for q in made[:6]] == [3, 4, 5, 3, 4, 5]
    chance = np.random.default_rng(0)
    digits = [int(d) for d in chance.integers(0, 10, 6)]
    assert attempt(digits, 0.0, chance) == running_sums(digits)
    assert attempt([7, 8, 4, 6, 8], 0.0, chance, [7, 8]) == [7, 6, 0, 6, 4] and attempt(
        [8, 7], 0.0, chance, [7, 8]
    ) == [8, 5]
    tries = [attempt(digits, 0.1, chance) for _ in range(4000)]
    first = np.mean([t[1] == running_sums(digits)[1] for t in tries])
    last = np.mean([t[-1] == running_sums(digits)[-1] for t in tries])
    # An error is carried on, unless another one of the other nine undoes it.
    clean = 0.1 + 0.9 * (1 - 10 / 9 * 0.1) ** 5
    assert first == pytest.approx(0.9, abs=0.02) and last == pytest.approx(clean, abs=0.03)
    splits = load_reasoning({"name": "sums", "size": 500})
    asked = [{r["question"] for r in part} for part in (splits.train, splits.validation, splits.test)]
    assert [len(a) for a in asked] == [500, 200, 500] and not (asked[0] & asked[1] or asked[0] & asked[2])
    record = splits.test[0]
    assert record["answer"] == str(running_sums(digits_of(record["question"]))[-1]) == record["rationale"][-1]


def test_a_users_file_is_read_as_question_rationale_and_answer(tmp_path):
    rows = [
        {"problem": f"What is {i} + {i}?", "solution": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
        for i in range(40)
    ]
    write_records(tmp_path / "d.jsonl", rows)
    data = {"name": str(tmp_path / "d.jsonl"), "columns": {"question": "problem", "answer": "solution"}}
    found = load_reasoning(data)
    record = found.train[0]
    number = int(record["answer"]) // 2
    assert record["question"] == f"What is {number} + {number}?"
    assert record["rationale"] == f"{number}+{number}={2 * number}"
    assert any("calculator marks <<…>> of 40 rationales" in note for note in found.notes)
    prepared = get("reasoning").prepare(
        make({"task": "reasoning", "method": "sft", "data": {**data, "vocab_size": 300}})
    )
    row, words = prepared.test[0], prepared.tokenizer
    labels = row["labels"][row["labels"] != -100]
    text = words.decode(labels, skip_special_tokens=True)
    assert text.endswith(f"\n#### {row['gold']}") and text.startswith(" ")
    asked = words.decode(row["input_ids"][row["labels"] == -100], skip_special_tokens=True)
    assert asked.startswith("Question: What is") and asked.endswith("Answer:")
    assert int(labels[-1]) == words.eos_token_id
    plain = [{"question": f"q {i}", "answer": i % 2 == 0} for i in range(20)]
    write_records(tmp_path / "e.jsonl", plain)
    found = load_reasoning({"name": str(tmp_path / "e.jsonl")})
    assert {(r["rationale"], r["answer"]) for r in found.train} == {("", "yes"), ("", "no")}
    assert completion("", "yes") == " #### yes"


def test_a_level_in_a_table_is_its_number(tmp_path):
    cells = "".join(f"q {i},{i},{('0', ' 12', '3.0', '')[i % 4]}\n" for i in range(40))
    (tmp_path / "d.csv").write_text("question,answer,level\n" + cells)
    found = load_reasoning({"name": str(tmp_path / "d.csv")})
    assert {(int(r["answer"]) % 4, r.get("level")) for r in found.train} == {(0, 0), (1, 12), (2, 3), (3, None)}


def test_questions_that_are_judged_are_not_trained_on(tmp_path):
    rows = [{"question": f"q {i}", "answer": str(i)} for i in range(20)]
    for split, part in {"train": rows, "validation": [{"question": "Q  3?", "answer": "3"}], "test": rows[:2]}.items():
        write_records(tmp_path / f"{split}.jsonl", part)
    found = load_reasoning({"name": str(tmp_path)})
    assert [r["question"] for r in found.train] == [f"q {i}" for i in range(20) if i not in (0, 1, 3)]
    assert any("3 training questions are also in validation or test" in note for note in found.notes)
    write_records(tmp_path / "train.jsonl", rows[:2])
    with pytest.raises(InputError, match="every training question is also in validation or test"):
        load_reasoning({"name": str(tmp_path)})


def test_known_sets_have_questions_and_answers_of_one_kind(data_folder):
    kinds = {"gsm8k": "number", "svamp": "number", "aqua": "choice", "commonsense_qa": "choice", "strategyqa": "yes_no"}
    for name, kind in kinds.items():
        found = load_reasoning({"name": name, "limit": 50, "eval_limit": 20})
        checker, _ = get("reasoning").checkers({}, found)
        assert checker.kind == kind, name
        for record in (*found.train, *found.test):
            text = completion(record["rationale"], record["answer"])
            assert checker.correct(text, checker.gold(record["answer"])), (name, text)
            assert record["question"] and "<<" not in record["rationale"]


def test_gsm8k_test_problems_are_not_both_trained_on_and_judged(data_folder, tmp_path):
    columns = {"question": "question", "answer": "ground_truth", "rationale": "solution"}
    name = str(data_folder / "gsm8k" / "model_solutions.parquet")
    with pytest.raises(InputError, match=r"trains on \d+ test problems of GSM8K and is judged on others of them"):
        load_reasoning({"name": name, "columns": columns})


def grading(**keys):
    how = {"tokenizer": None, "max_new_tokens": 4, "samples": 2, "temperature": 1.0, **keys}
    return Grading(Checker("number"), Checker("number", "last"), **how)


def test_answers_are_judged_by_hand():
    rows = [
        {"gold": "7", "level": 1},
        {"gold": "7", "level": 2},
        {"gold": "7", "level": 2},
        {"gold": "1/2", "level": 2},
    ]
    greedy = ["1 #### 7", "so it is 7", "#### 7 or 8", " #### 0.5"]
    texts = [[g, "#### 7", "#### 8"] for g in greedy[:3]] + [[greedy[3], "#### 0.50", "#### 1/2"]]
    attempts = [[Attempt(t, 5, t != "so it is 7") for t in tries] for tries in texts]
    found = judge(attempts, rows, grading())
    m = found["metrics"]
    assert (m["accuracy"], m["accuracy_lenient"], m["unparsed"], m["answer_tokens"]) == (0.5, 0.75, 0.5, 5)
    assert (m["pass_at_1"], m["pass_at_2"], m["majority_at_2"]) == (0.625, 1.0, 1.0)
    shares, reasons, levels = found["tables"]
    assert shares["rows"][0] == ["accuracy", "0.500", "0.150 to 0.850", 4]
    assert dict(reasons["rows"]) == {"cut off": 1, "several numbers": 1}
    assert [row[:2] for row in levels["rows"]] == [[1, "1.000"], [2, "0.333"]]
    assert m["accuracy"] <= m["accuracy_lenient"] and m["majority_at_2"] <= m["pass_at_2"]
    alone = judge([[tries[0]] for tries in attempts], rows, grading(samples=0))["metrics"]
    assert set(alone) == {"accuracy", "accuracy_lenient", "unparsed", "answer_tokens"}


def test_a_run_reports_answers_and_repeats_itself(tmp_path):
    first, second = distill(tiny(tmp_path / "a")), distill(tiny(tmp_path / "b"))
    assert first.metrics == second.metrics
    wanted = {"accuracy", "accuracy_lenient", "unparsed", "pass_at_1", "pass_at_2", "majority_at_2", "token_accuracy"}
    assert wanted <= set(first.metrics) and "nll" in first.metrics
    page = (first.folder / "report.html").read_text()
    for text in (
        "Final answers, with 95 % intervals",
        "Greedy answers that cannot be read",
        "Greedy accuracy by level",
    ):
        assert text in page
    titles = [t["title"] for t in json.loads((first.folder / "evaluation.json").read_text())["tables"]]
    assert len(titles) == len(set(titles))


def test_a_teacher_is_judged_beside_its_student(tmp_path):
    recipe = tiny(tmp_path / "run", samples=0)
    recipe |= {"method": "kd", "teacher": {"model": "llama:hidden=16,layers=1,heads=2", "train": TINY["trainer"]}}
    metrics = distill(recipe).metrics
    assert 0 <= metrics["teacher_accuracy"] <= metrics["teacher_accuracy_lenient"] <= 1
    assert "teacher_token_accuracy" in metrics and "pass_at_1" not in metrics


@pytest.mark.slow
def test_reasoning_is_learned_where_answers_alone_are_not(tmp_path):
    """At equal data and steps (paper 36, card): steps are small, the answer alone is all of them at once."""
    found = {}
    for keep in (True, False):
        recipe = tiny(tmp_path / str(keep), size=3000, digits=[4, 4], rationale=keep, max_new_tokens=14, eval_limit=100)
        recipe |= {"student": "llama:hidden=64,layers=2,heads=4,init=0.1"}
        recipe["trainer"] = {"max_steps": 300, "learning_rate": 4e-3, "save_strategy": "no"}
        found[keep] = distill(recipe).metrics["accuracy"]
    assert found[True] > found[False] + 0.5


def test_the_oracle_writes_steps_where_it_is_asked_for_them():
    recipe = make({"task": "reasoning", "method": "sft", "data": {"teacher_error": 0.0}}).dump()
    source = get("reasoning").oracle(recipe, "teacher")
    assert source.complete(Request("Solve step by step: 3529=", "a")).text == " 3809\n#### 9"
    assert source.complete(Request(({"role": "user", "content": "3529="},), "b")).text == " #### 9"
    with pytest.raises(InputError, match="has no oracle for critic"):
        get("reasoning").oracle(recipe, "critic")


@pytest.mark.parametrize(
    "data,says",
    [
        ({"digits": [3, 2]}, r"data\.digits is \[3, 2\]"),
        ({"digits": [1, 1]}, "too few for"),
        ({"prompt": "event"}, "Prompt event needs slot"),
        ({"prompt": "nope"}, "Prompt 'nope' is neither a file"),
        ({"answers": "word"}, r"data\.answers is 'word'"),
        ({"sample": 3}, "Did you mean 'samples'"),
        ({"temperature": 0.0}, r"data\.temperature is 0\.0"),
    ],
)
def test_bad_input(data, says):
    with pytest.raises(InputError, match=says):
        get("reasoning").prepare(make({"task": "reasoning", "method": "sft", "data": data}))


@pytest.mark.parametrize(
    "rows,keys,says",
    [
        ([{"question": "q", "answer": ""}], {}, "record 0 .*: answer is empty, not text"),
        ([{"question": "q", "answer": float("nan")}], {}, "record 0 .*: answer is empty, not text"),
        ([{"question": None, "answer": 1}], {}, "record 0 .*: question is empty, not text"),
        ([{"question": "q", "answer": float("inf")}], {}, "record 0 .*: answer is inf, not text"),
        ([{"question": "q", "answer": "1", "level": "1.5"}], {}, r"level is '1\.5' and must be a whole number"),
        ([{"question": "q", "answer": "1", "level": float("nan")}], {}, "level is nan and must be a whole number"),
        ([{"question": ["q"], "answer": "1"}], {}, "question is list, not text"),
        ([{"question": "q", "answer": "x ####"}], {}, "nothing stands behind #### in the answer"),
        ([{"question": "q", "answer": "1", "rationale": 3}], {}, "rationale is int, not text"),
        ([{"text": "q"}], {}, "expected one of: answer \\+ question"),
        ([{"question": "q", "answer": "1"}], {"digits": [3, 4]}, r"data\.digits belongs to the running sums"),
    ],
)
def test_bad_files(tmp_path, rows, keys, says):
    write_records(tmp_path / "d.jsonl", rows * 12)
    with pytest.raises(InputError, match=says):
        load_reasoning({"name": str(tmp_path / "d.jsonl"), **keys})


def test_an_answer_that_is_none_of_its_kind_is_named(tmp_path):
    write_records(tmp_path / "d.jsonl", [{"question": f"q {i}", "answer": "a car"} for i in range(20)])
    data = {"name": str(tmp_path / "d.jsonl"), "answers": "number"}
    with pytest.raises(InputError, match=r"The answer 'a car' is not one number: name its kind in data\.answers"):
        get("reasoning").prepare(make({"task": "reasoning", "method": "sft", "data": data}))
    assert Prompt.load("bare").render(question="3=") == "3="
