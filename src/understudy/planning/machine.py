"""Machines: GPU data sheet figures, and measured figures of this CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from understudy.errors import InputError, nearest

CONTEXT = 800 * 2**20
"""Bytes a CUDA process takes before any tensor (context, libraries' workspaces): typical, and not counted by torch."""
LAUNCH = 5e-6
"""Overhead of one eager op in seconds."""


@dataclass(frozen=True)
class Machine:
    """One device.

    Args:
        name: for display.
        half, single: operations per second of dense products in 16 and 32 bits.
        bandwidth: bytes per second.
        memory: bytes.
        gpu: whether the device is a GPU.
        launch: shortest time of an op, seconds.
        link: bytes per second to other devices.
    """

    name: str
    half: float
    single: float
    bandwidth: float
    memory: float
    gpu: bool = True
    launch: float = LAUNCH
    measured: bool = False

    def peak(self, itemsize: int) -> float:
        """Operations per second for numbers of `itemsize` bytes."""
        return self.half if itemsize <= 2 else self.single


def _card(name: str, half: float, single: float, bandwidth: float, gigabytes: float) -> Machine:
    return Machine(name, half * 1e12, single * 1e12, bandwidth * 1e12, gigabytes * 2**30)


CARDS = {
    "t4": _card("NVIDIA T4", 65, 8.1, 0.32, 15),
    "v100": _card("NVIDIA V100 32 GB", 125, 15.7, 0.9, 32),
    "a10g": _card("NVIDIA A10G", 70, 31.5, 0.6, 22.5),
    "rtx4090": _card("NVIDIA RTX 4090", 165.2, 82.6, 1.008, 24),
    "l40s": _card("NVIDIA L40S", 362, 91.6, 0.864, 45),
    "a100": _card("NVIDIA A100 80 GB", 312, 19.5, 2.039, 80),
    "h100": _card("NVIDIA H100 SXM", 989, 67, 3.35, 80),
    "h200": _card("NVIDIA H200", 989, 67, 4.8, 141),
    "b200": _card("NVIDIA B200", 2250, 75, 7.7, 180),
    "mi300x": _card("AMD MI300X", 1307, 163, 5.3, 192),
}
"""Data sheets: TFLOP/s of dense products in 16 and in plain 32 bits (no TF32), TB/s, and GiB."""


def machine(gpu: str | None, peak: float | None, bandwidth: float | None, memory: float | None) -> Machine:
    """A GPU by name, or this machine's CPU, with any figure that is given explicitly.

    Args:
        gpu: name of the GPU, or `None` for this CPU.
        peak: TFLOP/s, for both 16 and 32 bits.
        bandwidth: TB/s.
        memory: GiB.
    """
    if gpu is not None and gpu not in CARDS:
        raise InputError(f"Unknown card {gpu!r}.{nearest(gpu, CARDS)} Known: {', '.join(CARDS)}; or give --peak.")
    found = CARDS[gpu] if gpu is not None else this_cpu(probe=peak is None or bandwidth is None)
    for name, value in (("peak", peak), ("bandwidth", bandwidth), ("memory", memory)):
        if value is not None and not value > 0:
            raise InputError(f"{name} is {value} and must be above 0.")
    if peak is not None:
        found = replace(found, half=peak * 1e12, single=peak * 1e12)
    if bandwidth is not None:
        found = replace(found, bandwidth=bandwidth * 1e12)
    return replace(found, memory=memory * 2**30) if memory is not None else found


def this_cpu(probe: bool = True) -> Machine:
    """This machine: products and copies, timed for one second in total, and its memory."""
    side, length = 768, 2**23
    product, copy = 1e11, 1e10
    if probe:
        a, b = torch.randn(side, side), torch.randn(side, side)
        product = 2 * side**3 / _median(lambda: torch.mm(a, b))
        source, target = torch.randn(length), torch.empty(length)
        copy = 2 * 4 * length / _median(lambda: target.copy_(source))
    name = f"this CPU ({torch.get_num_threads()} threads)"
    return Machine(name, product, product, copy, float(_total()), gpu=False, measured=probe)


def _median(act: Callable[[], object], seconds: float = 0.5) -> float:
    act()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _total() -> int:
    """Memory of this machine in bytes."""
    return _kilobytes("/proc/meminfo", "MemTotal") or 8 * 2**30


def resident() -> int:
    """Resident memory of this process in bytes (Linux; 0 elsewhere)."""
    return _kilobytes("/proc/self/status", "VmRSS")


def _kilobytes(file: str, key: str) -> int:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)
