"""Talking Models on models of transformers, between positions of all kinds, and as runs."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine_cases import CONV, DIGITS, killed_run, weights
from golden_vectors import close
from text_classes import as_csv, classifier, reviews
from understudy import InputError, distill
from understudy.data import Batch
from understudy.methods.talking_models import TalkingModels
from understudy.models import ClassifierAdapter, own_classes
from understudy.models.messages import Places, States, as_output, carried, compared, states_of
from understudy.models.text_classifiers import TextClassifierAdapter
from understudy.runs.recipe import make
from understudy.runs.teachers import for_teacher
from understudy.tasks import get as get_task
from understudy.teachers import LocalTeacher
from understudy.training import TrainModule
from understudy.training.shapes import probe


def image_models():
    from transformers import (
        ConvNextConfig,
        ConvNextForImageClassification,
        ResNetConfig,
        ResNetForImageClassification,
        SwinConfig,
        SwinForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    from understudy.models.small import build_small

    size = {"num_channels": 1, "num_labels": 3}
    vit = {"image_size": 8, "patch_size": 2, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    swin = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    stages = {"hidden_sizes": [8, 12], "depths": [1, 1]}
    return {
        "mlp": build_small("mlp:8,6", 3, (1, 16, 16)),
        "mlp1": build_small("mlp:8", 3, (1, 16, 16)),
        "convnet": build_small("convnet:4", 3, (1, 16, 16)),
        "resnet8": build_small("resnet8:4", 3, (1, 16, 16)),
        "vit": ViTForImageClassification(ViTConfig(**size, **vit | {"image_size": 16, "intermediate_size": 8})),
        "swin": SwinForImageClassification(SwinConfig(**size, **swin)),
        "resnet": ResNetForImageClassification(
            ResNetConfig(**size, **stages, embedding_size=8, layer_type="basic", downsample_in_first_stage=False)
        ),
        "convnext": ConvNextForImageClassification(
            ConvNextConfig(**size, num_stages=2, patch_size=2, image_size=16, **stages)
        ),
    }


def text_models():
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        DistilBertConfig,
        DistilBertForSequenceClassification,
        EuroBertConfig,
        EuroBertForSequenceClassification,
        LlamaConfig,
        LlamaForSequenceClassification,
    )

    size = {"vocab_size": 30, "num_labels": 3, "pad_token_id": 0}
    wide = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    bag = {"hidden_size": 6, "num_hidden_layers": 0, "num_attention_heads": 1, "num_key_value_heads": 1}
    return {
        "bert": BertForSequenceClassification(BertConfig(**size, **wide)),
        "distilbert": DistilBertForSequenceClassification(
            DistilBertConfig(**size, dim=8, hidden_dim=8, n_layers=2, n_heads=2)
        ),
        "llama": LlamaForSequenceClassification(LlamaConfig(**size, **wide)),
        "bag": EuroBertForSequenceClassification(EuroBertConfig(**size, **bag, classifier_pooling="mean")),
    }


def module_of(method, student, teacher, batch, rectified=False):
    taps = {side: method.taps(side, m, batch) for side, m in (("student", student), ("teacher", teacher))}
    asked = LocalTeacher(teacher, "teacher", taps=taps["teacher"])
    tables = {"rectified": torch.full((4,), rectified)}
    shapes = probe(method, 3, {"student": student, "teacher": teacher}, taps, batch, tables)
    module = TrainModule(student, method, shapes, 1, taps=taps["student"], tables=tables).double()
    module.train_state.teacher = asked
    return module.eval()


def names(model, method, side, batch):
    known = {m: name for name, m in model.model.named_modules()}
    return [known[m] for m in method.taps(side, model, batch).values()]


def gradients(module, batches):
    module.zero_grad()
    for batch in batches:
        sum(module(batch, module.train_state.teacher(batch)).losses.values()).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


IMAGES = {
    "mlp": ["body.2", "body"],
    "mlp1": ["body.1", "body"],
    "convnet": ["body.2", "body"],
    "resnet8": ["layer1.0", "layer3"],
    "vit": ["vit.layers.0", "vit.layernorm"],
    "swin": ["swin.encoder.layers.0.blocks.0", "swin.pooler"],
    "resnet": ["resnet.encoder.stages.0", "classifier.0"],
    "convnext": ["convnext.encoder.stages.0.layers.0", "convnext.layernorm"],
}
TEXTS = {
    "bert": ["bert.encoder.layer.0", "dropout"],
    "distilbert": ["distilbert.transformer.layer.0", "dropout"],
    "llama": ["model.layers.0", "model.norm"],
    "bag": ["model.embed_tokens", "activation"],
}


@pytest.mark.parametrize("name", IMAGES)
def test_layers_of_image_classifiers_and_messages_to_and_from_each(name):
    torch.manual_seed(0)
    models, method = image_models(), TalkingModels(message_width=4, rounds=2)
    batch = Batch({"pixel_values": torch.rand(4, 1, 16, 16).double()}, torch.tensor([0, 1, 2, 0]), torch.arange(4))
    adapters = {key: ClassifierAdapter(model.double(), 3) for key, model in models.items()}
    assert names(adapters[name], method, "student", batch) == IMAGES[name]
    for other in ("resnet8", "vit") if name != "vit" else ("mlp", "swin"):
        for student, teacher in ((name, other), (other, name)):
            pair = (copy.deepcopy(adapters[student]), copy.deepcopy(adapters[teacher]))
            module = module_of(method, *pair, batch)
            whole = gradients(module, [batch])
            assert any(g.abs().max() > 0 for n, g in whole.items() if n.startswith("student."))
            assert all(p.grad is None for p in pair[1].parameters())
            parts = gradients(module, [batch.take(torch.tensor(i)) for i in ([0], [1, 2, 3])])
            assert whole.keys() == parts.keys()
            for key in whole:
                close(whole[key], parts[key], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("same", [True, False], ids=["one tokenizer", "two tokenizers"])
def test_layers_of_text_classifiers_and_padding_that_does_not_count(name, same):
    torch.manual_seed(0)
    models, method = text_models(), TalkingModels(message_width=4, rounds=2)
    batch = texts([3, 7, 5, 2])
    for other in ("bert", "bag"):
        adapters = [
            text_adapter(models[name].double(), "a"),
            text_adapter(copy.deepcopy(models[other]).double(), "a" if same else "b"),
        ]
        assert names(adapters[0], method, "student", batch) == TEXTS[name]
        for pair in (adapters, adapters[::-1]):
            module = module_of(method, *map(copy.deepcopy, pair), batch)
            whole, parts = (
                gradients(module, [batch]),
                gradients(module, [texts([3, 7, 5, 2], own) for own in ([0], [1, 2, 3])]),
            )
            assert any(g.abs().max() > 0 for n, g in whole.items() if n.startswith("student."))
            for key in whole:
                close(whole[key], parts[key], rtol=1e-6, atol=1e-9)


def texts(lengths, chosen=None):
    """Texts of given lengths, padded to the longest of those chosen; by the other tokenizer each has one token more."""
    torch.manual_seed(1)
    ids = [torch.randint(1, 30, (n + 1,)) for n in lengths]
    chosen = range(len(ids)) if chosen is None else chosen
    inputs = {}
    for key, more in (("a", 0), ("b", 1)):
        own = [ids[i][: lengths[i] + more] for i in chosen]
        inputs[f"{key}/input_ids"] = nn.utils.rnn.pad_sequence(own, batch_first=True)
        inputs[f"{key}/attention_mask"] = (inputs[f"{key}/input_ids"] > 0).long()
    index = torch.tensor(list(chosen))
    return Batch(inputs, torch.tensor([0, 1, 2, 0])[index], index)


def text_adapter(model, key):
    return TextClassifierAdapter(model, 3, SimpleNamespace(key=key))


def test_messages_between_positions_of_all_kinds():
    def states(prefix=0, grid=(1, 1)):
        torch.manual_seed(0)
        number = prefix + grid[0] * grid[1]
        return States(torch.randn(2, number, 3).double(), Places(None, prefix, grid))

    vector, small, large, patches = (states(*g) for g in ((), (0, (2, 2)), (0, (4, 4)), (1, (2, 2))))
    assert carried(small, small) is small.values
    close(carried(large, vector), large.values.mean(1, keepdim=True))
    close(carried(vector, large), vector.values.expand(-1, 16, -1))
    blocks = large.values.view(2, 2, 2, 2, 2, 3).mean((2, 4)).flatten(1, 2)
    close(carried(large, small), blocks)
    close(carried(patches, small), patches.values[:, 1:] + patches.values[:, :1])
    there = carried(small, patches)
    close(there[:, 1:], small.values)
    close(there[:, 0], small.values.mean(1))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    ours, theirs = (States(torch.randn(2, 3, 4).double(), Places(k), m) for k, m in (("a", mask), ("b", ~mask)))
    means = torch.stack([ours.values[0, :2].mean(0), ours.values[1, 0]])
    close(carried(ours, theirs), means[:, None].expand(-1, 3, -1))
    close(compared(ours, theirs).found[:, 0], means)
    close(compared(large, small).found, blocks)
    for shape in ((2, 5), (2, 6, 5), (2, 5, 3, 4)):
        output = torch.randn(shape)
        found = states_of(output, ClassifierAdapter(nn.Linear(1, 1), 1), None)
        assert found.values.shape[2] == 5 and torch.equal(as_output(found, output), output)
    with pytest.raises(InputError, match="3 positions for texts of 7 tokens"):
        states_of(torch.zeros(4, 3, 5), text_adapter(text_models()["bert"], "a"), texts([3, 7, 5, 2]))


RUN = {**DIGITS, "method": "talking-models", "options": {"message_width": 8, "rounds": 2}}


def test_it_learns_digits_and_leaves_the_student_alone(tmp_path):
    result = distill(
        {**RUN, "output": str(tmp_path), "data": {"name": "digits", "limit": 300}},
        teacher={"model": "mlp:16", "train": {"max_steps": 200, "learning_rate": 1e-2}},
        trainer={"max_steps": 200, "per_device_train_batch_size": 32, "learning_rate": 1e-2, "save_strategy": "no"},
    )
    assert result.metrics["accuracy"] > 0.5  # chance is 0.1
    assert result.metrics["message_variance"] > 1e-3
    assert sorted(weights(tmp_path)) == ["body.1.bias", "body.1.weight", "head.bias", "head.weight"]


def test_without_weights_a_run_ends_in_the_weights_of_training_on_labels(tmp_path):
    trainer = {**DIGITS["trainer"], "max_steps": 4, "save_strategy": "no"}
    off = {"interact_weight": 0, "message_weight": 0, "state_weight": 0}
    distill({**RUN, "options": off, "trainer": trainer, "output": str(tmp_path / "off")})
    distill({**DIGITS, "teacher": None, "method": "sft", "trainer": trainer, "output": str(tmp_path / "sft")})
    torch.testing.assert_close(weights(tmp_path / "off"), weights(tmp_path / "sft"), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("base", [DIGITS, CONV], ids=["mlp", "conv"])
def test_killed_and_resumed_ends_in_the_same_weights(base, tmp_path):
    trainer = {**DIGITS["trainer"], "max_steps": 10, "save_steps": 2}
    recipes = [{**RUN, **base, "trainer": trainer, "output": str(tmp_path / way)} for way in ("whole", "cut")]
    distill(recipes[0])
    assert killed_run(recipes[1], 5, "after")
    distill(recipes[1])
    torch.testing.assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_a_teacher_of_other_classes(tmp_path):
    trainer = {**DIGITS["trainer"], "max_steps": 6, "save_strategy": "no"}
    base = {**RUN, "data": {"name": "digits_shift"}, "trainer": trainer}
    result = distill({**base, "output": str(tmp_path / "run")})
    assert result.student.head.out_features == 4 and "teacher_accuracy" not in result.metrics
    teacher = {"teacher": str(tmp_path / "run" / "teacher" / "student"), "options": {}}
    for method, options in (
        ("fitnets", {"kd_weight": 0}),
        ("sft", {}),
    ):  # a comparison may name the teacher for all arms
        own = {"method": method, "options": options, "output": str(tmp_path / f"{method}-run")}
        assert "teacher_accuracy" not in distill({**base, **teacher, **own}).metrics
    for method in ("kd", "fitnets"):
        with pytest.raises(InputError, match="has 10 classes and the data has 4"):
            distill({**base, **teacher, "method": method, "output": str(tmp_path / method)})
    assert own_classes(nn.Sequential(nn.Linear(3, 7), nn.ReLU())) == 7
    with pytest.raises(InputError, match="does not say how many classes"):
        own_classes(nn.Flatten())


def test_a_teacher_of_another_resolution_sees_the_students_images_as_its_processor_makes_them(tmp_path):
    """Images of 8 × 8 and one channel for the student, of 16 × 16 and three normalised ones for the teacher."""
    from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    size = {"image_size": 16, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    vit = ViTForImageClassification(ViTConfig(**size, intermediate_size=8, num_labels=7)).eval()
    folder = tmp_path / "vit"
    vit.save_pretrained(folder)
    held = {"size": {"height": 16, "width": 16}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.1]}
    ViTImageProcessor(**held).save_pretrained(folder)
    trainer = {"max_steps": 3, "per_device_train_batch_size": 8, "save_strategy": "no"}
    given = {**RUN, "teacher": str(folder), "student": "convnet:4", "trainer": trainer, "output": str(tmp_path / "run")}
    whole = make(given)
    task = get_task(whole.task)
    prepared = task.prepare(whole)
    teacher = task.model(whole.teacher, for_teacher(whole, prepared))
    batch = Batch.from_dict(prepared.collate([prepared.train[i] for i in range(4)]))
    found = LocalTeacher(teacher, "vit", taps=whole.build_method().taps("teacher", teacher, batch))(batch).taps
    grey = (batch.inputs["pixel_values"] * 255).round().byte().repeat(1, 3, 1, 1)
    pixels = AutoImageProcessor.from_pretrained(folder)(list(grey.numpy()), return_tensors="pt")["pixel_values"]
    states = vit.vit(pixels, output_hidden_states=True)
    assert pixels.shape[2:] == (16, 16) and found["low"].shape == (4, 17, 8)  # a class token and 4 × 4 patches
    close(found["high"], states.last_hidden_state, rtol=0, atol=0.05)  # the library resizes in integers
    result = distill(given)
    assert 0 <= result.metrics["accuracy"] <= 1 and result.metrics["message_variance"] > 0


def test_an_encoder_that_was_trained_for_another_task_teaches_texts(tmp_path):
    from transformers import AutoModel, AutoTokenizer

    trained = classifier(tmp_path / "classifier", labels=("good", "bad"))
    AutoModel.from_pretrained(trained).save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "encoder")
    base = {
        "task": "text_classification",
        "data": {"name": str(as_csv(tmp_path / "d.csv", reviews(60))), "max_length": 16, "vocab_size": 300},
        "teacher": str(tmp_path / "encoder"),
        "student": "embedding:8",
        "trainer": {"max_steps": 4, "per_device_train_batch_size": 8, "save_strategy": "no"},
    }
    result = distill({**base, "method": "talking-models", "output": str(tmp_path / "run")})
    assert 0 <= result.metrics["accuracy"] <= 1 and "teacher_accuracy" not in result.metrics
    with pytest.raises(InputError, match="no head of its own for this task"):
        distill({**base, "method": "kd", "output": str(tmp_path / "kd")})
