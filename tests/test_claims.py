"""Claims: rounds of seeds until a verdict, runs that are read and not repeated, settings, other data."""

import dataclasses
import json
from pathlib import Path

import pytest

from engine_cases import DIGITS
from understudy import tasks
from understudy.claims import claim as claim_file
from understudy.claims import claims, get
from understudy.claims.experiment import Arm, Check, Claim, Setting, reproduce
from understudy.claims.result import difference_told, verdict_told
from understudy.cli.main import main
from understudy.errors import InputError
from understudy.files import write_json
from understudy.reporting import paired, paired_sequence
from understudy.runs.folder import take

RATES = ({"trainer": {"learning_rate": 1e-3}}, {"trainer": {"learning_rate": 1e-2}})
NOISE = [0.4, -1.1, 0.9, -0.3, 1.2, -0.8, 0.1, -0.6, 0.7, -0.2, 0.5, -0.9, 1.0, -0.4, 0.3, -1.0, 0.8, -0.5, 0.2, 0.6]
CLAIM = Claim(
    name="toy",
    statement="Taught is better than alone.",
    recipe={**DIGITS, "output": "unused"},
    arms={"taught": Arm("kd", {}, RATES), "alone": Arm("sft", {}, RATES)},
    checks=(
        Check("taught", "alone", 0.0, "accuracy", True, "taught is above alone"),
        Check("taught", "alone", 5.0, "accuracy", True, "by five"),
    ),
    tuned_on=("accuracy", True),
    settings={"real": Setting({**DIGITS, "data": {"name": "folder", "limit": 64}}, needs=("folder", "teacher"))},
)


@pytest.fixture
def runs(monkeypatch):
    """Runs that take no time: `accuracy` is the learning rate, plus for `kd` what `gain` says of the seed."""
    done = []
    gain = {"of": lambda seed: 0.0}

    def run_all(plans, shared, *rest):
        for plan in plans:
            metrics = {"accuracy": plan.trainer["learning_rate"]}
            metrics["accuracy"] += gain["of"](plan.seed) if plan.method == "kd" else 0.0
            folder = plan.output
            folder.mkdir(parents=True, exist_ok=True)
            take(plan)
            cost = {"steps": plan.trainer["max_steps"], "forwards": {"student": 1}, "seconds": 1.0}
            write_json(folder / "evaluation.json", {"split": plan.eval_split, "metrics": metrics, "cost": cost})
            write_json(folder / "run.json", {"status": "done"})
            done.append((plan.method, plan.seed, plan.eval_split))
        return [json.loads((p.output / "evaluation.json").read_text()) for p in plans]

    monkeypatch.setattr("understudy.runs.comparison._run_all", run_all)
    return done, gain


def test_it_stops_as_soon_as_it_is_decided(runs, tmp_path):
    done, gain = runs
    gain["of"] = lambda seed: 1 + 0.01 * NOISE[seed % 20]
    result = reproduce(CLAIM, None, tmp_path)
    assert (result["verdict"], result["stopped"], result["looks"]) == ("supported", "decided", [3])
    assert result["checks"][1]["verdict"] == "not supported" and result["budget"]["seeds"] == 3
    assert result["sequential"] and result["setting"] == "embedded"
    assert result["command"] == "understudy reproduce toy"
    assert json.loads((tmp_path / "claim.json").read_text()) == result
    values = [result["arms"][a]["values"]["accuracy"] for a in ("taught", "alone")]
    assert tuple(result["interval"]) == pytest.approx(paired_sequence(*values)[1:])
    assert done.count(("kd", 1000, "validation")) == 2 and ("kd", 3, "test") not in done


def test_it_goes_on_while_nothing_is_decided_and_no_further_than_told(runs, tmp_path):
    done, gain = runs
    gain["of"] = lambda seed: NOISE[seed % 20]
    result = reproduce(CLAIM, None, tmp_path, max_seeds=12)
    assert result["looks"] == [3, 4, 5, 6, 7, 8, 10, 12]
    assert (result["verdict"], result["stopped"]) == ("inconclusive", "12 seeds spent")
    assert result["command"] == "understudy reproduce toy --max-seeds 12"
    assert len(done) == len(set(done)) + 2 == 4 + 2 * 12  # each run once; the two candidates of an arm look alike here


