"""Texts about images: the fields of a processor reach the model, and methods of texts and preferences run unchanged."""

import csv
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from golden_vectors import close
from understudy import distill
from understudy.data import Batch, collate_lists, collate_text, train_tokenizer
from understudy.data.batch import COUNT
from understudy.data.image_texts import encode_image_texts, load_image_texts
from understudy.data.pictures import Pictures
from understudy.errors import InputError
from understudy.models import CausalLMAdapter, SequenceAdapter, evaluating
from understudy.models.vision_language import load_vision_language, new_processor
from understudy.planning.setting import setting
from understudy.runs.check import check_recipe
from understudy.runs.recipe import make
from understudy.streaming import logits_of
from understudy.synthetic.scenes import caption, named, scenes
from understudy.tasks import get
from understudy.teachers.cache.scores import sequences
from vision_cases import SCENES, TINY, qwen2_vl_processor, tiny_paligemma, tiny_qwen2_vl, write_images


def records(lists=False, **spec):
    return load_image_texts({"name": "scenes", "size": 6, "pairs": 4, **spec}, {"scenes": scenes}, lists=lists).train


def tokenizer():
    return train_tokenizer([" there is a 3 at a1 and a 7 at c2 . yes no describe"], 280)


def llava():
    processor = new_processor(tokenizer(), image=24, patch=8)
    torch.manual_seed(0)
    return processor, load_vision_language(TINY, processor=processor)


def qwen():
    processor = qwen2_vl_processor(tokenizer())
    return processor, tiny_qwen2_vl(processor.tokenizer)


