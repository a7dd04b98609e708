"""Paper 34 as a procedure: scenarios, refined strategies, a library that people edit, retrieval, paired evaluation."""

import json
import re

import pytest

from understudy import InputError, distill
from understudy.cli.main import main
from understudy.curation.strategies import StrategyLibrary, read_library
from understudy.data.text import write_records
from understudy.generation import Completion, OracleSource, Prompt
from understudy.models.text_vectors import text_vectors
from understudy.runs.recipe import make
from understudy.synthetic.support import TOPICS, SupportWorld
from understudy.tasks import get
from understudy.tasks.conversation import Conversations
from understudy.training import PipelineContext

STAGES = [
    "given",
    *(f"round-{n}/{s}" for n in (0, 1) for s in ("scenarios", "strategies", "library")),
    "judged/student",
]


def tiny(output, data=None, roles=None, **options):
    data = {"limit": 48, "eval_limit": 40, **(data or {})}
    values = {"method": "strategy-teaching", "task": "conversation", "data": data, "output": str(output)}
    return {**values, "options": options, **({"roles": roles} if roles else {})}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def edited(file, change):
    write_records(file, [{**row, **change(row)} for row in lines(file)])


@pytest.fixture
def asks(monkeypatch):
    """Every request that reaches a model, by role and content."""
    seen, complete = [], OracleSource.complete
    monkeypatch.setattr(
        OracleSource, "complete", lambda self, r: seen.append((self.name, r.key(""))) or complete(self, r)
    )
    return seen


@pytest.fixture
def writes(monkeypatch):
    """Put other models in the place of the world's, by role."""
    world = Conversations.oracle

    def put(**by_role):
        def oracle(self, recipe, role):
            return OracleSource(f"other {role}", by_role[role]) if role in by_role else world(self, recipe, role)

        monkeypatch.setattr(Conversations, "oracle", oracle)

    return put


def test_a_library_is_written_used_and_reported(tmp_path):
    done = distill(tiny(tmp_path / "run", roles={"transfer": "oracle"}))
    entries = read_library(done.folder / "library.jsonl")
    assert len(entries) == done.metrics["entries"] > 10
    assert all(e.score > e.base_score and e.status == "approved" and 1 <= e.rounds <= 5 for e in entries)
    scenarios = {s["id"] for n in (0, 1) for s in lines(done.folder / "stages" / f"round-{n}" / "scenarios.jsonl")}
    assert all(set(e.parents) < scenarios for e in entries) and len(scenarios) == 48
    assert done.metrics["satisfaction"] > done.metrics["baseline_satisfaction"] + 1 and done.metrics["paired_p"] < 0.05
    assert done.metrics["transfer_gain"] > 0 and 0.5 < done.metrics["right_type"] <= 1
    judged = lines(done.folder / "stages" / "judged" / "student.jsonl")
    known = {e.id for e in entries}
    assert all(set(j["parents"]) <= known and len(j["parents"]) <= 3 for j in judged)
    assert all(j["plain"] == j["advised"] and j["base"] == j["score"] for j in judged if not j["parents"])
    page = (done.folder / "report.html").read_text()
    for text in ("With the library and without", "Strategies", "What the models were asked", "strategies that help"):
        assert text in page
    recipe = make(tiny("x"))
    assert recipe.teacher.model == recipe.student.model == recipe.roles["judge"].model == "oracle"


def test_no_strategy_is_the_baseline_byte_for_byte(tmp_path):
    for name, options in (("k", {"k": 0}), ("t", {"refinements": 0}), ("r", {"rounds": 0}), ("m", {"min_score": 1.0})):
        done = distill(tiny(tmp_path / name, **options))
        judged = lines(done.folder / "stages" / "judged" / "student.jsonl")
        assert all(j["plain"] == j["advised"] and not j["parents"] for j in judged)
        assert done.metrics["gain"] == 0 and done.metrics["sign_p"] == 1 and done.metrics["advised"] == 0
        logged = lines(done.folder / "logs" / "student.jsonl")
        assert not any("judged-advised" in r.get("id", "") for r in logged)  # the very same requests
        assert bool(done.metrics["entries"]) == (name in "km")


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_at_any_stage_it_asks_nothing_twice_and_ends_alike(tmp_path, monkeypatch, asks, stage):
    stages, whole = PipelineContext.stage, distill(tiny(tmp_path / "whole"))
    expected = sorted(asks)
    asks.clear()
    dead = []

    def stopping(self, name, kind, make_items):
        def dying(funnel):
            items = make_items(funnel)
            if self.prefix + name == stage and not dead:
                dead.append(stage)
                raise KeyboardInterrupt
            return items

        return stages(self, name, kind, dying)

    monkeypatch.setattr(PipelineContext, "stage", stopping)
    with pytest.raises(KeyboardInterrupt):
        distill(tiny(tmp_path / "cut"))
    done = distill(tiny(tmp_path / "cut"))
    assert dead == [stage] and sorted(asks) == expected and len(set(asks)) == len(asks)
    assert done.metrics == whole.metrics
    for file in ("library.jsonl", *(f"stages/{s}.jsonl" for s in STAGES)):
        assert (done.folder / file).read_bytes() == (whole.folder / file).read_bytes()


