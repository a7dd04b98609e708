"""Small recipes, and a run of them in a process of its own that is killed on the way."""

import gc
import multiprocessing
import os
import signal

# Children are forked from a server that has imported the heavy modules already.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["understudy.runs.run", "transformers.trainer", "openai"])

DIGITS = {
    "task": "image_classification",
    "data": {"name": "digits", "limit": 64},
    "teacher": {"model": "mlp:16", "train": {"max_steps": 30, "per_device_train_batch_size": 32}},
    "student": "mlp:8",
    "trainer": {"max_steps": 40, "per_device_train_batch_size": 16, "save_steps": 5, "logging_steps": 1},
}
TEXT = {
    "task": "language_modeling",
    "data": {"name": "stdlib", "characters": 60_000, "max_length": 32, "vocab_size": 300},
    "teacher": {
        "model": "llama:hidden=16,layers=1,heads=2",
        "train": {"max_steps": 10, "per_device_train_batch_size": 8},
    },
    "student": "llama:hidden=16,layers=1,heads=2",
    "trainer": {"max_steps": 12, "per_device_train_batch_size": 4, "save_steps": 3, "logging_steps": 1},
}
CONV = {**DIGITS, "teacher": {**DIGITS["teacher"], "model": "convnet:4"}, "student": "convnet:2"}
OPTIONS = {
    "sft": {},
    "kd": {"divergence": "jsd"},
    "pld": {"temperature": 2.0},
    "taid": {"alpha": 0.2, "distil_ratio": 0.8},
    "dhkd": {"head": "nonlinear", "align": "all"},
    "trg": {"group": 4, "k": 3},
    "tgeo-kd": {"every": 2, "validation": 20},
    "hard": {
        "augmentor": "affine",
        "l_min": 2.0,
        "l_max": 2.5,
        "augmentor_memory": 2,
        "spread": 0.3,
        "augmentor_rate": 0.1,
    },
    "lelp": {"subclasses": 2, "fit_on": "teacher_train", "alpha": 0.1, "strict": False},
}


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "student" / "model.safetensors")


def killed_run(recipe, step, moment):
    """A run in a forked process that kills itself (SIGKILL) at a step: before it, after it, or inside a checkpoint.

    Returns whether the kill landed.
    """
    process = FORKED.Process(target=_run_until, args=(recipe, step, moment))
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


def _run_until(recipe, step, moment):
    import torch

    from understudy import distill
    from understudy.training import DistillationTrainer
    from understudy.training import checkpoint as ck

    torch.set_num_threads(1)
    gc.freeze()
    micro_step, seal = DistillationTrainer.training_step, ck.seal

    def stepping(self, *args, **kwargs):
        now = self.state.global_step == step
        if now and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        loss = micro_step(self, *args, **kwargs)
        if now and moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    def sealing(folder):
        if moment == "saving" and int(folder.name.rsplit("-", 1)[1]) >= step:
            os.kill(os.getpid(), signal.SIGKILL)
        seal(folder)

    DistillationTrainer.training_step, ck.seal = stepping, sealing
    distill(recipe)
