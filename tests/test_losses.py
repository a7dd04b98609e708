"""Limits that must hold and bad input of cards 00, 09, 19 and 40."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden_vectors import reduce
from understudy import losses
from understudy.errors import InputError
from understudy.losses.gradients import align
from understudy.losses.truncation import NAMES
from understudy.models import ModelOutput
from understudy.targets import Dense, Projected, TopK, largest, sample, top_k

F64 = torch.float64
DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.3},
    "skew_kl": {"alpha": 0.2},
    "skew_reverse_kl": {"alpha": 0.2},
    "total_variation": {},
    "alpha_beta": {"alpha": 0.2, "beta": 0.7},
    "adaptive_kl": {"mu": 0.6},
}


def draw(seed, rows=4, classes=7, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, classes, generator=g, dtype=F64) for _ in range(2))


def gradient(function, student, *args, **kwargs):
    leaf = student.clone().requires_grad_()
    function(leaf, *args, **kwargs).sum().backward()
    return leaf.grad


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(sorted(DIVERGENCES)))
def test_divergences_are_non_negative_and_shift_invariant(seed, name):
    function, options = getattr(losses, name), DIVERGENCES[name]
    s, t = draw(seed)
    values = function(s, t, **options)
    assert (values >= -1e-12).all()
    torch.testing.assert_close(function(s + 3, t - 5, **options), values)
    order = torch.randperm(s.shape[1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(function(s[:, order], t[:, order], **options), values)
    torch.testing.assert_close(
        gradient(function, s, t, **options).sum(-1), torch.zeros(len(s), dtype=F64), atol=1e-10, rtol=0
    )
    equal = function(s, s + 2, **options)
    torch.testing.assert_close(equal, torch.zeros_like(equal), atol=1e-12, rtol=0)
    assert gradient(function, s, s + 2, **options).abs().max() < 1e-10


def test_symmetries_and_limits():
    s, t = draw(1)
    torch.testing.assert_close(losses.forward_kl(s, t), losses.reverse_kl(t, s))
    torch.testing.assert_close(losses.jsd(s, t, beta=0.3), losses.jsd(t, s, beta=0.7))
    torch.testing.assert_close(losses.skew_reverse_kl(s, t, alpha=0.3), losses.skew_kl(t, s, alpha=0.3))
    torch.testing.assert_close(losses.jsd(s, t, beta=1e-7) / 1e-7, losses.forward_kl(s, t), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.jsd(s, t, beta=0.0), losses.forward_kl(s, t))
    torch.testing.assert_close(losses.jsd(s, t, beta=1.0), losses.reverse_kl(s, t))
    tv = losses.total_variation(s, t)
    assert (tv**2 <= 0.5 * torch.minimum(losses.forward_kl(s, t), losses.reverse_kl(s, t)) + 1e-12).all()
    assert (losses.skew_kl(s, t, alpha=0.1) <= -math.log(0.1)).all()
    for pair, expected in (((1, 0), losses.forward_kl(s, t)), ((0, 1), losses.reverse_kl(s, t))):
        torch.testing.assert_close(losses.alpha_beta(s, t, alpha=pair[0], beta=pair[1]), expected)
    q, p = s.softmax(-1), t.softmax(-1)
    torch.testing.assert_close(losses.alpha_beta(s, t, alpha=1, beta=1), 0.5 * (p - q).square().sum(-1))
    torch.testing.assert_close(losses.alpha_beta(s, t, alpha=0.5, beta=0.5), 4 * (1 - (p * q).sqrt().sum(-1)))
    tau = 1e4
    centred = [x - x.mean(-1, keepdim=True) for x in (s, t)]
    hot = losses.forward_kl(s, t, temperature=tau, tau_squared=True)
    torch.testing.assert_close(hot, (centred[1] - centred[0]).square().sum(-1) / (2 * s.shape[1]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("temperature,apart", [(2.0, 1e-3), (1e4, 0.1), (1e4, 1e-4), (2.0, 3.0), (2.0, 1e4)])
def test_the_binary_divergence_of_heads_is_as_exact_where_they_are_near(temperature, apart):
    """Card 40, limit 2: d² / 8 for small d / τ."""
    s, t = torch.tensor([[apart, 0.0]]), torch.zeros(1, 2)
    exact = temperature**2 * math.log(math.cosh(apart / 2 / temperature)) if apart < 100 else 4 * (2500 - math.log(2))
    expected = apart**2 / 8 if apart < temperature / 100 else exact
    found = losses.binary_kl_norm(s, t, temperature=temperature)
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=1e-4, atol=0)
    slope = gradient(losses.binary_kl_norm, s.double(), t.double(), temperature=temperature)
    expected = temperature / 2 * math.tanh(apart / 2 / temperature)
    torch.testing.assert_close(slope, torch.tensor([[expected, 0.0]]).double())


@pytest.mark.parametrize("a,b", [(0.704, -0.114), (0.2, 0.7), (0.7, 0.0), (0.0, 0.1), (0.1, 0.0), (0.4, -0.4)])
def test_alpha_beta_of_near_rows_is_exact_in_single_precision(a, b):
    t = 2.5 * torch.randn(200, 15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert losses.alpha_beta((t + 1.7).float(), t.float(), alpha=a, beta=b).abs().max() < 1e-9
    for apart in (1e-3, 0.09, 0.11):
        s = t + apart * torch.randn(200, 15, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        expected, slope = losses.alpha_beta(s, t, alpha=a, beta=b), gradient(losses.alpha_beta, s, t, alpha=a, beta=b)
        found = losses.alpha_beta(s.float(), t.float(), alpha=a, beta=b)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-9)
        steeper = gradient(losses.alpha_beta, s.float(), t.float(), alpha=a, beta=b)
        torch.testing.assert_close(steeper.double(), slope, rtol=1e-3, atol=1e-5)  # of 1 / a²


def test_total_variation_near_certainty_is_exact_in_single_precision():
    s, t = torch.tensor([[12.3, 0.0]]), torch.tensor([[11.7, 0.0]])
    exact = gradient(losses.total_variation, s.double(), t.double())
    torch.testing.assert_close(gradient(losses.total_variation, s, t).double(), exact, rtol=0.05, atol=0)
    found, expected = losses.total_variation(s, t), losses.total_variation(s.double(), t.double())
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("a,b", [(0.7, 0.0), (0.0, 0.7), (0.4, -0.4), (0.0, 0.0)])
def test_alpha_beta_is_continuous_through_its_branches(a, b):
    s, t = draw(2, scale=1.0)
    here = losses.alpha_beta(s, t, alpha=a, beta=b)
    near = losses.alpha_beta(s, t, alpha=a + 1e-4, beta=b + 2e-4)
    torch.testing.assert_close(here, near, rtol=5e-3, atol=1e-4)


def test_gradients_in_closed_form():
    s, t = draw(3)
    q, p = s.softmax(-1), t.softmax(-1)
    torch.testing.assert_close(gradient(losses.forward_kl, s, t), q - p)
    torch.testing.assert_close(gradient(losses.interpolated_kl, s, t, t=1.0), q - p)
    assert gradient(losses.interpolated_kl, s, t, t=0.0).abs().max() < 1e-14
    p_t = (0.6 * s + 0.4 * t).softmax(-1)
    torch.testing.assert_close(gradient(losses.interpolated_kl, s, t, t=0.4), q - p_t)


def by_loop(s, t, mu):
    """AKL's weight, value and gradient of one row, class by class."""
    q, p = s.softmax(-1), t.softmax(-1)
    head, held = [], 0.0
    for v in sorted(range(len(p)), key=lambda v: -p[v]):
        if held < mu:
            head.append(v)
            held += float(p[v])
    gap = (p - q).abs()
    w = gap[head].sum() / gap.sum()
    back = (q * (q / p).log()).sum()
    value = w * (p * (p / q).log()).sum() + (1 - w) * back
    return value, w * (q - p) + (1 - w) * q * ((q / p).log() - back)


