"""Studies: gain and fidelity as two axes, the paper's tests on its published table, grids, folders of runs, bad input."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from engine_cases import DIGITS
from golden_vectors import golden
from understudy import InputError, compare, distill, losses, study
from understudy.cli.main import main
from understudy.data import Batch
from understudy.evaluation.fidelity import answer_agreement
from understudy.files import digest, read_json, write_json
from understudy.methods import get as get_method
from understudy.reporting.study import Record, answers, assemble, best_temperature, notes, points, rows
from understudy.runs.folder import LOCK
from understudy.runs.measured import family_of, label_of
from understudy.runs.recipe import make
from understudy.runs.study import EXAMPLE
from understudy.targets import Dense
from understudy.tasks import get


def record(score, method="kd", student="s", temperature=None, seed=0, **keys):
    given = {"data": "d", "teacher": "t", "folder": f"{method}-{student}-{temperature}-{seed}"}
    return Record(method=method, student=student, temperature=temperature, seed=seed, score=score, **{**given, **keys})


def test_a_student_may_be_better_and_agree_less():
    """Tables of predictions: B is right where the teacher is wrong, A copies the teacher's mistakes."""
    gold = ["a"] * 10
    teacher = ["a"] * 6 + ["b"] * 4
    tables = {
        "A": ["a"] * 6 + ["b"] * 4,
        "B": ["a"] * 5 + ["c"] + ["a"] * 4,
        "sft": ["a"] * 5 + ["c"] * 1 + ["b"] * 3 + ["c"],
    }
    records = [
        record(answer_agreement(said, gold), name, agreement=answer_agreement(said, teacher))
        for name, said in tables.items()
    ]
    found = assemble(records, baseline="sft", metric="accuracy")
    a, b = found["points"]
    assert (a["score"], b["score"]) == (0.6, 0.9) and (a["agreement"], b["agreement"]) == (1.0, 0.5)
    assert (a["gain_rank"], b["gain_rank"]) == (2, 1) and (a["agreement_rank"], b["agreement_rank"]) == (1, 2)
    assert found["gains_with_less_agreement"] == [1, 2]  # B against 0.8 of the student trained alone
    assert any(line.startswith("1 of 2 points gain and yet agree less") for line in notes(found))
    assert [row[-2:] for row in rows(found)] == [["2", "1"], ["1", "2"]]


@pytest.mark.golden
def test_the_published_table_through_the_whole_study():
    g = golden("14-generalization-fidelity")
    if "paper_math_improvement" not in g:
        pytest.skip("only the public file holds the published table")
    records = []
    for i, gain in enumerate(g["paper_math_improvement"].tolist()):
        facts = {
            "student_size": float(g["paper_math_size"][i]),
            "teacher_score": float(g["paper_math_teacher_score"][i]),
        }
        own = {"student": f"s{i}", "teacher": f"t{i}"}
        records += [record(gain, f"m{int(g['paper_math_method'][i])}", **own, **facts), record(0.0, "sft", **own)]
    found = assemble(records, baseline="sft", metric="accuracy")["best_temperature"]
    for test, name in (
        (found["gains"], "ttest"),
        (found["anova"], "anova"),
        (found["spearman"]["student_size"], "spearman"),
        (found["spearman"]["teacher_score"], "spearman_teacher"),
    ):
        assert [test["statistic"], test["p"]] == pytest.approx(g[f"paper_math_{name}"].tolist(), rel=1e-9)
    assert found["spearman"]["agreement"]["reason"] == "no run has agreement with the teacher"
    said = {row[0]: row[-1] for row in answers(found, ["agreement", "kl"])}
    assert said["Is the student better than alone?"] == "yes" and said["Do the methods differ?"] == "not shown"
    assert said["Do gains go with the student's size?"] == "larger gains where it is smaller"
    assert said["Do gains go with the teacher's score?"] == "not shown"


def test_temperatures_are_maximised_over_and_also_held():
    draw = random.Random(1)
    records = [record(0.5, "sft", student=f"s{i}") for i in range(4)]
    records += [record(0.5 + draw.random(), "kd", f"s{i}", t) for i in range(4) for t in (1.0, 2.0)]
    records += [record(0.5 + draw.random(), "dist", f"s{i}") for i in range(4)]
    found = assemble(records, baseline="sft", metric="accuracy")
    best = best_temperature(found["points"])
    assert len(found["points"]) == 12 and len(best) == 8
    for p in best:
        same = [q["gain"] for q in found["points"] if (q["student"], q["method"]) == (p["student"], p["method"])]
        assert p["gain"] == max(same)
    assert set(found["fixed_temperature"]) == {"1", "2"} and found["best_temperature"]["gains"]["n"] == 8
    held = found["fixed_temperature"]["1"]["gains"]
    assert held["n"] == 8 and held["statistic"] < found["best_temperature"]["gains"]["statistic"]
    assert any("optimistic" in line for line in notes(found))
    json.dumps(found, allow_nan=False)


