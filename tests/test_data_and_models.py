"""Data and models: splits, masks, tokenizers, adapters of many architectures, real data where there is any."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from understudy import InputError
from understudy.data import Batch, augment, collate_text, encode, load_images, load_text, train_tokenizer
from understudy.models import CausalLMAdapter, ClassifierAdapter, find_head, load_classifier, load_small, save_small
from understudy.streaming import project


def test_augmentation_depends_on_the_example_alone():
    pixels, ids = torch.rand(6, 3, 8, 8), torch.arange(6) * 7
    whole = augment(pixels, ids, seed=1, epoch=2)
    parts = torch.cat([augment(pixels[i : i + 1], ids[i : i + 1], seed=1, epoch=2) for i in range(6)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, augment(pixels, ids, seed=1, epoch=3))
    many = augment(torch.arange(64.0).view(1, 1, 8, 8).expand(400, 1, 8, 8), torch.arange(400), seed=0, epoch=0)
    assert len({x.numpy().tobytes() for x in many}) > 100  # 81 shifts, mirrored or not


def test_embedded_sets_split_without_overlap():
    splits = load_images({"name": "digits", "limit": 100})
    ids = [set(s.ids.tolist()) for s in (splits.train, splits.validation, splits.test)]
    assert len(splits.train) == 100 and len(splits.test) == 600
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])
    assert load_images({"name": "digits", "limit": 100}).hash == splits.hash
    assert len(load_images({"name": "digits", "limit": 9, "for_teacher": True}).train) > 1000


def pictures(folder, each):
    """Random images of two classes in folders; the generator, to draw further ones."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for i in range(each):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return rng


def test_folders_of_images(tmp_path):
    pictures(tmp_path, 10)
    splits = load_images({"name": str(tmp_path)})
    assert splits.classes == ["cat", "dog"] and splits.shape == (3, 8, 8) and len(splits.notes) == 2


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the quick brown fox jumps over the lazy dog 日本 🙂"] * 20, 300)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=30).filter(lambda t: "\ud800" not in t), min_size=1, max_size=5))
def test_packing_loses_no_byte(texts):
    tokenizer = train_tokenizer(["plain"], 300)
    texts = [t for t in texts if t.encode("utf-8", "ignore").decode() == t] or ["x"]
    rows, counts = encode([{"id": i, "text": t} for i, t in enumerate(texts)], tokenizer, max_length=10_000, pack=True)
    assert counts.rows == 1
    assert sum(r["bytes"] for r in rows.records) == sum(len(t.encode()) for t in texts)


def test_prompts_are_masked_and_completions_end_once(tokenizer):
    records = [{"id": 0, "prompt": "the quick", "completion": " brown fox"}]
    rows, counts = encode(records, tokenizer, max_length=64, pack=False)
    row = rows[0]
    prompt = 1 + len(tokenizer("the quick", add_special_tokens=False)["input_ids"])
    assert (row["labels"][:prompt] == -100).all() and (row["labels"][prompt:] != -100).all()
    assert (
        row["input_ids"][0] == tokenizer.bos_token_id and row["input_ids"].tolist().count(tokenizer.eos_token_id) == 1
    )
    assert row["bytes"] == len(" brown fox") and counts.trained == len(row["labels"]) - prompt


def test_conversations_train_on_the_assistant_alone(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    try:
        messages = [{"role": "user", "content": "quick"}, {"role": "assistant", "content": "lazy dog"}]
        rows, _ = encode([{"id": 0, "messages": messages}], tokenizer, max_length=64, pack=False)
    finally:
        tokenizer.chat_template = None
    kept = rows[0]["labels"][rows[0]["labels"] != -100]
    assert tokenizer.decode(kept) == "lazy dog</s>"


def test_truncation_is_counted_and_sided(tokenizer):
    records = [{"id": 0, "prompt": "the " * 30, "completion": "dog"}, {"id": 1, "prompt": "the", "completion": " dog"}]
    _, end = encode(records, tokenizer, max_length=12, pack=False)
    assert (end.truncated, end.dropped, end.rows) == (1, 1, 1)
    _, start = encode(records, tokenizer, max_length=12, pack=False, truncation="start")
    assert (start.truncated, start.dropped, start.rows) == (1, 0, 2)


def test_text_files_in_every_convention(tmp_path):
    for name, row in (("a", {"text": "x"}), ("b", {"prompt": "p", "completion": "c", "extra": 1})):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for _ in range(20)))
        splits = load_text({"name": str(path)})
        assert len(splits.train) == 16 and len(splits.validation) == len(splits.test) == 2
        assert "extra" not in splits.train[0]


def tiny(kind):
    import transformers as tf

    common = {
        "vocab_size": 48,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    configs = {
        "llama": lambda: tf.LlamaConfig(**common),
        "gpt2": lambda: tf.GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2),
        "qwen2": lambda: tf.Qwen2Config(**common, num_key_value_heads=1),
        "gemma2": lambda: tf.Gemma2Config(**common, num_key_value_heads=1, head_dim=8, final_logit_softcapping=5.0),
        "cohere": lambda: tf.CohereConfig(**common, logit_scale=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        "granite": lambda: tf.GraniteConfig(**common, logits_scaling=4.0),
        "gpt_neox": lambda: tf.GPTNeoXConfig(**common),
    }
    return tf.AutoModelForCausalLM.from_config(configs[kind]()).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma2", "cohere", "granite", "gpt_neox"])
def test_rows_equal_the_models_own_logits(kind):
    model = tiny(kind)
    ids = torch.randint(3, 40, (2, 6))
    labels = ids.clone()
    labels[0, :3] = -100
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, torch.arange(2))
    rows = CausalLMAdapter(model, vocabulary=40)
    assert rows.padding == 8
    with torch.no_grad():
        own = model(input_ids=ids).logits[:, :-1][labels[:, 1:] != -100][:, :40]
        torch.testing.assert_close(project(rows(batch).signal), own, rtol=1e-4, atol=1e-5)


