"""Small recipes, and a run of them in a process of its own that can be killed."""

import sys

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
OPTIONS = {
    "sft": {},
    "kd": {"divergence": "jsd"},
    "pld": {"temperature": 2.0},
    "taid": {"alpha": 0.2, "distil_ratio": 0.8},
    "dhkd": {"head": "nonlinear", "align": "all"},
}


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "student" / "model.safetensors")


if __name__ == "__main__":
    import json

    from understudy import distill

    distill(json.loads(sys.argv[1]))
