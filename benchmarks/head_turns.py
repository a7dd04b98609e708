"""Streamed divergences against the bare products, in turns within one process, as CSV: one line a turn, seconds each.

    python benchmarks/head_turns.py > benchmarks/results/head-turns-cpu.csv

A process of `head.py` has its own memory and its own moment; here all arms share both, in an order drawn anew each turn,
so that the ratio within a turn is of one machine. The first turn warms up and is not written.
"""

from __future__ import annotations

import argparse
import csv
import platform
import random
import sys
import time

import torch
from head import path_of

from understudy.targets import Projected

NAMES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=131_072)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--teacher-hidden", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    hidden, weight = torch.randn(args.rows, args.hidden) * 0.5, torch.randn(args.vocabulary, args.hidden) * 0.1
    student = Projected(hidden.requires_grad_(), weight.requires_grad_())
    wide = args.teacher_hidden
    teacher = Projected(torch.randn(args.rows, wide) * 0.5, torch.randn(args.vocabulary, wide) * 0.05)
    arms = {"bare": path_of("bare", ""), **{name: path_of("rowwise", name) for name in NAMES}}
    draw, out = random.Random(args.seed), csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["turn", "rows", *arms, "machine", "torch", "threads", "seed"])
    where = [platform.machine(), torch.__version__, torch.get_num_threads(), args.seed]
    for turn in range(args.turns + 1):
        seconds = {}
        for name in draw.sample(list(arms), len(arms)):
            student.hidden.grad = student.weight.grad = None
            start = time.perf_counter()
            arms[name](student, teacher)
            seconds[name] = f"{time.perf_counter() - start:.3f}"
        if turn:
            out.writerow([turn, args.rows, *(seconds[name] for name in arms), *where])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