@pytest.mark.parametrize("make_model", [llava, qwen])
def test_a_processors_fields_reach_the_model_untouched(make_model):
    """The rows of a collated batch are those of the model on what its processor returns, example by example."""
    processor, model = make_model()
    rows = encode_image_texts(records(), processor, max_length=64)[0]
    chosen = [rows[i] for i in (0, 3, 7)]
    batch = Batch.from_dict(collate_text(chosen))
    adapter = CausalLMAdapter(model, len(processor.tokenizer), "auto")
    with evaluating(model), torch.no_grad():
        found = logits_of(adapter(batch).signal).split(batch.mask.sum(1).tolist())
        for row, ours in zip(chosen, found, strict=True):
            own = row["pictures"].prepared()
            added = len(row["input_ids"]) - own["input_ids"].shape[1]
            text = {k: own.get(k) for k in ("mm_token_type_ids",) if k in own}
            padded = {k: torch.cat([v, v.new_zeros(1, added)], 1) for k, v in text.items()}
            images = {k: own[k] for k in ("pixel_values", "image_grid_thw") if k in own}
            wanted = model(input_ids=row["input_ids"][None], **images, **padded).logits[0]
            close(ours, wanted[:-1][row["labels"][1:] != -100][:, : len(processor.tokenizer)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make_model", [llava, qwen])
def test_images_matter_and_stay_with_their_example(make_model):
    processor, model = make_model()
    rows = encode_image_texts(records(lists=True), processor, max_length=64)[0]
    batch = Batch.from_dict(collate_lists([rows[i] for i in range(3)]))
    adapter = SequenceAdapter(model, len(processor.tokenizer), "auto")
    with evaluating(model), torch.no_grad():
        whole = adapter(batch).signal.values
        for i in range(3):
            alone = Batch.from_dict(collate_lists([rows[i]]))
            close(adapter(alone).signal.values[0], whole[i], rtol=1e-4, atol=1e-4)
        blank = {**batch.inputs, "pixel_values": torch.zeros_like(batch.inputs["pixel_values"])}
        batch.inputs = blank
        del batch.__dict__["tokens"]
        assert not torch.allclose(adapter(batch).signal.values, whole, atol=1e-3)


def test_examples_are_taken_and_recognised_with_their_images():
    processor, _ = qwen()
    first, second, *_ = records()
    text = {"id": 9, "prompt": "describe", "completion": " text alone"}
    rows = encode_image_texts([first, text, second], processor, max_length=64)[0]
    batch = Batch.from_dict(collate_text([rows[i] for i in range(3)]))
    counts = batch.inputs[COUNT + "pixel_values"].tolist()
    assert counts[1] == 0 and counts[0] == counts[2] > 1
    taken = batch.take(torch.tensor([2, 1]))
    assert torch.equal(taken.inputs["pixel_values"], batch.inputs["pixel_values"][counts[0] :])
    assert taken.inputs[COUNT + "image_grid_thw"].tolist() == [1, 0]
    assert all(torch.equal(a, b) for a, b in zip(taken.contents[0], batch.contents[2], strict=True))
    assert [len(c) for c in batch.contents] == [4, 4, 4] and not len(batch.contents[1][2])


def test_scores_of_one_prompt_about_two_images_are_kept_apart():
    processor, _ = llava()
    one, two = records(lists=True)[:2]
    two = {**one, "id": 5, "pictures": two["pictures"]}
    rows = encode_image_texts([one, two], processor, max_length=64)[0]
    assert sequences(rows[0])[0] != sequences(rows[1])[0]
    assert sequences(rows[0]) == sequences(rows[0])


def test_scenes_say_what_is_in_them():
    made = scenes({"size": 300, "pairs": 20})
    told = [r for r in made["train"] if "completion" in r and r["prompt"] == "describe"]
    assert len(told) == 300 and len(made["validation"]) == len(made["test"]) == 75
    for record in made["test"]:
        digits = record["facts"]["digits"]
        assert record["chosen"] == caption(digits) and named(record["chosen"]) == digits
        worse = set(named(record["rejected"]).values())
        assert worse - set(digits.values())  # it names a digit that is not there
        about = int(record["facts"]["question"].split()[-2])
        assert (about in digits.values()) == (record["facts"]["answer"] == " yes")
    yes = sum(r["facts"]["answer"] == " yes" for r in made["test"])
    assert 20 < yes < 55
    assert named("there is a 3 at") == named("") == {}


@pytest.mark.parametrize("method", ["sft", "kd", "dpo"])
def test_methods_run_unchanged_and_transformers_loads_the_student(method, tmp_path):
    result = distill({**SCENES, "method": method, "output": str(tmp_path)})
    wanted = {"exact_match", "hallucination_rate", "yes_no_f1", "yes_rate"}
    assert wanted <= set(result.metrics)
    assert ("rewards/accuracies" in result.metrics) == (method == "dpo")
    folder = tmp_path / "student"
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
    picture = records()[0]["pictures"].read()
    inputs = processor(text=["<image>describe"], images=picture, return_tensors="pt")
    with torch.no_grad():
        close(model(**inputs).logits, result.student.eval()(**inputs).logits, rtol=1e-5, atol=1e-6)
    again = distill({**SCENES, "method": method, "output": str(tmp_path)})
    assert again.metrics == result.metrics


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    """A tiny Qwen2-VL as plain transformers saves it: the model and its processor."""
    folder = tmp_path_factory.mktemp("qwen")
    processor, model = qwen()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["sft", "kd", "dpo", "llava-mod"])
def test_a_model_of_images_in_any_number_of_patches_is_teacher_and_student(method, qwen_folder, tmp_path):
    options = {"experts": 2, "top_k": 1, "every": 2, "shares": [0.25, 0.5, 0.25]} if method == "llava-mod" else {}
    data = {**SCENES["data"], **({"unpaired": True} if method == "llava-mod" else {})}
    models = {"teacher": str(qwen_folder), "student": str(qwen_folder)}
    recipe = {**SCENES, **models, "data": data, "method": method, "options": options, "output": str(tmp_path)}
    result = distill(recipe)
    assert {"exact_match", "hallucination_rate"} <= set(result.metrics)
    processor = AutoProcessor.from_pretrained(tmp_path / "student")
    if method == "llava-mod":
        model = load_vision_language(tmp_path / "student", processor=processor).eval()
    else:
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "student").eval()
    assert ("mlp.experts" in " ".join(dict(model.named_parameters()))) == (method == "llava-mod")
    picture = records()[0]["pictures"].read()
    inputs = processor(
        text=["<|vision_start|><|image_pad|><|vision_end|>describe"], images=picture, return_tensors="pt"
    )
    with torch.no_grad():
        close(model(**inputs).logits, result.student.eval()(**inputs).logits, rtol=1e-5, atol=1e-6)
    assert not torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][-1])


