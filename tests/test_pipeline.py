"""Procedures: stages with provenance that resume by name, rounds, roles of any kind, one budget over the whole run."""

import json
from typing import ClassVar

import pytest

from understudy import InputError, distill
from understudy.curation import Item
from understudy.generation import Budget, BudgetSpent, Completion, OracleSource, Request, Spent, generate
from understudy.generation.log import RequestLog, tally
from understudy.runs.folder import differences, take
from understudy.runs.recipe import load, make
from understudy.runs.roles import models_of
from understudy.tasks import get
from understudy.training import Pipeline, PipelineContext, Role


class Draft(Item):
    text: str
    score: float | None = None


class Debate(Pipeline):
    """Two models write, a third judges: the smallest procedure that has every part."""

    name = "debate"
    kinds = frozenset({"generation"})
    roles: ClassVar = {
        "judge": Role("judges two answers"),
        "writers": Role("write", required=False, many=True),
    }
    rounds: int = 2

    def run(self, context):
        kept = 0
        for number in range(self.rounds):
            turn = context.round(number)
            drafts = turn.stage("drafts", Draft, lambda funnel, turn=turn, n=number: self.drafts(turn, n, funnel))
            judged = turn.stage("judged", Draft, lambda funnel, turn=turn, d=drafts: self.judged(turn, d, funnel))
            kept += len(judged)
        return {"metrics": {"kept": float(kept)}}

    def drafts(self, context, number, funnel):
        found = []
        for role in context.members("writers") or ["teacher"]:
            requests = [Request(f"topic {i}", f"{role}/{number}/{i}", draw=number) for i in range(3)]
            answers = context.ask(role, requests)
            found += [Draft(text=a.text, requests=(r.id,)) for r, a in zip(requests, answers, strict=True)]
        return funnel.sieve("distinct", found, lambda d: None)

    def judged(self, context, drafts, funnel):
        requests = [Request(f"judge: {d.text}", f"judge/{d.id}") for d in drafts]
        scores = [float(len(a.text)) for a in context.ask("judge", requests)]
        items = [
            Draft(text=d.text, score=s, parents=(d.id,), requests=(r.id,))
            for d, s, r in zip(drafts, scores, requests, strict=True)
        ]
        return funnel.sieve("good", items, lambda d: None if d.text.endswith("0") else "bad")


def echo(name, calls):
    def write(request, generator):
        calls.append((name, request.id))
        return Completion(f"{name} on {request.prompt} {request.draw % 2}", "stop", None, 10, 5)

    return OracleSource(name, write)


@pytest.fixture
def world(monkeypatch):
    """Every model called `oracle` echoes; which was asked what is noted."""
    calls = []
    monkeypatch.setattr(type(get("text_generation")), "oracle", lambda self, recipe, role: echo(role, calls))
    return calls


def recipe(tmp_path, **keys):
    values = {"method": Debate, "task": "text_generation", "teacher": "oracle", "output": str(tmp_path / "run")}
    return {**values, "roles": {"judge": "oracle"}, **keys}


def context(folder, **keys):
    oracle = lambda role: echo(role, keys.setdefault("calls", []))  # noqa: E731
    return PipelineContext({}, folder, {}, lambda name, values: (name, values), oracle, folder / "logs")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_procedure_runs_in_rounds_and_says_where_each_item_came_from(tmp_path, world):
    done = distill(recipe(tmp_path))
    stages = done.folder / "stages"
    assert done.metrics == {"kept": 3.0}  # round 1 draws texts that end with 1
    drafts, judged = (lines(stages / "round-0" / f"{name}.jsonl") for name in ("drafts", "judged"))
    assert [d["id"] for d in drafts] == [f"round-0/drafts/{i}" for i in range(3)]
    assert [j["parents"] for j in judged] == [[d["id"]] for d in drafts]
    logged = {r["id"] for role in ("teacher", "judge") for r in lines(done.folder / "logs" / f"{role}.jsonl")[1:]}
    assert {r for item in drafts + judged for r in item["requests"]} <= logged
    evaluation = json.loads((done.folder / "evaluation.json").read_text())
    funnel, spent = evaluation["tables"]
    assert [row[:3] for row in funnel["rows"]] == [
        ["distinct", 3, 3],
        ["good", 3, 3],
        ["distinct", 3, 3],
        ["good", 3, 0],
    ]
    assert funnel["rows"][-1][3] == "3 bad"
    assert [row[:4] for row in spent["rows"]] == [["teacher", 6, 60, 30], ["judge", 6, 60, 30], ["all", 12, 120, 60]]


