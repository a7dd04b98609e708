"""Head and divergence: time, peak memory and gradient error of every path, as CSV.

    python benchmarks/head.py > benchmarks/results/head-cpu.csv
    python benchmarks/head.py --device cuda --dtype bfloat16 > benchmarks/results/head-gpu.csv
    python benchmarks/head.py --target top_k:50 --paths bare plain rowwise > benchmarks/results/head-top-k-cpu.csv

Paths: `bare` (the four matrix products alone), `plain`, `rowwise` (ours), `triton` (ours with its kernels, on a GPU),
`liger` and `trl` (their chunked losses, where they are installed). Each cell is a process of its own, which warms up once
and then takes the median of its passes for `--seconds`, three at least: the gradient's pages are new in every pass, and
what that takes varies by half. Cells of one setting follow each other `--repeats` times, so that a drift of the machine
touches all alike. Memory is the peak resident size above parameters, inputs and the parameters' gradients; on a GPU, what
the allocator held at its peak above the same. With `--target` the teacher is what a cache keeps of it, made before the
clock starts, and *bare* is the three products of the student's head. The error is that of the hidden states' gradient in
bfloat16 against float64, at three KLs.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from understudy import losses
from understudy.streaming import logits_of, plain, rowwise
from understudy.targets import Projected, Sampled, Target, top_k

COLUMNS = (
    "loss target path rows vocabulary hidden teacher_hidden seconds peak_mib error_kl_1 error_kl_0.1 error_kl_0.01 "
    "machine torch threads seed"
).split()
PATHS = ("bare", "plain", "rowwise", "triton", "liger", "trl")


def forget_peak() -> None:
    """Begin a new peak of the resident size (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(what: str = "VmHWM") -> int:
    """Bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what))
    return int(line.split()[1]) * 1024


def occupied(device: str) -> int:
    """Bytes in use; the next `peak` counts from here."""
    if device == "cpu":
        forget_peak()
        return resident("VmRSS")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(device: str) -> int:
    """Bytes at the peak."""
    return resident() if device == "cpu" else torch.cuda.max_memory_allocated()


def liger(name: str) -> Callable[[Projected, Projected], Tensor]:
    """The sum of the same divergence by Liger's chunked loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[name]
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)

    def call(student: Projected, teacher: Projected) -> Tensor:
        labels = torch.zeros(len(student.hidden), dtype=torch.long, device=student.hidden.device)
        return loss(student.hidden, student.weight, teacher.hidden, teacher.weight, labels) * len(labels)

    return call


