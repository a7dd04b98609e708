"""Streaming equals plain, in value, gradient and for every kind of target; memory stays at a tile."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from understudy import losses
from understudy.errors import InputError
from understudy.streaming import chunked, plain, products, project, rowwise
from understudy.streaming.gradients import by_hand
from understudy.targets import Dense, Projected, sample, top_k

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
    (losses.adaptive_kl, {"mu": 0.7}),
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


HAND = [
    (losses.forward_kl, {}),
    (losses.cross_entropy_soft, {}),
    (losses.reverse_kl, {}),
    *((losses.jsd, {"beta": b}) for b in (0.0, 0.3, 1.0)),
    *((losses.skew_kl, {"alpha": a}) for a in (0.0, 0.1, 0.9)),
    *((losses.skew_reverse_kl, {"alpha": a}) for a in (0.0, 0.1, 0.9)),
]
BUCKETED = [*HAND, (losses.total_variation, {}), (losses.alpha_beta, {"alpha": 0.2, "beta": 0.7})]


def agrees(loss, options, target, rows=(), scale=3.0):
    logits = (torch.randn(7, 29, dtype=F64) * scale).requires_grad_()
    expected = loss(logits, *([target] if target is not None else []), *rows, **options)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    values, slope = by_hand(loss, logits.detach().clone(), target, rows, options)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(slope, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("more", [{}, {"temperature": 2.5}, {"temperature": 0.7, "tau_squared": True}])
def test_gradients_by_hand_are_those_of_autograd(more):
    teacher = torch.randn(7, 29, dtype=F64) * 3
    tau = more.get("temperature", 1.0)
    for loss, options in HAND:
        agrees(loss, {**options, **more}, Dense(teacher))
    for loss, options in BUCKETED:
        for k in (1, 5, 28):
            agrees(loss, {**options, **more}, top_k(teacher, k, temperature=tau))
        agrees(loss, {**options, **more, "truncation": "renorm"}, top_k(teacher, 5, temperature=tau))
    for loss in (losses.forward_kl, losses.cross_entropy_soft):
        agrees(loss, more, sample(teacher, 12, temperature=tau))
    agrees(losses.cross_entropy, {}, None, (torch.randint(0, 29, (7,)),))


@pytest.mark.parametrize("loss", [losses.jsd, losses.skew_kl, losses.skew_reverse_kl])
def test_probabilities_that_are_zero_in_floating_point(loss):
    """On the student's side, the teacher's, or both: values and gradients are those of the plain loss in float64."""
    logits, teacher = torch.randn(4, 9), torch.randn(4, 9)
    logits[:, :3] -= 300
    teacher[:, 2:5] -= 300
    values, slope = by_hand(loss, logits, Dense(teacher), (), {})
    leaf = logits.double().requires_grad_()
    exact = loss(leaf, Dense(teacher.double()))
    torch.testing.assert_close(values.double(), exact.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope.double(), torch.autograd.grad(exact.sum(), leaf)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [loss for loss, _ in HAND], ids=lambda c: c.__name__)
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_gradients_of_sides_that_nearly_agree(loss, shift):
    """At a KL of 0.005 over many classes; what all of a row's logits have in common is no part of it."""
    torch.manual_seed(0)
    teacher = torch.randn(4, 20_000) * 3
    leaf = (teacher.double() + 0.1 * torch.randn(4, 20_000)).float().double().requires_grad_()
    shifted = teacher + shift
    _, slope = by_hand(loss, leaf.detach().float(), Dense(shifted), (), {})
    (exact,) = torch.autograd.grad(loss(leaf, Dense(shifted.double())).sum(), leaf)
    assert (slope - exact).norm() / exact.norm() < 1e-4