def test_several_models_have_one_role(tmp_path, world):
    writers = {"members": {"a": {"model": "oracle"}, "b": {"model": "oracle"}}}
    done = distill(recipe(tmp_path, roles={"judge": "oracle", "writers": writers}, options={"rounds": 1}))
    assert {name for name, _ in world} == {"judge", "writers.a", "writers.b"}
    assert len(lines(done.folder / "stages" / "round-0" / "drafts.jsonl")) == 6
    assert (done.folder / "logs" / "writers.a.jsonl").is_file()


def test_stopped_anywhere_it_ends_alike_and_asks_nothing_twice(tmp_path, world, monkeypatch):
    whole = distill(recipe(tmp_path / "whole"))
    asked = sorted(world)
    world.clear()
    cut = recipe(tmp_path / "cut")
    stage, stopped = PipelineContext.stage, []

    def stopping(self, name, kind, make):
        def dying(funnel):
            value = make(funnel)
            if (self.prefix + name) not in stopped:
                stopped.append(self.prefix + name)
                raise KeyboardInterrupt
            return value

        return stage(self, name, kind, dying)

    monkeypatch.setattr(PipelineContext, "stage", stopping)
    for _ in range(4):  # after each stage's work, before its file
        with pytest.raises(KeyboardInterrupt):
            distill(cut)
    done = distill(cut)
    assert sorted(world) == asked
    for file in sorted((whole.folder / "stages").rglob("*.json*")):
        assert file.read_bytes() == (done.folder / file.relative_to(whole.folder)).read_bytes(), file
    first, second = (json.loads((r.folder / "evaluation.json").read_text()) for r in (whole, done))
    assert first == second


def test_a_stage_is_whole_or_absent_and_a_changed_file_is_refused(tmp_path):
    made = []

    def make(funnel):
        made.append(1)
        return [Draft(text="two\nlines \u2028 é"), Draft(id="own", text="b")]

    first = context(tmp_path).stage("drafts", Draft, make)
    again = context(tmp_path).stage("drafts", Draft, make)
    assert first == again and len(made) == 1 and [d.id for d in first] == ["drafts/0", "own"]
    file = tmp_path / "stages" / "drafts.jsonl"
    (tmp_path / "stages" / "drafts.json").unlink()  # killed between both files
    assert context(tmp_path).stage("drafts", Draft, make) == first and len(made) == 2
    file.write_text(file.read_text().replace("own", "mine"))
    with pytest.raises(InputError, match=r"is not what stage drafts wrote: put it back, or delete drafts\.json"):
        context(tmp_path).stage("drafts", Draft, make)
    file.unlink()
    with pytest.raises(InputError, match="is not what stage drafts wrote"):
        context(tmp_path).stage("drafts", Draft, make)


def test_runs_of_a_round_have_its_name(tmp_path):
    assert context(tmp_path).round(2).train("training", {"seed": 1}) == ("round-2/training", {"seed": 1})


@pytest.mark.parametrize(
    "budget,says",
    [
        ({"requests": 8}, "budget.requests=8 does not cover the next request: 8 are answered"),
        ({"tokens": 204}, "budget.tokens=204 does not cover the next request: 120 are used"),
    ],
)
def test_one_budget_covers_all_models_and_resumes(tmp_path, world, budget, says):
    """A request reserves its whole prompt and 64 tokens; an answer uses 15."""
    for _ in range(2):  # started again, it still knows what was spent
        with pytest.raises(BudgetSpent, match=says):
            distill(recipe(tmp_path, budget=budget))
        assert sum(tally(tmp_path / "run" / "logs" / f"{role}.jsonl")[0] for role in ("teacher", "judge")) == 8


