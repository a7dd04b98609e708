"""Streamed divergences against the bare products, in turns within one process, as CSV: one line a turn, seconds each.

    python benchmarks/head_turns.py > benchmarks/results/head-turns-cpu.csv

A process of `head.py` has its own memory and its own moment; here all arms share both, in an order drawn anew each turn,
so that the ratio within a turn is of one machine. The first turn warms up and is not written. At the end stderr has each
divergence's ratio to bare: the median of the turns and its 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import csv
import platform
import random
import statistics
import sys
import time

import torch
from head import path_of, sides

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
    args.device, args.dtype = "cpu", "float32"
    student, teacher = sides(args, args.rows)
    arms = {"bare": path_of("bare", ""), **{name: path_of("rowwise", name) for name in NAMES}}
    draw, out = random.Random(args.seed), csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["turn", "rows", *arms, "machine", "torch", "threads", "seed"])
    where = [platform.machine(), torch.__version__, torch.get_num_threads(), args.seed]
    taken: list[dict[str, float]] = []
    for turn in range(args.turns + 1):
        seconds = {}
        for name in draw.sample(list(arms), len(arms)):
            student.hidden.grad = student.weight.grad = None
            start = time.perf_counter()
            arms[name](student, teacher)
            seconds[name] = time.perf_counter() - start
        if turn:
            taken.append(seconds)
            out.writerow([turn, args.rows, *(f"{seconds[name]:.3f}" for name in arms), *where])
            sys.stdout.flush()
    for name in NAMES:
        ratios = [seconds[name] / seconds["bare"] for seconds in taken]
        medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(4000))
        low, high = medians[100], medians[-101]
        print(f"{name}: {statistics.median(ratios):.2f} of bare, {low:.2f} to {high:.2f}", file=sys.stderr)


if __name__ == "__main__":
    main()
