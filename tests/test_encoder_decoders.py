"""Encoder-decoder models as students and teachers: the encoder reads the prompt, rows are the completion's tokens."""

import json

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration, set_seed

from own_texts import examples, recipe, rows, words, write_set
from understudy import distill
from understudy.data import IGNORE, Batch, collate_text, encode
from understudy.errors import InputError
from understudy.generation.decoding import sample
from understudy.models import EncoderDecoderAdapter


def t5(tokenizer, seed=0):
    set_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer) + 5,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_factor=2.0,
    )
    return T5ForConditionalGeneration(config)


def folder(path, tokenizer, seed=0):
    t5(tokenizer, seed).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_rows_are_those_of_the_model_itself_and_of_a_causal_student():
    tokenizer = words()
    adapter = EncoderDecoderAdapter(t5(tokenizer).double().eval(), len(tokenizer))
    items = [examples(tokenizer, 6)[i] for i in range(6)]
    batch = Batch.from_dict(collate_text(items))
    found, causal = adapter(batch, features=True), rows(tokenizer)(batch)
    assert found.signal.logits.shape == (batch.num_items, len(tokenizer))
    assert len(causal.signal.hidden) == len(found.features) == batch.num_items
    own = []
    for item in items:
        start = int((item["labels"] != IGNORE).int().argmax())
        prompt = torch.cat([item["input_ids"][:start], torch.tensor([tokenizer.eos_token_id])])
        own.append(adapter.model(input_ids=prompt[None], labels=item["input_ids"][None, start:]).logits[0])
    torch.testing.assert_close(
        found.signal.logits, torch.cat(own)[:, : len(tokenizer)], rtol=1e-4, atol=1e-5, check_dtype=False
    )


def test_it_writes_as_generate_does():
    tokenizer = words()
    model = t5(tokenizer).eval()
    prompts = [[1, 20], [1, 30, 31, 32]]
    settings = {"most": 5, "vocabulary": len(tokenizer) + 5, "ends": {tokenizer.eos_token_id}, "pad": 0}
    found = sample(model, prompts, torch.arange(2), temperature=0.0, **settings)
    for prompt, text in zip(prompts, found, strict=True):
        whole = model.generate(torch.tensor([[*prompt, tokenizer.eos_token_id]]), do_sample=False, max_new_tokens=5)
        assert whole[0, 1:].tolist() == text
    with pytest.raises(InputError, match="set it to 0 or 1"):
        sample(model, prompts, torch.arange(2), teacher=model, teacher_share=0.5, **settings)


LLAMA = "llama:hidden=16,layers=1,heads=2,context=64"


@pytest.mark.parametrize(
    "method,teacher,student",
    [("sft", None, "t5"), ("kd", "t5", "t5"), ("gkd", "t5", LLAMA), ("gkd", LLAMA, "t5"), ("seqkd", "t5", LLAMA)],
)
def test_each_side_may_be_one(method, teacher, student, tmp_path):
    tokenizer = words()
    names = {
        "t5": lambda side: folder(tmp_path / side, tokenizer, seed=int(side == "student")),
        LLAMA: lambda side: LLAMA,
    }
    options = {"ce_weight": 0.0, "kd_weight": 1.0} if method == "kd" else {}
    values = recipe(write_set(tmp_path / "set"), tmp_path / "run", method=method, options=options, on_policy=None)
    values["trainer"] = {"max_steps": 20, "per_device_train_batch_size": 16, "learning_rate": 0.005, "logging_steps": 1}
    if teacher is None:
        values.pop("teacher")
    else:
        values["teacher"] = names[teacher]("teacher")
    values["student"] = names[student]("student")
    if method in ("gkd", "seqkd"):
        values["on_policy"] = {"max_new_tokens": 5}
    result = distill(values)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result.metrics["nll"] > 0 and sum(losses[-3:]) < sum(losses[:3])
    again = distill(values)  # the saved student is loaded again
    assert type(again.student) is type(result.student)


def test_a_text_without_a_prompt_is_refused():
    tokenizer = words()
    items = encode([{"id": 0, "text": "one two three"}], tokenizer, max_length=16, pack=False)[0]
    adapter = EncoderDecoderAdapter(t5(tokenizer), len(tokenizer))
    with pytest.raises(InputError, match="a text here has none"):
        adapter(Batch.from_dict(collate_text([items[0]])))
