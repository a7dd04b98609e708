"""A small world of prompts and completions, a tokenizer for it, and models that write in it."""

import json

from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from understudy.data import collate_text, encode, train_tokenizer
from understudy.models import CausalLMAdapter

WORDS = "one two three four five six seven eight nine ten".split()


def records(number=16):
    """Count on from a word: `three four five` → ` six seven`."""
    found = []
    for i in range(number):
        n, length = i % 6, 1 + i % 3
        asked, said = WORDS[n : n + length], WORDS[n + length : n + length + 2]
        found.append({"id": i, "prompt": " ".join(asked), "completion": " " + " ".join(said)})
    return found


def write_set(folder, number=16):
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in (("train", number), ("validation", 6), ("test", 6)):
        lines = [json.dumps({k: v for k, v in r.items() if k != "id"}) for r in records(size)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def words(size=300):
    return train_tokenizer([" ".join(WORDS)] * 3, size)


def model(tokenizer, seed=0, hidden=16, deviation=0.3):
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=deviation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def rows(tokenizer, **options):
    return CausalLMAdapter(model(tokenizer, **options), len(tokenizer))


def examples(tokenizer, number=16):
    return encode(records(number), tokenizer, max_length=32, pack=False)[0]


def batches(items, size):
    """Micro-batches in order, as a loader gives them."""
    items = [items[i] for i in range(len(items))]
    return iter([collate_text(items[i : i + size]) for i in range(0, len(items), size)])


def recipe(data, output, **keys):
    """A recipe with a teacher that is trained first, kd without labels, and every second text the student's own."""
    base = {
        "task": "language_modeling",
        "method": "kd",
        "options": {"divergence": "reverse_kl", "temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0},
        "data": {"name": data, "max_length": 32, "vocab_size": 300},
        "teacher": {
            "model": "llama:hidden=16,layers=1,heads=2,context=64",
            "train": {"max_steps": 30, "per_device_train_batch_size": 8},
        },
        "student": "llama:hidden=16,layers=1,heads=2,context=64,init=0.3",
        "trainer": {"max_steps": 12, "per_device_train_batch_size": 4, "save_steps": 4, "logging_steps": 1},
        "on_policy": {"max_new_tokens": 6, "steps": 3},
        "output": str(output),
    }
    return {k: v for k, v in {**base, **keys}.items() if v is not None or k == "teacher"}