def test_own_files_of_images(tmp_path):
    rows = write_images(tmp_path / "jsonl")
    recipe = {**SCENES, "method": "sft", "teacher": "none", "output": str(tmp_path / "run")}
    recipe["data"] = {"name": str(tmp_path / "jsonl"), "max_length": 64, "eval_limit": 2, "max_new_tokens": 4}
    prepared = get("vision_language").prepare(make(recipe))
    assert sum(len(prepared.split(s)) for s in ("train", "validation", "test")) == 30
    assert prepared.train[0]["pictures"].fields()["pixel_values"].shape == (1, 3, 24, 24)
    with (tmp_path / "jsonl" / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    recipe["data"] = {**recipe["data"], "name": str(tmp_path / "jsonl" / "train.csv")}
    other = get("vision_language").prepare(make(recipe))
    assert other.hashes["data"] == prepared.hashes["data"]
    assert "exact_match" in distill(recipe).metrics


def test_images_in_memory_have_the_hash_of_their_content(tmp_path):
    from PIL import Image

    rows = write_images(tmp_path / "files")
    given = [{**r, "image": Image.open(tmp_path / "files" / r["image"])} for r in rows]
    recipe = {**SCENES, "method": "sft", "data": given}
    from understudy.runs.objects import named as by_name

    values, _ = by_name(recipe)
    values["data"] = {**values["data"], "max_length": 64}
    one, two = (get("vision_language").prepare(make(values)) for _ in range(2))
    assert one.hashes == two.hashes


@pytest.mark.parametrize(
    "row, says",
    [
        ({"image": "none.png"}, r"train record 0 \(train.jsonl line 1\): its image .*none.png is not there"),
        ({"image": 3}, "image is int, not a path, bytes or an image"),
        (
            {"prompt": "<image><image> two ?"},
            "The prompt '<image><image> two .' has 2 places <image> and its record 1 images",
        ),
        ({"images": ["images/1.png"]}, r"train record 0 .*has both image and images"),
        ({"image": {"url": "1.png"}}, "image has url, and neither bytes nor a path"),
        ({"completion": ""}, "has an empty text"),
        ({"prompt": [{"role": "user", "content": "say"}]}, "holds messages"),
        ({"image": "train.jsonl"}, r"train.jsonl is not a readable image"),
    ],
)
def test_records_that_are_wrong_are_named(row, says, tmp_path):
    rows = write_images(tmp_path)
    lines = [{**rows[0], **row}, *rows[1:]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    data = {"name": str(tmp_path), "max_length": 64}
    with pytest.raises(InputError, match=says):
        get("vision_language").prepare(make({**SCENES, "method": "sft", "data": data}))


def test_text_without_images_is_read_too(tmp_path):
    rows = write_images(tmp_path)
    lines = [{k: v for k, v in r.items() if k != "image" or i % 2} for i, r in enumerate(rows)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    data = {"name": str(tmp_path), "max_length": 64, "max_new_tokens": 4}
    result = distill({**SCENES, "method": "sft", "teacher": "none", "data": data, "output": str(tmp_path / "run")})
    assert 0 <= result.metrics["exact_match"] <= 1


def test_a_record_with_an_empty_list_of_images_is_text(tmp_path):
    rows = write_images(tmp_path)
    texts = []
    for nothing in ({"image": []}, {"image": None}, {}):
        first = {k: v for k, v in rows[0].items() if k != "image"} | nothing
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [first, *rows[1:]]))
        found = load_image_texts({"name": str(tmp_path)}, {}, lists=False)
        texts.append([r for r in found.train + found.validation + found.test if "pictures" not in r])
    assert len(texts[0]) == 1 and texts[0] == texts[1] == texts[2]


def test_answers_that_are_labelled_false_are_no_answers_to_learn(tmp_path):
    rows = [
        {"prompt": f"q {i} ?", "completion": " right" if i % 3 else " wrong", "label": int(i % 3 > 0)}
        for i in range(90)
    ]

    def read(lists):
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return load_image_texts({"name": str(tmp_path / "train.jsonl")}, {}, lists=lists)

    found = read(False)
    every = [r["completion"] for r in found.train + found.validation + found.test]
    assert every == [" right"] * 60 and any("completions with label 0 were left out" in note for note in found.notes)
    assert {c for r in read(True).train for c in r["completions"]} == {" right", " wrong"}
    rows = [{**row, "label": 0} for row in rows]
    with pytest.raises(InputError, match="every completion has label 0"):
        read(False)


def test_images_in_memory_may_be_arrays():
    rows = [{"image": np.full((8, 8, 3), i, np.uint8), "prompt": "which ?", "completion": f" {i}"} for i in range(30)]
    from understudy.runs.objects import named as by_name

    values, _ = by_name({**SCENES, "method": "sft", "data": rows})
    found = load_image_texts({"name": values["data"]["name"]}, {}, lists=False)
    assert all("pictures" in r for r in found.train) and len({str(r["pictures"]) for r in found.train}) > 20


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (3, 5, 7), (1, 5, 7)])
def test_arrays_are_images_of_any_layout(shape):
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    whole = np.moveaxis(values, 0, 2) if shape[0] in (1, 3) else values if len(shape) == 3 else values[..., None]
    read = np.asarray(Pictures.of("data", values, None).read()[0])
    assert np.array_equal(read, np.broadcast_to(whole, (5, 7, 3)))


