"""DisWOT: the search of students by scores without training, and distillation with its similarities."""

import json
import random
from unittest.mock import Mock

import pytest
import torch
from scipy.stats import kendalltau, spearmanr

from engine_cases import CONV, killed_run, weights
from understudy import InputError, distill, search
from understudy.architectures import (
    Budget,
    Candidate,
    CandidateLog,
    Examiner,
    Range,
    Space,
    TeacherSimilarity,
    evolve,
    jacobian_score,
    rank_correlation,
    ranked,
    synflow_score,
)
from understudy.data import Batch
from understudy.methods.diswot import DisWOTKD, _left_out
from understudy.models import ClassifierAdapter, load_small, save_small
from understudy.models.small import build_small, is_small
from understudy.models.taps import called_layers, stages
from understudy.training import TrainState

SHAPE = (1, 8, 8)
WIDTHS = Space(("mlp:{a},{b}",), {"a": Range(low=1, high=100), "b": Range(low=1, high=100)})
SEARCH = {
    **{k: CONV[k] for k in ("task", "data")},
    "teacher": {"model": "convnet:4", "train": {"max_steps": 8}},
    "method": "diswot",
    "trainer": {"max_steps": 4, "per_device_train_batch_size": 16, "save_strategy": "no"},
    "options": {"images": 16, "repeats": 1, "population": 4, "tournament": 2, "evaluations": 10, "parameters": 3000},
}


def network(name, classes=10):
    torch.manual_seed(0)
    return ClassifierAdapter(build_small(name, classes, SHAPE), classes)


def a_batch(images=12, classes=10):
    torch.manual_seed(1)
    return Batch({"pixel_values": torch.rand(images, *SHAPE)}, torch.arange(images) % classes, torch.arange(images))


def judged(score, parameters=lambda name: 1):
    return lambda name: Candidate(student=name, parameters=parameters(name), fits=True, scores={"s": score(name)})


def sizes(name):
    return [int(v) for v in name.removeprefix("mlp:").split(",")]


@pytest.mark.parametrize("name", ["convnet:2", "resnet8:2", "mlp:8,4,8", "cnn:4x2k3,6x1k5,skip"])
@pytest.mark.parametrize("semantic", ["cam", "grad"])
def test_the_teacher_itself_has_the_highest_score_and_twice_the_same(name, semantic):
    score = TeacherSimilarity(network(name), a_batch(), seed=5, repeats=2, semantic=semantic)
    assert score(network(name)) == {"diswot": 0, "relation": 0, "semantic": 0}
    other = "cnn:4x1k1,6x1k3" if name.startswith("cnn") else name
    other = TeacherSimilarity(network(name), a_batch(), seed=6, repeats=2, semantic=semantic)(network(other))
    assert other["diswot"] == pytest.approx(other["relation"] + other["semantic"])


def test_scores_are_bit_identical_and_read_no_trained_weights():
    plain, trained = network("convnet:3"), network("convnet:3")
    with torch.no_grad():
        for value in trained.state_dict().values():
            value.copy_(torch.randperm(value.numel()).reshape(value.shape))
    found = [TeacherSimilarity(t, a_batch())(network("mlp:9")) for t in (plain, trained, plain)]
    assert found[0] == found[1] == found[2] and found[0]["diswot"] < 0


def test_a_deep_network_without_normalisation_is_ranked_last():
    deep = "mlp:" + ",".join(["512"] * 40)
    score = TeacherSimilarity(network("convnet:2"), a_batch())
    lost = Candidate(student=deep, parameters=1, fits=True, scores=score(network(deep)))
    assert lost.scores["diswot"] is None
    kept = Candidate(student="mlp:4", parameters=9, fits=True, scores=score(network("mlp:4")))
    assert ranked([lost, kept], "diswot") == [kept, lost]
    with pytest.raises(InputError, match="finite for none of 1 candidates"):
        evolve(Space((deep,), {}), lambda name: lost, "diswot", evaluations=1)