def test_an_audited_run_waits_for_people_and_uses_what_they_leave(tmp_path, asks):
    recipe, kind = tiny(tmp_path / "run", audit=True), None
    for number in (0, 1):
        file, known = tmp_path / "run" / f"round-{number}" / "library.jsonl", []
        for _ in range(2):  # it waits as long as it takes, and asks nothing meanwhile
            with pytest.raises(InputError, match=r"\d+ of \d+ strategies in .* are pending .*start the same") as caught:
                distill(recipe)
            assert "\n" not in str(caught.value)
            known.append(len(asks))
        assert known[0] == known[1]
        kind = kind or lines(file)[0]["type"]
        edited(file, lambda row, kind=kind: {"status": "banned" if row["type"] == kind else "approved"})
        if number == 0:
            file.write_text(file.read_text() + json.dumps({"scenario": "hello", "strategy": "Greet."}) + "\n")
    done = distill(recipe)
    entries = read_library(done.folder / "library.jsonl")
    assert [e.strategy for e in entries if e.scenario == "hello"] == ["Greet."]
    banned = {e.id for e in entries if e.status == "banned"}
    judged = lines(done.folder / "stages" / "judged" / "student.jsonl")
    assert banned and not any(banned & set(j["parents"]) for j in judged)


def test_a_banned_type_falls_back_to_the_baseline(tmp_path):
    first = distill(tiny(tmp_path / "first", k=1))
    file = tmp_path / "library.jsonl"
    file.write_bytes((first.folder / "library.jsonl").read_bytes())
    edited(file, lambda row: {"status": "banned"} if row["type"] != TOPICS[1][0] else {})
    again = distill(tiny(tmp_path / "again", k=1, library=str(file), rounds=0, min_score=0.4))
    judged = lines(again.folder / "stages" / "judged" / "student.jsonl")
    advised = [j for j in judged if j["parents"]]
    assert {j["found_type"] for j in advised} == {TOPICS[1][0]} and len(advised) < 10
    assert all(j["plain"] == j["advised"] for j in judged if not j["parents"])
    assert len(read_library(again.folder / "library.jsonl")) == len(read_library(file))


def test_refinement_goes_on_until_the_student_is_as_good_as_the_teacher(tmp_path, writes):
    """Scores by the number of the advice: 3, 4, 6, 9 against a teacher's 7; advice 3 is the first that is good enough."""
    scores = {"advice 1": 4, "advice 2": 6, "advice 3": 9}

    def teacher(request, chance):
        text = request.prompt[-1]["content"]
        before = re.findall(r"advice (\d)", text.split("Advice that the assistant had:")[-1])
        return f"advice {int(before[0]) + 1 if before else 1}" if "Compare both" in text else "teacher's"

    def student(request, chance):
        return next((s for s in scores if request.prompt[0]["content"].endswith(s)), "plain")

    def judge(request, chance):
        answer = request.prompt[0]["content"]
        return str(next((v for s, v in scores.items() if s in answer), 7 if "teacher's" in answer else 3))

    writes(teacher=teacher, student=student, judge=judge)
    best = lambda name, **options: read_library(  # noqa: E731
        distill(tiny(tmp_path / name, rounds=1, scenarios=2, **options)).folder / "library.jsonl"
    )
    full = best("full")
    assert [(e.strategy, e.base_score, e.score, e.teacher_score, e.rounds, e.converged) for e in full] == [
        ("advice 3", 3.0, 9.0, 7.0, 3, True)
    ] * 2
    assert [(e.strategy, e.rounds, e.converged) for e in best("two", refinements=2)] == [("advice 2", 2, False)] * 2
    assert best("lenient", tolerance=1.0)[0].strategy == "advice 2"
    assert best("as good", tolerance=4.0) == []  # at the first answer: no strategy is asked for
    assert best("denied", deny=("advice",)) == []


def test_a_teacher_without_advice_and_a_judge_that_is_not_read(tmp_path, writes):
    calls = []

    def judge(request, chance):
        calls.append((request.draw, request.temperature))
        broken = "parcel" in request.prompt[0]["content"]
        return "well" if broken or (request.draw == 0 and "login" in request.prompt[0]["content"]) else "5"

    def teacher(request, chance):
        return "NONE." if "Compare both" in request.prompt[-1]["content"] else "teacher's"

    records = [{"prompt": f"my {'parcel' if i % 3 == 0 else 'login' if i % 3 == 1 else 'x'} {i}"} for i in range(60)]
    write_records(tmp_path / "d.jsonl", records)
    writes(judge=judge, teacher=teacher, student=lambda request, chance: "hello")
    roles = {"judge": "oracle"}
    recipe = tiny(tmp_path / "run", data={"name": str(tmp_path / "d.jsonl")}, roles=roles, tolerance=0.0)
    done = distill({**recipe, "student": "oracle"})
    rows = json.loads((done.folder / "stages" / "judged" / "student.json").read_text())["funnel"]
    assert rows[0]["dropped"]["no readable judgement"] > 0 and rows[0]["after"] > 0
    assert done.metrics["satisfaction"] == 5 and done.metrics["entries"] == 0 and "right_type" not in done.metrics
    assert set(calls) == {(0, 0.0), (1, 1.0), (2, 1.0)}
    writes(judge=lambda request, chance: "fine", teacher=teacher, student=lambda request, chance: "hello")
    with pytest.raises(InputError, match=r"None of \d+ judgements is one number .*'fine'.*options.judge_prompt"):
        distill(tiny(tmp_path / "none"))