def test_gains_are_paired_over_seeds_and_signed_by_the_metric():
    records = [
        record(s, m, seed=i) for m, scores in {"sft": (3, 4), "kd": (1, 3)}.items() for i, s in enumerate(scores)
    ]
    (up,), (down,) = points(records, "sft"), points(records, "sft", higher_is_better=False)
    assert up["gain"] == -1.5 and down["gain"] == 1.5 and down["seeds"] == 2
    assert down["gain_interval"] == [-x for x in up["gain_interval"][::-1]]
    # A baseline beside another teacher serves, but what it agrees with is another matter.
    other = [record(0.5, "sft", teacher="u", agreement=0.9), record(0.6, agreement=0.7)]
    (point,) = points(other, "sft")
    assert point["gain"] == pytest.approx(0.1) and point["agreement_alone"] is None


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([record(0.5, "sft")], "Every run is of 'sft'"),
        (
            [record(0.5, "sft", student="s"), record(0.5, student="r")],
            "no run of 'sft' with student r, data d and seed 0",
        ),
        ([record(0.5, "sft"), record(0.5, seed=1)], "seed 1 to measure its gain"),
        ([record(0.5, "sft"), record(0.5), record(0.6)], "have the same data, teacher, student, method"),
        ([record(0.5, "sft", temperature=t) for t in (1.0, 2.0)] + [record(0.5)], "'sft' has several temperatures"),
        ([record(0.5, "sft"), record(float("nan"))] + [record(0.1, student="s", method=m) for m in "ab"], "is nan"),
    ],
)
def test_runs_that_cannot_be_compared_are_one_line(records, says):
    with pytest.raises(InputError, match=says) as error:
        assemble(records, baseline="sft", metric="accuracy")
    assert "\n" not in str(error.value)


def test_methods_are_called_by_what_they_do():
    assert label_of({"method": "kd", "options": {"temperature": 4.0, "divergence": "reverse_kl"}}) == "reverse_kl"
    sampled = {"method": "kd", "options": {"divergence": "jsd", "ce_weight": 0}, "on_policy": {"fraction": 0.5}}
    assert label_of(sampled) == "jsd ce_weight=0 on-policy"
    assert family_of("hot", {"method": "kd", "options": {"temperature": 4.0}}) == "kd"
    assert family_of("gkd", sampled) == "gkd"


TRAINER = {"max_steps": 4, "per_device_train_batch_size": 16, "save_strategy": "no"}
TEACHER = {"model": "mlp:8", "train": {"max_steps": 2}}


def grid(folder, **keys):
    shared = {"task": DIGITS["task"], "data": DIGITS["data"], "trainer": TRAINER, "output": str(folder)}
    return {**shared, "teachers": {"taught": TEACHER}, "students": ["mlp:4", "mlp:6"], "temperatures": [1, 4], **keys}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid") / "study"
    return study(grid(folder), 1, workers=1)


def stamps(folder):
    return {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file() and "student" in f.parts}


@pytest.mark.slow
def test_a_grid_is_trained_once_and_resumes(done, tmp_path):
    found, folder = done.data, done.folder
    assert {(p["teacher"], p["student"], p["method"], p["temperature"]) for p in done.table} == {
        ("taught", s, "kd", tau) for s in ("mlp:4", "mlp:6") for tau in (1.0, 4.0)
    }
    assert found["baseline"] == "sft" and len(found["runs"]) == 6 and found["notes"] == []
    assert {p["student_size"] for p in done.table} == {64 * 4 + 4 + 50, 64 * 6 + 6 + 70}
    assert all(
        p[k] is not None for p in done.table for k in ("agreement", "agreement_alone", "fidelity", "teacher_score")
    )
    assert len(list(folder.rglob("teacher/student"))) == 1  # trained once, not once a pair
    assert read_json(folder / "study.json") == json.loads(json.dumps(found))
    html = (folder / "report.html").read_text()
    assert "Gain by agreement" in html and "Tests, with τ = 4" in html
    before = stamps(folder)
    (folder / "study.json").unlink()
    next(folder.glob("runs/*/comparison.json")).unlink()
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(grid("elsewhere", students=["mlp:4"])))
    words = [str(tmp_path / "study.yaml"), "students=[mlp:4, mlp:6]", "--output", str(folder), "--seeds", "1"]
    with pytest.raises(SystemExit) as stop:
        main(["study", *words])
    assert stop.value.code == 0 and stamps(folder) == before
    assert read_json(folder / "study.json") == json.loads(json.dumps(found))


