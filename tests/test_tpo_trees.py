"""Trees for paper 24 out of searches: which answers are kept, their format and provenance, resume, bad input."""

import json

import pytest

from procedure_cases import lines, refused, stopped_and_resumed
from test_mcts_dpo import GIVEN, SMALL, TINY
from understudy import InputError, distill
from understudy.curation import Checker, Funnel
from understudy.curation.preference_trees import finished_answers, graded, preference_trees
from understudy.curation.step_pairs import TreeNode
from understudy.data import load_preferences
from understudy.data.trees import paths
from understudy.generation import Completion, LocalSource, OracleSource, Prompt
from understudy.generation.tree_search import Leaf, TreeJournal
from understudy.training.step_search import StepProposer

BUILD = {"rounds": 1, "scores": "evaluator", "learn": False}


def tiny(output, **options):
    return {**TINY, "method": "tpo-trees", "output": str(output), "options": {**SMALL, **BUILD, **options}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return distill(tiny(tmp_path_factory.mktemp("whole") / "run"))


# -- which answers ----------------------------------------------------------------------------------------------------------


def searched(tree, *rows):
    """Nodes from `(parent, text, outcome)`, numbered from 1 on; parent 0 is the root."""
    blank = {"chosen": False, "ended": True, "visits": 1, "q": 0.0, "v": 0.0, "prior": 1.0, "value": 0.0}
    made = [(None, "", None), *rows]
    return [
        TreeNode(
            id=f"trees/{tree}/{i}",
            tree=tree,
            number=i,
            parent=parent,
            text=text,
            self_evaluation=0.0,
            outcome=outcome,
            requests=(f"r{tree}.{i}",) if i else (),
            **blank,
        )
        for i, (parent, text, outcome) in enumerate(made)
    ]


NODES = [
    *searched(
        0,
        (0, " 1", None),
        (0, " 13\n", None),
        (1, "3\n", None),
        (3, "#### 3", 1.25),
        (2, "#### 3", 1.0),  # the same text in other steps
        (2, "#### 4", -1.0),
        (0, " 9", None),  # where the search stopped
    ),
    *searched(1, (0, " 5", -1.0), (0, " 6", -1.0)),
    *searched(2, (0, " 7", 1.0)),
]


def scored(answers, score=lambda a: 100.0 if a.text.endswith("3") else -100.0):
    return [a.model_copy(update={"score": score(a)}) for a in answers]


def test_trees_hold_each_finished_answer_once_with_what_it_was_made_of():
    funnel = Funnel()
    answers = finished_answers(NODES, funnel)
    assert [a.text for a in answers] == [" 13\n#### 3", " 13\n#### 4", " 5", " 6", " 7"]
    assert answers[0].parents == ("trees/0/1", "trees/0/3", "trees/0/4") and answers[0].requests == (
        "r0.1",
        "r0.3",
        "r0.4",
    )
    (tree,) = preference_trees(NODES, scored(answers), {0: "12=", 1: "3=", 2: "4="}, 5, funnel)
    assert tree.tree == 0 and tree.parents == ("trees/0/4", "trees/0/6") and tree.ended == [True, True]
    record = json.loads(json.dumps(tree.record()))
    steps, scores, unscored = paths("record", record["tree"])
    assert steps == [[" 1", "3\n", "#### 3"], [" 13\n", "#### 4"]] and scores == [100, -100] and not unscored
    dropped = {row["step"]: row["dropped"] for row in funnel.rows}
    assert dropped["answers"] == {"unfinished": 1} and dropped["distinct answers"] == {"written before": 1}
    assert dropped["trees of two scores"] == {"all scores equal": 1, "one answer": 1}


def test_shared_beginnings_are_one_node_and_of_many_answers_an_even_choice_stays():
    rows = [(0, " a", None), *((1, f" {i}", -1.0) for i in range(9))]
    nodes = searched(0, *rows)
    answers = scored(finished_answers(nodes, Funnel()), lambda a: float(a.text.split()[-1]))
    (tree,) = preference_trees(nodes, answers, {0: "?"}, 3, Funnel())
    assert len(tree.nodes) == 1 and [c["score"] for c in tree.nodes[0]["children"]] == [0.0, 4.0, 8.0]
    (tree,) = preference_trees(nodes, answers, {0: "?"}, 20, Funnel())
    assert len(tree.nodes[0]["children"]) == 9


@pytest.mark.parametrize(
    "said,score,problem",
    [
        (" 95", 95.0, None),
        ("-40.5 of 1e", None, "several grades"),
        ("−30", -30.0, None),
        ("good", None, "no grade"),
        ("120", None, "grade beyond -100 to 100"),
    ],
)
def test_grades_are_one_number_in_range(said, score, problem):
    (answer,) = finished_answers(searched(0, (0, " 1", 1.0)), Funnel())
    found = graded(answer, said, "g")
    assert (found.score, found.problem) == (score, problem) and found.requests == ("r0.1", "g")
    funnel = Funnel()
    preference_trees(searched(0, (0, " 1", 1.0)), [found], {0: "?"}, 5, funnel)
    assert funnel.rows[0]["dropped"] == ({problem: 1} if problem else {})


def test_the_reference_solution_is_a_branch_wherever_it_begins_so():
    def proposed(steps, last=False):
        ask = lambda requests: [Completion(" 14", "length", -1.0, 1, 3) for _ in requests]  # noqa: E731
        judge = Prompt.load("judge_steps")
        made = StepProposer({"0": GIVEN}, ask, None, judge, Checker("number"), solution=True)
        (found,) = made([Leaf("0", 0, steps, 2, last)])
        return [(s.text, s.outcome, s.ended) for s in found.steps], found.calls

    assert proposed(()) == ([(" 14", None, False), (" 13\n", None, False)], 1)
    assert proposed((" 13\n",)) == ([(" 14", None, False), ("#### 3", 1.0, True)], 1)
    assert proposed((" 1",), last=True)[0][1] == ("3\n#### 3", 1.0, True)
    assert proposed((" 12\n",)) == ([(" 14", None, False)], 2)


# -- the procedure ----------------------------------------------------------------------------------------------------------


def test_the_corpus_is_in_the_documented_form_and_names_its_nodes_and_requests(whole):
    folder = whole.folder
    nodes = {n["id"]: n for n in lines(folder / "stages" / "round-0" / "trees.jsonl")}
    answers = {a["parents"][-1]: a for a in lines(folder / "stages" / "round-0" / "answers.jsonl")}
    trees = lines(folder / "stages" / "round-0" / "preference_trees.jsonl")
    grades = {r["id"]: r["text"] for r in lines(folder / "logs" / "evaluator.jsonl")[1:]}
    known = {r["id"] for r in lines(folder / "logs" / "round-0" / "search.jsonl")[1:]} | set(grades)
    assert trees and all(-100 <= float(g) <= 100 for g in grades.values())
    for tree in trees:
        steps, scores, _ = paths("tree", tree["nodes"])
        assert 2 <= len(scores) <= 5 and len(set(scores)) > 1 and set(tree["requests"]) <= known
        assert sorted("".join(s) for s in steps) == sorted(answers[leaf]["text"] for leaf in tree["parents"])
        for leaf in tree["parents"]:
            assert answers[leaf]["score"] == float(grades[f"{leaf}/grade"]) and nodes[leaf]["outcome"] is not None
        assert any(nodes[leaf]["outcome"] == 1.0 for leaf in answers)  # the reference solution
    counted = json.loads((folder / "stages" / "round-0" / "preference_trees.json").read_text())
    assert [row["step"] for row in counted["funnel"]] == [
        "scored answers",
        "trees of two scores",
        "answers of these trees",
    ]
    found = load_preferences({"name": str(folder / "round-0" / "corpus")})
    assert found.train and all("steps" in record for record in found.train)
    assert set(whole.metrics) == {"search_accuracy", "answers_per_question"}
    assert "A search of round 1" in (folder / "report.html").read_text()


@pytest.mark.parametrize("cut", ["search", pytest.param("round-0/answers", marks=pytest.mark.slow)])
def test_stopped_while_it_builds_it_asks_nothing_twice_and_loses_nothing(tmp_path, monkeypatch, cut, whole):
    asked, write, judge, append = [], LocalSource.write, OracleSource.complete, TreeJournal.append
    monkeypatch.setattr(LocalSource, "write", lambda s, rs, p: asked.extend(r.id for r in rs) or write(s, rs, p))
    monkeypatch.setattr(OracleSource, "complete", lambda s, r: asked.append(r.id) or judge(s, r))

    def append_then_stop(self, tree, node, expansion):
        append(self, tree, node, expansion)
        if cut == "search" and node:
            raise KeyboardInterrupt

    stop = lambda patch: patch.setattr(TreeJournal, "append", append_then_stop)  # noqa: E731
    done = stopped_and_resumed(tiny(tmp_path / "cut"), cut, also=stop)
    assert sorted(asked) == sorted(set(asked)) and done.metrics == whole.metrics
    for file in ("stages/round-0/preference_trees.jsonl", "round-0/corpus/train.jsonl"):
        assert (done.folder / file).read_text() == (whole.folder / file).read_text()


def test_a_policy_learns_from_its_trees(tmp_path, whole):
    more = {"student": str(whole.folder / "start" / "student"), "roles": {}}
    done = distill({**tiny(tmp_path / "run", scores="answer", learn=True, calls=12), **more})
    recipe = (done.folder / "round-0" / "training" / "recipe.yaml").read_text()
    assert "method: tpo\n" in recipe and "reference: start" in recipe
    rows = lines(done.folder / "round-0" / "corpus" / "train.jsonl")
    assert {s for r in rows for s in paths("r", r["tree"])[1]} == {-100.0, 100.0}
    assert set(done.metrics) == {"accuracy", "start_accuracy", "search_accuracy", "answers_per_question"}


def test_bad_input_is_one_line_before_anything_is_asked(tmp_path):
    def refuse(says, **keys):
        refused({**tiny(tmp_path / "run"), **keys}, says)

    refuse("checks final answers and task 'language_modeling' has none", task="language_modeling", data={})
    refuse("needs a model that grades answers: set roles.evaluator", roles={})
    refuse("roles.evaluator is asked nothing", options={**SMALL, "rounds": 1})
    refuse("learn=false changes no policy between 2 rounds", options={**SMALL, **BUILD, "rounds": 2})
    refuse("Prompt 'nope' is neither a file", options={**SMALL, **BUILD, "grade_prompt": "nope"})


def test_trees_of_one_score_stop_the_run_with_advice(tmp_path, monkeypatch, whole):
    monkeypatch.setattr("understudy.methods.tpo_trees.preference_trees", lambda *_: [])
    with pytest.raises(InputError, match="where all answers have one value nothing is better"):
        distill({**tiny(tmp_path / "run"), "student": str(whole.folder / "start" / "student")})
