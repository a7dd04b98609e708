"""A step on the `meta` device: the memory, operations and traffic of each op, with nothing allocated."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from understudy.planning.machine import Machine


@dataclass
class Work:
    """Work of one role in a step: operations (those of attention also separately), bytes moved, seconds, the floor."""

    flops: float = 0.0
    attention: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    floor: float = 0.0


@dataclass
class Tracker(TorchDispatchMode):
    """Tracks every storage created inside it until it is freed, and counts operations by role.

    Seconds are a roofline per op: the largest of operations ÷ peak, bytes ÷ bandwidth, and launch time.

    Args:
        machine: peak figures.
        held: tensors that exist already (weights).
    """

    machine: Machine
    held: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.work: dict[str, Work] = {}
        self.now: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self.role = "student"
        self._live: dict[int, tuple[str, int]] = {}
        self._known = {t.untyped_storage()._cdata for t in self.held}

    @contextmanager
    def acting(self, role: str) -> Iterator[None]:
        """Context in which ops count for this role."""
        before, self.role = self.role, role
        try:
            yield
        finally:
            self.role = before

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            # Checks whether a mask is all true, or a row is a single text: yes, without padding or packing.
            return True if args[0].dtype == torch.bool else 1
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in results:
            self._follow(tensor)
        if not func.is_view and "detach" not in func.__name__:
            count = flop_registry.get(func.overloadpacket)
            flops = float(count(*args, **kwargs, out_val=out)) if count is not None else 0.0
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            moved = sum(t.numel() * t.itemsize for t in {id(t): t for t in given + results}.values())
            self.add(flops, moved, min((t.itemsize for t in results if t.is_floating_point()), default=4))
        return out

    def add(self, flops: float, moved: float, itemsize: int, attention: bool = False) -> None:
        """Count an op for the present role."""
        work = self.work.setdefault(self.role, Work())
        peak = self.machine.peak(itemsize)
        work.flops += flops
        work.attention += flops if attention else 0.0
        work.bytes += moved
        work.seconds += max(flops / peak, moved / self.machine.bandwidth, self.machine.launch)
        work.floor += flops / peak

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._live or not size:
            return
        self._live[key] = (self.role, size)
        weakref.finalize(storage, self._freed, key)
        self.now[self.role] = self.now.get(self.role, 0) + size
        if sum(self.now.values()) > self.peak_bytes:
            self.peak = dict(self.now)

    def _freed(self, key: int) -> None:
        role, size = self._live.pop(key, ("", 0))
        if size:
            self.now[role] -= size

    def rename(self, tensor: Tensor, role: str) -> None:
        """Count a tensor's storage under another role from now on (for example as a gradient)."""
        key = tensor.untyped_storage()._cdata
        old, size = self._live.get(key, ("", 0))
        if size:
            self.now[old] -= size
            self.now[role] = self.now.get(role, 0) + size
            self._live[key] = (role, size)


@contextmanager
def flash_attention(tracker: Tracker) -> Iterator[None]:
    """Replace `scaled_dot_product_attention` by one that keeps the tensors of its fused kernels, not the scores of the
    plain formula.

    The function itself is replaced, since torch modes are off while a checkpointed block is recomputed.
    """

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        return _Attention.apply(query, key, value, tracker)

    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tracker: Tracker) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.tracker = tracker
        tracker.add(2 * _product(query, key), _bytes(query, key, value, out), query.itemsize, attention=True)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, _ = ctx.saved_tensors
        # Five products: the recomputed scores, and the gradients of scores, queries, keys and values.
        ctx.tracker.add(5 * _product(query, key), 2 * _bytes(query, key, value, out), query.itemsize, attention=True)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _product(query: Tensor, key: Tensor) -> float:
    """Operations of one product of scores: every query with every key, as peers count it, causal or not."""
    return 2.0 * query.numel() * key.shape[-2]


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)
