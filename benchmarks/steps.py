"""Whole training steps, ours and TRL's, side by side in one process, as CSV.

    python benchmarks/steps.py > benchmarks/results/steps-cpu.csv

A step is what a user waits for: the batch from the loader, teacher or reference, forward, backward, clipping, optimiser.
Arms take turns, `--repeats` times, so that a drift of the machine touches all alike; `ratio` is the median over the turns of an
arm's step over that of its reference in the same turn. `floor` is the share of the step that its arithmetic would take at the
speed of a large matrix product, measured in the same turn: weights times tokens that cannot be left out, the head on rows
that are trained on, and attention on the sequences as they are.

Text is random words, one token each. `fixed`: prompts and completions of one length; `varied`: completions from a quarter
to seven quarters of it and prompts likewise, where padding costs.
"""

from __future__ import annotations

import argparse
import csv
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments
from transformers.utils import logging as transformers_logging

from understudy.data import IGNORE, Batch, collate_lists, collate_text, encode, encode_lists
from understudy.evaluation import CostMeter
from understudy.evaluation.cost import matmul_peak
from understudy.methods import get as get_method
from understudy.models import CausalLMAdapter, ModelAdapter, SequenceAdapter, load_causal_lm
from understudy.models.layouts import Packing
from understudy.teachers import CachedTeacher, LocalTeacher, Teacher
from understudy.teachers.cache.codecs import DEFAULT, Support
from understudy.teachers.cache.teacher import capture
from understudy.training import DistillationTrainer, OnPolicy, Rollouts, SetupContext, TrainModule
from understudy.training.shapes import Shapes

COLUMNS = (
    "lengths arm against seconds ratio floor prompt completion batch student teacher vocabulary "
    "machine torch transformers trl threads repeats seed"
).split()
REFERENCES = {
    "kd_online": "trl_gkd",
    "kd_sampled": "sft",
    "kd_top_k": "sft",
    "kd_hidden": "sft",
    "kd_sampled_trl": "trl_gkd",
    "on_policy": "trl_gkd_on_policy",
    "on_policy_ahead": "trl_gkd_on_policy",
    "dpo": "trl_dpo",
    "dpo_packed": "trl_dpo",
    "dpo_packed_trl_cached": "trl_dpo_precomputed",
}
"""What an arm is compared with; `A_B` beside an arm `A` is the same measurement against another reference."""


@dataclass
class Data:
    """Records of both kinds of text, and their tokenizer."""

    tokenizer: PreTrainedTokenizerFast
    completions: list[dict[str, Any]]
    pairs: list[dict[str, Any]]


