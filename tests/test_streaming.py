"""Streaming equals plain, in value, gradient and for every kind of target; memory stays at a tile."""

import subprocess
import sys

import pytest
import torch

from understudy import losses
from understudy.streaming import plain, project, rowwise
from understudy.targets import Projected, sample, top_k

F64 = torch.float64


def sides(dtype=F64, rows=13, classes=29, **options):
    student = Projected(
        torch.randn(rows, 8, dtype=dtype).requires_grad_(),
        torch.randn(classes, 8, dtype=dtype).requires_grad_(),
        torch.randn(classes, dtype=dtype).requires_grad_(),
        **options,
    )
    return student, Projected(torch.randn(rows, 5, dtype=dtype), torch.randn(classes, 5, dtype=dtype))


CASES = [
    (losses.forward_kl, {}),
    (losses.reverse_kl, {"temperature": 2.0, "tau_squared": True}),
    (losses.jsd, {"beta": 0.3}),
    (losses.skew_kl, {}),
    (losses.skew_reverse_kl, {}),
    (losses.total_variation, {}),
    (losses.alpha_beta, {"alpha": 0.2, "beta": 0.7}),
    (losses.interpolated_kl, {"t": 0.4}),
    (losses.binary_kl_norm, {}),
]


@pytest.mark.parametrize("loss,options", CASES, ids=lambda c: getattr(c, "__name__", ""))
@pytest.mark.parametrize("upstream", ["uniform", "by_row"])
def test_streaming_equals_plain(loss, options, upstream):
    student, teacher = sides(scale=1.3, softcap=8.0)
    weights = torch.full((13,), 0.7, dtype=F64) if upstream == "uniform" else torch.rand(13, dtype=F64)
    results = []
    for function, extra in ((plain, {}), (rowwise, {"tile_bytes": 29 * 8 * 4})):
        values = function(loss, student, teacher, **options, **extra)
        grads = torch.autograd.grad((values * weights).sum(), (student.hidden, student.weight, student.bias))
        results.append((values, *grads))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["dense", "top_k", "sampled", "none"])
def test_every_kind_of_target(kind):
    student, teacher = sides()
    logits, labels = project(teacher), torch.randint(0, 29, (13,))
    target = {"dense": teacher, "top_k": top_k(logits, 4), "sampled": sample(logits, 4), "none": None}[kind]
    loss, rows = (losses.cross_entropy, (labels,)) if kind == "none" else (losses.forward_kl, ())
    a = plain(loss, student, target, *rows)
    b = rowwise(loss, student, target, *rows, tile_bytes=29 * 8 * 3)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), student.weight)[0] for v in (a, b)))


def test_second_backward_frozen_head_and_no_rows():
    student, teacher = sides()
    values = rowwise(losses.forward_kl, student, teacher)
    first = torch.autograd.grad(values.sum(), student.hidden, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(values.sum(), student.hidden)[0], first)
    frozen = Projected(student.hidden, student.weight.detach())
    rowwise(losses.forward_kl, frozen, teacher).sum().backward()
    assert student.hidden.grad is not None and student.weight.grad is None
    empty = rowwise(losses.forward_kl, student.select(slice(0, 0)), teacher.select(slice(0, 0)))
    empty.sum().backward()
    assert empty.shape == (0,) and student.weight.grad.abs().sum() == 0


def test_gradient_error_in_bfloat16_is_small():
    """At a KL of about 0.01 the gradient is a difference of nearly equal numbers; rounding logits would ruin it."""
    h, w = torch.randn(64, 64).bfloat16(), (0.1 * torch.randn(500, 64)).bfloat16()
    teacher = (h.float() + 0.2 * torch.randn(64, 64)).bfloat16()
    grads = []
    for dtype in (torch.bfloat16, F64):
        weight = w.to(dtype).detach().clone().requires_grad_()
        with torch.autocast("cpu", enabled=dtype != F64):
            values = rowwise(
                losses.forward_kl, Projected(h.to(dtype), weight), Projected(teacher.to(dtype), w.to(dtype))
            )
        assert values.dtype == (F64 if dtype == F64 else torch.float32)
        values.sum().backward()
        grads.append(weight.grad.double())
    assert 0.001 < values.mean() < 0.1
    # What is left is the rounding of the stored gradient itself, 2^-9 a number.
    assert (grads[0] - grads[1]).norm() / grads[1].norm() < 0.002


MEMORY = """
import resource, sys, torch
from understudy import losses
from understudy.streaming import plain, rowwise
from understudy.targets import Projected
torch.set_num_threads(1)
rows, classes = 1536, 128_000
s = Projected(torch.randn(rows, 32).requires_grad_(), torch.randn(classes, 32).requires_grad_())
t = Projected(torch.randn(rows, 64), torch.randn(classes, 64))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{"plain": plain, "rowwise": rowwise}[sys.argv[1]](losses.forward_kl, s, t).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_peak_memory_is_a_tenth_of_plain():
    peaks = {
        path: int(
            subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=True).stdout
        )
        for path in ("plain", "rowwise")
    }
    assert peaks["rowwise"] <= peaks["plain"] / 10, peaks