def test_a_run_whose_budget_is_spent_goes_on_with_a_larger_one(tmp_path, world):
    """As the message says; nothing is asked twice, and what else the recipe says must stay."""
    with pytest.raises(BudgetSpent, match="Raise the budget and start again"):
        distill(recipe(tmp_path, budget={"requests": 8}))
    with pytest.raises(InputError, match=r"holds another run: seed: \d+ → 9"):
        distill(recipe(tmp_path, budget={"requests": 99}, seed=9))
    done = distill(recipe(tmp_path, budget={"requests": 99}))
    asked = sum(tally(tmp_path / "run" / "logs" / f"{role}.jsonl")[0] for role in ("teacher", "judge"))
    again = distill(recipe(tmp_path / "at once"))
    assert done.metrics == again.metrics
    assert asked == sum(
        tally(tmp_path / "at once" / "run" / "logs" / f"{role}.jsonl")[0] for role in ("teacher", "judge")
    )


@pytest.mark.parametrize(
    "change,free",
    [
        ({"concurrency": 2, "rate": 3.0, "retries": 1, "timeout": 9.0, "token_budget": 9}, True),
        ({"price_in": 1.0, "price_out": 2.0, "cost_budget": 3.0, "api_key_env": "A_KEY"}, True),
        ({"url": "http://another:1/v1"}, True),
        ({"url": ["http://one:1/v1", "http://two:1/v1"]}, True),
        ({"extra": {"top_k": 1}}, False),
    ],
)
def test_bounds_of_a_server_may_change_between_parts_of_a_run(tmp_path, change, free):
    """Which model is asked, and what, may not."""
    served = {"url": "http://one:1/v1"}
    plain = {"method": "frontier-synthetic", "task": "reasoning", "output": str(tmp_path / "run")}
    spec = lambda endpoint: make({**plain, "teacher": {"model": "m", "endpoint": endpoint}})  # noqa: E731
    (tmp_path / "run").mkdir()
    take(spec(served))
    found = differences(tmp_path / "run", spec({**served, **change}))
    assert (not found) is free and all(key.startswith("teacher.endpoint.") for key in found)


def test_money_is_counted_by_each_models_prices():
    budget, used = Budget(cost=1.0), Spent(1, 10, 10, 0.9)
    assert budget.exceeded(used + Spent(1, 0, 0, 0.1), used) == ""
    assert "budget.cost=1 does not cover the next request: 0.9 is used" in budget.exceeded(used + Spent(cost=0.2), used)


def test_a_run_budget_and_an_own_one_hold_together(tmp_path):
    requests = [Request("p", f"id/{i}", draw=i) for i in range(9)]
    with RequestLog(tmp_path / "log", "a") as log:
        with pytest.raises(BudgetSpent, match=r"budget\.requests=7"):
            generate(echo("a", []), requests, log, budget=Budget(requests=7), before=Spent(requests=3), concurrency=4)
        assert len(log) == 4
        with pytest.raises(BudgetSpent, match="token budget of 100"):
            generate(echo("a", []), requests, log, budget=Budget(requests=99), token_budget=100)
    assert tally(tmp_path / "log") == (4, 40, 20) and tally(tmp_path / "none") == (0, 0, 0)