def made(args: argparse.Namespace, varied: bool) -> Data:
    """Random records: a BOS token and words in the prompt, words and EOS in the completion."""
    words = {f"w{i}": i + 3 for i in range(args.vocabulary - 3)}
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **words}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    chance = random.Random(args.seed)

    def text(length: int) -> str:
        size = chance.randint(max(2, length // 4), length * 7 // 4) if varied else length
        return " ".join(f"w{chance.randrange(args.vocabulary - 3)}" for _ in range(size - 1))

    pairs = [
        {"prompt": text(args.prompt), "chosen": " " + text(args.completion), "rejected": " " + text(args.completion)}
        for _ in range(2 * args.batch)
    ]
    completions = [{"id": i, "prompt": p["prompt"], "completion": p["chosen"]} for i, p in enumerate(pairs)]
    return Data(tokenizer, completions, pairs)


class Arm:
    """A trainer, its own or TRL's, moved one step at a time as `train` would."""

    def __init__(self, trainer: Any, ahead: int = 1) -> None:
        self.trainer, self.ahead = trainer, ahead
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        self.batches = self._batches()
        trainer.model.train()

    def _batches(self) -> Iterator[Any]:
        loader = self.trainer.get_train_dataloader()
        while True:
            yield from loader

    def step(self) -> float:
        """Seconds of one step: the mean of as many as texts are written ahead for."""
        start = time.perf_counter()
        for _ in range(self.ahead):
            self._step()
        return (time.perf_counter() - start) / self.ahead

    def _step(self) -> None:
        trainer = self.trainer
        samples, count = trainer.get_batch_samples(self.batches, 1, trainer.args.device)
        trainer.training_step(trainer.model, samples[0], count)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        trainer.state.global_step += 1


@dataclass
class Bench:
    """What arms are made from."""

    args: argparse.Namespace
    data: Data
    folder: Path

    def model(self, teacher: bool = False) -> Any:
        """A new student, or teacher; the same weights for every arm."""
        torch.manual_seed(self.args.seed)
        hidden, layers = self.args.teacher if teacher else self.args.student
        name = f"llama:hidden={hidden},layers={layers},heads={hidden // 64},context=4096"
        return load_causal_lm(name, tokenizer=self.data.tokenizer)

    def ours(
        self, method: str, rows: ModelAdapter, examples: Any, collate: Any, teacher: Any = None, **options: Any
    ) -> Arm:
        """One of our methods, metered as every run is."""
        configured = get_method(method)(**options)
        vocabulary = len(self.data.tokenizer)
        if method == "dpo":
            configured.setup(SetupContext(rows, None, {"train": examples}, collate, vocabulary, self.folder, "bench"))
        args = TrainingArguments(output_dir=str(self.folder), **self.common())
        train_module = TrainModule(rows, configured, Shapes(vocabulary, 0, 0), 1000)
        return Arm(
            DistillationTrainer(train_module, args, examples, collate, teacher=teacher, meter=CostMeter("tokens"))
        )

    def common(self) -> dict[str, Any]:
        """Training arguments of all arms."""
        return {
            "per_device_train_batch_size": self.args.batch,
            "use_cpu": not torch.cuda.is_available(),
            "report_to": "none",
            "disable_tqdm": True,
            "log_level": "error",
            "dataloader_pin_memory": False,
            "learning_rate": 1e-5,
            "gradient_checkpointing": False,
        }

    def trl(self, kind: str, **options: Any) -> dict[str, Any]:
        """A configuration of TRL with checkpointing and half precision off, as everywhere here."""
        longest = 2 * (self.args.prompt + self.args.completion)
        return {"output_dir": str(self.folder / kind), "max_length": longest, "bf16": False, **self.common(), **options}

    # -- arms: a function of its name, and a place in ARMS, in REFERENCES if it is compared, and in `floor`

    def _text(self, method: str, teacher: Teacher | None = None, **options: Any) -> Arm:
        examples, _ = encode(self.data.completions, self.data.tokenizer, max_length=4096, pack=False)
        rows = CausalLMAdapter(self.model(), len(self.data.tokenizer), "auto")
        return self.ours(method, rows, examples, collate_text, teacher, **options)

    def sft(self) -> Arm:
        return self._text("sft")

    def kd_online(self) -> Arm:
        teacher = LocalTeacher(CausalLMAdapter(self.model(True), len(self.data.tokenizer), "auto"), "teacher")
        return self._text("kd", teacher=teacher, temperature=1.0, ce_weight=0.0, kd_weight=1.0, divergence="jsd")

    def _writing(self, ahead: int) -> Arm:
        """GKD on the student's own completions alone, written for `ahead` steps at a time."""
        arm = self.kd_online()
        trainer = arm.trainer
        trainer.rollouts = Rollouts(
            OnPolicy(fraction=1.0, max_new_tokens=self.args.completion, steps=ahead),
            trainer.model.student,
            self.data.tokenizer,
            collate_text,
            seed=self.args.seed,
            total=1000,
            file=self.folder / f"samples-{ahead}.jsonl",
            meter=trainer.meter,
        )
        return Arm(trainer, ahead)

    def on_policy(self) -> Arm:
        return self._writing(1)

    def on_policy_ahead(self) -> Arm:
        return self._writing(8)

    def _cached(self, support: str) -> Arm:
        examples, _ = encode(self.data.completions, self.data.tokenizer, max_length=4096, pack=False)
        folder = self.folder / support.replace(":", "-")
        batch = Batch.from_dict(collate_text(list(examples.records)))
        capture(
            CausalLMAdapter(self.model(True), len(self.data.tokenizer)),
            iter([batch]),
            folder,
            support=Support.parse(support),
            temperature=1.0,
            identity={"classes": len(self.data.tokenizer)},
        )
        return self._text("kd", teacher=CachedTeacher(folder), temperature=1.0, ce_weight=0.0, kd_weight=1.0)

    def kd_sampled(self) -> Arm:
        return self._cached(DEFAULT)

    def kd_top_k(self) -> Arm:
        return self._cached("top_k:50")

    def kd_hidden(self) -> Arm:
        return self._cached("hidden")

    def trl_gkd(self) -> Arm:
        return self._trl_gkd(0.0)

    def trl_gkd_on_policy(self) -> Arm:
        return self._trl_gkd(1.0)

    def _trl_gkd(self, share: float) -> Arm:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        examples, _ = encode(self.data.completions, self.data.tokenizer, max_length=4096, pack=False)

        def collate(items: list[Any]) -> dict[str, Any]:
            batch = collate_text(items, multiple=1)
            asked = [i["input_ids"][: int((i["labels"] == IGNORE).sum())].flip(0) for i in items]
            prompts = torch.nn.utils.rnn.pad_sequence(asked, batch_first=True).flip(1)  # padded on the left
            beside = {"prompts": prompts, "prompt_attention_mask": (prompts != 0).long()}
            return {k: batch[k] for k in ("input_ids", "attention_mask", "labels")} | beside

        options = {"temperature": 1.0, "beta": 0.5, "seq_kd": False, "max_new_tokens": self.args.completion}
        config = GKDConfig(**self.trl(f"gkd-{share}", lmbda=share, **options))
        dataset = Dataset.from_list([{k: r[k].tolist() for k in ("input_ids", "labels")} for r in examples.records])
        dataset.set_format("torch")
        plain = lambda items: collate([{**i, "id": 0, "bytes": 0} for i in items])  # noqa: E731
        return Arm(
            GKDTrainer(
                self.model(),
                self.model(True),
                config,
                data_collator=plain,
                train_dataset=dataset,
                processing_class=self.data.tokenizer,
            )
        )

    def _pairs(self, packing: Packing) -> Arm:
        records = [
            {"id": i, "prompt": p["prompt"], "completions": [p["chosen"], p["rejected"]], "scores": [1.0, 0.0]}
            for i, p in enumerate(self.data.pairs)
        ]
        examples, _ = encode_lists(records, self.data.tokenizer, max_length=4096)
        rows = SequenceAdapter(self.model(), len(self.data.tokenizer), packing)
        return self.ours("dpo", rows, examples, collate_lists)

    def dpo(self) -> Arm:
        return self._pairs("none")

    def dpo_packed(self) -> Arm:
        return self._pairs("auto")

    def _trl_dpo(self, name: str, **options: Any) -> Arm:
        from trl import DPOConfig, DPOTrainer

        config = DPOConfig(**self.trl(name, beta=0.1, **options))
        dataset = Dataset.from_list(self.data.pairs)
        return Arm(
            DPOTrainer(
                self.model(), self.model(), args=config, train_dataset=dataset, processing_class=self.data.tokenizer
            )
        )

    def trl_dpo(self) -> Arm:
        return self._trl_dpo("trl_dpo")

    def trl_dpo_precomputed(self) -> Arm:
        return self._trl_dpo("trl_dpo_precomputed", precompute_ref_log_probs=True)


ARMS = (
    "sft kd_online kd_sampled kd_top_k kd_hidden trl_gkd on_policy on_policy_ahead trl_gkd_on_policy "
    "dpo dpo_packed trl_dpo trl_dpo_precomputed"
).split()


def floor(arm: str, bench: Bench) -> float:
    """Operations of an average step that cannot be left out."""
    lengths = [
        (len(p["prompt"].split()) + 1, len(p["chosen"].split()) + 1, len(p["rejected"].split()) + 1)
        for p in bench.data.pairs
    ]
    preference = "dpo" in arm

    def work(teacher: bool, passes: int) -> float:
        hidden, layers = bench.args.teacher if teacher else bench.args.student
        body = layers * (4 * hidden**2 + 3 * hidden * (hidden * 8 // 3))
        total = 0.0
        for prompt, chosen, rejected in lengths:
            answers = [chosen, rejected] if preference else [chosen]
            tokens, rows = prompt + sum(answers), sum(answers)
            seen = prompt**2 / 2 + sum(prompt * a + a**2 / 2 for a in answers)
            total += 2 * passes * (body * tokens + hidden * bench.args.vocabulary * rows + 2 * layers * hidden * seen)
        return total / len(lengths) * bench.args.batch

    extra = work(False, 1) if arm == "trl_dpo" or "on_policy" in arm else 0.0
    if arm in ("kd_online", "trl_gkd") or "on_policy" in arm:
        extra += work(True, 1)
    if arm == "kd_hidden":
        extra = 2 * bench.args.teacher[0] * bench.args.vocabulary * bench.args.batch * sum(c for _, c, _ in lengths)
        extra /= len(lengths)
    return work(False, 3) + extra


def measure(bench: Bench, arms: list[str], repeats: int) -> dict[str, list[float]]:
    """Seconds of every arm at every turn, and under `peak` the operations a second of a matrix product."""
    standing = {}
    for name in arms:
        standing[name] = getattr(bench, name)()
        standing[name].step()  # warms up, and counts operations where a meter does
        print(f"{name} is ready", file=sys.stderr)
    found: dict[str, list[float]] = {name: [] for name in [*arms, "peak"]}
    for turn in range(repeats):
        matmul_peak.cache_clear()
        found["peak"].append(matmul_peak())
        for name in arms if turn % 2 == 0 else reversed(arms):
            found[name].append(standing[name].step())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--lengths", nargs="+", default=["fixed", "varied"], choices=["fixed", "varied"])
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--student", type=int, nargs=2, default=[256, 4], metavar=("HIDDEN", "LAYERS"))
    parser.add_argument("--teacher", type=int, nargs=2, default=[512, 6], metavar=("HIDDEN", "LAYERS"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers_logging.disable_progress_bar()
    trl = __import__("trl").__version__ if any(a.startswith("trl") for a in args.arms) else ""
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(COLUMNS)
    for lengths in args.lengths:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(args, made(args, lengths == "varied"), Path(folder))
            found = measure(bench, args.arms, args.repeats)
        rows = [(name, REFERENCES.get(name, "")) for name in args.arms]
        rows += [(r, against) for r, against in REFERENCES.items() if r not in ARMS]
        for row, against in rows:
            arm = max((a for a in args.arms if row.startswith(a)), key=len, default="")
            if not arm or (row not in ARMS and against not in found):
                continue
            seconds, peak = found[arm], found["peak"]
            ratio = [a / b for a, b in zip(seconds, found[against], strict=True)] if against in found else []
            share = [floor(arm, bench) / p / s for s, p in zip(seconds, peak, strict=True)]
            sizes = [
                args.prompt,
                args.completion,
                args.batch,
                *("x".join(map(str, s)) for s in (args.student, args.teacher)),
            ]
            where = [
                platform.machine(),
                torch.__version__,
                transformers.__version__,
                trl,
                args.threads,
                args.repeats,
                args.seed,
            ]
            shown = [against, f"{statistics.median(ratio):.3f}"] if ratio else ["", ""]
            numbers = [
                shown[0],
                f"{statistics.median(seconds):.3f}",
                shown[1],
                f"{100 * statistics.median(share):.0f}%",
            ]
            out.writerow([lengths, arm, *numbers, *sizes, args.vocabulary, *where])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
