"""Paper 6, LELP, as a run: what is saved, cached and live targets, hidden labels, other splits, refusals."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from engine_cases import weights
from understudy import InputError, distill
from understudy.data import Batch, collate_images, load_images
from understudy.losses.subclasses import marginal_logits
from understudy.methods.lelp import LELP
from understudy.models import ClassifierAdapter, SubclassHead, find_head, load_classifier, replace_head
from understudy.models.classifier_heads import linear_readout, sum_subclasses
from understudy.models.small import build_small, load_small, save_small
from understudy.synthetic.images import IMAGES
from understudy.teachers import LocalTeacher
from understudy.training import DistillationTrainer, SetupContext, TrainModule
from understudy.training.arguments import training_arguments
from understudy.training.shapes import Shapes

BASE = {
    "task": "image_classification",
    "method": "lelp",
    "data": {"name": "subclusters", "limit": 60, "teacher_limit": 1000, "unlabelled": True},
    "teacher": {"model": "mlp:32,24", "train": {"max_steps": 150, "learning_rate": 5e-3}},
    "student": "mlp:12",
    "trainer": {"max_steps": 60, "per_device_train_batch_size": 30, "learning_rate": 1e-2, "save_strategy": "no"},
}
LINEAR = {"subclasses": 3, "fit_on": "teacher_train"}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run with its teacher."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    result = distill({**BASE, "options": {**LINEAR, "cache": False}, "output": str(folder)})
    return folder, result


@pytest.fixture
def run(taught, tmp_path):
    """Runs with that teacher."""

    def start(name="run", **keys):
        shutil.copytree(taught[0] / "teacher", tmp_path / name / "teacher")
        return distill({**BASE, "output": str(tmp_path / name), **keys})

    return start


def test_it_learns_without_labels_and_leaves_an_ordinary_model(taught):
    from understudy.runs.check import evaluate_run

    folder, result = taught
    assert result.metrics["accuracy"] > 0.75 and "merge_agreement" not in result.metrics  # chance is 0.5
    assert evaluate_run(folder)["metrics"] == result.metrics
    model = load_classifier(str(folder / "student"), classes=2, input_shape=(1, 1, 20))
    assert isinstance(model.head, SubclassHead) and model(torch.rand(4, 1, 1, 20)).shape == (4, 2)
    assert load_file(folder / "student" / "model.safetensors")["head.weight"].shape == (6, 12)
    again = distill({**BASE, "options": {**LINEAR, "cache": False}, "output": str(folder)})
    assert again.metrics == result.metrics and isinstance(again.student.head, SubclassHead)


def test_validation_judges_by_class_not_by_the_largest_output(run):
    trainer = {**BASE["trainer"], "eval_strategy": "steps", "eval_steps": 30}
    result = run(options=LINEAR, trainer=trainer, eval_split="validation")
    last = json.loads((result.folder / "validation.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 60 and last["accuracy"] > 0.75
    for name in ("accuracy", "nll", "ece"):  # of the saved student, whose head sums over subclasses
        assert last[name] == pytest.approx(result.metrics[name], abs=1e-5)


def test_cached_targets_are_the_live_ones_and_the_teacher_rests(taught, run):
    folder, live = taught
    cached = run(options={**LINEAR, "cache": True})
    a, b = weights(folder), weights(cached.folder)
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    costs = [json.loads((f / "evaluation.json").read_text())["cost"]["forwards"] for f in (folder, cached.folder)]
    assert costs[0]["teacher"] > 0 and not costs[1].get("teacher")
    assert live.metrics["accuracy"] == pytest.approx(cached.metrics["accuracy"], abs=0.01)


@pytest.mark.parametrize("split,number", [("kmeans", 3), ("kmeans_soft", 3), ("random", 2), ("oracle", 5)])
def test_other_splits_train(split, number, run):
    result = run(options={"split": split, "subclasses": number})
    assert result.metrics["accuracy"] > 0.7
    assert load_small(result.folder / "student").head.subclasses == number


def test_with_labels_and_a_layer_of_ones_own(run):
    data = {**BASE["data"], "unlabelled": False}
    options = {**LINEAR, "alpha": 0.5, "teacher_layer": "body.2", "null_space": False}
    result = run(options=options, data=data)
    assert result.metrics["accuracy"] > 0.75
    assert '"ce"' in (result.folder / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match="needs labels"):
        run("hidden", options={**LINEAR, "alpha": 0.5})
    with pytest.raises(InputError, match="needs labels"):
        run("sft", method="sft", options={})


def small_resnet():
    names = {0: "odd", 1: "even"}
    config = ResNetConfig(
        num_channels=1, embedding_size=6, hidden_sizes=[6, 10], depths=[1, 1], layer_type="basic", id2label=names
    )
    config.label2id = {v: k for k, v in names.items()}
    return ResNetForImageClassification(config)


@pytest.mark.slow
def test_an_auto_model_gets_a_linear_head_and_says_how_near_it_is(tmp_path):
    small_resnet().save_pretrained(tmp_path / "start")
    values = {
        **BASE,
        "data": {"name": "digits", "modulo": 2, "limit": 300},
        "teacher": {"model": "mlp:32", "train": {"max_steps": 200, "learning_rate": 5e-3}},
        "student": str(tmp_path / "start"),
        "output": str(tmp_path / "run"),
    }
    with pytest.raises(InputError, match="head='exact' is for the small networks"):
        distill(values | {"options": {"head": "exact"}, "output": str(tmp_path / "exact")})
    result = distill(values)
    assert 0.9 < result.metrics["merge_agreement"] <= 1 and result.metrics["accuracy"] > 0.7
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "student").eval()
    assert saved.config.num_labels == 2 and saved.config.id2label == {0: "odd", 1: "even"}
    pixels = torch.rand(3, 1, 8, 8)
    assert torch.equal(saved(pixels).logits, result.student.eval()(pixels).logits)


def test_the_exact_head_is_the_marginal_of_the_wide_one(tmp_path):
    for name in ("mlp:7", "convnet:4", "resnet8:4"):
        rows = ClassifierAdapter(build_small(name, 3, (1, 8, 8)), 3).eval()
        before = torch.get_rng_state()
        wide = replace_head(rows, 12, seed=3)
        assert torch.equal(before, torch.get_rng_state()) and find_head(rows) is wide and rows.classes == 12
        batch = Batch({"pixel_values": torch.rand(5, 1, 8, 8)}, torch.zeros(5).long(), torch.arange(5))
        expected = marginal_logits(rows(batch).signal.logits, 3)
        sum_subclasses(rows, 3)
        torch.testing.assert_close(rows(batch).signal.logits, expected)
        assert rows(batch, features=True).features.shape[1] == wide.in_features
        save_small(rows.model, tmp_path / name[:3])
        torch.testing.assert_close(load_small(tmp_path / name[:3]).eval()(batch.inputs["pixel_values"]), expected)
        replace_head(rows, 3)  # such a student can be trained again by any method
        assert rows(batch).signal.logits.shape == (5, 3) and "subclasses" not in rows.model.understudy


def test_the_linear_head_recovers_one():
    torch.manual_seed(2)
    x, truth = torch.randn(200, 6).double() * 3 + 1, torch.nn.Linear(6, 3).double()
    found = linear_readout(x, torch.softmax(truth(x), -1), ridge=0.0)
    torch.testing.assert_close(torch.softmax(found(x), -1), torch.softmax(truth(x), -1), atol=1e-5, rtol=1e-4)
    bare = linear_readout(x, torch.softmax(truth(x), -1), bias=False)
    assert bare.bias is None and torch.equal(
        bare.weight, linear_readout(x, torch.softmax(truth(x), -1), bias=False).weight
    )


def stage_of(method, tmp_path, teacher=None, student=None, key="k"):
    torch.manual_seed(1)
    items = load_images({"name": "subclusters", "limit": 40}, IMAGES).train
    student = ClassifierAdapter(student or build_small("mlp:8", 2, (1, 1, 20)).double(), 2)
    teacher = ClassifierAdapter(teacher or build_small("mlp:16", 2, (1, 1, 20)).double(), 2)
    splits = {"train": items, "validation": items, "test": items}
    return SetupContext(student, teacher, splits, collate_images, 2, tmp_path, key)


@pytest.mark.parametrize("split", ["linear", "random"])
def test_any_split_of_a_batch_gives_the_same_update_and_reaches_the_student_alone(split, tmp_path):
    method, results = LELP(subclasses=4, alpha=0.3, tau=1.5, split=split), []
    for micro, accumulate in ((12, 1), (4, 3), (1, 12)):
        context = stage_of(method, tmp_path)
        student = method.student(context.student, context)
        values = {"max_steps": 2, "per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate}
        fixed = {"save_strategy": "no", "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant"}
        args = training_arguments({**values, **fixed, "max_grad_norm": 0.0}, tmp_path / "t", 0)
        train_module = TrainModule(student, method, Shapes(2), 2, tables=method.setup(context)).double()
        before = [p.clone() for p in train_module.parameters()]
        local = LocalTeacher(context.teacher_model, "teacher", features=True)
        items = [context.splits["train"][i] for i in range(12)]
        DistillationTrainer(train_module, args, items, collate_images, teacher=local).train()
        assert all(not torch.equal(a, b) for a, b in zip(before, train_module.parameters(), strict=True))
        assert all(p.grad is None for p in context.teacher_model.parameters())
        results.append(torch.cat([p.detach().flatten() for p in train_module.parameters()]))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=0, atol=1e-6)


def test_a_stored_split_is_used_for_its_own_settings_alone(tmp_path, monkeypatch):
    method = LELP(subclasses=4)
    first = method.setup(stage_of(method, tmp_path))
    monkeypatch.setattr(LELP, "_fit", lambda self, context: pytest.fail("computed again"))
    assert torch.equal(method.setup(stage_of(method, tmp_path))["directions"], first["directions"])
    monkeypatch.undo()
    for other, key in ((LELP(subclasses=4, rotation_seed=1), "k"), (method, "another teacher")):
        other.setup(stage_of(other, tmp_path, key=key))
    files = sorted(tmp_path.glob("lelp-*"))
    assert len(files) == 3
    for file in files[1:]:
        shutil.copy(files[0], file)
    refused = 0
    for other, key in ((method, "k"), (LELP(subclasses=4, rotation_seed=1), "k"), (method, "another teacher")):
        try:
            other.setup(stage_of(other, tmp_path, key=key))
        except InputError as error:
            assert "delete lelp-*" in str(error)
            refused += 1
    assert refused == 2


def test_heads_of_teachers(tmp_path, caplog):
    """One sigmoid output is two classes; a head that is not linear, or sees everything, or is not there."""
    flat = [torch.nn.Flatten(), torch.nn.Linear(20, 9), torch.nn.Tanh()]
    single = torch.nn.Sequential(*flat, torch.nn.Linear(9, 1)).double()
    double = torch.nn.Sequential(*flat, torch.nn.Linear(9, 2)).double()
    with torch.no_grad():
        for name in ("weight", "bias"):
            old, new = getattr(single[3], name), getattr(double[3], name)
            new.copy_(torch.cat([torch.zeros_like(old), old]))
    method = LELP(subclasses=3)
    found = [method.setup(stage_of(method, tmp_path / str(i), t)) for i, t in enumerate((single, double))]
    torch.testing.assert_close(found[0]["projector"], found[1]["projector"])
    torch.testing.assert_close(found[0]["directions"], found[1]["directions"])
    curved = torch.nn.Sequential(*double, torch.nn.Tanh())
    with pytest.raises(InputError, match=r"set options.null_space=false"):
        method.setup(stage_of(method, tmp_path / "curved", curved))
    bare = LELP(subclasses=3, null_space=False)
    assert "projector" not in bare.setup(stage_of(bare, tmp_path / "curved", curved))
    headless = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(20, 9), torch.nn.Threshold(0, 0)).double()
    headless.append(torch.nn.AdaptiveAvgPool1d(2))
    with pytest.raises(InputError, match="no linear head"):
        method.setup(stage_of(method, tmp_path / "headless", headless))
    inner = LELP(subclasses=3, null_space=False, teacher_layer="1")
    assert inner.setup(stage_of(inner, tmp_path / "headless", headless))["directions"].shape == (2, 3, 9)
    narrow = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(20, 2), torch.nn.Linear(2, 2)).double()
    one = LELP(subclasses=1)
    assert "projector" not in one.setup(stage_of(one, tmp_path / "narrow", narrow))
    assert "sees every direction" in caplog.text


def test_a_broken_embedding_is_named(tmp_path):
    context = stage_of(LELP(), tmp_path)
    context.splits["train"].pixels[3] = float("nan")
    with pytest.raises(InputError, match=f"example {int(context.splits['train'].ids[3])} is not finite"):
        LELP().setup(context)


def test_subclasses_that_cannot_be(run):
    for options, says in (
        ({"subclasses": 30}, r"30 subclasses need as many directions and the embedding leaves 22"),
        ({"subclasses": 0}, "subclasses = 0"),
        ({"beta": 0}, "beta = 0"),
        ({"tau": -1}, "tau = -1"),
        ({"teacher_layer": "body.2"}, "set null_space=false"),
        ({"split": "oracle", "subclasses": 3}, "set options.subclasses=5"),
        ({"teacher_layer": "body.22", "null_space": False}, "no layer 'body.22'"),
    ):
        with pytest.raises(InputError, match=says):
            run(str(options), options=options)


def test_coarser_and_hidden_labels():
    fine = load_images({"name": "digits", "limit": 50})
    odd = load_images({"name": "digits", "limit": 50, "modulo": 2, "unlabelled": True})
    assert odd.classes == ["0", "1"] and odd.train.labels.eq(-1).all() and odd.hash != fine.hash
    assert torch.equal(odd.train.parts, torch.stack([fine.train.labels % 2, fine.train.labels], 1))
    assert torch.equal(odd.test.labels, fine.test.labels % 2) and odd.teacher_train.labels.min() == 0
    halves = load_images({"name": "digits", "label_map": [0] * 5 + [1] * 5})
    assert torch.equal(halves.test.labels, (fine.test.labels > 4).long())
    worlds = [load_images({"name": "subclusters", "seed": s}, IMAGES) for s in (0, 0, 1)]
    assert worlds[0].hash == worlds[1].hash != worlds[2].hash and worlds[0].train.parts[:, 1].max() == 9
    for spec, says in (
        ({"modulo": 1}, "data.modulo is 1"),
        ({"modulo": 11}, "data.modulo is 11"),
        ({"label_map": [0, 1]}, "for each of the 10 classes"),
        ({"label_map": [0] * 5 + [2] * 5}, "without gaps"),
        ({"label_map": [0] * 10, "modulo": 2}, "give one"),
    ):
        with pytest.raises(InputError, match=says):
            load_images({"name": "digits", **spec})
