"""What two processes do in `test_ranks.py`: trainers and whole runs, each with the result that one process gives.

Run by `torchrun` with a folder and the name of a part; every case leaves `NAME.pt` or `NAME.txt` there.
"""

import copy
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaConfig, LlamaForCausalLM

from understudy import distill
from understudy.data import Batch, collate_text
from understudy.errors import InputError
from understudy.methods.dhkd import DHKD
from understudy.methods.kd import KD
from understudy.methods.sft import SFT
from understudy.methods.taid import TAID
from understudy.models import CausalLMAdapter
from understudy.models.sharding import is_sharded, usable, whole_state
from understudy.streaming import rowwise
from understudy.teachers import LocalTeacher
from understudy.training import DistillationTrainer, TrainModule
from understudy.training.arguments import training_arguments
from understudy.training.shapes import probe

METHODS = {"sft": SFT(), "kd": KD(divergence="reverse_kl"), "taid": TAID(alpha=0.3, distil_ratio=0.7)}
OWN = DHKD(head="linear", align="none")  # batch statistics would couple rows
WAYS = {"ddp": {}, "fsdp": {"fsdp": True}}


def model(tied, dropout=0.0):
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        attention_dropout=dropout,
    )
    return CausalLMAdapter(LlamaForCausalLM(config).double(), 38)  # two rows of the head are padding


def texts(examples):
    items = []
    for i in range(examples):
        ids = torch.randint(0, 38, (4 + i,))
        labels = ids.clone()
        labels[: i // 2] = -100
        items.append({"input_ids": ids, "labels": labels, "id": i, "bytes": 0})
    return items


def trainer_of(folder, method, micro, accumulate, examples, tied=True, sharded=False, **trainer):
    torch.manual_seed(3)
    student, teacher, items = model(tied), model(False, dropout=0.5).train(), texts(examples)
    values = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulate,
        "save_strategy": "no",
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.05,
        "logging_steps": 1,
        **trainer,
    }
    args = training_arguments(values, Path(folder), 0)
    sides, example = {"student": student, "teacher": teacher}, Batch.from_dict(collate_text(items[:2]))
    shapes = probe(method, 38, sides, {side: {} for side in sides}, example)
    train_module = TrainModule(student, method, shapes, 6).double()
    local = LocalTeacher(teacher, "teacher", args.device, sharded=sharded)
    return DistillationTrainer(train_module, args, items, collate_text, teacher=local)


# name: (method, micro-batch of one process, accumulation, examples); two processes take half of the micro-batch.
# 13 leaves 5 for the last round (3 and 2), 9 leaves one: a process has nothing and only keeps the other company.
CASES = {
    "sft": (METHODS["sft"], 8, 1, 13),
    "kd": (METHODS["kd"], 4, 2, 13),
    "taid": (METHODS["taid"], 4, 2, 9),
}


def end_of(trainer):
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {**whole_state(trainer.model), "norms": torch.tensor([float(n) for n in norms], dtype=torch.float64)}


