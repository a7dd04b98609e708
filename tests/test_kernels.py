"""Triton kernels: their cases in the interpreter and on a GPU, their compilation, and the products around them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from understudy import losses
from understudy.streaming import chunked, products, rowwise
from understudy.streaming.gradients import by_hand
from understudy.targets import Dense, Projected

CASES = Path(__file__).parent / "kernel_cases.py"


def run_cases(**environment):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    assert " passed" in run_cases(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu():
    assert "skipped" not in run_cases(TRITON_INTERPRET="0")


POINTERS = "z teacher norm norm_q norm_p pulls coefficients value_out pull_out top_out total_out".split()
WHOLE = "stride teacher_stride classes span".split()
LOSSES = "forward_kl cross_entropy_soft reverse_kl jsd skew_kl skew_reverse_kl".split()


def test_kernels_compile_for_a_gpu_that_is_not_there(monkeypatch):
    """The interpreter accepts what the compiler may not: every kernel becomes machine code of an H100."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from understudy.streaming import kernels

    if kernels.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")

    def compiled(kernel, teacher="*fp32", **fixed):
        kinds = {**dict.fromkeys(POINTERS, "*fp32"), **dict.fromkeys(WHOLE, "i32"), "teacher": teacher}
        signature = {n: "constexpr" if n in fixed else kinds.get(n, "fp32") for n in kernel.arg_names}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=fixed)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm

    made = [compiled(kernels.normalisers, BLOCK=4096), compiled(kernels.softmax, BLOCK=4096, CAPPED=True)]
    made += [compiled(kernels.divergence, "*bf16", BLOCK=4096, CAPPED=False, LOSS=x, WRITE=True) for x in LOSSES]
    made.append(compiled(kernels.divergence, BLOCK=4096, CAPPED=True, LOSS="jsd", WRITE=False))
    for asm in made:
        assert asm["cubin"] and ".local" not in asm["ptx"]  # nothing spilt from registers


def test_nothing_needs_triton(monkeypatch):
    """Where it is missing, `rowwise` takes the other paths, even when it is told to interpret."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "understudy.streaming.writers", raising=False)
    monkeypatch.delitem(sys.modules, "understudy.streaming.kernels", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not chunked._kernels(torch.device("cpu"))
    student = Projected(torch.randn(3, 4).requires_grad_(), torch.randn(9, 4))
    rowwise(losses.forward_kl, student, Dense(torch.randn(3, 9))).sum().backward()


@pytest.fixture
def tensor_cores(monkeypatch):
    """A CPU that multiplies half-precision numbers as a GPU does: exactly, summing in float32."""

    def product(left, right, out=None):
        assert left.dtype == right.dtype in products.HALF
        return torch.mm(left.float(), right.float(), out=out)

    monkeypatch.setattr(products, "on_tensor_cores", lambda x: x.dtype in products.HALF)
    monkeypatch.setattr(products, "narrow", product)
    monkeypatch.setattr(products, "BLOCK_BYTES", 4 * 64 * 100)


def distance(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("apart", [1.6, 0.5, 0.15])  # KL about 1, 0.1 and 0.01
def test_the_slope_as_two_halves(tensor_cores, name, apart):
    """One rounding of the slope costs as much as all else; a head whose rows have a mean makes it worse."""
    h = torch.randn(64, 64).bfloat16()
    w = (0.1 * (torch.randn(1000, 64) + torch.randn(64))).bfloat16()
    t = (h.float() + apart * torch.randn(64, 64)).bfloat16()
    _, slope = by_hand(getattr(losses, name), h.float() @ w.float().T, Dense(t.float() @ w.float().T), (), {})
    wide = [x.double() @ w.double().T for x in (h, t)]
    _, exact = by_hand(getattr(losses, name), wide[0], Dense(wide[1]), (), {})
    hidden, head = exact @ w.double(), exact.T @ h.double()
    rounded = slope.bfloat16().double()
    assert distance(rounded @ w.double(), hidden) > 4e-4 and distance(rounded.T @ h.double(), head) > 1e-3
    assert distance(products.to_hidden(slope, w), hidden) < 3e-5
    into = torch.empty(1000, 64)
    assert distance(products.to_weight(slope, h, into, 0.0), head) < 3e-5
    assert distance(products.to_weight(slope, h, into, 1.0), 2 * head) < 3e-5
    assert distance(products.to_weight(slope, h, into.bfloat16(), 0.0), head) < 2e-3


@pytest.mark.parametrize("hidden,weight", [("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32")])
def test_rowwise_on_tensor_cores(tensor_cores, hidden, weight):
    """All of `rowwise` with such products, one tile and several, whatever is stored in which precision."""
    types = [getattr(torch, x) for x in (hidden, weight)]
    h, w, t = torch.randn(12, 64), 0.1 * torch.randn(300, 64), torch.randn(12, 64)
    student = [x.to(d).requires_grad_() for x, d in zip((h, w), types, strict=True)]
    exact = [x.detach().double().requires_grad_() for x in student]
    teacher = Projected(t.to(types[0]), w.to(types[1]))
    wide = Projected(teacher.hidden.double(), teacher.weight.double())
    expected = torch.autograd.grad(rowwise(losses.forward_kl, Projected(*exact), wide).sum(), exact)
    for tile_bytes in (4 * 300 * 5, None):
        values = rowwise(losses.forward_kl, Projected(*student), teacher, tile_bytes=tile_bytes)
        for ours, theirs in zip(torch.autograd.grad(values.sum(), student), expected, strict=True):
            assert distance(ours, theirs) < 3e-3