@pytest.mark.parametrize("mu", [1e-6, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_adaptive_kl_weighs_both_directions_by_the_error_of_head_and_tail(mu, scale):
    s, t = draw(7, classes=11, scale=scale)
    value, slope = (torch.stack(x) for x in zip(*map(by_loop, s, t, [mu] * 4), strict=True))
    torch.testing.assert_close(losses.adaptive_kl(s, t, mu=mu), value)
    torch.testing.assert_close(gradient(losses.adaptive_kl, s, t, mu=mu), slope)
    close = {"rtol": 1e-4, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(losses.adaptive_kl(s.float(), t.float(), mu=mu), value, **close)
    torch.testing.assert_close(gradient(losses.adaptive_kl, s.float(), t.float(), mu=mu), slope, **close)
    hot = losses.adaptive_kl(s, t, mu=mu, temperature=2.0, tau_squared=True)
    torch.testing.assert_close(hot, 4 * losses.adaptive_kl(s / 2, t / 2, mu=mu))


def test_limits_of_adaptive_kl():
    s, t = draw(8)
    torch.testing.assert_close(losses.adaptive_kl(s, t, mu=1.0), losses.forward_kl(s, t))
    swapped = torch.tensor([[1.0, 0, 0, 0]]).double(), torch.tensor([[0, 1.0, 0, 0]]).double()
    flat = torch.zeros(1, 4).double()
    head = losses.adaptive_kl(swapped[0], flat, mu=0.5)  # of equal classes the lower are the head: here 0 and 1
    torch.testing.assert_close(head, losses.adaptive_kl(swapped[1], flat, mu=0.5))
    # The bucket of a truncated target is one class of the tail, however much it holds.
    cut = top_k(t, 2)
    q, p = s.softmax(-1).gather(-1, cut.ids), t.softmax(-1).gather(-1, cut.ids)
    gap = (p - q).abs()
    w = gap.sum(-1) / (gap.sum(-1) + (p.sum(-1) - q.sum(-1)).abs())
    both = w * losses.forward_kl(s, cut) + (1 - w) * losses.reverse_kl(s, cut)
    torch.testing.assert_close(losses.adaptive_kl(s, cut, mu=1.0), both)
    # Forbidden by the teacher alone, a class makes the tail's part infinite; by the student alone, its own.
    for side in (s, t):
        kept, side[:, 0] = side[:, 0].clone(), -math.inf
        assert losses.adaptive_kl(s, t).eq(math.inf).all()
        side[:, 0] = kept


def test_an_interpolated_target_is_the_geometric_mean_and_moves_away_with_t():
    s, t = 2 * torch.randn(2, 6, 5, dtype=torch.float64)
    p_t = (torch.softmax(s, -1) ** 0.7 * torch.softmax(t, -1) ** 0.3).log()
    expected = losses.forward_kl(s, p_t)
    torch.testing.assert_close(losses.interpolated_kl(s, t, t=0.3), expected)
    torch.testing.assert_close(losses.interpolated_kl(s + 4, t - 9, t=0.3), expected)
    path = torch.stack([losses.interpolated_kl(s, t, t=i / 20) for i in range(21)])
    assert (path.diff(dim=0) >= -1e-12).all() and path[0].abs().max() < 1e-12
    torch.testing.assert_close(path[-1], losses.forward_kl(s, t))
    torch.testing.assert_close(gradient(losses.interpolated_kl, s, s + 3, t=0.6), torch.zeros_like(s))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "total_variation", "skew_kl", "skew_reverse_kl"])
def test_a_tail_bucket_never_exceeds_the_whole(name):
    s, t = draw(4, rows=8)
    options = DIVERGENCES[name]
    full = getattr(losses, name)(s, t, **options)
    for k in (1, 3, 6, 7, 20):
        cut = getattr(losses, name)(s, top_k(t, k), **options)
        assert (cut <= full + 1e-9).all()
    torch.testing.assert_close(getattr(losses, name)(s, top_k(t, 6), **options), full)


def test_sampled_targets_are_unbiased_in_value_and_gradient():
    s, t = draw(5, rows=1, scale=1.5)
    g = torch.Generator().manual_seed(0)
    drawn = sample(t, 40_000, generator=g)
    torch.testing.assert_close(losses.forward_kl(s, drawn), losses.forward_kl(s, t), rtol=0.05, atol=0.02)
    torch.testing.assert_close(
        gradient(losses.forward_kl, s, drawn), gradient(losses.forward_kl, s, t), rtol=0.1, atol=0.02
    )
    with pytest.raises(InputError, match="reverse_kl is not defined for Sampled"):
        losses.reverse_kl(s, drawn)


def test_forbidden_tokens_give_no_nan():
    s, t = draw(6, rows=2)
    s[:, 0] = t[:, 0] = -math.inf
    for name, options in DIVERGENCES.items():
        function = getattr(losses, name)
        assert function(s, t, **options).isfinite().all()
        assert gradient(function, s, t, **options).isfinite().all()


@pytest.mark.parametrize("a,b", [(1, 0), (0, 1), (0, 0), (0.2, 0.7), (0.7, -0.7), (-0.7, 0.7), (1, -0.5), (-0.5, 0.2)])
def test_forbidden_tokens_of_the_alpha_beta_divergence(a, b):
    """Forbidden by both, a class adds nothing, whatever the exponents; by one, what its limit does."""
    s, t = draw(6, rows=3)
    without = losses.alpha_beta(s[:, 1:], t[:, 1:], alpha=a, beta=b)
    s[:, 0] = t[:, 0] = -math.inf
    torch.testing.assert_close(losses.alpha_beta(s, t, alpha=a, beta=b), without)
    assert gradient(losses.alpha_beta, s, t, alpha=a, beta=b).isfinite().all()
    for side in (s, t):
        side[:, 0] = 0.0
        here, near, nearer = (
            losses.alpha_beta(s.clamp(min=low), t.clamp(min=low), alpha=a, beta=b) for low in (-math.inf, -60, -600)
        )
        assert not here.isnan().any() and (nearer - near)[here.isinf()].gt(0.01).all()  # it grows without bound
        torch.testing.assert_close(here[here.isfinite()], nearer[here.isfinite()], rtol=1e-6, atol=1e-6)
        side[:, 0] = -math.inf


def test_truncation_takes_the_divergences_as_they_are():
    s, t = draw(3)
    for name, options in DIVERGENCES.items():
        if name in NAMES:
            whole = getattr(losses, name)(s, t, **options)
            for support in ("teacher", "student", "union"):
                torch.testing.assert_close(losses.truncate(name, s, t, 7, support=support, **options), whole)
                torch.testing.assert_close(losses.truncate(name, s, t, 6, support=support, **options), whole)
    ends = {0.0: "forward_kl", 1.0: "reverse_kl"}  # the convention of jsd holds here too
    for beta, name in ends.items():
        expected = losses.truncate(name, s, t, 3, support="union")
        torch.testing.assert_close(losses.truncate("jsd", s, t, 3, support="union", beta=beta), expected)


def test_one_class_and_no_rows():
    one = torch.randn(3, 1, dtype=F64)
    for name, options in DIVERGENCES.items():
        assert getattr(losses, name)(one, one + 1, **options).abs().max() < 1e-12
    empty = torch.zeros(0, 5, requires_grad=True)
    value = reduce(losses.forward_kl(empty, torch.zeros(0, 5)), "token_mean")
    value.backward()
    assert value == 0 and empty.grad is not None


def of_no_weight(student, teacher):
    """nan where the teacher's weight is 0: in the logit of a label that it gives no probability."""
    student[2, 0] = math.nan
    teacher[2, 0] = -math.inf
    return student, teacher


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda s, t: losses.forward_kl(s, t[:, :-1]), "7 classes and the teacher 6"),
        (lambda s, t: losses.forward_kl(s, t, temperature=0), "temperature is 0"),
        (lambda s, t: losses.jsd(s, t, beta=1.5), "beta is 1.5"),
        (lambda s, t: losses.skew_kl(s, t, alpha=1.0), "alpha is 1.0"),
        (lambda s, t: losses.adaptive_kl(s, t, mu=0.0), "mu is 0.0 and must lie in"),
        (lambda s, t: losses.adaptive_kl(s, t * math.nan), "row 0 .* teacher has nan"),
        (lambda s, t: losses.adaptive_kl(s, sample(t, 3)), "adaptive_kl is not defined for Sampled"),
        (lambda s, t: losses.forward_kl(s, top_k(t, 2, temperature=2.0)), "temperature 2.0 and the loss requires 1.0"),
        (lambda s, t: losses.forward_kl(s * math.nan, t), "row 0 .* student has nan"),
        (lambda s, t: losses.forward_kl(s, t * math.inf), "teacher has"),
        (lambda s, t: losses.forward_kl(torch.full_like(s, -math.inf), t), "-inf logits only"),
        (lambda s, t: losses.forward_kl(s, ModelOutput(Dense(t))), "not defined for ModelOutput targets"),
        (lambda s, t: losses.forward_kl(s, Projected(s, torch.ones(7, 7, dtype=F64))), "streaming.rowwise"),
        (lambda s, t: losses.binary_kl_norm(s, top_k(t, 2)), "not defined for TopK"),
        (lambda s, t: losses.binary_kl_norm(s, t * math.nan), "row 0 are not finite"),
        (lambda s, t: losses.cross_entropy(s, torch.tensor([0, 1, 2, 9])), "label 9"),
        (lambda s, t: losses.plackett_luce_distillation(s, t, torch.tensor([0, 1, 2, 9])), "label 9"),
        (lambda s, t: losses.plackett_luce_distillation(s, t * math.nan, torch.zeros(4).long()), "teacher has nan"),
        (
            lambda s, t: losses.plackett_luce_distillation(*of_no_weight(s, t), torch.zeros(4).long()),
            "row 2.* student has nan",
        ),
        (lambda s, t: losses.interpolated_kl(s, t, t=1.2), "t is 1.2"),
        (lambda s, t: losses.truncate("forward_lk", s, t, 2), "Did you mean 'forward_kl'"),
        (lambda s, t: losses.truncate("jsd", s, t, 2, beta=1.5), "beta is 1.5"),
        (lambda s, t: losses.truncate("forward_kl", s, t, 0), "k is 0"),
        (lambda s, t: losses.truncate("forward_kl", s, t, 2, support="techer"), "support is 'techer'"),
        (lambda s, t: losses.truncate("forward_kl", s, t, 2, truncation="drop"), "truncation is 'drop'"),
        (lambda s, t: losses.forward_kl(s, top_k(t, 2), truncation="drop"), "must be tail or renorm"),
        (lambda s, t: losses.truncate("forward_kl", s * math.inf, t, 2), "truncated forward_kl: row 0 .* student has"),
        (lambda s, t: top_k(t, 0), "k is 0"),
        (lambda s, t: TopK(torch.zeros(2, 3).long(), torch.zeros(2, 2), torch.zeros(2, 1)), "ids are"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call(*draw(0))


def test_truncation_scales_with_the_temperature_where_asked():
    s, t = draw(3)
    plain, squared = (losses.truncate("forward_kl", s, t, 3, temperature=2.0, tau_squared=on) for on in (False, True))
    torch.testing.assert_close(squared, 4 * plain)


def test_the_order_of_classes_and_equal_logits():
    s, t = draw(9, rows=5)
    y = torch.tensor([0, 1, 2, 3, 6])
    pld = losses.plackett_luce_distillation
    order = torch.randperm(7)
    torch.testing.assert_close(pld(s[:, order], t[:, order], order.argsort()[y]), pld(s, t, y))
    left = torch.arange(7, 0, -1, dtype=F64).log()
    weights = t.softmax(-1).gather(-1, losses.teacher_permutation(t, y))
    torch.testing.assert_close(pld(torch.full_like(s, 3.0), t, y), (weights * left).sum(-1))
    wrong = t.clone()
    wrong[torch.arange(5), y] = t.min() - 1
    at = wrong.clone()
    at[torch.arange(5), y] = -math.inf
    second = wrong.argmax(-1)
    cold = pld(s, wrong, y, temperature=1e-3)  # the label's own step has no weight, that of the teacher's best has all
    rest = s.masked_fill(at == -math.inf, -math.inf)
    torch.testing.assert_close(cold, losses.cross_entropy(rest, second))


def test_the_last_of_a_ranking_costs_nothing():
    s, t = draw(10, rows=5)
    y = torch.zeros(5, dtype=torch.long)
    last = losses.teacher_permutation(t, y)[:, -1]
    rows = torch.arange(5)
    out = s.index_put((rows, last), torch.tensor(-math.inf, dtype=F64))
    for weights in ("teacher", "uniform", "position", "first"):
        near = losses.plackett_luce_distillation(
            s.index_put((rows, last), torch.tensor(-80.0, dtype=F64)), t, y, weights=weights
        )
        torch.testing.assert_close(losses.plackett_luce_distillation(out, t, y, weights=weights), near)
        assert gradient(losses.plackett_luce_distillation, out, t, y, weights=weights).isfinite().all()


def test_plackett_luce_limits():
    s, t = draw(7, rows=5)
    y = torch.tensor([0, 1, 2, 3, 6])
    pld = losses.plackett_luce_distillation
    ce = losses.cross_entropy(s, y)
    torch.testing.assert_close(pld(s, t, y, weights="first"), ce)
    torch.testing.assert_close(pld(s, t, y, temperature=1e6), pld(s, t, y, weights="uniform"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pld(s + 4, t - 2, y), pld(s, t, y))
    torch.testing.assert_close(gradient(pld, s, t, y).sum(-1), torch.zeros(5, dtype=F64), atol=1e-12, rtol=0)
    a1 = t.softmax(-1).gather(-1, y[:, None])[:, 0]
    assert (pld(s, t, y) >= a1 * ce - 1e-12).all()
    assert gradient(pld, t, t, y).abs().max() > 1e-3  # a student equal to the teacher is not stationary
    two = torch.tensor([0, 1, 1, 0, 1])
    torch.testing.assert_close(
        pld(s[:, :2], t[:, :2], two),
        t[:, :2].softmax(-1).gather(-1, two[:, None])[:, 0] * losses.cross_entropy(s[:, :2], two),
    )
    wrong = torch.tensor([[5.0, 0.0, 0.0]], dtype=F64)
    first = losses.plackett_luce_distillation(s[:1, :3], wrong, torch.tensor([1]), temperature=1e-3)
    assert first.isfinite().all()
    masked = t.clone()
    masked[:, 4:6] = -math.inf
    student = s.clone()
    student[:, 4:6] = -math.inf
    value = pld(student, masked, torch.zeros(5).long())
    assert value.isfinite().all() and gradient(pld, student, masked, torch.zeros(5).long()).isfinite().all()
    assert losses.position_weights(300).isfinite().all()
    half = (pld(0.5 * (s + t), t, y) - 0.5 * (pld(s, t, y) + pld(t, t, y))) <= 1e-12
    assert half.all()


def test_binary_kl_norm_limits():
    v, t = draw(8)
    norm = losses.binary_kl_norm
    torch.testing.assert_close(norm(v, t), norm(t, v))
    torch.testing.assert_close(norm(v + 7, t + 7), norm(v, t))
    torch.testing.assert_close(norm(v, t, temperature=1e3), (v - t).square().sum(-1) / 8, rtol=1e-4, atol=1e-8)
    assert gradient(norm, 1000 * v, t).abs().max() <= 1.0 + 1e-12
    assert not torch.allclose(norm(v + 1, t), norm(v, t))
    assert norm(torch.full((1, 3), 1e4), torch.full((1, 3), -1e4)).isfinite().all()
    p = losses.binary_kl
    torch.testing.assert_close(gradient(p, v, t), 2 * (torch.sigmoid(v / 2) - torch.sigmoid(t / 2)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_alignment_never_opposes_the_reference(seed):
    a, b = draw(seed)
    aligned = align([a, None], [b, b])
    dot = (a * (a + aligned[0])).sum()
    assert dot >= a.square().sum() - 1e-9
    if (a * b).sum() >= 0:
        assert torch.equal(aligned[0], b)
    assert torch.equal(align([torch.zeros_like(a)], [b])[0], b)


@given(st.integers(1, 12), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_largest_are_those_of_a_stable_sort(k, seed):
    torch.manual_seed(seed)
    values = torch.randint(-3, 4, (2, 3, 9)).float().masked_fill(torch.rand(2, 3, 9) < 0.2, -float("inf"))
    expected = values.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    assert largest(values, k).equal(expected)