def test_bad_batches_classes_and_widths():
    with pytest.raises(InputError, match="the batch has 1: two or more"):
        TeacherSimilarity(network("convnet:2"), a_batch(1))
    with pytest.raises(InputError, match="the data have one"):
        TeacherSimilarity(network("convnet:2", 1), a_batch(4, 1))
    with pytest.raises(InputError, match="`grad` needs one width, `cam` does not"):
        TeacherSimilarity(network("convnet:2"), a_batch(), semantic="grad")(network("convnet:3"))
    with pytest.raises(InputError, match="choose the map that is pooled"):
        TeacherSimilarity(network("convnet:2"), a_batch())(network("circular:4,flat"))


def test_other_scores():
    """By hand on linear networks: SynFlow is a sum over paths, and equal gradients of all images correlate fully."""
    linear = build_small("mlp:2", 3, (1, 1, 2))
    with torch.no_grad():
        for name, parameter in linear.named_parameters():
            parameter.fill_(0.0 if "bias" in name else -2.0)
    paths = 2 * 2 * 3 * 4  # each layer of weights carries all 2 · 2 · 3 paths of weight 4 on an image of ones
    assert synflow_score(linear, (1, 1, 2)) == pytest.approx(torch.tensor(2.0 * paths).log().item())
    assert (linear.head.weight == -2).all()
    with torch.no_grad():
        linear.body[1].weight.copy_(torch.tensor([[2.0, 1.0], [1.0, 0.5]]))
    images = torch.rand(4, 1, 1, 2)
    expected = -sum(
        torch.log(v + 1e-5) + 1 / (v + 1e-5) for v in torch.tensor([0.0, 0.0, 0.0, 4.0], dtype=torch.float64)
    )
    assert jacobian_score(linear, images) == pytest.approx(float(expected), rel=1e-6)


def test_ties_go_to_fewer_parameters_then_to_the_name():
    found = evolve(
        Space(("mlp:{a}",), {"a": Range(low=3, high=40)}),
        judged(lambda name: 0.5, lambda n: sizes(n)[0]),
        "s",
        evaluations=99,
    )
    assert len(found) == 38 and ranked(found, "s")[0].student == "mlp:3"
    assert ranked(evolve(WIDTHS, judged(lambda name: 0.5), "s", evaluations=9), "s")[0].parameters == 1


def test_evolution_finds_what_random_draws_do_not():
    wide = Space(("mlp:{a},{b},{c},{d}",), {k: Range(low=1, high=30) for k in "abcd"})

    def score(name):
        return -sum(abs(v - best) for v, best in zip(sizes(name), (22, 3, 29, 11), strict=True))

    for seed in range(4):
        asked = []
        found = evolve(wide, lambda name: asked.append(name) or judged(score)(name), "s", evaluations=400, seed=seed)  # noqa: B023
        assert len(asked) == len(set(asked)) == len(found) <= 400
        generator = random.Random(seed)
        drawn = max(score(wide.draw(generator).name) for _ in range(400))
        assert ranked(found, "s")[0].score("s") > drawn
        again = evolve(wide, judged(score), "s", evaluations=400, seed=seed)
        assert [c.student for c in again] == [c.student for c in found]


def test_mutations_change_one_blank_or_the_template():
    space = Space(("mlp:{a}", "mlp:{a},{b}"), {"a": [1, 2, 3], "b": Range(low=4, high=8, step=2)})
    assert space.size == 3 + 9 == len({g.name for g in space.every()})
    generator = random.Random(0)
    parent = next(g for g in space.every() if len(g.values) == 2)
    for _ in range(40):
        child = space.mutate(parent, generator)
        assert child.name != parent.name
        assert child.template != parent.template or sum(child.values[k] != parent.values[k] for k in "ab") == 1
        assert child.template == parent.template or child.values["a"] == parent.values["a"]


