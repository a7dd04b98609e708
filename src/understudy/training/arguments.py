"""Arguments of transformers' Trainer with this project's defaults, and a stop that can be resumed from."""

from __future__ import annotations

import copy
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from understudy.errors import InputError
from understudy.models.sharding import anywhere


def training_arguments(values: Mapping[str, Any], output: Path, seed: int) -> TrainingArguments:
    """Transformers' arguments with this project's defaults; a bad value is one line."""
    defaults: dict[str, Any] = {
        "save_steps": 200,
        "save_total_limit": 2,
        "logging_steps": 10,
        "report_to": "none",
        # DeepSpeed finds its device by itself, a CPU too, and is left aside without a word where one is asked for.
        "use_cpu": not torch.cuda.is_available() and not values.get("deepspeed"),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "log_level": "error",
    }
    try:
        return TrainingArguments(output_dir=str(output), seed=seed, **{**defaults, **copy.deepcopy(dict(values))})
    except (TypeError, ValueError) as error:
        raise InputError(f"Bad trainer options: {' '.join(str(error).split())}") from error


def total_steps(args: TrainingArguments, examples: int) -> int:
    """Optimizer steps of a run over `examples`."""
    if args.max_steps > 0:
        return int(args.max_steps)
    batch = args.train_batch_size * max(1, args.world_size) * args.gradient_accumulation_steps
    left_out = examples % (batch // args.gradient_accumulation_steps) if args.dataloader_drop_last else 0
    return int(-(-(examples - left_out) // batch) * args.num_train_epochs)


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM finish the step, write a checkpoint and stop; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def ask(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        try:
            self.before = [signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)]
        except ValueError:  # signals belong to the main thread; elsewhere the caller handles them
            self.before = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.asked = anywhere(self.asked, args.device)  # ranks are told at different moments and must stop at one step
        if self.asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), self.before, strict=False):
            signal.signal(number, handler)