def test_an_effect_is_found_once_there_are_seeds_enough(runs, tmp_path):
    gain = runs[1]
    gain["of"] = lambda seed: 0.8 + NOISE[seed % 20]
    result = reproduce(CLAIM, None, tmp_path)
    assert (result["verdict"], result["stopped"]) == ("supported", "decided")
    assert 3 < result["looks"][-1] < 20 and result["budget"]["seeds"] == result["looks"][-1]


def test_seeds_that_are_done_are_used_and_not_run_again(runs, tmp_path):
    done, gain = runs
    gain["of"] = lambda seed: NOISE[seed % 20]
    fixed = reproduce(CLAIM, 6, tmp_path)
    assert fixed["looks"] == [6] and not fixed["sequential"] and fixed["stopped"] == "all seeds that were asked for"
    assert fixed["command"] == "understudy reproduce toy --seeds 6"
    values = [fixed["arms"][a]["values"]["accuracy"] for a in ("taught", "alone")]
    assert tuple(fixed["interval"]) == pytest.approx(paired(*values)[1:])  # one look: Student's own
    number = len(done)
    result = reproduce(CLAIM, None, tmp_path, max_seeds=8)
    assert result["looks"] == [6, 7, 8] and len(done) == number + 2 * 2
    assert result["interval"][1] - result["interval"][0] > fixed["interval"][1] - fixed["interval"][0]
    again = reproduce(CLAIM, None, tmp_path, max_seeds=4)
    assert again["looks"] == [4] and len(done) == number + 2 * 2
    other = dataclasses.replace(CLAIM, recipe={**CLAIM.recipe, "student": "mlp:9"})
    with pytest.raises(InputError, match=r"holds another run: student\.model: mlp:8 → mlp:9"):
        reproduce(other, 6, tmp_path)


def test_arms_of_side_claims_may_stop_earlier(runs, tmp_path):
    done, gain = runs
    gain["of"] = lambda seed: NOISE[seed % 20]
    claim = dataclasses.replace(
        CLAIM,
        arms={**CLAIM.arms, "other": Arm("forward_kl", {}, RATES)},
        checks=(*CLAIM.checks, Check("other", "taught", 0.0, "accuracy", True, "other is above taught")),
    )
    result = reproduce(claim, None, tmp_path / "few", max_seeds=12, side_seeds=4)
    assert result["looks"] == [3, 4, 5, 6, 7, 8, 10, 12] and result["budget"]["seeds"] == 12
    assert [c["seeds"] for c in result["checks"]] == [12, 12, 4]
    assert {a: len(found["values"]["accuracy"]) for a, found in result["arms"].items()} == {
        "taught": 12,
        "alone": 12,
        "other": 4,
    }
    assert [(m, s) for m, s, split in done if split == "test"].count(("forward_kl", 4)) == 0
    assert result["command"] == "understudy reproduce toy --max-seeds 12 --side-seeds 4"
    whole = reproduce(claim, None, tmp_path / "all", max_seeds=12)
    assert result["checks"][:2] == whole["checks"][:2]  # what is judged of the main claim is the same
    taught, other = (whole["arms"][a]["values"]["accuracy"][:4] for a in ("taught", "other"))
    assert tuple(result["checks"][2]["interval"]) == pytest.approx(paired_sequence(other, taught)[1:])
    assert "seeds would decide" in verdict_told(result, result["checks"][2])
    number = len(done)
    again = reproduce(claim, None, tmp_path / "few", max_seeds=12, side_seeds=4)
    assert again["looks"] == result["looks"] and len(done) == number  # looks of an earlier call count
    more = reproduce(claim, None, tmp_path / "few", max_seeds=12, side_seeds=6)  # and may go on later
    assert [c["seeds"] for c in more["checks"]] == [12, 12, 6] and len(done) == number + 2
    beside = dataclasses.replace(claim, name="beside", statement="Other is above alone.")
    looks = reproduce(beside, None, tmp_path / "few", max_seeds=12, side_seeds=6)["looks"]
    assert looks == [12] and len(done) == number + 2  # claims share runs, not looks


