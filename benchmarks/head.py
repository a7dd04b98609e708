"""Head and divergence: time, peak memory and gradient error of the plain and the streaming path, as CSV.

python benchmarks/head.py --vocabulary 32000 --rows 512 2048 > benchmarks/results/head-cpu.csv
"""

from __future__ import annotations

import argparse
import csv
import platform
import resource
import subprocess
import sys
import time

import torch

from understudy import losses
from understudy.streaming import plain, rowwise
from understudy.targets import Projected

COLUMNS = (
    "loss path rows vocabulary hidden teacher_hidden seconds peak_mib gradient_error machine torch threads seed".split()
)


def measure(name: str, path: str, rows: int, vocabulary: int, hidden: int, wide: int, seed: int) -> dict[str, object]:
    """One cell, in this process: its peak memory is above what the parameters and inputs take."""
    torch.manual_seed(seed)
    h, weight = torch.randn(rows, hidden) * 0.5, torch.randn(vocabulary, hidden) * 0.1
    target = Projected(torch.randn(rows, wide) * 0.5, torch.randn(vocabulary, wide) * 0.05)
    student = Projected(h.requires_grad_(), weight.requires_grad_())
    function, loss = {"plain": plain, "rowwise": rowwise}[path], getattr(losses, name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    function(loss, student, target).sum().backward()
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        "loss": name,
        "path": path,
        "rows": rows,
        "vocabulary": vocabulary,
        "hidden": hidden,
        "teacher_hidden": wide,
        "seconds": round(seconds, 3),
        "peak_mib": round(peak),
        "gradient_error": f"{error(function, loss, seed):.2e}",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


def error(function: object, loss: object, seed: int) -> float:
    """Relative error of the hidden states' gradient in bfloat16 against float64, at a KL of about 0.01."""
    torch.manual_seed(seed)
    h, weight = torch.randn(64, 64, dtype=torch.bfloat16), torch.randn(2000, 64, dtype=torch.bfloat16) * 0.1
    teacher = (h.float() + 0.15 * torch.randn(64, 64)).bfloat16()
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        leaf = h.to(dtype).detach().clone().requires_grad_()
        values = function(loss, Projected(leaf, weight.to(dtype)), Projected(teacher.to(dtype), weight.to(dtype)))  # type: ignore[operator]
        values.sum().backward()
        grads.append(leaf.grad.double())
    return float((grads[0] - grads[1]).norm() / grads[1].norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--teacher-hidden", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    if args.cell:
        name, path, rows = args.cell
        out.writerow(measure(name, path, int(rows), args.vocabulary, args.hidden, args.teacher_hidden, args.seed))
        return
    out.writeheader()
    sys.stdout.flush()
    for rows in args.rows:
        for name in ("forward_kl", "reverse_kl", "jsd"):
            for path in ("plain", "rowwise"):  # each in a process of its own, since peak memory never falls
                subprocess.run([sys.executable, __file__, *sys.argv[1:], "--cell", name, path, str(rows)], check=True)


if __name__ == "__main__":
    main()