def test_forbidden_classes_and_bad_rows_are_left_to_the_plain_loss():
    student, teacher = sides()
    logits = project(teacher)
    logits[:, 3] = -torch.inf
    values = rowwise(losses.forward_kl, student, Dense(logits))
    torch.testing.assert_close(values, plain(losses.forward_kl, student, Dense(logits)))
    logits[2] = torch.nan
    with pytest.raises(InputError, match="is not a distribution: the teacher has nan"):
        rowwise(losses.forward_kl, student, Dense(logits))


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("part", ["hidden", "weight", "bias"])
def test_half_precision_heads_block_by_block(tiles, part, monkeypatch):
    """Widening a head block by block, one tile or several, changes nothing beyond the rounding of what is stored."""
    monkeypatch.setattr(products, "BLOCK_BYTES", 4 * 8 * 5)
    student, teacher = sides()
    half = Projected(*(x.detach().bfloat16().requires_grad_() for x in (student.hidden, student.weight, student.bias)))
    exact = Projected(*(x.detach().double().requires_grad_() for x in (half.hidden, half.weight, half.bias)))
    narrow = Projected(teacher.hidden.bfloat16(), teacher.weight.bfloat16())
    wide = Projected(narrow.hidden.double(), narrow.weight.double())
    tile = 4 * 29 * (13 if tiles == 1 else 5)
    (ours,) = torch.autograd.grad(rowwise(losses.jsd, half, narrow, tile_bytes=tile).sum(), getattr(half, part))
    (theirs,) = torch.autograd.grad(plain(losses.jsd, exact, wide).sum(), getattr(exact, part))
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - theirs).norm() / theirs.norm() < 0.003


@pytest.mark.parametrize("rows", [1, products.FEW, products.FEW + 1])
@pytest.mark.parametrize("classes", [3, products.TURNED_CLASSES, 2 * products.TURNED_CLASSES + 7])
def test_logits_of_few_rows_are_those_of_many(rows, classes, monkeypatch):
    """Also in several blocks, where a head is a transposed view, and where the logits are columns of a wider tensor."""
    monkeypatch.setattr(products, "BLOCK_BYTES", 4 * 8 * 700)
    hidden, weight = torch.randn(rows, 8), torch.randn(8, classes).T
    room = torch.zeros(rows, classes + 2)
    made = products.to_logits(hidden, weight, room[:, 1:-1])
    torch.testing.assert_close(made.double(), hidden.double() @ weight.double().T, rtol=1e-5, atol=1e-5)
    assert not room[:, 0].any() and not room[:, -1].any()


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


FAULTS = """
import resource, torch
from understudy import losses
from understudy.streaming import chunked, gradients
from understudy.targets import Dense
z, t = torch.randn(2, 131_072), Dense(torch.randn(2, 131_072))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        gradients.by_hand(losses.skew_kl, z, t, (), {})
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(), print(faults())
chunked.keep_heap(8 * 2**20)
faults(), print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's heap")
def test_what_a_strip_frees_is_kept_for_the_next_one():
    for _ in range(3):  # a system that reclaims memory at the moment adds faults
        done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
        without, kept = map(int, done.stdout.split())
        if kept < 500:
            break
    assert kept < 500 and kept <= without / 10, (without, kept)


@pytest.mark.parametrize(
    "whole,tile", [(1, 128), (128, 128), (129, 64), (320, 64), (640, 128), (1024, 192), (9999, 192)]
)
def test_a_tile_holds_all_rows_or_grows_with_them_to_a_bound(whole, tile):
    assert chunked.bytes_of_tile(False, whole * 2**20) == tile * 2**20
    assert chunked.bytes_of_tile(True, whole * 2**20) == chunked.GPU_TILE_BYTES


@pytest.mark.parametrize(
    "rows,most,tile,beside", [(16, 256, 16, 16), (256, 256, 256, 128), (512, 128, 128, 104), (3, 2, 2, 1)]
)
def test_the_teacher_answers_fewer_rows_than_a_tile_on_a_cpu(rows, most, tile, beside):
    assert chunked.rows_of_tile(rows, most, False) == (tile, beside)
    assert chunked.rows_of_tile(rows, most, True) == (tile, tile)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures as Linux does")
def test_the_benchmark_of_growth_runs(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import growth

    seconds, mib = growth.head(8, 64)
    assert seconds > 0 and abs(mib) < 64  # next to nothing, within what the process takes by itself