def test_hours_end_it_before_a_round_that_would_not_fit(runs, tmp_path, monkeypatch):
    done, gain = runs
    gain["of"] = lambda seed: NOISE[seed % 20]
    monkeypatch.setattr("understudy.claims.experiment.time.time", lambda: 600.0 * len(done))  # ten minutes a run
    result = reproduce(CLAIM, None, tmp_path, hours=2.3)  # tuning 40 minutes, a seed 20
    assert result["looks"] == [3, 4] and result["stopped"] == "2.3 hours spent"
    assert result["seconds"] <= 2.3 * 3600 and result["command"].endswith("--hours 2.3")


@pytest.mark.parametrize(
    ("seeds", "options", "says"),
    [
        (3, {"max_seeds": 9}, "--seeds asks for exactly 3 seeds, and --max-seeds"),
        (3, {"hours": 1.0}, "--seeds asks for exactly 3 seeds, and --hours"),
        (0, {}, "--seeds is 0"),
        (None, {"max_seeds": 2}, "--max-seeds is 2, and no verdict is possible below 3"),
        (None, {"hours": 0.0}, "--hours is 0"),
        (None, {"hours": float("nan")}, "--hours is nan"),
        (None, {"side_seeds": 2}, "--side-seeds is 2, and no verdict of a side claim is possible below 3"),
        (None, {"setting": "reel"}, "no setting 'reel'. Did you mean 'real'.*Known: embedded, real"),
        (None, {"setting": "real"}, "needs folder and teacher, and folder is not in UNDERSTUDY_DATA"),
        (None, {"setting": "real", "data": "mine"}, "needs teacher, and teacher is not in UNDERSTUDY_DATA"),
    ],
)
def test_a_bad_budget_or_setting_is_one_line(runs, tmp_path, monkeypatch, seeds, options, says):
    monkeypatch.delenv("UNDERSTUDY_DATA", raising=False)
    with pytest.raises(InputError, match=says) as error:
        reproduce(CLAIM, seeds, tmp_path / "out", **options)
    assert "\n" not in str(error.value) and not runs[0] and not (tmp_path / "out").exists()