def test_roles_and_budgets_are_checked_before_anything_is_asked(tmp_path, world):
    def refused(says, **keys):
        with pytest.raises(InputError, match=says) as caught:
            distill(recipe(tmp_path, **keys))
        assert "\n" not in str(caught.value)

    refused("'debate' needs a model that judges two answers: set roles.judge", roles=None)
    refused("has no role 'juge': it has judge, writers. Did you mean 'judge'", roles={"judge": "oracle", "juge": "x"})
    refused("roles.judge is one model", roles={"judge": {"members": {"a": "oracle", "b": "oracle"}}})
    refused("Unknown recipe key: 'roles.judge.modell'", roles={"judge": {"model": "oracle", "modell": 1}})
    refused("budget.requests", budget={"requests": 0})
    refused("Member 'a b' of roles.writers", roles={"judge": "oracle", "writers": {"members": {"a b": "oracle"}}})
    with pytest.raises(InputError, match="budget bounds what a procedure asks and method 'kd' is none"):
        make({"method": "kd", "budget": {"tokens": 5}})
    with pytest.raises(InputError, match="Method 'kd' has no role 'judge': it has none"):
        make({"method": "kd", "roles": {"judge": "oracle"}})
    assert not world


def test_a_task_without_a_world_has_no_oracle():
    with pytest.raises(InputError, match="Task 'language_modeling' has no oracle for judge"):
        get("language_modeling").oracle({}, "judge")


def test_roles_are_named_on_the_command_line(tmp_path, world):
    from understudy.methods import adopt

    adopt(Debate)
    words = ["method=debate", "task=text_generation", "roles.judge=some-model", "roles.judge.endpoint.url=localhost"]
    with pytest.raises(InputError, match="a URL begins with http"):
        load(None, words)
    found = load(None, [*words[:-1], "roles.judge.endpoint=http://localhost:1", "budget.cost=2.5"])
    assert found.roles["judge"].endpoint.url == "http://localhost:1/v1" and found.budget.cost == 2.5
    assert set(models_of(found)) == {"teacher", "student", "judge"}
    assert "roles" not in make({"method": "kd"}).dump()


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"funnel": 3}', bytes(range(256))])
def test_a_damaged_seal_of_a_stage_is_one_line(content, tmp_path):
    made = lambda funnel: [Draft(text="a")]  # noqa: E731
    assert context(tmp_path).stage("drafts", Draft, made)[0].text == "a"
    (tmp_path / "stages" / "drafts.json").write_bytes(content)
    with pytest.raises(InputError, match=r"drafts\.json is damaged") as caught:
        context(tmp_path).stage("drafts", Draft, made)
    assert "\n" not in str(caught.value)


def test_what_a_recipe_names_may_not_change_before_a_procedure_goes_on(tmp_path, world, monkeypatch):
    """The files of its data and options, by their content; requests and stages are of what it began with."""

    class Reading(Debate):
        name = "reading"
        prompt: str = "not a file"
        many: tuple[str, ...] = ()

    (tmp_path / "data").mkdir()
    for file in ("data/a.txt", "ask.txt", "other.txt"):
        (tmp_path / file).write_text(file)
    options = {"prompt": str(tmp_path / "ask.txt"), "many": [str(tmp_path / "other.txt"), "x" * 5000]}
    asked = recipe(tmp_path, method=Reading, data={"name": str(tmp_path / "data")}, options=options)
    stage = PipelineContext.stage

    def stopped(self, name, *rest):
        if self.prefix == "round-1/":
            raise KeyboardInterrupt
        return stage(self, name, *rest)

    monkeypatch.setattr(PipelineContext, "stage", stopped)
    with pytest.raises(KeyboardInterrupt):
        distill(asked)
    monkeypatch.setattr(PipelineContext, "stage", stage)
    for file, key in (("data/a.txt", "data.name"), ("ask.txt", "options.prompt"), ("other.txt", "options.many.0")):
        (tmp_path / file).write_text("other")
        with pytest.raises(InputError, match=f"The {key} of run .* changed since it began"):
            distill(asked)
        (tmp_path / file).write_text(file)
    assert distill(asked).metrics == {"kept": 3.0}
    (tmp_path / "ask.txt").write_text("other")
    with pytest.raises(InputError, match=r"The options\.prompt of run .* changed since it began"):
        distill(asked)
