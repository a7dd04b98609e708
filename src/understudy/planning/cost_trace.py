"""Dry runs on the `meta` device: the teacher's forward pass, the student's step and an evaluation, with the ops of a
real run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from understudy.data import Batch
from understudy.evaluation.rows import TILE_BYTES as EVALUATION_TILE
from understudy.methods.kd import KD
from understudy.models.adapters import CausalLMAdapter, ModelAdapter, ModelOutput
from understudy.models.bodies import body
from understudy.planning.machine import Machine
from understudy.planning.tracker import Tracker, Work, flash_attention
from understudy.streaming.chunked import STRIP_BYTES, bytes_of_tile, rows_of_tile
from understudy.streaming.products import BLOCK_BYTES
from understudy.targets import Projected
from understudy.training import Method, Shapes, TrainState

STRIPS = 4
"""Strips held at a time as `streaming.gradients` writes the losses: q, p, log p/q and, of a skewed KL, one more. (JSD: five.)"""
STATISTICS = 8
"""Number of float64 tiles that the statistics of an evaluation hold at a time, see `evaluation.rows`."""


@dataclass(frozen=True)
class Answer:
    """The source of the teacher's outputs in each step: its model, stored rows, or none.

    Args:
        stored: bytes per row of outputs that are read from disk.
        head: the head that projects stored hidden states.
    """

    model: ModelAdapter | None = None
    stored: float = 0.0
    head: Tensor | None = None


@dataclass
class Seen:
    """Peak memory of one phase in bytes by role, and work by role."""

    peak: dict[str, int] = field(default_factory=dict)
    work: dict[str, Work] = field(default_factory=dict)


def head_calls(method: Method) -> list[bool]:
    """One entry for each pass over the head in a method's loss: whether it projects the teacher too.

    It is found from the autograd graph of the method's own loss on a toy example. A method that needs more to start
    (inner layers, tables) is assumed to make two passes, like kd.
    """
    batch = Batch.from_dict(
        {
            "input_ids": torch.ones(2, 4, dtype=torch.long),
            "attention_mask": torch.ones(2, 4, dtype=torch.long),
            "labels": torch.ones(2, 4, dtype=torch.long),
            "ids": torch.arange(2),
            "bytes": torch.ones(2),
        }
    )

    def signal(grad: bool) -> ModelOutput:
        hidden, weight = torch.randn(6, 4), torch.randn(8, 4)
        return ModelOutput(Projected(hidden.requires_grad_(grad), weight.requires_grad_(grad)), hidden)

    def calls(of: Method) -> list[bool]:
        own = of.modules(Shapes(classes=8, features=4, teacher_features=4))
        state = TrainState(modules=own, method_state=of.init_state(10), total=10)
        terms = of.loss(signal(True), signal(False), batch, state)
        return _passes([t.values.grad_fn for t in terms.values()])

    try:
        found = calls(method)
    except Exception:  # the method needs something that only a run provides
        found = []
    return found or calls(KD())  # type: ignore[call-arg]


def _passes(roots: list[Any]) -> list[bool]:
    """The distinct tiled passes in an autograd graph."""
    seen: set[Any] = set()
    waiting, found = [r for r in roots if r is not None], []
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "work"):
            found.append(isinstance(node.work.target, Projected))
        waiting += [n for n, _ in node.next_functions if n is not None]
    return found


def step(
    machine: Machine,
    student: ModelAdapter,
    teacher: Answer,
    shape: tuple[int, ...],
    passes: list[bool],
    *,
    twice: bool = False,
    keep_gradients: bool = True,
) -> Seen:
    """One micro-batch, forward and backward.

    Args:
        shape: of a batch's inputs: examples and length, or examples, channels, height and width.
        passes: from `head_calls`.
        twice: with the gradients of an earlier micro-batch in memory.
        keep_gradients: gradients stay whole on this device; otherwise they are counted separately.
    """
    tracker = Tracker(machine, _weights(student, teacher))

    def arrived(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if keep_gradients:
            tracker.rename(parameter.grad, "gradients")
        else:
            parameter.grad = None

    trained = [p for p in student.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(arrived) for p in trained]
    student.train()
    with torch.device("meta"), flash_attention(tracker), tracker:
        for _ in range(2 if twice and keep_gradients else 1):
            tracker.work.clear()
            with tracker.acting("teacher"):
                target = _answer(teacher, shape)
            signal = _signal(student, shape)
            if isinstance(signal, Projected):
                heads = [_Head.apply(signal.hidden, signal.weight, target if p else None, tracker) for p in passes]
                loss = torch.stack([h.sum() for h in heads]).sum()
            else:
                loss = signal.float().logsumexp(-1).sum()
            del signal, target
            loss.backward()
            del loss
    for hook in hooks:
        hook.remove()
    for parameter in trained:
        parameter.grad = None
    return Seen(tracker.peak, tracker.work)


def evaluation(machine: Machine, student: ModelAdapter, teacher: ModelAdapter | None, shape: tuple[int, ...]) -> Seen:
    """The forward passes of student and teacher on one evaluation batch, and the statistics of its rows."""
    answer = Answer(teacher)
    tracker = Tracker(machine, _weights(student, answer))
    student.eval()
    with torch.device("meta"), torch.no_grad(), flash_attention(tracker), tracker:
        signal = _signal(student, shape)
        with tracker.acting("teacher"):
            target = _answer(answer, shape)
        if isinstance(signal, Projected):
            with tracker.acting("head"):
                rows = min(len(signal.hidden), max(1, EVALUATION_TILE // (4 * signal.classes)))
                held = [torch.empty(rows, signal.classes, dtype=torch.float64) for _ in range(STATISTICS)]
                del held
        del signal, target
    return Seen(tracker.peak, tracker.work)


def _weights(student: ModelAdapter, teacher: Answer) -> list[Tensor]:
    models = [m for m in (student, teacher.model) if m is not None]
    held = [t for m in models for t in (*m.parameters(), *m.buffers())]
    return held + ([teacher.head] if teacher.head is not None else [])


@torch.no_grad()
def _answer(teacher: Answer, shape: tuple[int, ...]) -> Tensor | tuple[Tensor, Tensor] | None:
    """The teacher's outputs as the loss gets them; they stay in memory until the backward pass has used them."""
    if teacher.model is not None:
        teacher.model.eval()
        signal = _signal(teacher.model, shape)
        return (signal.hidden, signal.weight) if isinstance(signal, Projected) else signal
    if not teacher.stored:
        return None
    rows = shape[0] * (shape[1] - 1) if len(shape) == 2 else shape[0]
    if teacher.head is not None:
        return torch.empty(rows, teacher.head.shape[1], dtype=teacher.head.dtype), teacher.head
    return torch.empty(rows * math.ceil(teacher.stored), dtype=torch.uint8)