def test_a_setting_stands_in_for_the_claims_own(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_DATA", str(tmp_path))
    (tmp_path / "folder").mkdir()
    (tmp_path / "teacher").touch()
    seen = dataclasses.replace(CLAIM, caveat="seen before", first_seed=6, new_data=True)
    real = seen.at("real")
    assert real.recipe["data"]["name"] == "folder" and (real.caveat, real.first_seed, real.new_data) == ("", 0, False)
    assert real.arms == CLAIM.arms and real.statement == CLAIM.statement
    assert seen.at() == dataclasses.replace(seen, settings={})
    embedded = dataclasses.replace(CLAIM, settings={"other": Setting({**DIGITS}, needs=())})
    assert not embedded.held_by(tmp_path)
    assert CLAIM.held_by(tmp_path) and not CLAIM.held_by(tmp_path / "folder")


def test_other_data_take_the_place_of_a_settings_own():
    arms = {**CLAIM.arms, "few": Arm("kd", {}, RATES, {"data": {"name": "digits", "limit": 8}})}
    moved = dataclasses.replace(CLAIM, arms=arms).at(data="else/where")
    plans = {label: moved.judging(label, 0, 0, Path("out")) for label in arms}
    assert {label: (p.data["name"], p.data["limit"]) for label, p in plans.items()} == {
        "taught": ("else/where", 64),
        "alone": ("else/where", 64),
        "few": ("else/where", 8),
    }


WITHOUT_REAL_DATA = {
    *("symbolic-kd", "i2d2"),  # nothing but its own world knows whether a text is true
    *("adpa", "redi", "tpo"),  # the return of a chain, and the grade of a list, are known in a world alone
    "dpo-pg",  # so is the target of a policy
    "llava-mod",  # so is what an image holds
    *("teacher-hacking", "survey-llm-kd"),  # the distance from the truth is known in a world alone
    "qcrd",  # the error of its teacher is known in a world alone
    *("arte", "ded", "frontier-synthetic"),  # so are the styles of its solutions, and whom they help
    "mcts-dpo",  # a student of that size never reaches a right answer to a real problem
    "ddk",  # its embedded data are real texts
    "strategy-teaching",  # how content a customer is
}


def everywhere():
    return [(name, setting) for name, one in claims().items() for setting in ("embedded", *one.settings)]


@pytest.mark.parametrize(("name", "setting"), everywhere())
def test_every_setting_of_every_claim_is_fair(name, setting, monkeypatch):
    """Each arm has valid recipes, the same budget, as many candidates, and every check names arms that there are."""
    monkeypatch.setattr(claim_file, "find", Path)
    one = get(name).at(setting)
    plans = [one.tuning(label, i, Path("out")) for label in one.arms for i in range(one.candidates)]
    plans += [one.judging(label, 0, 0, Path("out")) for label in one.arms]
    assert {p.eval_split for p in plans[: -len(one.arms)]} <= {"validation"} and plans[-1].eval_split == "test"
    # A procedure that changes no weights has neither.
    budgets = {(p.trainer.get("max_steps"), p.trainer.get("per_device_train_batch_size")) for p in plans}
    assert len(budgets) == 1 and one.candidates >= 1
    parts = [(p, {}) for p in plans] + [(p, v) for p in plans for k, v in p.options.items() if k.endswith("_data")]
    worlds = [{**p.data, **(other or {})} for p, other in parts if p.task == "reasoning" and p.data["name"] == "sums"]
    assert all(tasks.get("reasoning").read(json.loads(data)).test for data in {json.dumps(w) for w in worlds})
    assert {c.arm for c in one.checks} | {c.other for c in one.checks} <= one.arms.keys()
    assert bool(get(name).settings) != (name in WITHOUT_REAL_DATA)


def test_on_the_command_line(runs, tmp_path, monkeypatch, capsys):
    """The data folder, or other data; the result's folder says which; the finding is printed and written."""
    gain = runs[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNDERSTUDY_DATA", "")
    real = {**CLAIM.settings, "real": dataclasses.replace(CLAIM.settings["real"], needs=("folder",))}
    monkeypatch.setattr("understudy.claims.claims", lambda: {"toy": dataclasses.replace(CLAIM, settings=real)})
    gain["of"] = lambda seed: 1 + 0.01 * NOISE[seed % 20]
    (tmp_path / "sets" / "folder").mkdir(parents=True)

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            main(["reproduce", "toy", "--json", "out.json", *words])
        printed = capsys.readouterr()
        return stop.value.code, printed.out + printed.err

    code, said = call()
    assert code == 0 and "supported: Taught is better than alone." in said and "3 seeds, embedded: decided" in said
    assert (tmp_path / "runs/claims/toy/claim.json").is_file()
    code, said = call("--setting", "real")
    assert code == 2 and "needs folder" in said and said.count("\n") == 1
    code, _ = call("--setting", "real", "--data", "sets")
    written = json.loads((tmp_path / "out.json").read_text())
    assert code == 0 and written["setting"] == "real" and "data" not in written
    assert (tmp_path / "runs/claims/toy-real/claim.json").is_file()
    code, _ = call("--setting", "real", "--data", "else/mine", "--max-seeds", "5")
    written = json.loads((tmp_path / "out.json").read_text())
    assert code == 0 and written["data"] == "else/mine"
    assert written["command"] == "understudy reproduce toy --setting real --max-seeds 5 --data else/mine"
    assert (tmp_path / "runs/claims/toy-real-mine/claim.json").is_file()
    code, said = call("--seeds", "3", "--hours", "1")
    assert code == 2 and "leave one out" in said


def test_where_it_is_not_supported_own_options_are_tried_on_validation(runs, tmp_path):
    """The judged setting first, then each knob, against the same runs of the other arm; judged seeds are not touched."""
    done, gain = runs
    gain["of"] = lambda seed: -1 + 0.01 * NOISE[seed % 20]
    knobs = ({"temperature": 2.0}, {"temperature": 4.0, "kd_weight": 1.0})
    result = reproduce(dataclasses.replace(CLAIM, knobs=knobs), None, tmp_path)
    assert result["verdict"] == "not supported"
    assert [t["options"] for t in result["search"]] == [{}, *knobs]
    expected = sum(gain["of"](1000 + n) for n in range(3)) / 3
    assert all(t["difference"] == pytest.approx(expected) for t in result["search"])
    searched = [(method, seed) for method, seed, split in done if split == "validation"][4:]
    assert {seed for _, seed in searched} == {1000, 1001, 1002}
    assert searched.count(("kd", 1001)) == 3 and len(list((tmp_path / "search").iterdir())) == 3 * 3 + 3
    number = len(done)
    assert reproduce(dataclasses.replace(CLAIM, knobs=knobs), None, tmp_path)["search"] == result["search"]
    assert len(done) == number
    gain["of"] = lambda seed: 1.0
    assert "search" not in reproduce(dataclasses.replace(CLAIM, knobs=knobs), None, tmp_path / "supported")
    with pytest.raises(InputError, match="temperature"):
        reproduce(dataclasses.replace(CLAIM, knobs=({"temperature": -1.0},)), None, tmp_path / "refused")
    assert not (tmp_path / "refused" / "runs").exists()


@pytest.mark.parametrize("name", [name for name, claim in claims().items() if claim.knobs])
def test_knobs_are_options_that_work_with_whatever_was_tuned(name, tmp_path):
    claim = get(name)
    label = claim.checks[0].arm
    for knob in claim.knobs:
        for candidate in range(claim.candidates):
            recipe = claim.trying(label, candidate, knob, 0, tmp_path)
            assert knob.items() <= recipe.options.items() and recipe.eval_split == "validation"
            recipe.build_method()


def test_a_difference_is_told_with_its_interval_if_it_has_one():
    check = {"difference": 0.04127, "interval": [0.0384, 0.04414], "metric": "accuracy"}
    assert difference_told(check) == "+0.0413 [+0.0384, +0.0441] accuracy"
    assert difference_told(check | {"interval": [None, None]}) == "+0.0413 accuracy"
    level = {"difference": -3.7e-17, "interval": [-0.02939, 0.02939]}
    assert difference_told(check | level) == "+0 [-0.0294, +0.0294] accuracy"


def test_an_open_check_says_how_many_seeds_would_decide_it():
    check = {"verdict": "inconclusive", "arm": "a", "other": "b", "metric": "m", "threshold": 0.0}
    result = {"arms": {"a": {"values": {"m": [1.0, 3.0, 2.0]}}, "b": {"values": {"m": [1.0, 1.0, 1.0]}}}}
    assert verdict_told(result, check) == "inconclusive; about 14 seeds would decide"  # 3.7 / √14 < 1
    assert verdict_told(result, check | {"verdict": "supported"}) == "supported"
    level = {"arms": {"a": {"values": {"m": [1.0, 3.0, 2.0]}}, "b": {"values": {"m": [2.0, 2.0, 2.0]}}}}
    assert verdict_told(level, check) == "inconclusive; more than 10,000 seeds would decide"
    once = {"arms": {"a": {"values": {"m": [1.0]}}, "b": {"values": {"m": [2.0]}}}}
    assert verdict_told(once, check) == "inconclusive"