def test_customers_are_simulated_where_a_conversation_has_turns(tmp_path):
    roles = {"judge": "oracle", "customer": "oracle"}
    done = distill(tiny(tmp_path / "run", roles=roles, turns=2, rounds=1, scenarios=6))
    met = lines(done.folder / "stages" / "round-0" / "scenarios.jsonl")
    assert [len(s["conversation"]) for s in met] == [1] * 6 + [3] * 6
    assert [m["role"] for m in met[6]["conversation"]] == ["user", "assistant", "user"]
    assert met[6]["conversation"][1]["content"] == met[0]["answer"]
    assert len(lines(done.folder / "logs" / "customer.jsonl")) == 7


def test_rounds_end_once_all_scenarios_are_covered(tmp_path):
    done = distill(tiny(tmp_path / "run", coverage=0.0))
    assert (done.folder / "stages" / "round-1" / "scenarios.jsonl").is_file()
    assert not (done.folder / "stages" / "round-1" / "strategies.jsonl").is_file()


def test_a_finished_library_serves_from_python_and_prompts_are_files(tmp_path):
    (tmp_path / "use.txt").write_text("Rules:\n{{ strategies }}")
    done = distill(tiny(tmp_path / "run", use_prompt=str(tmp_path / "use.txt")))
    served = StrategyLibrary(
        read_library(done.folder / "library.jsonl"), text_vectors(), Prompt.load(tmp_path / "use.txt"), k=1
    )
    world = SupportWorld(0)
    record = get("conversation").read(make(tiny("x")).data).test[0]
    system, user = served.messages(record["prompt"])
    assert system["content"].startswith("Rules:\n- ") and user["content"] == record["prompt"]
    assert world.topic(record["prompt"]) == [t[0] for t in TOPICS].index(record["type"])
    logged = (done.folder / "logs" / "student.jsonl").read_text()
    assert len(logged.splitlines()) > 90


def test_it_runs_from_the_command_line_on_own_conversations(tmp_path, capsys, writes):
    rows = [
        {"message": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"q {i}"}]}
        for i in range(40)
    ]
    write_records(tmp_path / "d.jsonl", rows)
    seen = []
    writes(
        teacher=lambda request, chance: "be good",
        student=lambda request, chance: seen.append(request.prompt) or Completion("ok", "stop", None, 1, 1),
        judge=lambda request, chance: "6",
    )
    words = [
        "method=strategy-teaching",
        "task=conversation",
        f"data={tmp_path / 'd.jsonl'}",
        "data.columns.prompt=message",
    ]
    words += ["student=oracle", "roles.judge=oracle", f"output={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as ended:
        main(["train", *words])
    assert ended.value.code == 0, capsys.readouterr().err
    assert all([m["role"] for m in prompt] == ["system", "user"] for prompt in seen)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]["satisfaction"] == 6


def test_bad_input_is_one_line_before_anything_is_asked(tmp_path, asks):
    def refused(says, rows=None, **keys):
        if rows is not None:
            write_records(tmp_path / "d.jsonl", rows)
            keys["data"] = {"name": str(tmp_path / "d.jsonl")}
        with pytest.raises(InputError, match=says) as caught:
            distill({**tiny(tmp_path / str(len(done))), **keys})
        assert "\n" not in str(caught.value) and not asks
        done.append(says)

    done = []

    refused("options.turns=2 needs a model that speaks for the customer", options={"turns": 2})
    refused(
        "3 rounds of 50 conversations need 150 and the data train on 144",
        data={},
        options={"rounds": 3, "scenarios": 50},
    )
    refused("Strategy library no.jsonl is not a file", options={"library": "no.jsonl"})
    refused("Prompt 'nope' is neither a file", options={"write_prompt": "nope"})
    refused("has no slot 'conversation'|needs slot", options={"judge_prompt": "event"})
    refused("has no role 'judges'", roles={"judges": "oracle"})
    refused(
        "works on conversation tasks and 'reasoning' is a text task",
        task="reasoning",
        data={},
        roles={"judge": "oracle"},
    )
    asked = [{"prompt": f"q {i}"} for i in range(30)]
    refused("needs a student that answers", asked)
    refused("needs a model that rates an answer", asked, student="some/model")
    both = {"student": "some/model", "roles": {"judge": "oracle"}}
    refused("record 2 .*the last message is empty", [*asked[:2], {"prompt": " "}], **both)
    refused(
        "does not end with a message of the user", [{"prompt": [{"role": "assistant", "content": "x"}]}] * 3, **both
    )
    refused("data.teacher_error is 2: ", data={"teacher_error": 2})
    refused("Unknown key data.follow", data={"follow": 1})
