"""Paper 32: the differential information of two policies against golden vectors, its limits, bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden_vectors import close, golden
from understudy import InputError
from understudy.losses import differential_information as did
from understudy.losses.gradients import align


@pytest.fixture(scope="module")
def g():
    return golden("32-differential-information")


def powers_of(log_reference, alphas):
    """log π of π ∝ π_ref^(1 + a) for each a, and the differential information of each, `[alphas, responses]`."""
    policies = ((1 + alphas)[:, None] * log_reference).log_softmax(-1)
    return policies, did.log_ratio_distribution(policies, log_reference.expand_as(policies))


@pytest.mark.golden
def test_golden_distributions(g):
    ref, star, beta = g["logp_ref"], g["logp_star"], float(g["beta"])
    forth, back = did.log_ratio_distribution(star, ref), did.log_ratio_distribution(ref, star)
    close(forth, g["did_logp"], rtol=1e-9)
    close(back, g["did_reverse_logp"], rtol=1e-9)
    close(did.entropy_of(forth), g["did_entropy"], rtol=1e-9)
    close(did.entropy_of(back), g["did_reverse_entropy"], rtol=1e-9)
    rejected = did.rejected_distribution(ref, star, beta=beta)
    close(rejected, g["logp_rejected_opt"], rtol=1e-9)
    close(did.preference_matrix(ref, rejected), g["pref_matrix"], rtol=1e-9)
    assert bool(did.ordered_pairs(star, ref, rejected) == 1) == bool(g["log_margin_ordered"])
    close(did.ordered_pairs(star, ref, g["logp_rejected_bad"]), g["frac_pairs_ordered_bad"], rtol=1e-9)
    policies, powers = powers_of(g["power_logp_ref"], g["power_alpha"])
    close(did.entropy_of(powers), g["power_did_entropy"], rtol=1e-9)
    close((policies.exp() * g["power_logp_ref"]).sum(-1), g["power_expected_ref_logp"], rtol=1e-9)


@pytest.mark.golden
def test_golden_expected_loss(g):
    ref, rejected, beta = g["logp_ref"], g["logp_rejected_opt"], float(g["beta"])
    theta = g["theta"].clone().requires_grad_()
    value = did.expected_preference_loss(beta * (theta.log_softmax(-1) - ref), ref, rejected)
    close(value, g["pop_loss"], rtol=1e-9)
    value.backward()
    close(theta.grad, g["pop_grad"], rtol=1e-9)
    star = did.expected_preference_loss(beta * (g["logp_star"] - ref), ref, rejected)
    close(star, g["pop_loss_at_star"], rtol=1e-9)


@pytest.mark.golden
@pytest.mark.filterwarnings("ignore:sampled_entropy")
def test_golden_estimate(g):
    ours, theirs, drawn = g["est_logp_policy"], g["est_logp_ref"], g["est_sample_idx"]
    entropy, log_z, effective = did.sampled_entropy(ours, theirs)
    close(entropy, g["est_entropy"], rtol=1e-9)
    close(log_z, g["est_logZ"], rtol=1e-9)
    weights = 1 / theirs.exp()
    close(effective, weights.sum().square() / weights.square().sum(), rtol=1e-9)
    close(theirs, g["power_logp_ref"][drawn])
    far = (theirs - theirs[0]).abs().argmax()  # the samples are of a power 1 + a of the reference
    alpha = (ours[far] - ours[0]) / (theirs[far] - theirs[0]) - 1
    policies, powers = powers_of(g["power_logp_ref"], alpha[None])
    close(policies[0, drawn], ours, rtol=1e-9)
    close(did.entropy_of(powers)[0], g["exact_entropy"], rtol=1e-9)


@pytest.mark.golden
def test_golden_projection(g):
    weight = float(g["pg_weight"])
    chosen, rejected = -weight * g["pg_gw"], weight * g["pg_gl"]
    close(chosen + rejected, g["pg_dpo_grad"], rtol=1e-9)
    (kept,) = align([chosen], [rejected])
    close(chosen + kept, g["pg_projected_grad"], rtol=1e-9)
    assert (-(chosen + kept) @ g["pg_gw"]) >= 0  # the step does not lower the chosen one, to first order
    free = rejected if chosen @ rejected >= 0 else -rejected
    (same,) = align([chosen], [free])
    assert same.equal(free)  # nothing conflicts


policies = st.lists(st.floats(-40, 5), min_size=5, max_size=5).map(
    lambda v: torch.tensor(v, dtype=torch.float64).log_softmax(-1)
)


@given(policies, policies, policies, st.floats(0.05, 2), st.floats(-30, 30))
def test_limits(a, b, c, beta, shift):
    def q(x, y):
        return did.log_ratio_distribution(x, y)

    close(q(a, a), torch.full_like(a, -math.log(5)))
    close(did.entropy_of(q(a, a)), torch.tensor(math.log(5), dtype=torch.float64))
    assert did.entropy_of(q(a, b)) <= math.log(5) + 1e-12
    close(q(a + shift, b), q(a, b), atol=1e-8)
    close(q(b, a), (-q(a, b)).log_softmax(-1), atol=1e-9)
    close(q(a, c), (q(a, b) + q(b, c)).log_softmax(-1), atol=1e-8)
    rejected = did.rejected_distribution(a, b, beta=beta)
    matrix = did.preference_matrix(a, rejected)
    power = beta * q(b, a)
    close(matrix, torch.sigmoid(power[:, None] - power[None]), atol=1e-9)
    close(matrix + matrix.T, torch.ones_like(matrix), atol=1e-12)
    close(did.rejected_distribution(a, b, beta=1e-12), a, atol=1e-9)
    theta = b.clone().requires_grad_()
    did.expected_preference_loss(beta * (theta.log_softmax(-1) - a), a, rejected).backward()
    assert theta.grad.abs().max() < 1e-12


def test_rejected_are_uniform_where_the_target_is_the_square():
    ref = torch.tensor([0.3, -1.0, 2.0, 0.1]).double().log_softmax(-1)
    uniform = did.rejected_distribution(ref, (2 * ref).log_softmax(-1), beta=1.0)
    close(uniform, torch.full_like(ref, -math.log(4)))


def test_a_target_that_is_the_reference_moves_no_pair():
    ref = torch.tensor([0.3, -1.0, 2.0, 0.1]).double().log_softmax(-1)
    assert did.ordered_pairs(ref, ref, did.rejected_distribution(ref, ref, beta=0.1)) == 1


def test_responses_of_probability_zero():
    a, b = torch.tensor([0.0, -1.0, -math.inf]), torch.tensor([-1.0, 0.0, -2.0])
    log_q = did.log_ratio_distribution(a, b)
    assert log_q[2] == -math.inf and did.entropy_of(log_q) == pytest.approx(0.36533, abs=1e-4)
    leaf = log_q.requires_grad_()
    assert torch.autograd.grad(did.entropy_of(leaf), leaf)[0].isfinite().all()
    log_q = leaf.detach()
    with pytest.raises(InputError, match="response 2 has probability 0"):
        did.log_ratio_distribution(b, a)
    with pytest.warns(UserWarning, match="left out"):
        both = did.log_ratio_distribution(a, torch.tensor([-1.0, 0.0, -math.inf]))
    close(both, log_q)
    neither = torch.tensor([-math.inf])
    chosen, rejected, target = (torch.tensor(v).log_softmax(-1) for v in ([0.0, -1.0], [-1.0, 0.5], [2.0, 0.3]))
    more = [torch.cat([x, neither]) for x in (target, chosen, rejected)]
    assert did.ordered_pairs(*more) == did.ordered_pairs(target, chosen, rejected)
    reward = (more[0] - more[1]).requires_grad_()
    value = did.expected_preference_loss(reward, more[1], more[2])
    close(value, did.expected_preference_loss(target - chosen, chosen, rejected), rtol=1e-6)
    assert torch.autograd.grad(value, reward)[0].isfinite().all()
    matrix = did.preference_matrix(more[1], more[2])
    assert matrix[:2, :2].equal(did.preference_matrix(chosen, rejected)) and matrix[2].isnan().all()
    assert did.preference_matrix(a, b).diag().tolist() == [0.5] * 3  # response 2 is never chosen
    assert did.entropy_of(did.log_ratio_distribution(torch.zeros(1), torch.zeros(1))) == 0


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda x: did.rejected_distribution(x, x, beta=0.0), "beta is 0.0"),
        (lambda x: did.log_ratio_distribution(x * math.nan, x), "response 0 is not a number"),
        (lambda x: did.log_ratio_distribution(x, x[:2]), "3 responses of one policy and 2 of the other"),
        (lambda x: did.sampled_entropy(x, x - math.inf), "finite log-probability under both"),
        (lambda x: did.ordered_pairs(x[:1], x[:1], x[:1]), "makes no pair"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call(torch.zeros(3))


def test_few_effective_samples_are_said():
    with pytest.warns(UserWarning, match=r"effective number of samples is 1\.0"):
        did.sampled_entropy(torch.tensor([-1.0, -2.0]), torch.tensor([-100.0, -1.0]))
