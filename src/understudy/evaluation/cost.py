"""The cost of a run: time by role, floating-point operations, memory, and utilisation of the machine's peak."""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper


def _added(out: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])


def _attention(query: Any, key: Any, *args: Any, **kwargs: Any) -> int:
    return int(4 * math.prod(query) * key[-2])


def _attention_back(upstream: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> int:
    return int(10 * math.prod(query) * key[-2])


ALSO = {
    torch.ops.aten.addmm_: shape_wrapper(_added),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_back),
}
"""Operations that torch's own counter leaves out: sums of products in place, and a CPU's fused attention."""


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, by torch's formulas.

    torch's own FlopCounterMode also tracks modules and thereby keeps tensors that gradient checkpointing frees: the
    counted step would need half the memory of a step without checkpointing.
    """

    total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "overloadpacket", func)
        count = ALSO.get(name) or flop_registry.get(name)
        if count is not None:
            self.total += float(count(*args, **(kwargs or {}), out_val=out))
        return out


ROLES = ("teacher", "head", "step", "generate")
NO_STEPS: Mapping[str, Any] = MappingProxyType({"steps": 0, "seconds": 0.0, "forwards": {}, "time_share": {}})
"""The cost of a run that trains nothing, such as a procedure of no rounds."""


class _Timer:
    """Adds the seconds inside its context to those of a role."""

    def __init__(self, seconds: dict[str, float], role: str) -> None:
        self.seconds, self.role = seconds, role

    def __enter__(self) -> None:
        synchronize()
        self.start = time.perf_counter()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            synchronize()
            self.seconds[self.role] += time.perf_counter() - self.start


class CostMeter:
    """Accumulates the cost of a run, also over resumes.

    Operations are counted on the first step of each kind and extrapolated; examples are counted at each forward pass.
    Time is wall time; a GPU is synchronised only at the start and end of a role.

    Args:
        unit: name of rows in reports (`images`, `tokens`).
    """

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.seconds = dict.fromkeys(ROLES, 0.0)
        self.flops = {"teacher": 0.0}
        self.generated = 0
        self._watched: dict[str, nn.Module] = {}
        self.rows = self.micro_steps = 0
        self.kinds: dict[str, int] = {}
        self.wall = 0.0
        self.forwards = {"student": 0, "teacher": 0}
        self._counts = False

    def watch(self, role: str, model: nn.Module | None) -> None:
        """Count the examples in each forward pass of `model` during steps, under the name `role`.

        Every phase of a run asks for it, and the examples are counted once.
        """
        if model is None or self._watched.get(role) is model:
            return
        self._watched[role] = model

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._counts and inputs:
                self.forwards[role] += len(inputs[0].ids)

        model.register_forward_hook(note)

    def _timed(self, role: str) -> _Timer:
        return _Timer(self.seconds, role)

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Context of the teacher's forward pass."""
        with self._timed("teacher"):
            if self.flops["teacher"]:
                yield
            else:
                with Operations() as counter:
                    yield
                self.flops["teacher"] = counter.total

    def head(self) -> AbstractContextManager[None]:
        """Around the losses: with streaming that is the head, forward and backward."""
        return self._timed("head")

    @contextmanager
    def step(self, kind: str = "student") -> Iterator[None]:
        """Context of one micro-batch, forward and backward, teacher included. `kind` names the optimisers that step."""
        self.micro_steps += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        self._counts = True
        with self._timed("step"):
            if kind in self.flops:
                yield
            else:
                with Operations() as counter:
                    yield
                self.flops[kind] = counter.total
        self._counts = False

    @contextmanager
    def generate(self, model: nn.Module) -> Iterator[None]:
        """Context of the generation of text during training; the caller adds to `generated`. A token counts as two
        operations per parameter."""
        self.flops["generated token"] = 2.0 * sum(p.numel() for p in model.parameters())
        with self._timed("generate"):
            yield

    def shares(self) -> dict[str, float]:
        """Fraction of the time in steps and generation by role, so far."""
        seconds = {"generate": 0.0, **self.seconds}
        own = seconds["step"] - seconds["teacher"] - seconds["head"]
        parts = {
            "generate": seconds["generate"],
            "teacher": seconds["teacher"],
            "head": seconds["head"],
            "student": own,
        }
        total = sum(parts.values()) or 1e-9
        return {role: max(0.0, value) / total for role, value in parts.items()}

    def summary(self) -> dict[str, Any]:
        """The values stored under `cost` in `evaluation.json`."""
        step, writing = self.seconds["step"], self.seconds.get("generate", 0.0)
        total = (step + writing) or 1e-9
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        flops = sum(self.flops.get(kind, 0.0) * number for kind, number in self.kinds.items())
        per_step = flops / max(1, self.micro_steps)
        flops += self.flops.get("generated token", 0.0) * self.generated
        peak = matmul_peak()
        whole = max(self.wall, total)
        student = max(0.0, step - self.seconds["teacher"] - self.seconds["head"])
        return {
            "flops_total": flops,
            "flops_per_step": {"teacher": self.flops["teacher"], "student": per_step - self.flops["teacher"]},
            "rows_per_second": self.rows / total,
            "unit": self.unit,
            "time_share": {
                **({"generate": writing / whole} if writing else {}),
                "teacher": self.seconds["teacher"] / whole,
                "head": self.seconds["head"] / whole,
                "student": student / whole,
                "rest": (whole - total) / whole,
            },
            "peak_memory_bytes": peak_memory(),
            "peak_flops_per_second": peak,
            "percent_of_peak": 100 * flops / total / peak,
            "seconds": whole,
            "steps": self.micro_steps,
            "moves": dict(self.kinds),
            "forwards": dict(self.forwards),
            "generated_tokens": self.generated,
            "device": device,
            "threads": torch.get_num_threads(),
        }

    def state_dict(self) -> dict[str, Any]:
        kept = ("seconds", "flops", "rows", "micro_steps", "kinds", "forwards", "wall", "generated")
        return {k: getattr(self, k) for k in kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)


@cache
def _gpu() -> bool:
    """Whether there is a GPU, looked for once: steps ask often."""
    return torch.cuda.is_available()


def synchronize() -> None:
    """Wait until a GPU has done what it was given."""
    if _gpu():
        torch.cuda.synchronize()


def peak_memory() -> int:
    """Bytes: the peak of the device on a GPU, otherwise the largest resident set size of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@cache
def matmul_peak(size: int = 768, repeats: int = 5) -> float:
    """Operations per second of a float32 matrix product, measured now: the median of a few. Noisy on shared machines."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    times = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:])