def trl(name: str) -> Callable[[Projected, Projected], Tensor]:
    """The sum of the same divergence by TRL's tiled loss, as its distillation trainer calls it."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[name]

    def call(student: Projected, teacher: Projected) -> Tensor:
        all_rows = torch.ones(1, len(student.hidden), device=student.hidden.device)
        sides = student.hidden[None], teacher.hidden[None], student.weight, teacher.weight
        total: Tensor = _chunked_divergence_loss(*sides, all_rows, beta, num_items_in_batch=1)[0]
        return total

    return call


def kept(teacher: Projected, target: str) -> Target:
    """The whole teacher (`head`), its k likeliest classes (`top_k:50`), or as many draws (`sampled:32`)."""
    kind, _, number = target.partition(":")
    if kind == "head":
        return teacher
    if kind == "top_k":
        return top_k(logits_of(teacher), int(number))
    log_p = logits_of(teacher).float().log_softmax(-1)
    ids = torch.multinomial(log_p.exp(), int(number), replacement=True)
    return Sampled(ids, torch.full(ids.shape, 1 / int(number), device=ids.device), log_p.gather(-1, ids), 1.0)


def path_of(path: str, name: str) -> Callable[[Projected, Any], Any]:
    """A function of both sides that does the work of one path, backward pass included."""
    if path == "bare":

        def bare(student: Projected, teacher: Target) -> None:
            hidden, weight = student.hidden.detach(), student.weight.detach()
            if isinstance(teacher, Projected):
                slope = teacher.hidden @ teacher.weight.T
                torch.mm(hidden, weight.T, out=slope)
            else:
                slope = hidden @ weight.T
            student.hidden.grad, student.weight.grad = slope @ weight, slope.T @ hidden

        return bare
    if path in ("liger", "trl"):
        forward = {"liger": liger, "trl": trl}[path](name)
    else:
        functions = {"plain": plain, "rowwise": partial(rowwise, kernels=False), "triton": rowwise}
        function, loss = functions[path], getattr(losses, name)
        forward = lambda student, teacher: function(loss, student, teacher).sum()  # noqa: E731
    return lambda student, teacher: (forward(student, teacher) * 0.5).backward()


def sides(args: argparse.Namespace, rows: int) -> tuple[Projected, Projected]:
    """A student that wants gradients, and a teacher."""
    torch.manual_seed(args.seed)

    def made(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape).mul_(scale).to(args.device, getattr(torch, args.dtype))

    hidden, weight = made(rows, args.hidden, scale=0.5), made(args.vocabulary, args.hidden, scale=0.1)
    wide = args.teacher_hidden
    teacher = Projected(made(rows, wide, scale=0.5), made(args.vocabulary, wide, scale=0.05))
    return Projected(hidden.requires_grad_(), weight.requires_grad_()), teacher


def measure(name: str, path: str, args: argparse.Namespace, rows: int) -> list[float]:
    """Seconds and peak MiB of one cell."""
    student, whole = sides(args, rows)
    with torch.no_grad():
        teacher = kept(whole, args.target)
    del whole
    for leaf in (student.hidden, student.weight):
        leaf.grad = torch.zeros_like(leaf)
    work = path_of(path, name)
    seconds: list[float] = []
    extra: list[float] = []
    while len(seconds) < 4 or sum(seconds) < args.seconds:  # the first one warms up
        student.hidden.grad = student.weight.grad = None
        before, start = occupied(args.device), time.perf_counter()
        work(student, teacher)
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        gradients = sum(leaf.itemsize * leaf.numel() for leaf in (student.hidden, student.weight))
        extra.append((peak(args.device) - before - gradients) / 2**20)
    return [statistics.median(seconds[1:]), statistics.median(extra[1:])]


def errors(name: str, path: str, target: str, seed: int, device: str) -> list[float]:
    """Relative error of the gradient in bfloat16 against float64, at KL about 1, 0.1 and 0.01."""
    if path == "bare":
        return []
    found = []
    for distance in (1.6, 0.5, 0.15):
        torch.manual_seed(seed)
        h, weight = torch.randn(64, 64, dtype=torch.bfloat16), torch.randn(2000, 64, dtype=torch.bfloat16) * 0.1
        teacher, grads = (h.float() + distance * torch.randn(64, 64)).bfloat16(), []
        one = kept(Projected(teacher, weight), target)
        for dtype, way in ((torch.bfloat16, path), (torch.float64, "plain")):
            leaf = h.to(device, dtype, copy=True).requires_grad_()
            wide = weight.to(device, dtype).requires_grad_()
            taught = Projected(teacher.to(device, dtype), wide.detach()) if target == "head" else one.to(device)
            path_of(way, name)(Projected(leaf, wide), taught)
            assert leaf.grad is not None
            grads.append(leaf.grad.double())
        found.append(float((grads[0] - grads[1]).norm() / grads[1].norm()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=131_072)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 128, 512, 2048])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--teacher-hidden", type=int, default=2048)
    parser.add_argument("--losses", nargs="+", default=["forward_kl"])
    parser.add_argument("--target", default="head", help="head, or what a cache keeps: top_k:50, sampled:32.")
    parser.add_argument("--paths", nargs="+", help="default: all that run on the device")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="a process times passes for so long, three at least"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        name, path, rows = args.cell
        print(*measure(name, path, args, int(rows)), *errors(name, path, args.target, args.seed, args.device))
        return
    on_gpu = args.device != "cpu"
    args.paths = args.paths or [path for path in PATHS if on_gpu or path != "triton"]
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow([*COLUMNS, "dtype"] if on_gpu else COLUMNS)
    machine = torch.cuda.get_device_name() if on_gpu else platform.machine()
    for rows in args.rows:
        for name in args.losses:
            cells: dict[str, list[list[float]]] = {path: [] for path in args.paths}
            for _ in range(args.repeats):
                for path in args.paths:
                    command = [sys.executable, __file__, *sys.argv[1:], "--cell", name, path, str(rows)]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        print(f"{path}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                        continue
                    cells[path].append([float(v) for v in done.stdout.split()])
            for path, runs in cells.items():
                if runs:
                    middle = [statistics.median(column) for column in zip(*runs, strict=True)]
                    error = [f"{v:.2e}" for v in middle[2:]] or [""] * 3
                    size = [args.vocabulary, args.hidden, args.teacher_hidden]
                    where = [machine, torch.__version__, torch.get_num_threads(), args.seed]
                    where += [args.dtype] if on_gpu else []
                    seconds = f"{middle[0]:.{5 if on_gpu else 3}f}"
                    out.writerow([name, args.target, path, rows, *size, seconds, round(middle[1]), *error, *where])
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
