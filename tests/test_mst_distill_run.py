"""Paper 18, MST-Distill, as a method: what each part trains, its limits, layers that are masked, runs."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from engine_cases import killed_run, weights
from golden_vectors import close
from understudy import InputError, distill
from understudy.losses import forward_kl
from understudy.models import ClassifierAdapter
from understudy.models.masks import mask_layers
from understudy.models.small import build_small
from understudy.runs.recipe import make
from understudy.runs.teachers import load_model
from understudy.tasks import get
from understudy.teachers import Ensemble, LocalTeacher
from understudy.training import SetupContext, TrainModule
from understudy.training.checkpoint import load_tree
from understudy.training.reduction import Counts
from understudy.training.shapes import probe

TASK = get("multimodal_classification")
RUN = {
    "task": "multimodal_classification",
    "method": "mst-distill",
    "data": {"name": "av_digits", "limit": 128},
    "teacher": {
        "members": {
            "audio": {"model": "mlp:12,12", "options": {"reads": "audio"}},
            "both": {"model": "fusion:8,12,12"},
        }
    },
    "student": "mlp:12",
    "trainer": {"max_steps": 24, "per_device_train_batch_size": 32, "save_steps": 3, "logging_steps": 1},
    "options": {"shares": [1, 2, 3], "kd_every": 2, "balance_every": 1},
}


@pytest.fixture
def build(tmp_path):
    """A module with its phases begun by name, and a batch of 12, in float64."""

    def made(phase="", **options):
        recipe = make({**RUN, "options": options})
        prepared, method = TASK.prepare(recipe), recipe.build_method()
        torch.manual_seed(0)
        student = load_model(TASK, recipe.student, prepared)
        teacher = Ensemble({n: load_model(TASK, m, prepared) for n, m in recipe.teacher.members.items()})
        asked = LocalTeacher(teacher, "teacher")
        splits = {name: prepared.split(name) for name in ("train", "validation", "test")}
        context = SetupContext(student, teacher, splits, prepared.collate, 10, tmp_path, "key", teacher=asked)
        tables = method.setup(context)
        batch = next(context.batches("train", 12))
        shapes = probe(
            method, 10, {"student": student, "teacher": teacher}, {"student": {}, "teacher": {}}, batch, tables
        )
        shapes = dataclasses.replace(shapes, student=student, teacher=teacher)
        module = TrainModule(student, method, shapes, 10, tables=tables, context=context).double()
        trainable = {id(p) for p in module.parameters() if p.requires_grad}
        if phase:
            module.begin_phase(next(p for p in method.phases() if p.name == phase), 10, trainable)
        module.train()
        batch.inputs.update({k: v.double() for k, v in batch.inputs.items()})
        return module, batch

    return made


def terms(module, batch):
    return {
        name: term.values
        for name, term in module.method.loss(module.student(batch), None, batch, module.train_state).items()
    }


def gradients(module, parts):
    counts = Counts.total([Counts.of(b, "token_mean", {}) for b in parts], lambda v: v)
    module.zero_grad()
    for part in parts:
        sum(counts.divide(n, v) for n, v in module(part, None).losses.items()).backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def trained(found):
    return {
        name.split(".")[1] if name.startswith("own.") else "student" for name, g in found.items() if g.abs().max() > 0
    }


@pytest.mark.parametrize(
    "phase,parts", [("cotrain", {"student", "teachers"}), ("specialise", {"masks"}), ("route", {"student", "router"})]
)
def test_each_part_trains_its_modules_alone_and_a_cut_batch_gives_the_same_gradient(build, phase, parts):
    module, batch = build(phase, group=4)
    whole = gradients(module, [batch])
    assert trained(whole) == parts
    cut = gradients(module, [batch.take(torch.arange(4)), batch.take(torch.arange(4, 12))])
    assert whole.keys() == cut.keys()
    for name, gradient in whole.items():
        close(cut[name], gradient)
    few = gradients(module, [batch.take(torch.arange(8))])
    rest = {k: v.index_fill(0, torch.arange(8, 12), 1e3) for k, v in batch.inputs.items()}
    ignored = dataclasses.replace(batch, inputs=rest, labels=batch.labels.index_fill(0, torch.arange(8, 12), -100))
    for name, gradient in gradients(module, [ignored]).items():
        close(gradient, few[name])


def test_detached_cotraining_leaves_a_model_its_own_terms(build):
    module, batch = build("cotrain", detach=True)
    found = module.method.loss(module.student(batch), None, batch, module.train_state)
    teachers = [p for p in module.own["teachers"].parameters()]
    own = sum(found[n].values.sum() for n in ("student_ce", "student_kd"))
    assert not any(g.any() for g in torch.autograd.grad(own, teachers))


def test_the_router_has_no_gradient_from_kd_unless_it_is_soft(build):
    for options, moves in (({}, False), ({"router_grad": "soft"}, True)):
        module, batch = build("route", balance_weight=0.0, **options)
        found = gradients(module, [batch])
        assert ("router" in trained(found)) == moves
    module, batch = build("route", ce_weight=0.0, kd_weight=0.0, detach_router_input=True)
    assert trained(gradients(module, [batch])) == {"router"}
    module, batch = build("route", ce_weight=0.0, kd_weight=0.0)
    assert trained(gradients(module, [batch])) == {"router", "student"}


def test_all_ways_are_their_average_and_a_single_one_is_distillation(build):
    module, batch = build("route", k=4)
    found, logits = terms(module, batch)["kd"], module.student(batch).signal.logits
    ways = [mask.signal(module.own["teachers"][n], batch) for n, own in module.own["masks"].items() for mask in own]
    each = [forward_kl(logits, w.logits, temperature=4.0, tau_squared=True) for w in ways]
    close(found, sum(each) / 4)
    with torch.no_grad():
        module.own["router"][1].bias.add_(torch.randn(4).double())
    close(terms(module, batch)["kd"], found)
    module, batch = build("route", shares=(1, 0, 1))
    with torch.no_grad():
        module.own["router"][1].bias.copy_(torch.tensor([0.0, 1e3]))
    logits = [m(batch).signal.logits for m in (module.student, module.own["teachers"]["both"])]
    found = terms(module, batch)
    close(found["kd"], forward_kl(*logits, temperature=4.0, tau_squared=True))
    assert found["routed/both"].tolist() == [1.0] * 12 and found["routed/audio"].tolist() == [0.0] * 12


def test_masks_of_1_are_the_teachers_and_masks_learn_what_the_student_says(build):
    module, batch = build("specialise")
    for own in module.own["masks"].values():
        for mask in own:
            nn.init.zeros_(mask.fc.weight)
            nn.init.constant_(mask.fc.bias, 100.0)
    with torch.no_grad():
        found, student = terms(module, batch), module.student(batch).signal.logits
        for name, teacher in module.own["teachers"].items():
            wanted = forward_kl(teacher(batch).signal.logits, student, temperature=4.0, tau_squared=True)
            for mask in module.own["masks"][name]:
                close(found[f"mask/{name}.{mask.place}"], wanted)


def test_the_best_masks_return_at_the_end(build):
    module, _ = build("specialise")
    state, method, masks = module.train_state, module.method, module.own["masks"]
    method.sampling(state)
    assert state.method_state.least is None  # no epoch has ended
    method.sampling(state)
    best = {k: v.clone() for k, v in masks.state_dict().items()}
    assert state.method_state.least > 0
    state.method_state.least = 0.0  # no later loss is smaller
    for parameter in masks.parameters():
        nn.init.normal_(parameter)
    method.on_train_end(state)
    assert all(torch.equal(v, best[k]) for k, v in masks.state_dict().items())
    state.method_state.least = 1e9
    for parameter in masks.parameters():
        nn.init.normal_(parameter)
    later = {k: v.clone() for k, v in masks.state_dict().items()}
    method.on_train_end(state)
    assert all(torch.equal(v, later[k]) for k, v in masks.state_dict().items())
    assert state.method_state.least < 1e9


def test_a_mask_is_removed_also_after_an_exception(build):
    module, batch = build("route")
    teacher, mask = module.own["teachers"]["audio"], module.own["masks"]["audio"][0]
    before = teacher(batch).signal.logits
    assert not torch.equal(mask.signal(teacher, batch).logits, before)
    assert torch.equal(teacher(batch).signal.logits, before)
    short = dataclasses.replace(batch, inputs={**batch.inputs, "audio": batch.inputs["audio"][..., :3]})
    with pytest.raises(RuntimeError):
        mask.signal(teacher, short)
    assert not any(m._forward_hooks for m in teacher.modules())


def test_weights_decay_at_the_end_of_their_epochs(build):
    module, batch = build("route", kd_every=2, balance_every=1, balance_decay=0.9)
    state, seen = module.train_state, []
    for _ in range(4):
        module.method.sampling(state)
        found = module.method.loss(module.student(batch), None, batch, state)
        seen.append((found["kd"].weight, found["balance"].weight))
    assert seen == [(1.0, 1.0), (0.5, pytest.approx(0.9)), (0.5, pytest.approx(0.81)), (0.25, pytest.approx(0.729))]


# -- layers -----------------------------------------------------------------------------------------------------------


def test_the_last_layers_are_masked_unless_they_are_named(build):
    _, batch = build()
    batch.inputs["pixel_values"] = torch.randn(12, 3, 16, 16)
    found = {}
    for name, shape in (("convnet:4", (3, 16, 16)), ("resnet8:4", (3, 16, 16)), ("mlp:8,8,8", (3, 16, 16))):
        model = ClassifierAdapter(build_small(name, 10, shape), 10)
        found[name] = mask_layers("t", model, batch, 2)
    assert [s for s in found["convnet:4"].values()] == [(16, 4, 4), (16, 2, 2)]
    assert list(found["resnet8:4"]) == ["layer2", "layer3"]
    assert list(found["mlp:8,8,8"].values()) == [(8,), (8,)]
    assert list(mask_layers("t", model, batch, 2, ["body.1"])) == ["body.1"]
    with pytest.raises(InputError, match=r"no layer 'body\.11' that shows vectors or maps.*body\.1"):
        mask_layers("t", model, batch, 2, ["body.11"])
    with pytest.raises(InputError, match="shows 3 layers to mask and 4 are asked for"):
        mask_layers("t", model, batch, 4)


@pytest.mark.parametrize(
    "options,says",
    [
        ({"k": 5}, "k is 5 and there are 4 ways"),
        ({"layers": {"adio": ["body.1"]}}, "Did you mean 'audio'"),
        ({"layers_per_teacher": 3}, "shows 2 layers to mask and 3"),
        ({"shares": (1, 1, 0)}, "the last"),
        ({"mask_heads": 7}, "12 channels has no width left with 7 heads"),
    ],
)
def test_bad_options_are_told_before_training(build, options, says):
    with pytest.raises(InputError, match=says) as error:
        build(**options)
    assert "\n" not in str(error.value)


def test_a_teacher_that_is_not_here_is_refused(tmp_path):
    with pytest.raises(InputError, match="reads the teacher's own model"):
        distill({**RUN, "teacher": {"model": "mlp:4", "cache": str(tmp_path)}, "output": str(tmp_path / "run")})


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_reports_its_routes_and_leaves_an_ordinary_student(tmp_path):
    result = distill({**RUN, "output": str(tmp_path)})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["cotrain"] * 4 + ["specialise"] * 8 + ["route"] * 12
    assert {"student_kd", "teacher_both_ce"} < lines[0]["terms"].keys()
    routed = [v for k, v in lines[-1]["terms"].items() if k.startswith("routed/")]
    assert len(routed) == 4 and sum(routed) == pytest.approx(1)
    assert [line["state"]["balance_factor"] for line in lines[-12::4]] == pytest.approx([1, 0.9, 0.81])
    held = json.loads((tmp_path / "evaluation.json").read_text())
    use, by_class = held["tables"][:2]
    assert [row[0] for row in use["rows"]] == ["audio.body.1", "audio.body.3", "both.body.0", "both.body.2"]
    assert len(by_class["rows"]) == 10 and 0 <= result.metrics["routing_entropy"] <= 1
    assert set(weights(tmp_path)) == {"body.1.weight", "body.1.bias", "head.weight", "head.bias"}


def test_it_learns(tmp_path):
    trainer = {"max_steps": 300, "per_device_train_batch_size": 64, "learning_rate": 5e-3, "save_strategy": "no"}
    values = {**RUN, "data": "av_digits", "trainer": trainer, "options": {"mask_rate": 1e-3}}
    found = distill({**values, "output": str(tmp_path)}).metrics
    assert found["accuracy"] > 0.45 and found["accuracy_of_both"] > 0.4  # chance is 0.1


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_weights(tmp_path):
    whole, cut = ({**RUN, "output": str(tmp_path / way)} for way in ("whole", "cut"))
    distill(whole)
    for step, moment in ((2, "after"), (6, "after"), (7, "before"), (10, "after"), (11, "saving")):
        assert killed_run(cut, step, moment), f"the kill at step {step} did not land"
    distill(cut)
    torch.testing.assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"), rtol=0, atol=0)
    for phase in ("0-cotrain", "1-specialise", "2-route"):
        ends = [load_tree(tmp_path / way / "phases" / f"{phase}.safetensors") for way in ("cut", "whole")]
        torch.testing.assert_close(*(end["weights"] for end in ends), rtol=0, atol=0)
    before, after = (
        load_tree(tmp_path / "whole" / "phases" / f"{p}.safetensors")["weights"] for p in ("1-specialise", "2-route")
    )
    frozen = [name for name in before if name.startswith(("own.teachers", "own.masks"))]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