@pytest.mark.slow
def test_folders_of_runs_are_studied_as_the_grid_is(done, tmp_path, monkeypatch, capsys):
    again = study([done.folder], output=tmp_path / "again")
    assert again.table == done.table
    cells = sorted(done.folder.glob("runs/*"))
    parts = study(cells, output=tmp_path / "parts")
    strip = lambda table: sorted((p["student"], p["temperature"], p["gain"], p["agreement"]) for p in table)  # noqa: E731
    assert strip(parts.table) == strip(done.table) and {p["method"] for p in parts.table} == {"kd"}
    monkeypatch.chdir(tmp_path)
    words = ["study", *map(str, sorted(cells[0].glob("runs/*"))), "--output", "runs", "--json", "out.json"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr().out
    assert (
        stop.value.code == 0 and "Do gains go with the student's size?" in said and "no test: 1 of at least 3" in said
    )
    assert len(json.loads((tmp_path / "out.json").read_text())["points"]) == 2
    (tmp_path / "runs" / "report.html").unlink()
    with pytest.raises(SystemExit):
        main(["report", "runs"])
    assert (tmp_path / "runs" / "report.html").is_file()


def test_a_run_that_was_not_compared_with_its_teacher_is_evaluated_again(tmp_path, monkeypatch):
    recipe = {**DIGITS, "teacher": TEACHER, "trainer": TRAINER, "output": str(tmp_path / "c")}
    found = compare(recipe, ["sft", "kd"], 1, workers=1)
    wanted = {}
    for run in found.data["runs"]:
        folder = tmp_path / "c" / run["folder"]
        evaluation, facts = read_json(folder / "evaluation.json"), read_json(folder / "run.json")
        wanted[run["method"]] = evaluation["metrics"].pop("agreement"), evaluation["metrics"].pop("kl")
        write_json(folder / "evaluation.json", evaluation)
        facts["files"]["evaluation.json"] = digest(folder / "evaluation.json")
        write_json(folder / "run.json", facts)
    first = study(tmp_path / "c", output=tmp_path / "s")
    (point,) = first.table
    assert (point["agreement"], point["fidelity"]) == pytest.approx(wanted["kd"])
    assert point["agreement_alone"] == pytest.approx(wanted["sft"][0])
    monkeypatch.setattr("understudy.runs.measured.evaluate_run", None)  # kept, not computed again
    assert study(tmp_path / "c", output=tmp_path / "s").data == first.data


def test_noise_on_the_teacher_depends_on_step_and_example_alone():
    method, state = get_method("kd")(teacher_noise=2.0, ce_weight=0), SimpleNamespace(step=3, seed=1)
    sides = [torch.randn(7, 5).double() for _ in range(2)]
    labels = torch.tensor([[-100, 1, 2, -100], [-100, -100, 3, 4], [-100, 0, 1, 2]])

    def values(examples, step=3):
        rows = torch.isin(torch.tensor([0, 0, 1, 1, 2, 2, 2]), torch.tensor(examples))
        batch = Batch({}, labels[examples], torch.tensor([10, 11, 12])[examples])
        student, teacher = (SimpleNamespace(signal=Dense(side[rows])) for side in sides)
        state.step = step
        return method.loss(student, teacher, batch, state)["kd"].values

    whole = values([0, 1, 2])
    torch.testing.assert_close(torch.cat([values([0]), values([1, 2])]), whole, rtol=1e-12, atol=0)
    assert not torch.isclose(values([0, 1, 2], step=4), whole).any()
    clean = get_method("kd")(teacher_noise=0.0, ce_weight=0)
    assert not torch.isclose(whole, losses.forward_kl(*sides, temperature=2.0, tau_squared=True)).any()
    method = clean
    assert torch.equal(values([0, 1, 2]), losses.forward_kl(*sides, temperature=2.0, tau_squared=True))
    for bad in (-1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="teacher_noise"):
            make({"method": "kd", "options": {"teacher_noise": bad}})


LLAMA = "llama:hidden=16,layers=1,heads=2"


def test_language_models_and_reasoning(tmp_path):
    """Answers and rationales are compared where there are some; a model agrees with itself."""
    data = {"size": 64, "eval_limit": 6, "samples": 0, "digits": [3, 4], "max_new_tokens": 8}
    base = {
        "task": "reasoning",
        "data": data,
        "trainer": {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no"},
        "teachers": {"big": {"model": LLAMA, "train": {"max_steps": 2, "per_device_train_batch_size": 4}}},
        "students": [LLAMA],
        "output": str(tmp_path),
    }
    found = study(base, 1, workers=1)
    (point,) = found.table
    assert found.data["measures"] == ["answer_agreement", "rationale_bleu"] and 0 <= point["agreement"] <= 1
    assert 0 <= point["fidelity"] <= 100 and point["teacher_score"] is not None
    task, recipe = get("reasoning"), make({k: base[k] for k in ("task", "data", "trainer")} | {"student": LLAMA})
    prepared = task.prepare(recipe)
    model = task.model(recipe.student, prepared)
    loader = DataLoader(prepared.test, batch_size=6, collate_fn=prepared.collate)
    metrics = task.evaluate(model, model, loader)["metrics"]
    assert metrics["answer_agreement"] == 1 and metrics["rationale_bleu"] == pytest.approx(100)


def test_the_example_of_the_page_is_a_grid(tmp_path, monkeypatch):
    class Begun(Exception):
        pass

    def held(*given, **how):
        raise Begun

    monkeypatch.setattr("understudy.runs.study.held", held)
    (tmp_path / "study.yaml").write_text(EXAMPLE)
    with pytest.raises(Begun):
        study(tmp_path / "study.yaml")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"student": "mlp:4"}, "names student and students"),
        ({"studens": ["mlp:4"]}, "Unknown recipe key: 'studens'"),
        ({"teachers": 3}, "Bad study key: teachers"),
        ({"teachers": {"a": {"model": "mlp:4", "trian": {}}}}, "Unknown study key: 'teachers.a.trian'"),
        ({"temperatures": [0]}, "temperature = 0"),
        ({"temperatures": [float("nan")]}, "Bad study key: temperatures"),
        ({"temperatures": 4}, "Bad study key: temperatures"),
        ({"baseline": "none"}, "Baseline 'none' is not among the arms kd"),
        ({"arms": {"kd": {"method": "kdd"}}}, "Unknown method 'kdd'"),
        ({"arms": {"kd": {"options": {"temprature": 1}}}}, "Did you mean 'temperature'"),
        ({"arms": 3}, "arms is 3"),
        ({"students": ["mlp:4", "mlp 4", "mlp/4"]}, "Pairs .* would share the folder"),
        ({"data": {"name": "digits", "limits": 3}}, "limits"),
    ],
)
def test_a_bad_grid_is_one_line_before_anything_runs(tmp_path, keys, says):
    with pytest.raises(InputError, match=says) as error:
        study(grid(tmp_path / "out", **keys), 1)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_bad_folders_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds neither a run"):
        study([tmp_path / "empty"], output=tmp_path / "s")
    with pytest.raises(InputError, match="needs a folder of its own"):
        study([tmp_path / "empty"])
    with pytest.raises(InputError, match=r"leave out seed=1"):
        study([tmp_path / "empty"], overrides=["seed=1"], output=tmp_path / "s")
    with pytest.raises(InputError, match="does not exist"):
        study(tmp_path / "none.yaml")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"status": "interrupted"}))
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump({**DIGITS, "output": "x"}))
    with pytest.raises(InputError, match="holds no finished run"):
        study([tmp_path / "run"], output=tmp_path / "s")
    one = distill({**DIGITS, "method": "sft", "teacher": "none", "trainer": TRAINER, "output": str(tmp_path / "one")})
    with pytest.raises(InputError, match="Every run is of 'sft'"):
        study([one.folder], output=tmp_path / "s")


def test_one_run_and_several_do_not_mix_in_a_folder(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "run.json").write_text('{"format": 1, "status": "done"}')
    (tmp_path / "one" / "report.html").write_text("of the run")
    with pytest.raises(InputError, match=r"holds a single run \(run\.json\), and several runs would mix"):
        compare({**DIGITS, "output": str(tmp_path / "one")}, ["sft"], 1)
    assert (tmp_path / "one" / "report.html").read_text() == "of the run" and not (tmp_path / "one" / "runs").exists()
    for name in ("comparison.json", "study.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        (folder / LOCK).touch()
        with pytest.raises(InputError, match=rf"holds a comparison or study \({name}\), and one run would mix"):
            distill(**DIGITS, method="sft", output=str(folder))
        assert {p.name for p in folder.iterdir()} == {name, LOCK}
    (tmp_path / "cut" / "runs").mkdir(parents=True)  # of a comparison that was killed before its first report
    (tmp_path / "cut" / LOCK).touch()
    with pytest.raises(InputError, match=r"holds a comparison or study \(runs\), and one run would mix"):
        distill(**DIGITS, method="sft", output=str(tmp_path / "cut"))
