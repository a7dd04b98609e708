"""The Triton kernels on whatever is at hand: a GPU, or a CPU told to interpret. `test_kernels.py` runs this file."""

import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from understudy import losses
from understudy.errors import InputError
from understudy.streaming import chunked, plain, products, rowwise, writers
from understudy.streaming.kernels import INTERPRETED
from understudy.targets import Dense, Projected, sample, top_k

ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
PLAIN = [(losses.forward_kl, {}), (losses.cross_entropy_soft, {}), (losses.reverse_kl, {})]
MIXED = [
    *((losses.jsd, {"beta": b}) for b in (0.3, 0.0, 1.0)),
    *((losses.skew_kl, {"alpha": a}) for a in (0.1, 0.9, 0.0)),
    *((losses.skew_reverse_kl, {"alpha": a}) for a in (0.1, 0.9, 0.0)),
]
DENSE = PLAIN + MIXED
OTHERS = [(losses.total_variation, {}), (losses.alpha_beta, {"alpha": 0.2, "beta": 0.7})]
BUCKETED = [*PLAIN, MIXED[0], MIXED[3], MIXED[6], *OTHERS]
SETTINGS = [{}, {"temperature": 2.5}, {"temperature": 0.7, "tau_squared": True}]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 8 classes and two parts a row: every loop and every edge within 29 classes."""
    warnings.simplefilter("ignore", RuntimeWarning)
    torch.manual_seed(0)
    monkeypatch.setattr(writers, "BLOCK", 8)
    monkeypatch.setattr(writers, "PROGRAMS", 6)


def made(*shape, scale=3.0):
    return (torch.randn(*shape) * scale).to(DEVICE)


def exact(target):
    """A target in float64."""
    if target is None:
        return None
    names = [n for n in target._tensors() if getattr(target, n).is_floating_point()]
    return target._map(names, torch.Tensor.double)


def agrees(loss, options, target, rows=(), logits=None, scale=1.0, softcap=None, tolerance=1e-5):
    """Values and gradient of the kernels against the plain loss in float64 on the same numbers."""
    raw = made(3, 29) if logits is None else logits
    leaf = raw.double().requires_grad_()
    product = leaf * scale
    expected = loss(
        product if softcap is None else softcap * torch.tanh(product / softcap),
        *([exact(target)] if target is not None else []), *rows, **options,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    z = raw * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    values = writers.writer(loss, z, target, rows, options)(z, scale, softcap)
    torch.testing.assert_close(values.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(z.double(), gradient, rtol=10 * tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("loss,options", DENSE, ids=lambda x: getattr(x, "__name__", str(x)))
def test_dense_targets(loss, options):
    for more in SETTINGS:
        agrees(loss, {**options, **more}, Dense(made(3, 29)))


@pytest.mark.parametrize("loss,options", BUCKETED, ids=lambda x: getattr(x, "__name__", ""))
def test_the_most_probable_classes_and_a_tail(loss, options):
    for more in SETTINGS:
        teacher, tau = made(3, 29), more.get("temperature", 1.0)
        for k in (1, 5, 29):
            agrees(loss, {**options, **more}, top_k(teacher, k, temperature=tau))
        agrees(loss, {**options, **more, "truncation": "renorm"}, top_k(teacher, 5, temperature=tau))


def test_samples_and_labels():
    for more in SETTINGS:
        for loss, _ in PLAIN[:2]:
            agrees(loss, more, sample(made(3, 29), 12, temperature=more.get("temperature", 1.0)))  # with repeats
    agrees(losses.cross_entropy, {}, None, (torch.tensor([0, 28, 28], device=DEVICE),))


@pytest.mark.parametrize("scale,softcap", [(0.3, None), (1.7, 4.0)])
def test_scale_and_soft_cap_of_the_head(scale, softcap):
    for loss, options in (PLAIN[0], PLAIN[2], MIXED[0]):
        agrees(loss, {**options, "temperature": 1.5}, Dense(made(3, 29)), scale=scale, softcap=softcap)
        agrees(loss, options, top_k(made(3, 29), 4), scale=scale, softcap=softcap)
    agrees(losses.cross_entropy, {}, None, (torch.tensor([3, 1, 9], device=DEVICE),), scale=scale, softcap=softcap)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 3), classes=st.integers(1, 35), block=st.sampled_from([1, 4, 16, 64]),
    programs=st.integers(1, 12), case=st.sampled_from(DENSE), seed=st.integers(0, 99), size=st.sampled_from([0.01, 1, 20]),
)  # fmt: skip
def test_any_shape_and_cut(rows, classes, block, programs, case, seed, size):
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers, "BLOCK", block)
        patch.setattr(writers, "PROGRAMS", programs)
        logits = made(rows, classes, scale=size)
        teacher = Dense(made(rows, classes, scale=size))
        agrees(*case, teacher, logits=logits)
        agrees(*case, top_k(teacher.logits, min(3, classes)), logits=logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_teacher_logits_as_they_are_stored(dtype):
    """Half-precision, a slice of a wider table, or transposed."""
    wide = made(3, 40).to(dtype)
    for teacher in (wide[:, :29], made(29, 3).to(dtype).T):
        agrees(losses.reverse_kl, {}, Dense(teacher))
        agrees(losses.forward_kl, {}, Dense(teacher))


def test_forbidden_classes_of_the_teacher():
    """A class at −inf has p = 0 and follows 0 · log 0 = 0: no other path is needed where the value is finite."""
    teacher = made(3, 29)
    teacher[:, :16], teacher[1, 20] = -math.inf, -math.inf  # two whole blocks
    for loss, options in (*PLAIN[:2], MIXED[0], MIXED[3], MIXED[6]):
        agrees(loss, options, Dense(teacher))
    agrees(losses.forward_kl, {}, top_k(teacher, 20))
    logits = made(3, 29)
    both = torch.where(teacher == -math.inf, teacher, logits)
    for loss, options in DENSE:
        agrees(loss, options, Dense(teacher), logits=both)
    values = writers.writer(losses.reverse_kl, logits, Dense(teacher), (), {})(logits, 1.0, None)
    assert not values.isfinite().any()  # KL(q ‖ p) is infinite: the plain loss has to say so


def test_extreme_logits():
    logits, teacher = made(3, 29, scale=1e3), made(3, 29, scale=1e3)
    shifted = made(3, 29, scale=0.1)
    for loss, options in (PLAIN[0], PLAIN[2], *MIXED[:1], MIXED[3], MIXED[6]):
        agrees(loss, options, Dense(teacher), logits=logits)
        agrees(loss, options, Dense(shifted + 4096), logits=shifted - 4096)  # constants cancel before rounding
        same = logits.clone()
        values = writers.writer(loss, same, Dense(logits), (), options)(same, 1.0, None)
        assert values.abs().max() < 1e-6 and same.abs().max() < 1e-6


def test_gradients_near_the_teacher():
    """At a KL of about 0.01 and below the gradient is a small difference; float32 leaves enough of it."""
    logits = made(3, 29, scale=2.0)
    teacher = logits + made(3, 29, scale=0.1)
    for loss, options in DENSE:
        leaf, z = logits.double().requires_grad_(), logits.clone()
        values = loss(leaf, teacher.double(), **options)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        writers.writer(loss, z, Dense(teacher), (), options)(z, 1.0, None)
        assert (z - gradient).norm() / gradient.norm() < 1e-4, loss


def test_what_is_not_covered_is_left_as_it_is():
    logits, teacher = made(3, 29), Dense(made(3, 29))
    before = logits.clone()
    assert writers.writer(losses.total_variation, logits, teacher, (), {}) is None
    assert writers.writer(losses.forward_kl, logits, teacher, (), {"beta": 0.5}) is None
    assert writers.writer(losses.jsd, logits, teacher, (), {"beta": 1.5}) is None
    assert writers.writer(losses.forward_kl, logits.double(), teacher, (), {}) is None
    assert writers.writer(losses.forward_kl, logits, Dense(made(3, 28)), (), {}) is None
    assert writers.writer(losses.forward_kl, logits, top_k(before, 3), (), {"temperature": 2.0}) is None
    fewer = top_k(before, 3)
    fewer.ids[0, -1], fewer.log_probs[0, -1] = -1, -math.inf
    assert writers.writer(losses.forward_kl, logits, fewer, (), {}) is None
    assert torch.equal(logits, before)
    with pytest.raises(InputError, match="label 29 is outside"):
        writers.writer(losses.cross_entropy, logits, None, (torch.tensor([0, 29, 1], device=DEVICE),), {})


def head(dtype, rows=7, classes=29, requires=True, **options):
    parts = (made(rows, 8, scale=1.0), made(classes, 8, scale=1.0), made(classes, scale=1.0))
    return Projected(*(x.to(dtype).requires_grad_(requires) for x in parts), **options)


def streamed(loss, student, target, *rows, tile_rows=3, **options):
    """Values and gradients, tile by tile against whole in float64; rows weigh differently or alike."""
    wide = Projected(
        *(x.detach().double().requires_grad_() for x in (student.hidden, student.weight, student.bias)),
        scale=student.scale, softcap=student.softcap,
    )  # fmt: skip
    ours = rowwise(loss, student, target, *rows, tile_bytes=4 * 29 * tile_rows, **options)
    theirs = plain(loss, wide, exact(target), *rows, **options)
    for weights in (torch.full_like(ours, 0.7), torch.rand_like(ours)):
        grads = [
            torch.autograd.grad((v * weights).sum(), (p.hidden, p.weight, p.bias), retain_graph=True)
            for v, p in ((ours, student), (theirs, wide))
        ]
        yield ours, theirs, [(a.double() - b).norm() / b.norm() for a, b in zip(*grads, strict=True)]


@pytest.mark.parametrize("kind", ["projected", "top_k", "sampled", "labels"])
def test_the_whole_of_rowwise(kind, monkeypatch):
    monkeypatch.setattr(chunked, "by_hand", lambda *_: pytest.fail("the kernels did not run"))
    student, teacher = head(torch.float32, scale=1.3, softcap=8.0), head(torch.float32, requires=False, softcap=5.0)
    labels, logits = torch.randint(0, 29, (7,)).to(DEVICE), made(7, 29)
    target = {"projected": teacher, "top_k": top_k(logits, 4), "sampled": sample(logits, 4), "labels": None}[kind]
    loss, rows = (losses.cross_entropy, (labels,)) if kind == "labels" else (losses.forward_kl, ())
    for tile_rows in (3, 7):
        for ours, theirs, errors in streamed(loss, student, target, *rows, tile_rows=tile_rows):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
            assert max(errors) < 1e-4


@pytest.mark.parametrize("loss", [losses.forward_kl, losses.reverse_kl, losses.jsd])
def test_half_precision_heads(loss):
    student, teacher = head(torch.bfloat16), head(torch.bfloat16, requires=False)
    for ours, theirs, errors in streamed(loss, student, teacher):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
        assert max(errors) < 0.003  # stored in bfloat16: 2^-9 a number


def test_rows_that_are_not_finite_are_decided_by_the_plain_loss():
    student, logits = head(torch.float32), made(7, 29)
    logits[4, 3] = -math.inf
    for kernels in (True, False):
        values = rowwise(losses.reverse_kl, student, Dense(logits), kernels=kernels)
        assert values.isinf().tolist() == [False] * 4 + [True] + [False] * 2
    (gradient,) = torch.autograd.grad(rowwise(losses.forward_kl, student, Dense(logits)).sum(), student.hidden)
    (expected,) = torch.autograd.grad(plain(losses.forward_kl, student, Dense(logits)).sum(), student.hidden)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    logits[2, 5] = math.nan
    with pytest.raises(InputError, match="row 2 is not a distribution: the teacher has nan"):
        rowwise(losses.forward_kl, student, Dense(logits))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_products_of_half_precision_on_a_gpu(monkeypatch):
    monkeypatch.setattr(products, "BLOCK_BYTES", 4 * 64 * 100)
    hidden, weight, slope = (made(*s, scale=1.0) for s in ((48, 64), (520, 64), (48, 520)))
    half, head_ = hidden.bfloat16(), weight.bfloat16()
    for out, expected in (
        (products.to_logits(half, head_, torch.empty_like(slope)), half.double() @ head_.double().T),
        (products.to_hidden(slope, head_), slope.double() @ head_.double()),
        (products.to_weight(slope, half, torch.zeros_like(weight), 0.0), slope.double().T @ half.double()),
    ):
        assert out.dtype == torch.float32
        assert (out.double() - expected).norm() / expected.norm() < 1e-5