@pytest.mark.parametrize(
    ("templates", "ranges", "says"),
    [
        ((), {}, "space of students is empty"),
        (("mlp:{width}",), {"widht": [1]}, "no values for {width}. Did you mean 'widht'"),
        (("mlp:{a}",), {"a": []}, "no values for {a}"),
        (("mlp:{a}",), {"a": [1], "b": [2]}, "Range 'b' belongs to no student"),
        (("mlp:{a",), {"a": [1]}, "cannot be read"),
        (("mlp:{0}",), {"a": [1]}, "is no blank"),
    ],
)
def test_bad_spaces(templates, ranges, says):
    with pytest.raises(InputError, match=says):
        Space(templates, ranges)


def examiner(folder, score=lambda name, model: {"s": 0.0}, key="k", **budget):
    return Examiner(10, SHAPE, Budget(**budget), CandidateLog(folder / "c.jsonl", key), score)


def test_costs_and_budgets(tmp_path):
    found = examiner(tmp_path, latency=1e6)("mlp:5")
    assert found.parameters == 64 * 5 + 5 + 5 * 10 + 10 and found.operations == 2 * (64 * 5 + 5 * 10)
    assert found.fits and found.latency > 0
    for budget, says in [
        ({"parameters": 384}, "385 parameters, more than 384"),
        ({"min_parameters": 386}, "fewer than 386"),
        ({"operations": 700}, "740 operations, more than 700"),
        ({"latency": 1e-9}, "ms, more than"),
    ]:
        one = examiner(tmp_path, key=str(budget), **budget)("mlp:5")
        assert not one.fits and says in one.why
    with pytest.raises(
        InputError, match=r"within the budget; the smallest, mlp:5: 385 parameters, more than 9\. Raise it"
    ):
        evolve(Space(("mlp:5",), {}), examiner(tmp_path, key="none", parameters=9), "s", evaluations=2)


@pytest.mark.slow
def test_a_search_that_finds_nothing_leaves_the_one_that_it_was_to_replace(tmp_path):
    data, trainer = {"name": "digits", "limit": 60}, {"max_steps": 1, "save_strategy": "no"}
    teacher = {"model": "convnet:2", "train": {"max_steps": 1}}
    recipe = {"task": "image_classification", "data": data, "teacher": teacher, "trainer": trainer}
    recipe |= {"output": str(tmp_path / "run"), "options": {"evaluations": 2, "train": 0}}
    search(recipe)
    kept = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and "logs" not in p.parts}
    with pytest.raises(InputError, match="within the budget"):
        search({**recipe, "options": {**recipe["options"], "parameters": 1}}, overwrite=True)
    assert {p: p.read_bytes() for p in kept if p.exists()} == kept and not (tmp_path / "run" / ".replaced").exists()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="down"):
        patch.setattr("understudy.methods.diswot.DisWOT.run", Mock(side_effect=RuntimeError("the server is down")))
        search({**recipe, "seed": 1}, overwrite=True)
    assert {p: p.read_bytes() for p in kept if p.exists()} == kept
    assert search({**recipe, "seed": 1}, overwrite=True).folder == tmp_path / "run"
    assert not (tmp_path / "run" / ".replaced").exists()


def test_networks_that_cannot_be_built_do_not_end_a_search(tmp_path):
    space = Space(("resnet{d}:2", "mlp:{w}", "cnn:4x1k{d}", "convnet:{w}{w}x"), {"d": [8, 9], "w": [4]})
    found = evolve(space, examiner(tmp_path), "s", evaluations=50)
    assert {c.student for c in found} == {"resnet8:2", "mlp:4", "cnn:4x1k9"}
    lost = {
        r["student"]: r["why"] for r in map(json.loads, (tmp_path / "c.jsonl").read_text().splitlines()) if r["why"]
    }
    assert (
        "6n + 2" in lost["resnet9:2"]
        and "kernel odd" in lost["cnn:4x1k8"]
        and "no small network" in lost["convnet:44x"]
    )