def case(folder, name, share, **more):
    method, micro, accumulate, examples = CASES[name]
    return trainer_of(folder, method, micro // share, accumulate, examples, **more)


def save(folder, name, value):
    if dist.get_rank() == 0:
        torch.save(value, folder / f"{name}.pt")


def trainers(folder):
    for way, arguments in WAYS.items():
        for name in CASES:
            trainer = case(folder, name, 2, **arguments)
            save(folder, f"{way}-{name}", end_of(trainer))
            assert is_sharded(trainer.model) == (way == "fsdp")
        save(folder, f"{way}-own", end_of(trainer_of(folder, OWN, 4, 1, 13, **arguments)))
    save(folder, "refused", refusal(lambda: trainer_of(folder, DHKD(align="all"), 4, 1, 13, fsdp=True)))
    trainer = case(folder, "kd", 2, sharded=True, **WAYS["fsdp"])
    save(folder, "sharded-kd", end_of(trainer))
    assert is_sharded(trainer.teacher.model) and trainer.teacher.model.training  # its mode is as it was


def refusal(make):
    try:
        make()
    except InputError as error:
        return str(error)
    return ""


def collectives(folder):
    """How often weights are gathered in a step, with the head's product in one tile and in many."""
    counts = []
    for size in (1 << 20, 40 * 8):
        kept, rowwise.__kwdefaults__["tile_bytes"] = rowwise.__kwdefaults__["tile_bytes"], size
        trainer = case(folder, "sft", 2, max_steps=1, logging_steps=5, **WAYS["fsdp"])
        with CommDebugMode() as seen:
            trainer.train()
        rowwise.__kwdefaults__["tile_bytes"] = kept
        counts.append({str(k): n for k, n in seen.get_comm_counts().items()})
    save(folder, "collectives", counts)


def alone(folder):
    """A part of a sharded model by itself, and the teacher by its own forward pass."""
    trainer = case(folder, "sft", 2, max_steps=1, **WAYS["fsdp"])
    before = copy.deepcopy(trainer.model.student)
    trainer.train()
    batch = Batch.from_dict(collate_text(texts(3)))
    state = {k.removeprefix("student."): v for k, v in whole_state(trainer.model).items()}
    with usable(trainer.model), torch.no_grad():
        rows = trainer.model.student(batch).signal
        logits = rows.hidden @ rows.weight.T
    if dist.get_rank() == 0:
        before.load_state_dict(state)
        with torch.no_grad():
            plain = before(batch).signal
        torch.testing.assert_close(logits, plain.hidden @ plain.weight.T)
    assert is_sharded(trainer.model)
    half = case(folder, "sft", 2, max_steps=1, bf16=True, **WAYS["fsdp"])
    found = []
    half.model.register_forward_hook(lambda module, inputs, sums: found.extend(sums.losses.values()))
    half.train()
    # Hidden states are half, the loss and its sum are not.
    assert found and all(v.dtype.itemsize >= 4 for v in found)


TEXT = {
    "task": "language_modeling",
    "data": {"name": "stdlib", "characters": 40_000, "max_length": 32, "vocab_size": 300},
    "student": "llama:hidden=16,layers=1,heads=2",
    "method": "kd",
    "trainer": {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1},
}
PAIRS = {
    "task": "preferences",
    "method": "dpo",
    "data": {"name": "word_order", "limit": 40, "vocab_size": 300},
    "trainer": {"max_steps": 3, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.5},
}


def recipe(base, teacher, output, share, **trainer):
    size = base["trainer"].get("per_device_train_batch_size", 8) // share
    values = {**base["trainer"], "per_device_train_batch_size": size, **trainer}
    return {**base, **teacher, "output": str(output), "trainer": values}


def text_recipe(folder, name, share, **trainer):
    teacher = {"teacher": {"model": str(folder / "teacher"), "device": "sharded"}}
    return recipe(TEXT, teacher, folder / name, share, **trainer)


def pairs_recipe(folder, name, share, **trainer):
    return recipe({**PAIRS, "student": str(folder / "start")}, {}, folder / name, share, **trainer)


SGD = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.1}


def runs(folder):
    evaluated = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_steps": 3}
    distill(text_recipe(folder, "text-fsdp", 2, fsdp=True, **SGD, **evaluated))
    distill(pairs_recipe(folder, "pairs-fsdp", 2, fsdp=True))
    distill(text_recipe(folder, "whole", 2, fsdp=True))


def stopped(folder):
    """The second rank alone is asked to stop: all stop at that step, and go on as if they had not."""

    def stopping(self, *args, **kwargs):
        if self.state.global_step == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(self, *args, **kwargs)

    step_of, DistillationTrainer.training_step = DistillationTrainer.training_step, stopping
    result = distill(text_recipe(folder, "stopped", 2))
    DistillationTrainer.training_step = step_of
    assert result.interrupted and (folder / "stopped" / "checkpoints" / "checkpoint-4" / "complete.json").is_file()
    distill(text_recipe(folder, "stopped", 2))
    distill(text_recipe(folder, "whole-ddp", 2))


def killed(folder):
    """The second rank kills itself before a step that no checkpoint holds yet."""
    step_of = DistillationTrainer.training_step

    def stepping(self, *args, **kwargs):
        if self.state.global_step == 5 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step_of(self, *args, **kwargs)

    DistillationTrainer.training_step = stepping
    distill(text_recipe(folder, "cut", 2, fsdp=True))


def resumed(folder):
    distill(text_recipe(folder, "cut", 2, fsdp=True))


ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def narrow(trainer_arguments):
    """In float32; without a GPU transformers gives all processes the same data, so the micro-batch is that of one."""
    global model
    wide, double = model, TrainModule.double
    model, TrainModule.double = lambda *a, **k: wide(*a, **k).float(), lambda self: self
    try:
        trainer = trainer_of("unused", METHODS["taid"], 2, 2, 9, **trainer_arguments)
    finally:
        model, TrainModule.double = wide, double
    trainer.train()
    trainer.ranks.make_whole()
    return whole_state(trainer.model)


def partitioned(folder):
    from understudy.training import zero

    zero.check = lambda args: None
    save(folder, "zero3", narrow({"deepspeed": ZERO3}))


PARTS = {
    "zero3": (partitioned,),
    "first": (trainers, collectives, alone, runs, stopped, killed),
    "second": (resumed,),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2] != "zero3":  # DeepSpeed makes its own
        dist.init_process_group("gloo")
    for part in PARTS[sys.argv[2]]:
        part(Path(sys.argv[1]))
        dist.barrier()
    dist.destroy_process_group()