def test_arrays_that_are_no_images_are_named():
    for values in (
        np.zeros((5, 7, 2), np.uint8),
        np.zeros((5, 7, 3)),
        np.zeros(5, np.uint8),
        np.zeros((0, 5), np.uint8),
    ):
        with pytest.raises(InputError, match=r"^record 3: its image is an array of .* give uint8"):
            Pictures.of("record 3", values, None)


def test_completions_beside_pairs_are_kept_where_asked():
    assert {len(r["completions"]) for r in records(lists=True)} == {2}
    assert {len(r["completions"]) for r in records(lists=True, unpaired=True)} == {1, 2}
    assert len(records()) == len(records(lists=True, unpaired=True))


def test_what_does_not_go_with_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="on_policy is not available for vision_language"):
        make({**SCENES, "method": "kd", "on_policy": {"fraction": 1.0}})
    data = {**SCENES["data"], "max_length": 10}
    with pytest.raises(InputError, match=r"fills data\.max_length"):
        get("vision_language").prepare(make({**SCENES, "method": "sft", "data": data}))
    with pytest.raises(InputError, match="'vision_language' is a preference/text task: run a few steps"):
        setting(make({**SCENES, "method": "kd"}), None, 1, None, None)
    with pytest.raises(InputError, match="'width=3' is not one of hidden=N"):
        load_vision_language("llava:width=3", processor=None)


@pytest.mark.parametrize("both_ways", [None, False])
def test_a_model_that_sees_its_answers_is_refused(both_ways, tmp_path):
    """PaliGemma without token types reads later tokens, and with the processor's, of a prompt alone, those of the answer."""
    processor, model = tiny_paligemma(tokenizer(), both_ways)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    recipe = make(
        {**SCENES, "method": "sft", "teacher": "none", "student": str(tmp_path), "output": str(tmp_path / "run")}
    )
    with pytest.raises(InputError, match=r"prefix attention\), which is not supported.*Name a model of causal") as said:
        check_recipe(recipe)
    assert "PaliGemmaForConditionalGeneration" in str(said.value) and "\n" not in str(said.value)
    with pytest.raises(InputError, match="prefix attention"):
        load_vision_language(model, processor=processor)


def test_a_prompt_that_is_repeated_is_read_once(tmp_path):
    def read(rows, lists):
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return load_image_texts({"name": str(tmp_path / "train.jsonl")}, {}, lists=lists)

    asked = [f"what is number {i}?" for i in range(20)]
    found = read([{"prompt": q, "completion": f"{q} a cat"} for q in asked], False)
    assert {r["completion"] for r in found.train} == {" a cat"} and set(asked) >= {r["prompt"] for r in found.train}
    assert any("20 records repeat the prompt in front of the completion" in note for note in found.notes)
    found = read([{"prompt": q, "chosen": f"{q} a cat", "rejected": f"{q} a dog"} for q in asked], True)
    assert {tuple(r["completions"]) for r in found.train} == {(" a cat", " a dog")}
    found = read([{"prompt": q, "completion": f"a cat, {q}"} for q in asked], False)
    assert found.train[0]["completion"].startswith("a cat") and not any(
        "repeat the prompt" in note for note in found.notes
    )
