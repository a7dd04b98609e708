"""The worked plans of `scaling.md`: an 8B student of a 70B teacher in the public shapes of Llama 3.1."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from understudy.planning import markdown, plan

VOCABULARY = 128_256
SHAPES = {  # hidden, inner, layers, heads
    "llama-3.1-8b": (4096, 14_336, 32, 32),
    "llama-3.1-70b": (8192, 28_672, 80, 64),
}
TRAINER = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": True,
    "max_steps": 1000,
}
PLANS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "One GPU: adapters, and a teacher that answered before": (
        {
            "student": {"peft": {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}},
            "teacher": {"cache": "cache"},
        },
        {"gpu": "h100", "rows": 1e8},
    ),
    "Eight GPUs: the whole student, a live teacher, both sharded": (
        {"teacher": {"device": "sharded"}, "trainer": {"fsdp": "full_shard"}},
        {"gpu": "h100", "gpus": 8, "rows": 1e9},
    ),
    "Eight GPUs, from a cache": (
        {"teacher": {"cache": "cache"}, "trainer": {"fsdp": "full_shard"}},
        {"gpu": "h100", "gpus": 8, "rows": 1e9},
    ),
    "64 GPUs": (
        {"teacher": {"device": "sharded"}, "trainer": {"fsdp": "full_shard", "gradient_accumulation_steps": 1}},
        {"gpu": "h100", "gpus": 64, "rows": 1e10},
    ),
}


def write_shapes(folder: Path) -> None:
    """A configuration of each model, without weights."""
    for name, (hidden, inner, layers, heads) in SHAPES.items():
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))


def recipe(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The recipe of all plans, with one plan's changes."""
    return {
        "task": "language_modeling",
        "method": "kd",
        "student": {"model": str(folder / "llama-3.1-8b"), **changes.get("student", {})},
        "teacher": {"model": str(folder / "llama-3.1-70b"), **changes.get("teacher", {})},
        "data": {"name": "stdlib", "max_length": 4096},
        "trainer": {**TRAINER, **changes.get("trainer", {})},
    }


def worked() -> str:
    """The plans as Markdown."""
    parts = []
    with tempfile.TemporaryDirectory() as place:
        write_shapes(Path(place))
        for title, (changes, where) in PLANS.items():
            found = plan(recipe(Path(place), changes), **where)
            options = " ".join(f"--{k} {v:g}" if isinstance(v, float) else f"--{k} {v}" for k, v in where.items())
            notes = markdown(found).replace(place, "…")
            parts.append(f"### {title}\n\n`understudy plan recipe.yaml {options}`\n\n{notes}")
    return "\n\n".join(parts)


def current(page: str) -> str:
    """`scaling.md` with the plans as they are computed now."""
    begin, end = "<!-- plans -->", "<!-- end of plans -->"
    before, rest = page.split(begin)
    return before + begin + "\n\n" + worked() + "\n\n" + end + rest.split(end)[1]


if __name__ == "__main__":
    file = Path(__file__).parent / "scaling.md"
    file.write_text(current(file.read_text()))
