"""How time and memory grow as rows, vocabulary and cache double, twofold to eightfold. CSV to standard output.

    python benchmarks/growth.py > benchmarks/results/growth-cpu.csv

`rows` and `vocabulary`: the streamed forward KL with its backward pass; memory is the peak above parameters, inputs and
gradients. `cache`: opening a cache and reading batches from it at random; memory is what that adds to the process. Each
cell is a process of its own, and cells of one series follow each other `--repeats` times.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from head import measure, resident

from understudy.targets import Dense
from understudy.teachers.cache.codecs import DEFAULT, Support, decode, encode
from understudy.teachers.cache.store import ShardStore, content_key

COLUMNS = "series factor rows vocabulary examples seconds mib seconds_ratio mib_ratio machine torch threads".split()
FACTORS = (1, 2, 4, 8)
ROWS, VOCABULARY, EXAMPLES, LENGTH = 512, 16_384, 4_000, 64


def head(rows: int, vocabulary: int) -> list[float]:
    """Seconds and peak MiB of one streamed loss."""
    sizes = {"vocabulary": vocabulary, "hidden": 256, "teacher_hidden": 512}
    args = argparse.Namespace(seed=0, device="cpu", dtype="float32", target="head", seconds=0, **sizes)
    return measure("forward_kl", "rowwise", args, rows)


def cache(examples: int, vocabulary: int = VOCABULARY) -> list[float]:
    """Seconds to open a cache of so many texts and read 100 batches of 16, and the MiB that this adds."""
    support = Support.parse(DEFAULT)
    torch.manual_seed(0)
    code = encode(Dense(torch.randn(LENGTH, vocabulary) * 3), support, 1.0, 0)["code"]
    with tempfile.TemporaryDirectory() as name:
        keys = [content_key(torch.tensor([i])) for i in range(examples)]
        store = ShardStore(Path(name), {"format": 1})
        for start in range(0, examples, 500):
            part = keys[start : start + 500]
            store.append(part, [LENGTH] * len(part), {"code": code.repeat(len(part), 1)})
        del store
        before, begin = resident("VmRSS"), time.perf_counter()
        store = ShardStore(Path(name))
        order = torch.randint(examples, (100, 16), generator=torch.Generator().manual_seed(0)).tolist()
        for chosen in order:
            decode(store.read([keys[i] for i in chosen]), support, 1.0, vocabulary, None, [LENGTH] * len(chosen))
        return [time.perf_counter() - begin, (resident("VmRSS") - before) / 2**20]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = {"rows": (ROWS, VOCABULARY, 0), "vocabulary": (ROWS, VOCABULARY, 0), "cache": (0, VOCABULARY, EXAMPLES)}
    grown = {
        (series, f): tuple(
            n * (f if name == series else 1) for name, n in zip(("rows", "vocabulary", "cache"), base, strict=True)
        )
        for series, base in sizes.items()
        for f in FACTORS
    }
    if args.cell:
        series, factor = args.cell[0], int(args.cell[1])
        rows, vocabulary, examples = grown[series, factor]
        print(*(cache(examples) if series == "cache" else head(rows, vocabulary)))
        return
    found: dict[tuple[str, int], list[list[float]]] = {cell: [] for cell in grown}
    for _ in range(args.repeats):
        for series, factor in grown:
            command = [sys.executable, __file__, "--cell", series, str(factor)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[series, factor].append([float(v) for v in done.stdout.split()])
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(COLUMNS)
    middle = {cell: [statistics.median(column) for column in zip(*runs, strict=True)] for cell, runs in found.items()}
    where = [platform.machine(), torch.__version__, torch.get_num_threads()]
    for (series, factor), (seconds, mib) in middle.items():
        ratios = [a / b if b else float("nan") for a, b in zip((seconds, mib), middle[series, 1], strict=True)]
        values = [f"{seconds:.4f}", f"{mib:.1f}", *(f"{r:.2f}" for r in ratios)]
        out.writerow([series, factor, *grown[series, factor], *values, *where])


if __name__ == "__main__":
    main()