def test_scored_candidates_are_not_scored_again(tmp_path):
    asked = []
    first = examiner(tmp_path, lambda name, model: asked.append(name) or {"s": 0.25})
    kept = [first(f"mlp:{i}") for i in (3, 4)]
    with (tmp_path / "c.jsonl").open("a") as file:
        file.write('{"step": 2, "student": "mlp:5", "par')  # killed while it wrote
    again = examiner(tmp_path, lambda name, model: asked.append(name) or {"s": 0.5})
    assert [again(f"mlp:{i}") for i in (3, 4)] == kept and again("mlp:5").scores == {"s": 0.5}
    assert asked == ["mlp:3", "mlp:4", "mlp:5"]
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 3
    assert examiner(tmp_path, lambda name, model: {"s": 1.0}, key="other")("mlp:3").scores == {"s": 1.0}


def test_rank_correlation():
    torch.manual_seed(0)
    x = torch.randn(24).round(decimals=1).tolist()
    y = [a + b for a, b in zip(x, torch.randn(24).tolist(), strict=True)]
    found = rank_correlation(x, y)
    assert found.rho == pytest.approx(spearmanr(x, y).statistic) and found.tau == pytest.approx(
        kendalltau(x, y).statistic
    )
    assert found.low < found.rho < found.high
    assert rank_correlation(x, [3 * v for v in x])[:3] == (1, 1, 1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None and rank_correlation([1, 2], [1, 2]) is None


def test_networks_of_stages(tmp_path):
    model = build_small("cnn:4x2k3,6x1k5,6x1k1,skip", 10, SHAPE)
    pixels = torch.rand(3, *SHAPE)
    calls = called_layers(model, lambda: model(pixels))
    shapes = [next(y.shape for m, y in calls if m is stage) for stage in stages(calls)]
    assert shapes == [(3, 4, 8, 8), (3, 6, 4, 4), (3, 6, 2, 2)]
    assert [m.skip for m in model.modules() if hasattr(m, "skip")] == [False, True, False, True]
    save_small(model, tmp_path)
    torch.testing.assert_close(load_small(tmp_path).eval()(pixels), model.eval()(pixels))
    assert not is_small("cnn:4x2") and not is_small("cnn:") and not is_small("cnn:4x1k3,4")


def plain(result):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in result.ranking]