def _signal(rows: ModelAdapter, shape: tuple[int, ...]) -> Any:
    """Hidden states and head of the rows that count, or an image classifier's logits."""
    if not isinstance(rows, CausalLMAdapter):
        pixels = torch.empty(shape, dtype=torch.float32)
        if getattr(rows, "normalise", None) is not None:
            pixels = (pixels - 0.5) / torch.ones(shape[1], 1, 1)
        output = rows.model(pixels.to(next(rows.model.parameters()).dtype))
        return output if isinstance(output, Tensor) else output.logits
    inner = rows.model.get_base_model() if hasattr(rows.model, "get_base_model") else rows.model
    ids = torch.zeros(shape, dtype=torch.long)
    whole = torch.ones_like(ids)
    hidden = body(inner)(input_ids=ids, attention_mask=whole, use_cache=False).last_hidden_state
    width = hidden.shape[-1]
    head = inner.get_output_embeddings()
    chosen = hidden[:, :-1].reshape(-1, width)
    if type(head) is not nn.Linear:
        return head(chosen).float()
    return Projected(chosen, head.weight if rows.padding == 0 else head.weight[: rows.vocabulary])


class _Head(torch.autograd.Function):
    """A pass over the head as in `streaming.chunked`: the same tensors in the same order."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Any, tracker: Tracker) -> Tensor:
        ctx.tracker, ctx.needs = tracker, ctx.needs_input_grad[:2]
        ctx.tensors = (hidden, weight, target)
        rows, classes, size = len(hidden), len(weight), 4 * len(weight)
        gpu = bool(tracker.machine.gpu)
        pair = target if isinstance(target, tuple) else None
        tile, beside = rows_of_tile(rows, bytes_of_tile(gpu, rows * size) // size, gpu)
        strip = 0 if gpu else max(1, min(tile, STRIP_BYTES // size))  # kernels overwrite the tile
        with tracker.acting("head"):
            mine = hidden.new_empty(tile, classes, dtype=torch.float32)
            theirs = hidden.new_empty(beside, classes, dtype=torch.float32) if pair is not None else None
            grads: list[Any] = [None, None]
            number = rows
            for start in range(0, rows, tile):
                number = min(rows, start + tile) - start
                _product(tracker, number, weight)
                if pair is not None:
                    for first in range(-(-start // beside) * beside, start + number, beside):
                        _product(tracker, min(beside, rows - first), pair[1])
                held = [hidden.new_empty(strip, classes, dtype=torch.float32) for _ in range(STRIPS)]
                del held
                tracker.add(0.0, 2 * STRIPS * size * number, 4)
                if start + tile < rows:
                    _spread(ctx, number, grads)
            del theirs
            ctx.slope, ctx.grads, ctx.last = mine, grads, number
            return hidden.new_empty(rows, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, _ = ctx.tensors
        with ctx.tracker.acting("head"):
            grads, ctx.grads = ctx.grads, None
            _spread(ctx, ctx.last, grads)
            ctx.slope = None
            out = [g.to(t.dtype) if g is not None else None for g, t in zip(grads, (hidden, weight), strict=True)]
        ctx.tensors = None
        return (*out, None, None)


def _product(tracker: Tracker, rows: int, weight: Tensor) -> None:
    """One product with a head, in float32; a head of half precision is widened a block at a time."""
    classes, width = weight.shape
    if weight.itemsize < 4:
        weight.new_empty(min(classes, max(1, BLOCK_BYTES // (4 * width))), width, dtype=torch.float32)
    tracker.add(2.0 * rows * classes * width, 4.0 * rows * (classes + width) + weight.numel() * weight.itemsize, 4)


def _spread(ctx: Any, rows: int, grads: list[Any]) -> None:
    """Add a tile's part to the gradients of hidden states and head; the first tile allocates them."""
    hidden, weight, _ = ctx.tensors
    if ctx.needs[0]:
        grads[0] = grads[0] if grads[0] is not None else torch.empty_like(hidden)
        _product(ctx.tracker, rows, weight)
    if ctx.needs[1]:
        grads[1] = grads[1] if grads[1] is not None else weight.new_empty(weight.shape, dtype=torch.float32)
        _product(ctx.tracker, rows, weight)
