"""Plans against runs: predicted and measured peak memory, operations and time of a zoo of small recipes, as CSV.

    python benchmarks/plan.py > benchmarks/results/plan-cpu.csv

Each recipe is trained in a process of its own (Linux), after a smaller run has loaded every library. Measured is the
whole run, checks, checkpoint and evaluation included: its largest resident size above what the process holds when data
are ready and no model is loaded. Predicted is the plan without its line for the process. Nothing in the plan is fitted
to these recipes. The C library gives freed memory back at once here (ALLOCATOR below). Seconds are those of a training step; a machine that does other work too lengthens them.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = (
    "recipe predicted_mib measured_mib memory_error_percent predicted_gflop measured_gflop flop_error_percent "
    "predicted_seconds measured_seconds percent_of_floor machine python torch transformers threads seed"
).split()
RECORDS = 100
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""What is freed goes back at once. As it comes, glibc keeps holes where aligned tensors were and may not fill them again:
the process is larger than its tensors ever were, by an amount that depends on their order."""


def text(
    vocabulary: int, length: int, batch: int, teacher: str | None, student: Any, method: str = "kd", **trainer: Any
) -> dict[str, Any]:
    """A language-modelling recipe on random words."""
    recipe: dict[str, Any] = {
        "task": "language_modeling",
        "method": method,
        "student": {"model": f"llama:{student}"} if isinstance(student, str) else student,
        "data": {"vocabulary": vocabulary, "max_length": length},
        "trainer": {"per_device_train_batch_size": batch, "per_device_eval_batch_size": 8, "max_steps": 4, **trainer},
    }
    return recipe | ({"teacher": f"llama:{teacher}"} if teacher is not None else {})


def images(name: str, teacher: str, student: str, batch: int, limit: int = 600) -> dict[str, Any]:
    """An image recipe."""
    data = {"name": name, "limit": limit} | ({"augment": False} if name == "cifar10" else {})
    trainer = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": 64, "max_steps": 4}
    return {
        "task": "image_classification",
        "method": "kd",
        "teacher": teacher,
        "student": student,
        "data": data,
        "trainer": trainer,
    }