@pytest.mark.slow
def test_a_search_ranks_trains_and_distils_and_resumes(tmp_path, monkeypatch):
    options = {**SEARCH["options"], "train": 3}
    whole = search({**SEARCH, "options": options}, output=str(tmp_path / "whole"))
    assert len(whole.ranking) == 10 and whole.student == whole.ranking[0]["student"]
    values = [row["scores"]["diswot"] for row in whole.ranking]
    assert values == sorted(values, reverse=True)
    assert sum(row["trained"] is not None for row in whole.ranking) == 3
    assert all(row["parameters"] <= 3000 for row in whole.ranking)
    assert whole.metrics["scored_candidates"] == 10 and "above_median" in whole.metrics
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "Scores before training" in page and "diswot, before training" in page and whole.student in page
    assert whole.model.understudy["understudy_model"] == whole.student
    assert (tmp_path / "whole" / "teacher").is_dir() and not list((tmp_path / "whole" / "runs").glob("*/teacher"))

    add, number = CandidateLog.add, []

    def stopping(self, candidate):
        number.append(candidate.student)
        if len(number) == 6:
            raise KeyboardInterrupt
        return add(self, candidate)

    monkeypatch.setattr(CandidateLog, "add", stopping)
    with pytest.raises(KeyboardInterrupt):
        search({**SEARCH, "options": options}, output=str(tmp_path / "cut"))
    cut = search({**SEARCH, "options": options}, output=str(tmp_path / "cut"))
    assert len(number) == len(set(number)) + 1  # the one that was being written
    assert plain(cut) == plain(whole)
    ours, theirs = (weights(tmp_path / f / "winner") for f in ("whole", "cut"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_the_command(tmp_path, capsys):
    from understudy.cli.main import main

    words = ["task=image_classification", "data.limit=64", "teacher.model=convnet:2", "teacher.train={max_steps: 4}"]
    words += [
        "trainer.max_steps=4",
        'options.students=["mlp:{w}"]',
        "options.ranges={w: {low: 2, high: 40}}",
        "options.images=8",
    ]
    with pytest.raises(SystemExit) as ended:
        main(["search", *words, f"output={tmp_path}", "--parameters", "500", "--evaluations", "50", "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["student"] == found["ranking"][0]["student"] and len(found["ranking"]) == 5
    assert "34 candidates are beyond the budget" in (tmp_path / "report.html").read_text()


def test_the_report_says_what_was_left_out():
    """With `semantic=grad` that may be most of a space."""
    small, large, other = (
        Candidate(student=n, parameters=p, why=w) for n, p, w in (("a", 5, ""), ("b", 9, ""), ("c", 0, "w"))
    )
    assert _left_out([small, large]) == ["2 candidates are beyond the budget and were not scored."]
    assert _left_out([other]) == ["1 candidates cannot be scored, for example c: w"] and _left_out([]) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"distil": "dpo"}, "distil is 'dpo', which trains no classifier"),
        ({"distil": "diswot"}, "trains no classifier"),
        ({"students": ["mlp:{w}"]}, "no values for {w}"),
        ({"train": 20}, "train .20. is more than evaluations"),
        ({"ranges": {"width1": {"low": 4, "high": 2}}}, "high .2. is below low .4."),
    ],
)
def test_bad_options_are_refused_before_anything_runs(options, says, tmp_path):
    with pytest.raises(InputError, match=says):
        search({**SEARCH, "options": {**SEARCH["options"], **options}}, output=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_teacher_without_an_architecture_of_its_own_is_refused(tmp_path):
    members = {"members": {"a": "mlp:4", "b": "mlp:5"}}
    with pytest.raises(InputError, match="name one model that runs here"):
        search({**SEARCH, "teacher": members}, output=str(tmp_path / "run"))


def test_its_losses_split_between_groups_and_reach_student_alone():
    student, teacher = network("mlp:8,6").double(), network("mlp:12").double()
    method, batch = DisWOTKD(group=4), a_batch(12)
    batch.inputs["pixel_values"] = batch.inputs["pixel_values"].double()
    sides = {"student": student, "teacher": teacher}
    taps = {side: method.taps(side, model, batch) for side, model in sides.items()}
    state = TrainState(student=student, tables={"teacher_head": teacher.model.head.weight})

    def gradients(parts):
        student.zero_grad()
        for part in parts:
            ours, theirs = (model(part, taps=taps[side]) for side, model in sides.items())
            terms = method.loss(ours, theirs.detach(), part, state)
            assert all(t.values.shape == (len(part.ids),) for t in terms.values())
            sum((t.weight * t.values).sum() for t in terms.values()).backward()
        assert all(p.grad is None for p in teacher.parameters())
        return [p.grad.clone() for p in student.parameters()]

    cut = [
        Batch({"pixel_values": batch.inputs["pixel_values"][i]}, batch.labels[i], batch.ids[i])
        for i in torch.arange(12).split(4)
    ]
    for whole, parts in zip(gradients([batch]), gradients(cut), strict=True):
        assert whole.abs().max() > 0
        torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-12)


def test_it_learns_digits(tmp_path):
    teacher = {"model": "convnet:4", "train": {"max_steps": 150, "learning_rate": 1e-2}}
    trainer = {"max_steps": 150, "per_device_train_batch_size": 32, "learning_rate": 1e-2, "save_strategy": "no"}
    data = {"name": "digits", "limit": 300}
    result = distill(
        {**CONV, "method": "diswot-kd", "teacher": teacher, "data": data, "trainer": trainer}, output=str(tmp_path)
    )
    assert result.metrics["accuracy"] > 0.4  # chance is 0.1


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_weights(tmp_path):
    trainer = {**CONV["trainer"], "max_steps": 8, "save_steps": 2}
    recipe = {**CONV, "method": "diswot-kd", "trainer": trainer}
    distill({**recipe, "output": str(tmp_path / "whole")})
    assert killed_run({**recipe, "output": str(tmp_path / "cut")}, 5, "after")
    distill({**recipe, "output": str(tmp_path / "cut")})
    torch.testing.assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"), rtol=0, atol=0)
