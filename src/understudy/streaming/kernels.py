"""The gradients of `by_hand` as Triton kernels that overwrite a tile of float32 logits; `writers` launches them.

Kernels run on a grid of (row, part of the row); if there are few rows they are split into more parts, to fill the GPU.

- `normalisers`: maximum and Σ exp(z − maximum) of a part, for each side.
- `divergence`: a part's value and Σ q g; optionally it writes the gradient q (g − Σ q g) of each class.
- `softmax`: a row's coefficient times its softmax. Targets that name a few classes (a label, samples, the k most
  probable) need no more: the named classes are gathered before and added after.

Forward KL and cross-entropy have Σ q g = −1, so their value is summed while the gradient is written: two reads of both
sides and one write. The others need Σ q g first, a third read. Reverse KL could compute it in the first read, as Σ q
(z_q − z_p) minus the normalisers' difference, but that cancels where the sides' logits differ by a constant.

With `TRITON_INTERPRET=1` set before the first import the same kernels run on a CPU, slowly, for tests.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def normalisers(z, top_out, total_out, stride, classes, inverse, span, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, part = tl.program_id(0), tl.program_id(1)
    z += row.to(tl.int64) * stride
    top, total = tl.full((), -INFINITY, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, classes), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(z + columns, mask=columns < classes, other=-INFINITY).to(tl.float32) * inverse
        higher = tl.maximum(top, tl.max(x, 0))
        safe = tl.where(higher == -INFINITY, 0.0, higher)  # −inf alone so far: exp(−inf − 0) = 0
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(x - safe), 0)
        top = higher
    at = row * tl.num_programs(1) + part
    tl.store(top_out + at, top)
    tl.store(total_out + at, total)


@triton.jit
def _weigh(log_x, factor):  # type: ignore[no-untyped-def]
    """x · factor, and 0 · anything = 0 where x is exactly 0."""
    return tl.where(log_x == -INFINITY, 0.0, tl.exp(log_x) * factor)


@triton.jit
def _mix(log_x, log_y, log_share, log_rest):  # type: ignore[no-untyped-def]
    """log(share · x + (1 − share) · y)."""
    a, b = log_x + log_share, log_y + log_rest
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    return tl.where(high == -INFINITY, high, high + tl.log(1.0 + tl.exp(low - high)))


@triton.jit
def _terms(log_q, log_p, share, log_share, log_rest, LOSS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A class's part of the value, and its q g with g = ∂L/∂q up to a constant, which cancels in q (g − Σ q g)."""
    if LOSS == "forward_kl":  # g = −p / q
        value = _weigh(log_p, log_p - log_q)
        pull = -tl.exp(log_p)
    elif LOSS == "cross_entropy_soft":
        value = -_weigh(log_p, log_q)
        pull = -tl.exp(log_p)
    elif LOSS == "reverse_kl":  # g = log q/p
        value = _weigh(log_q, log_q - log_p)
        pull = value
    elif LOSS == "jsd":  # m = share · p + (1 − share) · q; g = (1 − share) log q/m
        log_m = _mix(log_p, log_q, log_share, log_rest)
        pull = (1.0 - share) * _weigh(log_q, log_q - log_m)
        value = share * _weigh(log_p, log_p - log_m) + pull
    elif LOSS == "skew_kl":  # the same m; g = −(1 − share) p / m
        log_m = _mix(log_p, log_q, log_share, log_rest)
        value = _weigh(log_p, log_p - log_m)
        pull = (share - 1.0) * tl.where(log_m == -INFINITY, 0.0, tl.exp(log_p + log_q - log_m))
    else:  # skew_reverse_kl: m = share · q + (1 − share) · p; g = log q/m − share · q/m
        ratio = log_q - _mix(log_q, log_p, log_share, log_rest)
        value = _weigh(log_q, ratio)
        pull = _weigh(log_q, ratio - share * tl.exp(ratio))
    return value, pull


@triton.jit
def divergence(  # type: ignore[no-untyped-def]
    z, teacher, norm_q, norm_p, pulls, value_out, pull_out, stride, teacher_stride, classes, inverse,
    share, log_share, log_rest, outward, inverse_cap, span,
    LOSS: tl.constexpr, WRITE: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    z += row.to(tl.int64) * stride
    teacher += row.to(tl.int64) * teacher_stride
    top_q, log_total_q = tl.load(norm_q + 2 * row), tl.load(norm_q + 2 * row + 1)
    top_p, log_total_p = tl.load(norm_p + 2 * row), tl.load(norm_p + 2 * row + 1)
    row_pull = tl.load(pulls + row)
    values, pulled = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, classes), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < classes
        x = tl.load(z + columns, mask=inside, other=-INFINITY)
        t = tl.load(teacher + columns, mask=inside, other=-INFINITY).to(tl.float32)
        log_q = (x * inverse - top_q) - log_total_q
        log_p = (t * inverse - top_p) - log_total_p
        value, pull = _terms(log_q, log_p, share, log_share, log_rest, LOSS)
        values += tl.sum(value, 0)
        pulled += tl.sum(pull, 0)
        if WRITE:
            slope = (pull - tl.exp(log_q) * row_pull) * outward
            if CAPPED:  # d cap · tanh(u / cap) / du, from its value
                slope *= 1.0 - (x * inverse_cap) * (x * inverse_cap)
            tl.store(z + columns, slope, mask=inside)
    at = row * tl.num_programs(1) + part
    tl.store(value_out + at, values)
    tl.store(pull_out + at, pulled)


@triton.jit
def softmax(  # type: ignore[no-untyped-def]
    z, norm, coefficients, stride, classes, inverse, inverse_cap, span, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    row, part = tl.program_id(0), tl.program_id(1)
    z += row.to(tl.int64) * stride
    top, log_total, coefficient = tl.load(norm + 2 * row), tl.load(norm + 2 * row + 1), tl.load(coefficients + row)
    for start in range(part * span, tl.minimum((part + 1) * span, classes), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < classes
        x = tl.load(z + columns, mask=inside, other=-INFINITY)
        slope = coefficient * tl.exp((x * inverse - top) - log_total)
        if CAPPED:
            slope *= 1.0 - (x * inverse_cap) * (x * inverse_cap)
        # A class at −inf is a named one: its gradient is added later, so it must be 0 here, also with a soft-cap.
        tl.store(z + columns, tl.where(x == -INFINITY, 0.0, slope), mask=inside)


INTERPRETED = not isinstance(softmax, triton.JITFunction)
"""Whether `TRITON_INTERPRET=1` was set when this file was read."""