WIDE = "hidden=256,layers=4,heads=4"
ADAPTERS = {"r": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ZOO: dict[str, dict[str, Any]] = {
    "text-1k": text(1_000, 128, 16, WIDE, "hidden=128,layers=4,heads=4"),
    "text-8k": text(8_000, 128, 8, WIDE, "hidden=128,layers=2,heads=4"),
    "text-32k": text(32_000, 64, 8, WIDE, "hidden=192,layers=2,heads=4"),
    "text-64k": text(64_000, 64, 8, WIDE, "hidden=128,layers=2,heads=4"),
    "text-long": text(2_000, 512, 4, WIDE, "hidden=128,layers=4,heads=4"),
    "text-batch": text(4_000, 64, 48, WIDE, "hidden=128,layers=3,heads=4"),
    "text-deep-sft": text(2_000, 64, 8, None, "hidden=384,layers=10,heads=6", method="sft"),
    "text-accumulated": text(8_000, 64, 8, WIDE, "hidden=256,layers=4,heads=4", gradient_accumulation_steps=2),
    "text-checkpointing": text(2_000, 256, 8, WIDE, "hidden=192,layers=8,heads=4", gradient_checkpointing=True),
    "text-sgd": text(16_000, 64, 8, WIDE, "hidden=256,layers=4,heads=4", optim="sgd"),
    "text-lora": text(8_000, 128, 8, WIDE, {"model": "llama:hidden=256,layers=6,heads=4", "peft": ADAPTERS}),
    "text-cached": text(32_000, 64, 8, WIDE, "hidden=192,layers=2,heads=4"),
    "image-mlp": images("digits", "mlp:2048,2048", "mlp:1024,1024", 64),
    "image-convnet": images("cifar10", "convnet:64", "convnet:32", 64),
    "image-resnet": images("cifar10", "resnet20", "resnet14:32", 64),
}
"""Recipes by name. Those of CIFAR-10 need UNDERSTUDY_DATA."""


def random_words(folder: Path, vocabulary: int, length: int, seed: int) -> None:
    """A tokenizer of `vocabulary` words, and records that fill a row each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(vocabulary - 3))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "tokenizer")
    chance = random.Random(seed)
    lines = [json.dumps({"text": " ".join(chance.choices(words[3:], k=length))}) for _ in range(RECORDS)]
    (folder / "records").mkdir()
    (folder / "records" / "train.jsonl").write_text("\n".join(lines))


def made(name: str, folder: Path, seed: int) -> dict[str, Any]:
    """The recipe called `name`, with its data in `folder`."""
    recipe: dict[str, Any] = json.loads(json.dumps(ZOO[name]))
    vocabulary = recipe["data"].pop("vocabulary", None)
    if vocabulary is not None:
        random_words(folder, vocabulary, recipe["data"]["max_length"], seed)
        recipe["data"] |= {"name": str(folder / "records"), "tokenizer": str(folder / "tokenizer")}
    return recipe | {"output": str(folder / "run"), "seed": seed}


def status(key: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(key)).split()[1]) * 1024


def measure(name: str, seed: int) -> dict[str, float]:
    """Run a recipe and plan it."""
    from understudy import distill, plan
    from understudy.runs import run
    from understudy.runs.capture import capture_recipe
    from understudy.runs.recipe import make

    start: list[int] = []
    load = run.load_teacher

    def watched(*args: Any) -> Any:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        start.append(status("VmRSS"))
        return load(*args)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipe = made(name, folder, seed)
        if name.endswith("-cached"):
            capture_recipe(make(recipe), folder / "cache")
            recipe["options"] = {"temperature": 1.0}  # at which a cache is captured
            recipe["teacher"] = {"model": recipe["teacher"], "cache": str(folder / "cache")}
        distill(_smaller(recipe, folder))
        run.load_teacher = watched
        distill(recipe)
        measured = status("VmHWM") - start[-1]
        cost = json.loads((folder / "run" / "evaluation.json").read_text())["cost"]
        found = plan(recipe)
    micro = recipe["trainer"].get("gradient_accumulation_steps", 1)
    rows = found.rows / found.steps / micro
    return {
        "predicted_mib": (found.peak - found.memory["process"]) / 2**20,
        "measured_mib": measured / 2**20,
        "predicted_gflop": (sum(w["flops"] for w in found.work.values())) / micro / 1e9,
        "measured_gflop": sum(cost["flops_per_step"].values()) / 1e9,
        "predicted_seconds": found.step_seconds / micro,
        "measured_seconds": rows / cost["rows_per_second"],
        "percent_of_floor": found.percent_of_floor,
        "threads": cost["threads"],
    }


def _smaller(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A run of the same kind that is small: it loads what is loaded once, however large a run is."""
    text_task = recipe["task"] == "language_modeling"
    small = "llama:hidden=16,layers=1,heads=2" if text_task else "mlp:8"
    student = {"model": small, **{k: v for k, v in recipe["student"].items() if k == "peft"}} if text_task else small
    data = (
        {"name": "stdlib", "characters": 40_000, "max_length": 32, "vocab_size": 300}
        if text_task
        else {"name": "digits"}
    )
    trainer = {**recipe["trainer"], "max_steps": 2, "per_device_train_batch_size": 2}
    teacher = {"teacher": small} if recipe.get("teacher") else {}
    kept = {k: v for k, v in recipe.items() if k in ("task", "method", "seed")}
    return {**kept, **teacher, "student": student, "data": data, "trainer": trainer, "output": str(folder / "warm")}


def percent(predicted: float, measured: float) -> float:
    """Signed, of what was measured."""
    return 100 * (predicted - measured) / measured


def cell(name: str, seed: int = 0) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--cell", name, "--seed", str(seed)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **ALLOCATOR}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["memory_error_percent"] = percent(found["predicted_mib"], found["measured_mib"])
    found["flop_error_percent"] = percent(found["predicted_gflop"], found["measured_gflop"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(ZOO), choices=list(ZOO))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(measure(args.cell, args.seed)))
        return
    import torch
    import transformers

    versions = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    out = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    out.writeheader()
    errors: dict[str, list[float]] = {"memory_error_percent": [], "flop_error_percent": []}
    for name in args.recipes:
        found = cell(name, args.seed)
        for key, values in errors.items():
            values.append(abs(found[key]))
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.items()}
        facts = {**versions, "transformers": transformers.__version__, "seed": args.seed}
        out.writerow({"recipe": name, **shown, **facts})
        sys.stdout.flush()
    for label, of in (("median", statistics.median), ("worst", max)):
        out.writerow({"recipe": label, **{k: f"{of(v):.4g}" for k, v in errors.items()}})


if __name__ == "__main__":
    main()
