r"""The signal frontier: bytes a token of each cache support against what the student loses. CSV to standard output.

    python benchmarks/frontier.py > benchmarks/results/frontier-cpu.csv
    python benchmarks/frontier.py --teacher lm_stories260k --write 6000 --limit 4800 --steps 600 --seeds 4 \
        --supports top_k:12 sampled:12 sampled:20 --student llama:hidden=64,layers=2,heads=4 \
        > benchmarks/results/frontier-own-cpu.csv

Every support teaches the same student on the same tokens in the same order; `none` is cross-entropy alone, `live` the
teacher itself. `gap_percent` is what is lost of the gain that the live teacher brings over none, in KL to the teacher on
the test split, at the same seed. `cosine` is that of the gradient of one update against the live teacher's, for a
student that was taught by labels alone (`early`) and for one that the live teacher has taught (`late`). With `--write` the
texts are the teacher's own: it is then as sure of the next token as a teacher is on text of its kind.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from understudy import distill, losses
from understudy.data import Batch
from understudy.data.folders import find
from understudy.evaluation.rows import RowStatistics, row_statistics
from understudy.models import ModelAdapter
from understudy.runs.capture import capture_recipe, describe
from understudy.runs.recipe import Recipe, make
from understudy.runs.run import load_teacher
from understudy.streaming import rowwise
from understudy.tasks import Prepared
from understudy.tasks import get as get_task
from understudy.teachers import CachedTeacher, LocalTeacher

COLUMNS = (
    "support seed bytes_per_token test_kl gap_percent test_nll cosine_early cosine_late seconds_per_run "
    "vocabulary steps machine torch threads"
).split()
SUPPORTS = ("hidden", "top_k:50", "top_k:12", "sampled:100B", "sampled:38B", "sampled:20B")


def recipe(args: argparse.Namespace, folder: Path, name: str, seed: int, **changes: Any) -> Recipe:
    """The one setting; a learning rate and steps that suit the student of labels alone."""
    data = {"name": args.data, "max_length": 128, "pack": not args.write, "limit": args.limit}
    if args.data == "lm_domains":
        data["domains"] = args.domains
    if args.teacher:
        changes = {"teacher": {"model": args.teacher}, **changes}
    return make(
        {
            "task": "language_modeling",
            "data": data,
            "student": args.student,
            "method": "kd",
            "options": {"temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0},
            "trainer": {"max_steps": args.steps, "per_device_train_batch_size": 8, "save_strategy": "no"},
            "seed": seed,
            "output": str(folder / f"{name}-{seed}"),
            **changes,
        }
    )


@torch.no_grad()
def write(teacher: str, number: int, file: Path) -> None:
    """Texts of 128 tokens that the teacher writes at temperature 1, one a line."""
    where = str(find(teacher) or teacher)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(where).eval(), AutoTokenizer.from_pretrained(where)
    torch.manual_seed(0)
    texts: list[str] = []
    while len(texts) < number:
        begin = torch.full((128, 1), tokenizer.bos_token_id)
        settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 128, "pad_token_id": tokenizer.eos_token_id}
        found = model.generate(begin, attention_mask=torch.ones_like(begin), **settings)
        texts += tokenizer.batch_decode(found, skip_special_tokens=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:number]))


class Judge:
    """The test split, the teacher on it, and one update's gradient."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.recipe = recipe(args, folder, "judge", 0)
        self.task = get_task("language_modeling")
        self.prepared: Prepared = self.task.prepare(self.recipe)
        teacher = load_teacher(self.recipe, self.task, self.prepared, folder, False, None)
        assert teacher is not None
        self.teacher = LocalTeacher(teacher, "teacher")

    def batch(self, split: str, start: int, size: int) -> Batch:
        examples = self.prepared.split(split)
        chosen = [examples[i] for i in range(start, min(start + size, len(examples)))]
        return Batch.from_dict(self.prepared.collate(chosen))

    def student(self, folder: Path) -> ModelAdapter:
        model: ModelAdapter = self.task.model(self.recipe.student, self.prepared, folder / "student")
        return model.eval()

    @torch.no_grad()
    def test(self, student: ModelAdapter, most: int = 256) -> tuple[float, float]:
        """KL to the teacher and −log-likelihood, nats a token."""
        parts = []
        for start in range(0, min(most, len(self.prepared.test)), 16):
            batch = self.batch("test", start, 16)
            parts.append(row_statistics(student(batch).signal, self.teacher(batch).signal, batch.row_labels))
        found = RowStatistics.join(parts)
        return float(found.kl.mean()), float(found.nll.mean())

    def gradient(self, student: ModelAdapter, teacher: LocalTeacher | CachedTeacher) -> Tensor:
        """That of the mean divergence over 64 training texts, all parameters in a row."""
        student.zero_grad()
        for start in range(0, 64, 16):
            batch = self.batch("train", start, 16)
            rowwise(losses.forward_kl, student(batch).signal, teacher(batch).signal).sum().backward()
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="lm_domains", help="A text set; `stdlib` needs no UNDERSTUDY_DATA.")
    parser.add_argument(
        "--limit", type=int, default=800, help="Training texts; all are captured, each is seen once or so."
    )
    parser.add_argument("--domains", nargs="+", default=["news_brown", "telephone_dialogue"], help="Of lm_domains.")
    parser.add_argument("--teacher", help="Default: the one that belongs to the data.")
    parser.add_argument("--write", type=int, help="Learn from so many texts that --teacher writes, in place of --data.")
    parser.add_argument("--student", default="llama:hidden=96,layers=2,heads=4")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--supports", nargs="+", default=list(SUPPORTS))
    parser.add_argument("--folder", type=Path, default=None, help="Where runs and caches are kept (else thrown away).")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    if args.write and not args.teacher:
        parser.error("--write needs --teacher: name the model that is to write.")
    if args.write:
        args.data = str(folder.resolve() / "texts.jsonl")
        write(args.teacher, args.write, Path(args.data))
    judge, out = Judge(args, folder), csv.writer(sys.stdout, lineterminator="\n")
    teacher = judge.recipe.teacher
    assert teacher is not None
    known = {"model": str(folder / "teacher" / "student") if teacher.train else teacher.model}
    caches = {}
    for support in args.supports:
        caches[support] = folder / f"cache-{_file(support)}"
        capture_recipe(recipe(args, folder, "capture", 0, teacher=known), caches[support], support)
    out.writerow(COLUMNS)
    for seed in range(args.seeds):
        arms: dict[str, dict[str, Any]] = {"none": {"method": "sft", "options": {}}, "live": {"teacher": known}}
        arms |= {s: {"teacher": {**known, "cache": str(path)}} for s, path in caches.items()}
        runs = {name: distill(recipe(args, folder, _file(name), seed, **arm)).folder for name, arm in arms.items()}
        students = {name: judge.student(run) for name, run in runs.items()}
        found = {name: judge.test(student) for name, student in students.items()}
        gain = found["none"][0] - found["live"][0]
        for name, (kl, nll) in found.items():
            gap, seconds = 100 * (kl - found["live"][0]) / gain, _cost(runs[name])["seconds"]
            values = [f"{kl:.5f}", f"{gap:.2f}", f"{nll:.5f}", "", "", f"{seconds:.1f}"]
            size = ""
            if name in caches:
                size, cached = f"{describe(caches[name])['bytes_per_row']:.1f}", CachedTeacher(caches[name])
                for i, state in ((3, "none"), (4, "live")):
                    pair = [judge.gradient(students[state], teacher) for teacher in (judge.teacher, cached)]
                    values[i] = f"{torch.cosine_similarity(pair[0], pair[1], dim=0):.5f}"
            where = [judge.prepared.classes, args.steps, platform.machine(), torch.__version__, torch.get_num_threads()]
            out.writerow([name, seed, size, *values, *where])
            sys.stdout.flush()


def _file(name: str) -> str:
    return name.replace(":", "-")


def _cost(folder: Path) -> dict[str, Any]:
    cost: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())["cost"]
    return cost


if __name__ == "__main__":
    main()