def test_lora_students_also_on_the_head(tokenizer):
    pytest.importorskip("peft")
    rows = CausalLMAdapter(tiny("llama"), vocabulary=40)
    rows.add_adapters({"r": 2, "target_modules": ["q_proj", "lm_head"]})
    ids = torch.randint(3, 40, (2, 6))
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, torch.arange(2))
    signal = rows(batch).signal
    signal.logits.sum().backward()
    names = [n for n, p in rows.named_parameters() if p.grad is not None]
    assert names and all("lora" in n for n in names)


def test_small_networks_round_trip_and_show_features(tmp_path):
    for name in ("mlp:8,8", "convnet:4", "resnet8:4"):
        model = load_classifier(name, classes=5, input_shape=(3, 16, 16)).eval()
        save_small(model, tmp_path / name.replace(":", "-"))
        back = load_small(tmp_path / name.replace(":", "-")).eval()
        pixels = torch.rand(2, 3, 16, 16)
        assert torch.equal(model(pixels), back(pixels))
        rows = ClassifierAdapter(model, 5)
        out = rows(Batch({"pixel_values": pixels}, torch.tensor([0, -100]), torch.arange(2)), features=True)
        torch.testing.assert_close(find_head(rows)(out.features), out.signal.logits)
        assert out.signal.rows == 1 and not find_head(rows)._forward_pre_hooks


@pytest.mark.parametrize("outputs", [4, 7])
def test_a_module_of_other_classes_is_refused(outputs):
    batch = Batch({"pixel_values": torch.rand(2, 1, 4, 4)}, torch.tensor([0, 4]), torch.arange(2))
    rows = ClassifierAdapter(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, outputs)), 5)
    with pytest.raises(InputError, match=rf"Sequential gives \(2, {outputs}\) for 2 examples of 5 classes"):
        rows(batch)


@pytest.mark.slow
def test_pretrained_resnet_on_real_images(data_folder):
    splits = load_images({"name": "cifar10"})
    model = load_classifier("cifar10_resnets/resnet20", classes=10, input_shape=(3, 32, 32))
    from understudy.models import normalisation

    rows = ClassifierAdapter(model.eval(), 10, normalisation(model))
    test = splits.test.select(slice(0, 500))
    with torch.no_grad():
        batch = Batch({"pixel_values": test.pixels.float() / 255}, test.labels, test.ids)
        accuracy = (rows(batch).signal.logits.argmax(-1) == test.labels).float().mean()
    assert accuracy > 0.88


@pytest.mark.slow
def test_a_real_teacher_folder_teaches_a_student_on_text(data_folder, tmp_path):
    from understudy import distill

    result = distill(
        task="language_modeling",
        method="taid",
        output=str(tmp_path / "run"),
        data={"name": "lm_domains", "domains": ["telephone_dialogue"], "limit": 20, "max_length": 32},
        student="llama:hidden=16,layers=1,heads=2",
        options={"alpha": 0.3},
        trainer={"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
    )
    assert result.metrics["teacher_bits_per_byte"] < result.metrics["bits_per_byte"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    assert student.config.vocab_size == len(tokenizer)


@pytest.mark.slow
def test_resnet56_teaches_a_small_student_on_cifar10(data_folder, tmp_path):
    from understudy import distill

    result = distill(
        task="image_classification",
        method="kd",
        output=str(tmp_path / "run"),
        student="resnet8:4",
        data={"name": "cifar10", "limit": 64},
        eval_split="validation",
        trainer={"max_steps": 3, "per_device_train_batch_size": 16, "warmup_steps": 0},
    )
    assert result.metrics["teacher_accuracy"] > 0.9


def test_the_data_type_asked_for_is_that_of_a_new_small_network_too():
    sizes = {"classes": 3, "input_shape": (1, 8, 8)}
    assert {p.dtype for p in load_classifier("convnet:4", dtype="bfloat16", **sizes).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_classifier("convnet:4", **sizes).parameters()} == {torch.float32}


def test_the_hash_of_data_covers_what_the_teacher_alone_saw(tmp_path):
    rng = pictures(tmp_path, 20)
    spec = {"name": str(tmp_path), "limit": 3}
    before = load_images(spec)
    shown = {p.numpy().tobytes() for part in (before.train, before.validation, before.test) for p in part.pixels}
    file = next(
        f
        for f in sorted(tmp_path.glob("*/*.png"))
        if np.asarray(Image.open(f)).transpose(2, 0, 1).tobytes() not in shown
    )
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(file)
    after = load_images(spec)
    assert after.train.pixels.equal(before.train.pixels) and after.test.pixels.equal(before.test.pixels)
    assert after.hash != before.hash


def test_padding_side_and_length(tokenizer):
    rows, _ = encode(
        [{"id": 0, "text": "fox"}, {"id": 1, "text": "the lazy dog"}], tokenizer, max_length=32, pack=False
    )
    batch = collate_text([rows[0], rows[1]], pad_id=tokenizer.pad_token_id)
    assert batch["input_ids"].shape[1] % 8 == 0
    assert ((batch["attention_mask"] == 0) <= (batch["labels"] == -100)).all()
