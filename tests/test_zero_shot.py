"""Zero-shot teachers: classes that are texts, compared with images as CLIP and SigLIP do; with an adapter of labelled images;
what they refuse."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    pipeline,
)

from understudy import InputError, distill, plan
from understudy.data import Batch, train_tokenizer
from understudy.models.few_shot import ALPHAS, BETAS, FewShotAdapter
from understudy.models.zero_shot import is_zero_shot, load_zero_shot
from understudy.runs.capture import capture_recipe
from understudy.runs.check import evaluate_run
from understudy.runs.recipe import make
from understudy.tasks.image_classification import ImageClassification

NAMES = ["red", "green", "deep_blue"]
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TEXT, "image_size": 16, "patch_size": 8}
KINDS = {
    "clip": (CLIPConfig, CLIPModel, CLIPImageProcessor),
    "siglip": (SiglipConfig, SiglipModel, SiglipImageProcessor),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """A tiny model of images and texts with random weights, as plain transformers saves it."""
    path = tmp_path_factory.mktemp("models") / request.param
    kind, model, processor = KINDS[request.param]
    tokenizer = train_tokenizer(["a photo of a red green deep blue thing."] * 8, 300)
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "eos_token_id": tokenizer.eos_token_id}
    text |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = kind(text_config=text, vision_config=VISION, **({"projection_dim": 12} if kind is CLIPConfig else {}))
    torch.manual_seed(0)
    model(config).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    size = {"shortest_edge": 16} if kind is CLIPConfig else {"height": 16, "width": 16}
    processor(size=size, **({"crop_size": 16} if kind is CLIPConfig else {})).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images of 16 × 16 whose class is their colour, by folder."""
    root, chance = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, number in (("train", 24), ("test", 9)):
        for label, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True)
            for i in range(number // 3):
                pixels = chance.integers(0, 80, (16, 16, 3))
                pixels[..., label] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def recipe(folder, pictures, **changes):
    return {
        "task": "image_classification",
        "method": "kd",
        "data": {"name": str(pictures)},
        "teacher": {"model": str(folder)},
        "student": "resnet8:4",
        "trainer": {"max_steps": 3, "per_device_train_batch_size": 8},
        **changes,
    }


def test_logits_are_those_of_the_model_for_one_prompt_and_the_mean_prototype_for_several(folder):
    plain = (CLIPModel if folder.name == "clip" else SiglipModel).from_pretrained(folder).eval()
    tokenizer, pixels = AutoTokenizer.from_pretrained(folder), torch.rand(5, 3, 16, 16)
    classes = [name.replace("_", " ") for name in NAMES]

    def read(prompt):
        return tokenizer([prompt.format(c) for c in classes], padding="max_length", max_length=64, return_tensors="pt")

    with torch.no_grad():
        one = load_zero_shot(str(folder), NAMES)(pixels)
        torch.testing.assert_close(one, plain(pixel_values=pixels, **read("a photo of a {}.")).logits_per_image)
        prompts = ["a photo of a {}.", "{} thing"]
        sides = [F.normalize(plain.get_text_features(**read(p)).pooler_output, dim=-1) for p in prompts]
        mean = F.normalize(sum(sides) / 2, dim=-1)
        seen = F.normalize(plain.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        bias = getattr(plain, "logit_bias", torch.zeros(1))
        wanted = plain.logit_scale.exp() * seen @ mean.T + bias
        torch.testing.assert_close(load_zero_shot(str(folder), NAMES, prompts)(pixels), wanted)


def test_a_classifier_of_such_a_kind_is_none(tmp_path):
    from transformers import CLIPForImageClassification

    config = CLIPConfig(text_config={**TEXT, "vocab_size": 99}, vision_config=VISION, num_labels=3)
    CLIPForImageClassification(config).save_pretrained(tmp_path / "own")
    assert not is_zero_shot(str(tmp_path / "own")) and not is_zero_shot("resnet8")


@pytest.mark.parametrize("method", ["kd", "dho", "fitnets"])
def test_a_student_learns_from_it_with_few_labels_or_its_features(method, folder, pictures, tmp_path):
    options = {"labelled_batch": 4, "unlabelled_batch": 4} if method == "dho" else {}
    data = {"name": str(pictures), **({"labelled": 6} if method == "dho" else {})}
    prompts = {"prompts": ["a photo of a {}.", "a {} thing."]}
    found = distill(
        recipe(folder, pictures, method=method, options=options, data=data, output=str(tmp_path / "run"))
        | {"teacher": {"model": str(folder), "options": prompts}}
    )
    assert found.metrics["accuracy"] >= 0 and found.folder.joinpath("student", "model.safetensors").is_file()


def test_its_answers_about_files_are_those_of_the_pipeline_of_transformers(folder, pictures, tmp_path):
    """With the model's own processor: the teacher's accuracy in a run is the share that the pipeline gets right."""
    found = distill(recipe(folder, pictures, output=str(tmp_path / "run")))
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    right, labels = [], [name.replace("_", " ") for name in NAMES]
    for path in sorted((pictures / "test").glob("*/*.png")):
        best = classify(str(path), candidate_labels=labels, hypothesis_template="a photo of a {}.")[0]["label"]
        right.append(best == path.parent.name.replace("_", " "))
    assert len(right) == 9 and found.metrics["teacher_accuracy"] == pytest.approx(sum(right) / 9)


def test_it_is_planned_as_nothing_else(folder, pictures):
    with pytest.raises(InputError, match=r"plan does not know .*, which compares images with texts"):
        plan(recipe(folder, pictures), peak=0.1, bandwidth=0.01)


def test_it_is_captured_like_any_teacher(folder, pictures, tmp_path):
    whole = recipe(folder, pictures)
    assert capture_recipe(whole, tmp_path / "cache", "dense").examples > 0
    live = distill(whole | {"output": str(tmp_path / "live")})
    cached = {"model": str(folder), "cache": str(tmp_path / "cache")}
    stored = distill(whole | {"teacher": cached, "output": str(tmp_path / "stored")})
    assert stored.metrics["nll"] == pytest.approx(live.metrics["nll"], abs=1e-3)


FEW = {"labelled": 3, "validation_size": 9}


class Unread:
    """A split that must not be read."""

    def __getattr__(self, name):
        raise AssertionError(f"the test split was read: {name}")

    __getitem__ = __len__ = __getattr__


def with_adapter(folder, pictures, adapter=True, **data):
    """The teacher of a recipe with an adapter, its data, and what plain transformers gives for each split in float64."""
    options = {"teacher": {"model": str(folder), "options": {"adapter": adapter}}}
    found = make(recipe(folder, pictures, data={"name": str(pictures), **FEW, **data}, **options))
    prepared = ImageClassification().prepare(found)
    prepared.test = Unread()
    return ImageClassification().model(found.teacher, prepared), prepared


def closed_form(folder, prepared):
    """Embeddings, zero-shot logits and labels of the labelled images of each split, float64."""
    plain = (CLIPModel if folder.name == "clip" else SiglipModel).from_pretrained(folder).eval()
    zero = ImageClassification().model(make(recipe(folder, "x")).teacher, prepared)
    found = []
    for part in (prepared.train, prepared.validation):
        batch = Batch.from_dict(prepared.collate([part[i] for i in range(len(part)) if part.labels[i] >= 0]))
        with torch.no_grad():
            seen = plain.get_image_features(pixel_values=zero.shown(batch.inputs["pixel_values"])).pooler_output
            logits = zero(batch).signal.logits.double()
        found.append((F.normalize(seen.double(), dim=-1), logits, batch.labels))
    return found


def test_labelled_images_vote_as_the_formula_says(folder, pictures):
    teacher, prepared = with_adapter(folder, pictures, {"alpha": 1.3, "beta": 4.0})
    (keys, _, classes), (features, logits, _) = closed_form(folder, prepared)
    assert len(keys) == 9  # three of each class
    wanted = logits + 1.3 * torch.exp(-4.0 * (1 - features @ keys.T)) @ F.one_hot(classes, 3).double()
    batch = Batch.from_dict(prepared.collate([prepared.validation[i] for i in range(9)]))
    rows = teacher(batch, features=True)
    torch.testing.assert_close(rows.signal.logits.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows.features.double(), features, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_without_weight_the_votes_change_nothing_and_far_ones_count_less(folder, pictures):
    teacher, prepared = with_adapter(folder, pictures, {"alpha": 0, "beta": 4.0})
    zero = ImageClassification().model(make(recipe(folder, pictures)).teacher, prepared)
    batch = Batch.from_dict(prepared.collate([prepared.train[i] for i in range(6)]))
    torch.testing.assert_close(teacher(batch).signal.logits, zero(batch).signal.logits, rtol=0, atol=0)
    keys = torch.eye(3)
    near = FewShotAdapter(keys, torch.tensor([0, 1, 1]), 2, 1.0, 1e6)  # a key's own vote alone is left
    torch.testing.assert_close(near(keys), torch.tensor([[1.0, 0], [0, 1], [0, 1]]), rtol=0, atol=0)
    torch.testing.assert_close(
        FewShotAdapter(keys, torch.tensor([0, 1, 1]), 2, 2.0, 0.0)(keys)[0], torch.tensor([2.0, 4])
    )


def test_alpha_and_beta_are_the_best_on_validation_images_and_no_test_image_is_read(folder, pictures, tmp_path):
    teacher, prepared = with_adapter(folder, pictures)
    (keys, _, classes), (features, logits, labels) = closed_form(folder, prepared)
    best = (-1.0, None, None)
    for beta in BETAS:
        votes = torch.exp(-beta * (1 - features @ keys.T)) @ F.one_hot(classes, 3).double()
        for alpha in ALPHAS:
            right = float(((logits + alpha * votes).argmax(-1) == labels).double().mean())
            best = max(best, (right, alpha, beta), key=lambda found: found[0])  # the first of equals
    adapter = teacher.model.adapter
    assert (float(adapter.alpha), float(adapter.beta)) == pytest.approx(best[1:])
    batch = Batch.from_dict(prepared.collate([prepared.validation[i] for i in range(9)]))
    assert float((teacher(batch).signal.logits.argmax(-1) == labels).double().mean()) == pytest.approx(best[0])
    said = [note for note in prepared.notes if "9 labelled images vote" in note]
    assert len(said) == 1 and f"α = {best[1]:.4g} and β = {best[2]:.4g}, chosen on 9 validation images" in said[0]


@pytest.mark.parametrize("method", ["kd", "dho"])
def test_a_student_learns_from_it_live_and_captured(method, folder, pictures, tmp_path):
    """The teacher of the run is the one with votes, in its report too; a capture answers the same."""
    options = {"labelled_batch": 4, "unlabelled_batch": 4} if method == "dho" else {"ce_weight": 0}
    adapter = {"alpha": 50.0, "beta": 5.0}  # decides alone
    whole = recipe(folder, pictures, method=method, options=options, data={"name": str(pictures), **FEW})
    whole |= {"teacher": {"model": str(folder), "options": {"adapter": adapter}}}
    live = distill(whole | {"output": str(tmp_path / "live")})
    assert live.metrics["teacher_accuracy"] == 1.0  # colours are told apart by any encoder
    chosen = {"model": str(folder), "options": {"adapter": True}}
    found = distill(whole | {"teacher": chosen, "output": str(tmp_path / "chosen")})
    assert "labelled images vote" in json.dumps(json.loads((found.folder / "run.json").read_text()), ensure_ascii=False)
    assert capture_recipe(whole, tmp_path / "cache", "dense").examples > 0
    cached = {"model": str(folder), "cache": str(tmp_path / "cache")}
    stored = distill(whole | {"teacher": cached, "output": str(tmp_path / "stored")})
    assert stored.metrics["nll"] == pytest.approx(live.metrics["nll"], abs=1e-3)


@pytest.mark.parametrize(
    ("adapter", "data", "says"),
    [
        (True, {"labelled": None, "unlabelled": True}, "training images that have a label vote, and none has one"),
        (True, {"with_validation": True}, "chosen on the validation images, and these are trained on"),
        ({"alpha": 1.0}, {}, "give true, or alpha of at least 0 and beta above 0"),
        ({"alpha": -1.0, "beta": 1.0}, {}, "give true, or alpha of at least 0 and beta above 0"),
        ({"alpha": 1.0, "beta": 0}, {}, "give true, or alpha of at least 0 and beta above 0"),
        ("yes", {}, "options.adapter is 'yes'"),
    ],
)
def test_bad_adapters(adapter, data, says, folder, pictures):
    with pytest.raises(InputError, match=says):
        with_adapter(folder, pictures, adapter, **data)


def test_its_states_are_read_where_its_classes_are_not(folder, pictures, tmp_path):
    found = distill(recipe(folder, pictures, method="talking-models", output=str(tmp_path / "run")))
    assert 0 <= found.metrics["accuracy"] <= 1


def test_a_student_of_it_is_its_images_side_with_a_new_head(folder, pictures, tmp_path):
    """Also with the same folder as teacher; it starts at the saved weights and is saved as an ordinary classifier."""
    whole = recipe(folder, pictures, student=str(folder), output=str(tmp_path / "run"))
    found = make(whole)
    prepared = ImageClassification().prepare(found)
    student = ImageClassification().model(found.student, prepared)
    plain = (CLIPModel if folder.name == "clip" else SiglipModel).from_pretrained(folder)
    held = dict(plain.vision_model.named_parameters())
    started = {n.removeprefix("vision_model."): p for n, p in student.model.vision_model.named_parameters()}
    assert held.keys() == started.keys()
    torch.testing.assert_close(started, held, rtol=0, atol=0)
    assert student.model.classifier.out_features == 3 and all(p.requires_grad for p in student.parameters())
    assert any("no weights for classifier" in note for note in prepared.notes)
    saved = distill(whole).folder / "student"
    again = AutoModelForImageClassification.from_pretrained(saved)
    assert list(again.config.id2label.values()) == sorted(NAMES) and not is_zero_shot(str(saved))
    image = Image.open(pictures / "test" / "red" / "0.png")
    assert {s["label"] for s in pipeline("image-classification", model=str(saved))(image, top_k=3)} == set(NAMES)
    assert 0 <= evaluate_run(saved.parent)["metrics"]["accuracy"] <= 1


def test_a_student_that_is_a_copy_of_it_is_refused(folder, pictures, tmp_path):
    with pytest.raises(InputError, match="ZeroShotClassifier, has no weights to train"):
        distill(recipe(folder, pictures, student="teacher", output=str(tmp_path / "run")))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher": {"model": "resnet8", "options": {"adapter": True}}}, "classes of its own: options.adapter is of"),
        ({"teacher": {"options": {"prompts": ["a photo"]}}}, "'a photo' must be text with one {} where the name"),
        ({"teacher": {"options": {"prompts": []}}}, "options.prompts is empty"),
        ({"teacher": {"model": "resnet8", "options": {"prompts": "{}"}}}, "resnet8 has classes of its own"),
        ({"student": {"options": {"prompts": "{}"}}}, r"student.options.prompts is of zero-shot teachers"),
    ],
)
def test_bad_input(changes, says, folder, pictures, tmp_path):
    filled = {side: {"model": str(folder), **keys} for side, keys in changes.items()}
    with pytest.raises(InputError, match=says):
        distill(recipe(folder, pictures, output=str(tmp_path / "run"), **filled))
