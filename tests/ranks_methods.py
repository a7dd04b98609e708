"""What two processes do in `test_ranks_methods.py`: runs of methods that hold more than a student.

Run by `torchrun` with a folder. Each run leaves its folder `NAME-WAY`, what is refused leaves its line in `refused.json`.
In float64, so that a difference is a mistake and not rounding, where the parts of a run allow it.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import ViTConfig, ViTForImageClassification

from ranks_cases import METHODS, TEXT, refusal, trainer_of
from understudy import distill
from understudy.data.scored_triples import Triple, write_triples
from understudy.models.sharding import is_sharded
from understudy.training import DistillationTrainer

STEPS = {
    "max_steps": 4,
    "save_steps": 2,
    "optim": "sgd",
    "optim_args": "momentum=0.9",  # a state to resume, and steady: Adam divides by what may be rounding alone
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "per_device_train_batch_size": 16,
}
DIGITS = {"task": "image_classification", "data": {"name": "digits", "limit": 64}, "student": "circular:4,flat"}
UNEVEN = {**DIGITS, "data": {"name": "digits", "limit": 17}}
WORDS = {"task": "preferences", "data": {"name": "word_order", "limit": 40, "vocab_size": 300}, "student": "lm/student"}
RING = {
    "task": "image_generation",
    "data": {"name": "ring8", "size": 256, "samples": 100, "compare_steps": [1], "teacher_steps": 5},
    "student": "denoiser:16,16",
}
RANKER = {"task": "ranking", "data": {"name": "triples.tsv", "vocab_size": 300}}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["norm"], "task_type": "CAUSAL_LM"}
WRAPPED = {"fsdp_config": {"activation_checkpointing": True}}

# name: what the recipe says beside `STEPS`. Names of files are those in the test's folder.
CASES = {
    # a tap on a block that is sharded, and a projector
    "trg": {**DIGITS, "options": {"group": 4, "k": 3, "sigma": 1.0}, "student": "vit", "teacher": "vit-teacher"},
    # both models entered at an inner layer, also by a process that has no example
    "talking-models": {
        **UNEVEN,
        "options": {"rounds": 2, "message_width": 4},
        "student": "vit",
        "teacher": "vit-teacher",
    },
    # memories that all processes write, and two projections
    "crd": {**DIGITS, "options": {"negatives": 20, "width": 8}, "teacher": "conv/student"},
    # another head while training
    "lelp": {**DIGITS, "options": {"subclasses": 2, "strict": False}, "teacher": "conv/student"},
    # auxiliary optimisers; their second update has one example, and a process has none
    "hard": {
        **UNEVEN,
        "options": {"l_min": 2.0, "l_max": 2.5, "spread": 0.3, "max_augmentor_steps": 1},
        "teacher": {"model": "conv/student", "device": "sharded"},
    },
    "tgeo-kd": {**UNEVEN, "options": {"validation": 10}, "teacher": "conv/student"},
    "distillation-dpo": {**RING, "options": {"assistant_optimizer": "sgd", "assistant_rate": 0.1}},
    # companions that follow the student; denoisers save in their own way
    "adpo": {**WORDS, "options": {"anchor": "ema", "decay": 0.5}},
    # a sum over all processes before the first loss
    "kto": {**WORDS, "data": {"name": "answers.jsonl", "max_length": 64, "vocab_size": 300}, "options": {"beta": 1.0}},
    "boot": {**RING, "options": {"ema": 0.5}},
    # rankers save in their own way
    "margin-mse": {**RANKER, "student": "bert:hidden=16,layers=1,heads=2"},
    # adapters, inside wrappers that change the names of layers
    "kd": {**TEXT, "teacher": "lm/student", "student": {"model": "lm/student", "peft": LORA}},
}
AUXILIARY = ("hard", "tgeo-kd", "distillation-dpo")
RESUMED = ("trg", "crd", "lelp", "adpo", "kd")
# Text models are read in float32, and so is what an augmentor sees, which moves by Adam. The factor of DDP is applied to the
# summed loss, one rounding more than the one process has.
TOLERANCE = {"hard": 1e-5, "kd": 1e-6, "adpo": 3e-6, "kto": 1e-6}
RATES = {"margin-mse": 1e-2, "kd": 3.0}


def prepare(root):
    """The models and data that recipes name."""
    trainer = {**STEPS, "save_strategy": "no"}
    distill({**DIGITS, "method": "sft", "student": "circular:6,flat", "trainer": trainer, "output": str(root / "conv")})
    distill({**TEXT, "method": "sft", "trainer": {**trainer, "learning_rate": 0.5}, "output": str(root / "lm")})
    for seed, name in enumerate(("vit", "vit-teacher")):
        torch.manual_seed(seed)
        shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
        width = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        ViTForImageClassification(ViTConfig(**shape, **width)).double().save_pretrained(root / name)
    lines = [Triple(5.0 + i % 3, i % 5 - 9.0, f"sun {i}", f"sea is {i % 7}", f"moon or {i}") for i in range(32)]
    answers = [{"prompt": f"sun {i}", "completion": f" sea {i % 7}", "label": i % 3 == 0} for i in range(30)]
    (root / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    write_triples(root / "triples.tsv", lines)


def recipe(root, name, way, share):
    """The recipe of a case with `share` processes; the whole batch is that of one."""
    values = dict(CASES[name])
    batch = 8 if name in ("adpo", "kd", "kto") else 16
    trainer = {**STEPS, "per_device_train_batch_size": batch // share, "learning_rate": RATES.get(name, 0.1)}
    if way == "fsdp":
        trainer |= {"fsdp": True, **(WRAPPED if name == "kd" else {})}
    for side in ("teacher", "student"):
        spec = values.get(side)
        if isinstance(spec, dict):
            values[side] = {**spec, "model": str(root / spec["model"])}
        elif spec is not None and (root / spec).exists():
            values[side] = str(root / spec)
    if (root / values["data"]["name"]).is_file():
        values["data"] = {**values["data"], "name": str(root / values["data"]["name"])}
    return {**values, "method": name, "trainer": trainer, "output": str(root / f"{name}-{way}")}


def run(root, name, way, share):
    torch.set_default_dtype(torch.float32 if name == "hard" else torch.float64)
    return distill(recipe(root, name, way, share))


class Cut(Exception):
    """What a run is stopped by, after a checkpoint."""


def watched(sharded, first=0, cut=None):
    """A step of training that fails where weights are not held as they should be, or out of place; `cut` ends the run."""

    def stepping(self, *args, **kwargs):
        assert is_sharded(self.model) == sharded and self.state.global_step >= first
        if self.state.global_step == cut:
            raise Cut
        return STEP(self, *args, **kwargs)

    return stepping


STEP = DistillationTrainer.training_step


def launched(root):
    """Every case under DDP, and under FSDP2 where that is possible; some of these are cut in the last step and resumed."""
    for way, name in [(way, name) for way in ("ddp", "fsdp") for name in CASES]:
        if way == "fsdp" and name in AUXILIARY:
            continue
        first = 0
        if way == "fsdp" and name in RESUMED:
            DistillationTrainer.training_step = watched(True, cut=3)
            try:
                run(root, name, way, 2)
            except Cut:
                first = 2
            assert first
        DistillationTrainer.training_step = watched(way == "fsdp", first)
        run(root, name, way, 2)
    DistillationTrainer.training_step = STEP


def refused(root):
    torch.set_default_dtype(torch.float32)

    def trainer(**fsdp_config):
        return lambda: trainer_of(root / "none", METHODS["sft"], 4, 1, 8, fsdp=True, fsdp_config=fsdp_config)

    lines = {name: refusal(lambda n=name: run(root, n, "fsdp", 2)) for name in AUXILIARY}
    lines["lean"] = refusal(trainer(cpu_ram_efficient_loading=True))
    lines["offload"] = refusal(trainer(cpu_offload=True)) if not torch.accelerator.is_available() else None
    if dist.get_rank() == 0:
        (root / "refused.json").write_text(json.dumps(lines))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for part in (launched, refused):
        part(Path(sys.argv[1]))
        dist.barrier()
    dist.destroy_process_group()
