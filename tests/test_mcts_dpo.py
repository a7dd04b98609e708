"""Paper 26 as a procedure on the running sums: rounds, provenance, resume, controls, bad input, and what it learns."""

import json
import math

import pytest
import torch

from engine_cases import weights
from procedure_cases import lines, refused, stopped_and_resumed
from understudy import InputError, distill
from understudy.curation import Checker
from understudy.curation.step_pairs import StepPair
from understudy.data.reasoning_world import on_the_way
from understudy.generation import Completion, LocalSource, OracleSource, Prompt
from understudy.generation.tree import state_value
from understudy.generation.tree_search import Leaf, TreeJournal
from understudy.methods.mcts_dpo import MCTSDPO
from understudy.tasks.reasoning import Reasoning
from understudy.training.step_search import Question, StepProposer, outcome, probability_right

TINY = {
    "method": "mcts-dpo",
    "task": "reasoning",
    "data": {"size": 16, "eval_limit": 4, "digits": [3, 4], "max_new_tokens": 8, "samples": 1},
    "student": {
        "model": "llama:hidden=16,layers=1,heads=2",
        "train": {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 1e-2},
    },
    "roles": {"evaluator": "oracle"},
    "trainer": {"max_steps": 4, "per_device_train_batch_size": 8, "save_strategy": "no", "logging_steps": 1},
}
SMALL = {"rounds": 2, "questions": 4, "simulations": 2, "width": 2, "first_width": 3, "depth": 3, "step_tokens": 4}


