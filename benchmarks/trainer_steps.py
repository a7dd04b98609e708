"""What a step costs besides its arithmetic: ours against a plain `transformers.Trainer`, side by side in one process, as CSV.

    python benchmarks/trainer_steps.py > benchmarks/results/trainer-steps-cpu.csv

Networks are so small that hardly anything but the loop around them is measured: a perceptron on 8 × 8 digits, and a language
model of two layers of 32 on random tokens. Both sides are given the same arguments, examples and weights, and run
`Trainer.train` whole. The plain side reads a list of dictionaries of tensors through transformers' default collator;
`plain_sft` is transformers' own loss, `plain_kd` overrides `compute_loss` with the teacher's forward pass and the two losses.
Ours keeps what every run keeps: term means, a cost meter and `metrics.jsonl`.

`ms` is CPU time of the process a step, which a busy machine disturbs less than wall time, from step `--skip` on; arms take
turns, `--rounds` times. `ratio` is the median over the rounds of an arm's time over that of its reference in the same round, `low`
and `high` its quartiles.
"""

from __future__ import annotations

import argparse
import copy
import csv
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from understudy.data import IGNORE, TextSet, collate_images, collate_text, load_images
from understudy.evaluation import CostMeter
from understudy.methods import get as get_method
from understudy.models import CausalLMAdapter, ClassifierAdapter
from understudy.models.small import build_small
from understudy.runs.fitting import training_arguments
from understudy.teachers import LocalTeacher
from understudy.training import DistillationTrainer, TrainModule
from understudy.training.shapes import Shapes

COLUMNS = "world arm against ms ratio low high batch steps rounds threads machine processor torch transformers".split()
ARMS = {"plain_sft": "", "sft": "plain_sft", "plain_kd": "", "kd": "plain_kd"}
"""Each arm and what it is compared with."""
VOCABULARY, TOKENS = 256, 64


@dataclass(frozen=True)
class World:
    """Examples, student and teacher of one kind.

    Args:
        adapter: from a network to what our methods train. plain: to a module with a loss.
        records: the examples as the plain side reads them.
    """

    examples: Any
    records: Any
    collate: Any
    student: nn.Module
    teacher: nn.Module
    adapter: Callable[[nn.Module], Any]
    plain: Callable[[nn.Module], nn.Module]
    classes: int
    batch: int


class _Images(nn.Module):
    """A classifier with its loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class _Plain(Trainer):
    """Distillation as one writes it on a plain Trainer."""

    def __init__(self, *args: Any, teacher: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval()

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        output = model(**inputs)
        with torch.no_grad():
            said = self.teacher(**inputs)["logits"]
        mine, labels = output["logits"], inputs["labels"]
        if labels.dim() == 2:
            kept = labels[:, 1:] != IGNORE
            mine, said = mine[:, :-1][kept], said[:, :-1][kept]
        kl = F.kl_div((mine / 2).log_softmax(-1), (said / 2).log_softmax(-1), log_target=True, reduction="batchmean")
        return 0.1 * output["loss"] + 0.9 * 4 * kl


class _Clock(TrainerCallback):
    """Process time between two steps."""

    def __init__(self, first: int) -> None:
        self.first, self.start, self.end = first, 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first:
            self.start = time.process_time()
        self.end = time.process_time()


@cache
def images() -> World:
    splits = load_images({"name": "digits"})
    torch.manual_seed(0)
    student, teacher = (build_small(f"mlp:{width}", 10, splits.shape) for width in (32, 64))
    whole = collate_images([splits.train[i] for i in range(len(splits.train))])
    records = [{k: whole[k][i] for k in ("pixel_values", "labels")} for i in range(len(splits.train))]
    adapter = partial(ClassifierAdapter, classes=10)
    return World(splits.train, records, collate_images, student, teacher, adapter, _Images, 10, 64)


@cache
def texts() -> World:
    torch.manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, (512, TOKENS))
    examples = TextSet([{"input_ids": t, "labels": t, "id": i, "bytes": TOKENS} for i, t in enumerate(tokens)])
    records = [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": t} for t in tokens]

    def network(width: int) -> nn.Module:
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2}
        config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=VOCABULARY, num_hidden_layers=2)
        return LlamaForCausalLM(config)

    adapter = partial(CausalLMAdapter, vocabulary=VOCABULARY, packing="auto")
    return World(examples, records, collate_text, network(32), network(64), adapter, lambda model: model, VOCABULARY, 8)


WORLDS = {"images": images, "texts": texts}


def trainer(world: World, arm: str, args: TrainingArguments, clock: _Clock) -> Trainer:
    """A new trainer of an arm, its student with the weights that all arms begin with."""
    student, teacher = copy.deepcopy(world.student), copy.deepcopy(world.teacher)
    if not arm.startswith("plain"):
        method = get_method(arm)()
        module = TrainModule(world.adapter(student), method, Shapes(world.classes, 0, 0), args.max_steps)
        asked = LocalTeacher(world.adapter(teacher), "teacher") if method.requires.in_steps else None
        file, meter = Path(str(args.output_dir)) / "metrics.jsonl", CostMeter("rows")
        return DistillationTrainer(
            module,
            args,
            world.examples,
            world.collate,
            teacher=asked,
            meter=meter,
            metrics_file=file,
            callbacks=[clock],
        )
    args.remove_unused_columns = False
    kind: Any = partial(_Plain, teacher=world.plain(teacher)) if arm == "plain_kd" else Trainer
    found: Trainer = kind(
        model=world.plain(student),
        args=args,
        train_dataset=world.records,
        data_collator=default_data_collator,
        callbacks=[clock],
    )
    for callback in (PrinterCallback, ProgressCallback):
        found.remove_callback(callback)
    return found


def milliseconds(world: World, arm: str, steps: int, skip: int) -> float:
    """CPU time of one step of an arm."""
    clock = _Clock(skip)
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": steps, "per_device_train_batch_size": world.batch, "save_strategy": "no"}
        args = training_arguments({**options, "use_cpu": True}, Path(folder), 0)
        trainer(world, arm, args, clock).train()
    return 1e3 * (clock.end - clock.start) / (steps - skip)


def processor() -> str:
    """The name of the processor, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=[*WORLDS], choices=[*WORLDS])
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=[*ARMS])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--skip", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(COLUMNS)
    where = [platform.machine(), processor(), torch.__version__, transformers.__version__]
    for name in args.worlds:
        world = WORLDS[name]()
        found: dict[str, list[float]] = {arm: [] for arm in args.arms}
        for turn in range(args.rounds + 1):
            for arm in args.arms if turn % 2 == 0 else reversed(args.arms):
                spent = milliseconds(world, arm, args.steps, args.skip)
                if turn:  # the first round warms up
                    found[arm].append(spent)
        for arm, spent in found.items():
            against, ratio = ARMS[arm], ["", "", ""]
            if against in found:
                ratios = [a / b for a, b in zip(spent, found[against], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                ratio = [f"{value:.3f}" for value in (middle, low, high)]
            sizes = [world.batch, args.steps, args.rounds, args.threads]
            out.writerow([name, arm, against, f"{statistics.median(spent):.3f}", *ratio, *sizes, *where])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
