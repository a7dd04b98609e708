"""Paper 22, KD³, as a method: what its gradient reaches, pools of images, saved students, runs."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from engine_cases import CONV, DIGITS, killed_run
from golden_vectors import close
from understudy import InputError, distill
from understudy.data import UNLABELLED, Batch, ImageSet, collate_images, load_images
from understudy.methods.kd3 import KD3
from understudy.models import ClassifierAdapter, load_classifier, normalisation
from understudy.models.heads import SubclassHead
from understudy.models.small import build_small
from understudy.models.transfer import TransferClassifier, last_map, read_by_teacher
from understudy.planning.sizes import outline_classifier
from understudy.runs.specs import ModelSpec
from understudy.synthetic.images import IMAGES
from understudy.teachers import LocalTeacher
from understudy.training import SetupContext, TrainModule
from understudy.training.shapes import probe

RUN = {
    **CONV,
    "method": "kd3",
    "data": {"name": "digits", "teacher_limit": 500, "pool": "digits_web", "limit": 200},
    "options": {"group": 8, "selection_steps": 3},
}


def classifier(name, classes=4, shape=(3, 8, 8)):
    return ClassifierAdapter(build_small(name, classes, shape), classes)


@pytest.fixture
def build(tmp_path):
    """A trained module in evaluation mode, its teacher and a batch of 8, in float64."""

    def made(method, student="resnet8:4", teacher="resnet14:6", labels=None):
        torch.manual_seed(0)
        sides = classifier(student), classifier(teacher)
        labels = torch.full((8,), UNLABELLED) if labels is None else labels
        pool = ImageSet(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), labels, torch.arange(8))
        context = SetupContext(*sides, {"train": pool}, collate_images, 4, tmp_path, "key")
        rows = method.student(sides[0], context)
        batch = next(context.batches("train"))
        asked = LocalTeacher(sides[1], "teacher", features=True, taps=method.taps("teacher", sides[1], batch))
        taps = {"student": method.taps("student", rows, batch), "teacher": asked.taps}
        shapes = probe(method, 4, {"student": rows, "teacher": sides[1]}, taps, batch)
        module = TrainModule(rows, method, shapes, 10, taps=taps["student"], context=context).double().eval()
        sides[1].double()
        module.train_state.teacher = asked
        batch.inputs["pixel_values"] = batch.inputs["pixel_values"].double()
        return module, asked, batch

    return made


def gradients(module, teacher, batches):
    module.zero_grad()
    for batch in batches:
        sum(module(batch, teacher(batch)).losses.values()).backward()
    return {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("pair", [("resnet8:4", "resnet14:6"), ("mlp:8", "resnet8:4"), ("convnet:4", "mlp:12")])
def test_gradients_reach_the_body_the_block_and_the_embeddings(build, pair):
    module, teacher, batch = build(KD3(group=4), *pair)
    found = gradients(module, teacher, [batch])
    own_head = {f"student.model.body.{n}" for n in ("linear.weight", "linear.bias", "head.weight", "head.bias")}
    without = {name for name, gradient in found.items() if gradient is None}
    assert without == {"student.model.head.weight", "student.model.head.bias"} | (own_head & found.keys())
    assert all(p.grad is None for p in teacher.model.parameters())
    # The teacher's contrast trains its embedding and nothing else.
    alone, _, _ = build(KD3(group=4, teacher_contrast=False), *pair)
    others = gradients(alone, teacher, [batch])
    assert not any(name.startswith("own.teacher") for name in others)
    for name, gradient in others.items():
        if gradient is not None and not name.startswith("own."):
            close(gradient, found[name])


def test_without_contrast_there_are_no_embeddings(build):
    module, teacher, batch = build(KD3(contrast_weight=0))
    assert not module.own and set(module(batch, teacher(batch)).losses) == {"align"}


@pytest.mark.parametrize("cut", [4, 6])
def test_a_batch_cut_between_groups_has_the_same_gradient(build, cut):
    module, teacher, batch = build(KD3(group=2, contrast_weight=1.0))
    whole = gradients(module, teacher, [batch])
    parts = gradients(module, teacher, [batch.take(torch.arange(cut)), batch.take(torch.arange(cut, 8))])
    for name, gradient in whole.items():
        if gradient is not None:
            close(parts[name], gradient)


def test_labels_of_the_pool_change_nothing(build):
    found = [gradients(*(m := build(KD3(), labels=y))[:2], [m[2]]) for y in (None, torch.arange(8) % 4)]
    for name, gradient in found[0].items():
        assert gradient is None or torch.equal(gradient, found[1][name])


def test_images_that_do_not_count_may_hold_anything(build):
    module, teacher, batch = build(KD3(group=2))
    few = gradients(module, teacher, [batch.take(torch.arange(6))])
    batch.labels[6:] = -100
    batch.inputs["pixel_values"][6:] = 1e3
    for name, gradient in gradients(module, teacher, [batch]).items():
        assert gradient is None or torch.equal(gradient, few[name])


def test_a_student_at_the_teachers_map_is_aligned(build):
    module, teacher, batch = build(KD3(contrast_weight=0))
    rows = teacher(batch)
    held = module.student(batch, taps={"map": module.student.model.map, "transferred": module.student.model.transfer})
    held = held._replace(taps={**held.taps, "transferred": rows.taps["map"].clone()})
    assert module.method.loss(held, rows, batch, module.train_state)["align"].values.abs().max() == 0


# -- the student's network -----------------------------------------------------------------------------------------


def test_the_last_map_is_the_one_that_the_head_reads():
    x = Batch({"pixel_values": torch.rand(3, 3, 16, 16)}, torch.zeros(3, dtype=torch.long), torch.arange(3))
    shape = (3, 16, 16)
    assert last_map(classifier("resnet8:4", shape=shape), x) == ("layer3", (16, 4, 4))
    assert last_map(classifier("convnet:4", shape=shape), x) == ("body.11", (16, 2, 2))
    assert last_map(classifier("mlp:7", shape=shape), x) == (None, (7, 1, 1))


@pytest.mark.parametrize(
    ("student", "teacher", "grid"), [("resnet8:4", "convnet:2", (2, 2)), ("convnet:2", "resnet8:4", None)]
)
def test_the_student_is_read_by_the_teachers_head_and_saved_with_it(student, teacher, grid, tmp_path):
    shape = (3, 16, 16)
    ours, theirs = classifier(student, shape=shape), classifier(teacher, shape=shape)
    x = Batch({"pixel_values": torch.rand(3, *shape)}, torch.zeros(3, dtype=torch.long), torch.arange(3))
    body, before = ours.model, torch.random.get_rng_state()
    read_by_teacher(ours, theirs, x, seed=1)
    assert isinstance(ours.model, TransferClassifier) and ours.model.body is body and ours.model.facts.grid == grid
    assert torch.equal(torch.random.get_rng_state(), before)
    ours.eval()
    taps = {"transferred": ours.model.transfer}
    rows = ours(x, features=True, taps=taps)
    close(rows.features, rows.taps["transferred"].mean((2, 3)))
    own = next(m for m in reversed(list(theirs.model.modules())) if isinstance(m, nn.Linear))
    close(rows.signal.logits, own(rows.features))
    assert not any(p.requires_grad for p in ours.model.head.parameters())
    ours.save(tmp_path)
    again = load_classifier(tmp_path, classes=4, input_shape=shape).eval()
    assert normalisation(again) == normalisation(body)
    close(again(x.inputs["pixel_values"]), ours.model(x.inputs["pixel_values"]), rtol=0, atol=0)
    outlined = outline_classifier(ModelSpec(model=str(tmp_path)), 4, shape)
    assert {k: v.shape for k, v in outlined.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    config = json.loads((tmp_path / "config.json").read_text())
    config["understudy_transfer"]["factor"] = "two"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="describes no student with a teacher's head"):
        load_classifier(tmp_path, classes=4, input_shape=shape)


def test_a_single_value_a_channel_needs_no_statistics():
    rows = classifier("mlp:8")
    read_by_teacher(rows, classifier("mlp:6"), example())
    assert rows.model.train()(torch.rand(1, 3, 8, 8)).isfinite().all()


def example():
    return Batch({"pixel_values": torch.rand(2, 3, 8, 8)}, torch.zeros(2, dtype=torch.long), torch.arange(2))


def test_heads_that_cannot_be_shared_are_refused():
    with pytest.raises(InputError, match="has 4 classes and the teacher 5"):
        read_by_teacher(classifier("mlp:8"), classifier("mlp:8", 5), example())
    wide = classifier("mlp:8")
    wide.model.head = SubclassHead(8, 4, 2)
    with pytest.raises(InputError, match="The teacher has a SubclassHead as its head"):
        read_by_teacher(classifier("mlp:8"), wide, example())


# -- pools ---------------------------------------------------------------------------------------------------------


def test_a_pool_takes_the_place_of_the_students_examples(tmp_path):
    plain = load_images({"name": "digits", "teacher_limit": 500})
    found = load_images({"name": "digits", "teacher_limit": 500, "pool": "digits_web"}, IMAGES)
    assert found.domains == ("digits", "noise", "shuffled", "textures") and len(found.train) == 1350
    assert (found.train.labels == UNLABELLED).all() and torch.equal(found.train.ids, torch.arange(1350))
    assert torch.equal(found.teacher_train.pixels, plain.teacher_train.pixels) and found.hash != plain.hash
    counts = dict(zip(*np.unique(found.train.domains, return_counts=True), strict=True))
    assert counts == {"digits": 540, "noise": 270, "shuffled": 270, "textures": 270}
    assert (load_images({"name": "digits", "pool": "digits_web", "for_teacher": True}, IMAGES).train.labels >= 0).all()


def test_a_pool_may_be_a_flat_folder_of_colours_beside_gray_digits_and_a_table_without_labels(tmp_path):
    from PIL import Image

    (tmp_path / "web" / "more").mkdir(parents=True)
    for place in ("a.png", "b.png", "more/c.jpg"):
        Image.new("RGB", (20, 12), (200, 100, 50)).save(tmp_path / "web" / place)
    np.savez(tmp_path / "bare.npz", images=np.zeros((4, 8, 8), dtype=np.uint8))
    pools = [str(tmp_path / "web"), str(tmp_path / "bare.npz")]
    found = load_images({"name": "digits", "pool": pools})
    assert found.train.pixels.shape == (7, 1, 8, 8) and found.domains == tuple(sorted(pools))
    web = found.train.pixels[torch.from_numpy(found.train.domains == pools[0])]
    assert (web.int() - 124).abs().max() <= 1  # 0.299 · 200 + 0.587 · 100 + 0.114 · 50
    assert len(load_images({"name": "digits", "pool": pools, "limit": 5}).train) == 5


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"pool": []}, "must be the name of an image set"),
        ({"pool": "digits_web", "labelled": 5}, "data.labelled is about labels"),
        ({"pool": "clusters"}, "images of torch.float32"),
        ({"pool": "digits_wed"}, "neither built in"),
    ],
)
def test_pools_that_do_not_fit_are_refused(data, says):
    with pytest.raises(InputError, match=says):
        load_images({"name": "digits", **data}, IMAGES)


# -- runs ----------------------------------------------------------------------------------------------------------


def test_it_learns_from_the_pool_and_reports_what_was_selected(tmp_path):
    teacher = {"model": "mlp:32", "train": {"max_steps": 150, "learning_rate": 1e-2}}
    trainer = {**DIGITS["trainer"], "max_steps": 150, "learning_rate": 1e-2, "save_strategy": "no"}
    values = {**RUN, "teacher": teacher, "student": "mlp:16", "trainer": trainer, "options": {}}
    result = distill({**values, "output": str(tmp_path)})
    assert result.metrics["accuracy"] > 0.4  # chance is 0.1
    assert 0 < result.metrics["kept"] < 1 and result.metrics["pool_from_digits"] == pytest.approx(0.4, abs=0.1)
    held = json.loads((tmp_path / "evaluation.json").read_text())
    course, classes = held["tables"][:2]
    assert (
        course["headings"][:3] == ["step", "teacher's weight", "kept of the pool"] and course["rows"][0][1] == "0.992"
    )
    assert sum(int(row[1]) for row in classes["rows"]) == 200 and len(held["pictures"]) == 2
    again = distill({**values, "output": str(tmp_path)})  # read from its folder
    assert again.metrics == result.metrics and isinstance(again.student, TransferClassifier)


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_weights(tmp_path):
    trainer = {**DIGITS["trainer"], "max_steps": 9, "save_steps": 2, "learning_rate": 1e-2}
    recipes = [{**RUN, "trainer": trainer, "output": str(tmp_path / way)} for way in ("whole", "cut")]
    distill(recipes[0])
    assert killed_run(recipes[1], 5, "after")
    distill(recipes[1])
    for part in ("", "body"):
        found = [{**weights_at(tmp_path / way, part)} for way in ("cut", "whole")]
        torch.testing.assert_close(*found, rtol=0, atol=0)


def weights_at(folder, part):
    from safetensors.torch import load_file

    return load_file(folder / "student" / part / "model.safetensors")


class Own(nn.Module):
    """A module of the caller, without a format of its own."""

    def __init__(self, channels=3):
        super().__init__()
        self.conv, self.pool, self.out = nn.Conv2d(1, channels, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(channels, 10)

    def forward(self, x):
        return self.out(self.pool(self.conv(x)).flatten(1))


def test_a_module_of_the_caller_is_read_again_with_the_teachers_head(tmp_path):
    trainer = {**DIGITS["trainer"], "max_steps": 3, "save_strategy": "no"}
    values = {**RUN, "trainer": trainer, "output": str(tmp_path)}
    first, again = distill(values, student=Own()), distill(values, student=Own())
    x = torch.rand(2, 1, 8, 8)
    assert first.student.facts.layer == "conv"
    close(again.student.eval()(x), first.student.eval()(x), rtol=0, atol=0)


def test_a_network_of_transformers_is_read_again(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    config = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}
    net = ResNetForImageClassification(ResNetConfig(**config, num_labels=10, downsample_in_first_stage=False))
    trainer = {**DIGITS["trainer"], "max_steps": 3, "save_strategy": "no"}
    result = distill({**RUN, "trainer": trainer, "output": str(tmp_path)}, student=net)
    again = load_classifier(tmp_path / "student", classes=10, input_shape=(1, 8, 8))
    x = torch.rand(2, 1, 8, 8)
    close(again.eval()(x), result.student.eval()(x), rtol=1e-5, atol=1e-6)


def test_fewer_than_two_confident_images_are_told(tmp_path, caplog):
    trainer = {**DIGITS["trainer"], "max_steps": 2, "save_strategy": "no"}
    options = {"cutoff": 1.0, "min_threshold": 0.999999}
    distill({**RUN, "trainer": trainer, "options": options, "output": str(tmp_path)})
    assert "the most confident tenth is taken" in caplog.text


def test_a_teacher_that_is_not_here_is_refused(tmp_path):
    teacher = {"model": "mlp:8", "cache": str(tmp_path)}
    with pytest.raises(InputError, match="live teacher"):
        distill({**RUN, "teacher": teacher, "output": str(tmp_path / "run")})


def test_indices_are_those_of_all_examples_where_some_do_not_count(build):
    module, teacher, _ = build(KD3(), labels=torch.tensor([-1, -100, -1, -1, -100, -1, -1, -1]))
    module.float(), teacher.model.float()
    context = dataclasses.replace(module.train_state.context, teacher=teacher)
    tables = module.method.setup(context)
    assert tables["places"].tolist() == [0, 2, 3, 5, 6, 7] and tables["teacher"].shape == (6, 4)