def tiny(output, **options):
    return {**TINY, "output": str(output), "options": {**SMALL, **options}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return distill(tiny(tmp_path_factory.mktemp("whole") / "run"))


def test_trees_are_stored_and_each_pair_names_where_it_is_from(whole):
    folder = whole.folder
    for number in (0, 1):
        nodes = {n["id"]: n for n in lines(folder / "stages" / f"round-{number}" / "trees.jsonl")}
        pairs = lines(folder / "stages" / f"round-{number}" / "pairs.jsonl")
        asked = {r["id"] for r in lines(folder / "logs" / f"round-{number}" / "search.jsonl")[1:]}
        judged = {r["id"] for r in lines(folder / "logs" / "evaluator.jsonl")[1:]}
        assert {n["tree"] for n in nodes.values()} == set(range(4 * number, 4 * number + 4)) and pairs
        for pair in pairs:
            better, worse = (nodes[name] for name in pair["parents"])
            assert better["parent"] == worse["parent"] and better["q"] > worse["q"] and pair["better"] != pair["worse"]
            assert pair["better"].startswith(better["text"]) and pair["visits"] == [better["visits"], worse["visits"]]
            assert set(pair["requests"]) <= asked | judged and len(set(pair["requests"]) & asked) >= 2
            above = nodes[f"round-{number}/trees/{pair['tree']}/{better['parent']}"]
            assert pair["prompt"].endswith("=" if above["parent"] is None else above["text"])
        chosen = [n for n in nodes.values() if n["chosen"]]
        assert all(n["parent"] is None or n["parent"] in {c["number"] for c in chosen} for n in chosen)
        rows = lines(folder / f"round-{number}" / "corpus" / "train.jsonl")
        assert {tuple(r["completions"]) for r in rows} <= {(p["better"], p["worse"]) for p in pairs}
        assert all(0 <= r["label_smoothing"] <= 0.5 for r in rows)
    recipe = (folder / "round-1" / "training" / "recipe.yaml").read_text()
    assert f"model: {folder / 'round-0' / 'training' / 'student'}" in recipe  # goes on from the first round
    assert f"model: {folder / 'start' / 'student'}" in recipe and "reference: teacher" in recipe
    assert set(whole.metrics) == {"accuracy", "start_accuracy", "search_accuracy", "pairs_per_question"}
    report = (folder / "report.html").read_text()
    assert "A search of round 1" in report and "A search of round 2" in report and "visits, Q" in report


EACH = ("start", "round-0/pairs", "round-1/training", "judged-1")


@pytest.mark.parametrize("cuts", [("search",), pytest.param(EACH, marks=pytest.mark.slow)], ids=("one", "each"))
def test_stopped_at_any_point_it_asks_nothing_twice_and_ends_alike(tmp_path, monkeypatch, cuts, whole):
    asked, write, judge = [], LocalSource.write, OracleSource.complete
    append = TreeJournal.append
    monkeypatch.setattr(LocalSource, "write", lambda s, rs, p: asked.extend(r.id for r in rs) or write(s, rs, p))
    monkeypatch.setattr(OracleSource, "complete", lambda s, r: asked.append(r.id) or judge(s, r))

    def append_then_stop(self, tree, node, expansion):
        append(self, tree, node, expansion)
        if cuts == ("search",) and node and "round-1" in str(self.path):
            raise KeyboardInterrupt

    done = stopped_and_resumed(
        tiny(tmp_path / "cut"), *cuts, also=lambda patch: patch.setattr(TreeJournal, "append", append_then_stop)
    )
    assert sorted(asked) == sorted(set(asked)) and done.metrics == whole.metrics
    for file in ("trees", "pairs"):  # a text is the same in any batch; log-probabilities are up to rounding
        both = [lines(run.folder / "stages" / "round-1" / f"{file}.jsonl") for run in (whole, done)]
        for one, other in zip(*both, strict=True):
            assert one == {k: pytest.approx(v, rel=1e-4) if k == "prior" else v for k, v in other.items()}
    for (name, a), b in zip(
        weights(whole.folder / "round-1/training").items(),
        weights(done.folder / "round-1/training").values(),
        strict=True,
    ):
        assert torch.equal(a, b), name


def test_offline_and_other_searchers(tmp_path, monkeypatch, whole):
    start = str(whole.folder / "start" / "student")
    more = {"student": start, "roles": {}}
    own = {"self_evaluation": False, "calls": 9, "searcher": "start", "anchor": "round", "smoothing": False}
    done = distill({**tiny(tmp_path / "offline", **own), **more})
    names = [lines(done.folder / "logs" / f"round-{i}" / "nodes.jsonl")[0]["settings"]["searcher"] for i in (0, 1)]
    assert names[0] == names[1] and not (done.folder / "start").exists()
    for number in (0, 1):
        calls = {}
        for row in lines(done.folder / "logs" / f"round-{number}" / "nodes.jsonl")[1:]:
            calls[row["tree"]] = calls.get(row["tree"], 0) + row["calls"]
        assert max(calls.values()) <= 9
        assert "label_smoothing" not in lines(done.folder / f"round-{number}" / "corpus" / "train.jsonl")[0]
        assert "reference: start" in (done.folder / f"round-{number}" / "training" / "recipe.yaml").read_text()

    def says(request, chance):
        text = str(chance.integers(0, 10)) if "\n" in request.prompt else " " + str(chance.integers(100, 999))
        return Completion(f"#### {text}" if "\n" in request.prompt else text, "stop", -1.0, 1, 2)

    monkeypatch.setattr(Reasoning, "oracle", lambda *_: OracleSource("served", says))
    one = {"self_evaluation": False, "searcher": "teacher", "rounds": 1, "step_tokens": 8, "depth": 2}
    done = distill({**tiny(tmp_path / "teacher", **one), **more})
    assert lines(done.folder / "logs" / "teacher.jsonl") and done.metrics["pairs_per_question"] > 0


def test_bad_input_is_one_line_before_anything_is_asked(tmp_path):
    def refuse(says, **keys):
        refused({**tiny(tmp_path / "run"), **keys}, says)

    refuse("checks final answers and task 'language_modeling' has none", task="language_modeling", data={})
    refuse("max_steps is 4 and options.rounds 7", options={"rounds": 7})
    refuse("width=1 and options.first_width=1 leave nothing", options={"rounds": 1, "width": 1, "first_width": 1})
    refuse("budget of 3 calls does not cover the first 3 proposals", options={**SMALL, "calls": 3})
    refuse("roles.evaluator judges steps", options={**SMALL, "self_evaluation": False})
    refuse("Prompt 'nope' is neither a file", options={**SMALL, "judge_prompt": "nope"})
    refuse("depth = 0: Input should be greater than or equal to 1", options={"depth": 0})
    refuse("has no role 'judge'", roles={"judge": "oracle"})
    refuse("student.peft is for one round", student={"model": TINY["student"]["model"], "peft": {"r": 2}})


def test_a_teacher_without_log_probabilities_cannot_search(tmp_path):
    with pytest.raises(InputError, match=r"teacher 'oracle' gives no log-probabilities: search with the student"):
        distill(tiny(tmp_path / "run", searcher="teacher"))


def test_searches_without_pairs_stop_the_run_with_advice(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(MCTSDPO, "_found", lambda *_: [])
    with pytest.raises(InputError, match="The first round has no pair"):
        distill({**tiny(tmp_path / "run"), "student": str(whole.folder / "start" / "student")})


# -- proposing and evaluating ---------------------------------------------------------------------------------------------

GIVEN = Question("12=", "12=", "3", " 13\n#### 3")


def proposed(answers, judged=(), steps=(), last=False, **how):
    """The expansion of a leaf whose proposals are `answers`, as (text, finish)."""
    given, said = iter(answers), iter(judged)

    def ask(requests):
        return [Completion(text, finish, -1.0, 1, 3) for text, finish in (next(given) for _ in requests)]

    judge = (lambda requests: [next(said) for _ in requests]) if judged else None
    prompt = Prompt.load("judge_steps")
    proposer = StepProposer({"0": GIVEN}, ask, judge, prompt, Checker("number"), **how)
    (found,) = proposer([Leaf("0", 0, steps, len(answers), last)])
    return found


def test_steps_end_with_their_line_and_answers_behind_the_mark():
    found = proposed([(" 13", "stop"), (" 14", "length"), ("", "stop"), (" 13 ", "stop")])
    assert [s.text for s in found.steps] == [" 13\n", " 14"] and found.calls == 4
    assert all(s.outcome is None and not s.ended for s in found.steps)
    found = proposed([("#### 3", "stop"), ("#### 4", "stop"), ("#### ?", "stop"), ("####", "length")], steps=(" 13\n",))
    assert [(s.text, s.outcome, s.ended) for s in found.steps] == [
        ("#### 3", 1.0, True),  # the reference solution
        ("#### 4", -1.0, True),
        ("#### ?", -1.0, True),  # what cannot be read is wrong
        ("####", None, False),
    ]
    found = proposed([("#### 3", "stop"), (" 9", "length")], steps=(" 12\n",), last=True)
    assert [(s.outcome, s.ended) for s in found.steps] == [
        (1.25, True),
        (-1.0, False),
    ]  # right in its own words; cut off
    assert outcome(" 1 3\n#### 3", GIVEN, Checker("number")) == 1.25


def test_an_evaluator_gives_the_probability_of_right():
    judged = [
        Completion("B", "stop", math.log(0.75)),
        Completion(" A)", "stop", math.log(0.75)),
        Completion("well", "stop", -0.1),
    ]
    found = proposed([(" 1", "length"), (" 2", "length"), (" 3", "length")], judged)
    assert [s.self_evaluation for s in found.steps] == pytest.approx([0.75, 0.25, 0.0]) and found.calls == 6
    assert all(len(s.requests) == 2 for s in found.steps)
    assert probability_right(Completion("B", "stop")) == 1.0
    # An evaluator that is sure of "wrong" is heard: the value of the state before is not taken for it.
    for certain in (None, 0.0):
        assert state_value(probability_right(Completion("A", "stop", certain)), None, 0.9, 1) < 1e-3
    assert state_value(probability_right(Completion("well", "stop")), None, 0.9, 1) == 0.9
    with pytest.raises(InputError, match="has no log-probability"):
        proposer = StepProposer(
            {"0": GIVEN}, lambda r: [Completion("x", "stop")], None, Prompt.load("judge_steps"), Checker("number")
        )
        list(proposer([Leaf("0", 0, (), 1, False)]))


def test_the_evaluator_sees_the_solution_by_choice():
    seen = []

    def judge(requests):
        seen.extend(requests)
        return [Completion("B", "stop", -0.1) for _ in requests]

    for hint, chat in ((True, False), (False, True)):
        prompt = Prompt.load("judge_steps")
        ask = lambda requests: [Completion(" 1", "length", -1.0, 1, 2) for _ in requests]  # noqa: E731
        proposer = StepProposer({"0": GIVEN}, ask, judge, prompt, Checker("number"), hint=hint, chat=chat)
        list(proposer([Leaf("0", 0, (), 1, False)]))
    assert GIVEN.solution in seen[0].prompt and "Solution so far: 1" in seen[0].prompt
    assert GIVEN.solution not in seen[1].prompt[0]["content"]
    assert on_the_way("12= 1\n") and on_the_way("12= 13\n#### 3") and not on_the_way("12= 2")
    assert not on_the_way("12= 13\n#### 4")


# -- the update -----------------------------------------------------------------------------------------------------------


def pair(i, visits=(9, 3)):
    sides = {"better": f" {i}{i}", "worse": f" {i}x", "ended": (False, i % 2 == 0)}
    return StepPair(tree=i, prompt=f"say {i} =", visits=visits, q=(1.0, 0.0), **sides)


def update(folder, name, records, **trainer):
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    recipe = {
        "task": "preferences",
        "method": "dpo",
        "data": {"name": str(folder), "max_length": 32, "vocab_size": 260},
        "student": "llama:hidden=16,layers=1,heads=2",
        "trainer": {"max_steps": 1, "learning_rate": 0.1, "save_strategy": "no", "optim": "sgd", **trainer},
        "output": str(folder / name),
    }
    return distill(recipe)


def test_any_split_of_smoothed_pairs_trains_alike(tmp_path):
    records = [pair(i, (9, i)).record() for i in range(4)]
    assert [r["label_smoothing"] for r in records] == [0.0, 0.1, 2 / 11, 0.25]
    one = update(tmp_path, "one", records, per_device_train_batch_size=4)
    many = update(tmp_path, "many", records, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for (name, a), b in zip(weights(one.folder).items(), weights(many.folder).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_a_pair_that_the_search_did_not_tell_apart_teaches_nothing(tmp_path):
    even = update(tmp_path, "even", [pair(i, (4, 4)).record() for i in range(4)], per_device_train_batch_size=4)
    told = update(tmp_path, "told", [pair(i, (4, 0)).record() for i in range(4)], per_device_train_batch_size=4)
    plain = update(tmp_path, "plain", [pair(i, (4, 4)).record(False) for i in range(4)], per_device_train_batch_size=4)
    still = update(tmp_path, "still", [pair(0).record()], per_device_train_batch_size=1, learning_rate=0.0)
    moved = lambda run: sum((a - b).abs().sum() for a, b in zip(*map(all_weights, (run, still)), strict=True))  # noqa: E731
    assert float(moved(even)) < 1e-5 < 1e-2 < float(moved(told))
    for a, b in zip(all_weights(told), all_weights(plain), strict=True):
        torch.testing.assert_close(a, b)


def all_weights(run):
    return list(weights(run.folder).values())


def test_smoothing_of_the_data_needs_a_loss_that_reads_it(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(pair(0).record()) + "\n")
    with pytest.raises(InputError, match="train example 1 has a label_smoothing and loss_type hinge reads none"):
        distill(
            {
                "task": "preferences",
                "method": "hinge",
                "data": {"name": str(tmp_path), "max_length": 32, "vocab_size": 260},
                "student": "llama:hidden=16,layers=1,heads=2",
                "trainer": {"max_steps": 1},
                "output": str(tmp_path / "run"),
            }
        )
