"""Paper 6, LELP: golden vectors, limits that must hold, bad input, the other splitters."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden_vectors import close, golden
from understudy import InputError
from understudy.losses import cross_entropy, cross_entropy_soft, entropy, forward_kl
from understudy.losses.subclasses import (
    marginal_cross_entropy,
    marginal_logits,
    null_projector,
    principal_directions,
    projections,
    random_rotations,
    split_log_targets,
    subclass_log_probs,
    two_class_head,
)
from understudy.teachers.splitters import SPLITTERS, Known, Shape

NEAR = {"rtol": 1e-7, "atol": 1e-9}


@pytest.mark.golden
def test_golden():
    g = golden("06-lelp")
    number, beta, tau = int(g["num_subclasses"]), float(g["beta"]), float(g["tau"])
    classes = len(g["teacher_W"])
    p = null_projector(g["teacher_W"])
    how = {"classes": classes, "subclasses": number}
    found = principal_directions(g["embeddings"], g["labels"], projector=p, **how)
    turned = g["rotation"] @ found.directions
    z = g["batch_embeddings"] @ g["teacher_W"].T + g["teacher_b"]
    scores = projections(g["batch_embeddings"] @ p, found.means, turned)
    plain, scaled = (subclass_log_probs(scores, beta=beta, scale=s) for s in (None, found.scale))
    targets = [split_log_targets(z, r, temperature=tau) for r in (plain, scaled)]
    parts = (len(z), classes, number)
    for value, name in (
        (p, "null_projector"),
        (found.means, "class_means"),
        (found.directions, "pca_directions"),
        (found.variances, "pca_variances"),
        (found.scale, "class_scale"),
        (turned, "subclass_directions"),
        (z, "teacher_logits"),
        (torch.softmax(z / tau, -1), "teacher_class_probs"),
        (scores, "projections"),
        (plain.exp(), "subclass_probs"),
        (scaled.exp(), "subclass_probs_normalised"),
        (targets[0].exp().view(parts), "target_probs"),
        (targets[1].exp().view(parts), "target_probs_normalised"),
    ):
        close(value, g[name], **NEAR)
    student = g["student_logits"].clone().requires_grad_()
    values, other = (cross_entropy_soft(student, tau * t, temperature=tau, tau_squared=True) for t in targets)
    (gradient,) = torch.autograd.grad(values.mean(), student)
    ours = marginal_logits(g["student_logits"], classes)
    for value, name in (
        (values, "loss_per_sample"),
        (values.mean(), "loss"),
        (gradient, "grad_student"),
        (entropy(tau * targets[0], temperature=tau), "target_entropy"),
        (other.mean(), "loss_normalised"),
        (torch.softmax(ours, -1), "student_class_probs"),
    ):
        close(value, g[name], **NEAR)
    assert torch.equal(ours.argmax(-1), g["student_pred"])
    bare = principal_directions(g["embeddings"], g["labels"], **how)
    close(bare.means, g["class_means_no_null"], **NEAR)
    close(bare.directions, g["pca_directions_no_null"], **NEAR)
    scores = projections(g["batch_embeddings"], bare.means, g["rotation"] @ bare.directions)
    close(subclass_log_probs(scores, beta=beta).exp(), g["subclass_probs_no_null"], **NEAR)


@pytest.fixture
def world():
    """Embeddings, labels, head, and 6 rows with their logits."""
    torch.manual_seed(5)
    h, w, b = torch.randn(50, 9).double(), torch.randn(3, 9).double(), torch.randn(3).double()
    h = h * torch.linspace(3, 0.3, 9).double()
    return h, torch.arange(50) % 3, w, b


def targets(h, labels, w, rows, z, *, number=4, beta=0.5, tau=1.0, null=True, rotation=None):
    p = null_projector(w) if null else torch.eye(h.shape[1], dtype=h.dtype)
    found = principal_directions(h, labels, classes=len(w), subclasses=number, projector=p if null else None)
    u = found.directions if rotation is None else rotation @ found.directions
    r = subclass_log_probs(projections(rows @ p, found.means, u), beta=beta, scale=found.scale)
    return r, split_log_targets(z, r, temperature=tau)


def test_one_subclass_is_plain_distillation(world):
    h, labels, w, b = world
    z = h[:6] @ w.T + b
    _, t = targets(h, labels, w, h[:6], z, number=1, tau=2.0)
    student = torch.randn(6, 3).double().requires_grad_()
    ours = cross_entropy_soft(student, 2.0 * t, temperature=2.0, tau_squared=True)
    plain = cross_entropy_soft(student, z, temperature=2.0, tau_squared=True)
    close(ours, plain)
    close(torch.autograd.grad(ours.sum(), student)[0], torch.autograd.grad(plain.sum(), student)[0])


def test_limits_of_beta(world):
    h, labels, w, b = world
    z = h[:6] @ w.T + b
    r, t = targets(h, labels, w, h[:6], z, beta=1e12, tau=1.5)
    close(r, torch.full_like(r, -math.log(4)), atol=1e-9)
    # A student at its optimum has the class marginals, and pays log S more than plain distillation at its own.
    best = cross_entropy_soft(1.5 * t, 1.5 * t, temperature=1.5, tau_squared=True)
    close(best, 1.5**2 * (entropy(z, temperature=1.5) + math.log(4)), atol=1e-9)
    close(torch.softmax(marginal_logits(t, 3), -1), torch.softmax(z / 1.5, -1))
    r, t = targets(h, labels, w, h[:6], z, beta=1e-9)
    assert ((r.exp() - 1).abs() < 1e-9).sum(-1).eq(1).all()
    student = torch.randn(6, 12).double().requires_grad_()
    loss = cross_entropy_soft(student, t)
    loss.sum().backward()
    assert loss.isfinite().all() and student.grad.isfinite().all()


def test_marginals_of_the_target_are_the_teachers(world):
    h, labels, w, b = world
    for scale in (1.0, 30.0):
        z = scale * (h @ w.T + b)
        _, t = targets(h, labels, w, h, z, tau=0.7)
        close(t.exp().view(50, 3, 4).sum(-1), torch.softmax(z / 0.7, -1), rtol=1e-12, atol=1e-14)


def test_what_the_head_sees_and_constants_do_not_matter(world):
    h, labels, w, b = world
    z = h[:6] @ w.T + b
    r, _ = targets(h, labels, w, h[:6], z)
    seen = torch.randn(50, 3).double() @ w
    close(targets(h, labels, w, h[:6] + seen[:6], z)[0], r)
    shift = torch.randn(9).double()
    for null in (True, False):
        before = targets(h, labels, w, h[:6], z, null=null)[0]
        close(targets(h + shift, labels, w, h[:6] + shift, z, null=null)[0], before)
    assert (targets(h, labels, w, h[:6] + seen[:6], z, null=False)[0] - r).abs().max() > 1e-3


def test_rotations(world):
    h, labels, w, _ = world
    p = null_projector(w)
    found = principal_directions(h, labels, classes=3, subclasses=4, projector=p)
    eye = torch.eye(4).double().expand(3, 4, 4)
    q = random_rotations(3, 4, seed=7)
    assert torch.equal(q, random_rotations(3, 4, seed=7)) and not torch.equal(q[0], q[1])
    u = q @ found.directions
    close(u @ u.transpose(1, 2), eye)
    close(u.transpose(1, 2) @ u, found.directions.transpose(1, 2) @ found.directions)  # the same subspace
    x = h @ p

    def spread(directions):
        own = projections(x, found.means, directions)
        return torch.stack([own[labels == c, c].square().mean(0) for c in range(3)])

    close(spread(found.directions), found.variances)
    close(spread(u).mean(-1).sqrt(), found.scale)
    many = torch.stack([spread(random_rotations(3, 4, seed=s) @ found.directions) for s in range(400)]).mean(0)
    assert ((many / many.mean(-1, keepdim=True) - 1).abs() < 0.12).all()  # equal in expectation


def test_a_turned_embedding_gives_the_same_targets(world):
    h, labels, w, b = world
    turn = torch.linalg.qr(torch.randn(9, 9).double()).Q
    z = h[:6] @ w.T + b
    p, p2 = null_projector(w), null_projector(w @ turn.T)
    a = principal_directions(h, labels, classes=3, subclasses=4, projector=p)
    c = principal_directions(h @ turn.T, labels, classes=3, subclasses=4, projector=p2)
    one, two = projections(h @ p, a.means, a.directions), projections(h @ turn.T @ p2, c.means, c.directions)
    sign = torch.where((one * two).sum(0) < 0, -1.0, 1.0)
    close(one, two * sign, atol=1e-9)
    r = [subclass_log_probs(x, beta=0.5, scale=a.scale)[:6] for x in (one, two * sign)]
    close(split_log_targets(z, r[0]), split_log_targets(z, r[1]), atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.floats(0.3, 5.0), st.integers(0, 1000))
def test_the_gradient_and_the_bound(classes, number, tau, seed):
    torch.manual_seed(seed)
    t = torch.log_softmax(3 * torch.randn(5, classes * number).double(), -1)
    student = torch.randn(5, classes * number).double().requires_grad_()
    loss = cross_entropy_soft(student, tau * t, temperature=tau, tau_squared=True)
    (gradient,) = torch.autograd.grad(loss.mean(), student)
    close(gradient, tau / 5 * (torch.softmax(student / tau, -1) - t.exp()), atol=1e-9)
    close(gradient.sum(-1), torch.zeros(5).double(), atol=1e-9)
    assert (loss >= tau**2 * entropy(t) - 1e-9).all()
    order = torch.cat([c * number + torch.randperm(number) for c in range(classes)])
    close(cross_entropy_soft(student[:, order], tau * t[:, order], temperature=tau, tau_squared=True), loss)
    marginal = marginal_logits(student, classes)
    close(torch.softmax(marginal, -1), torch.softmax(student, -1).view(5, classes, number).sum(-1))
    labels = torch.randint(0, classes, (5,))
    close(marginal_cross_entropy(student, labels, classes=classes), cross_entropy(marginal, labels))
    close(forward_kl(marginal, marginal), torch.zeros(5).double(), atol=1e-9)


def test_the_class_is_not_that_of_the_largest_output():
    logits = torch.tensor([[1.0, 0.0, 0.9, 0.9]])
    assert int(logits.argmax() // 2) == 0 and int(marginal_logits(logits, 2).argmax()) == 1


def test_edges(world):
    h, labels, w, _ = world
    flat = principal_directions(torch.ones(50, 9), labels, classes=3, subclasses=2)
    r = subclass_log_probs(projections(h, flat.means, flat.directions), beta=0.5, scale=flat.scale)
    assert flat.scale.eq(0).all() and torch.equal(r, torch.full_like(r, -math.log(2)))
    few = torch.cat([torch.zeros(45), torch.ones(3), torch.full((2,), 2)]).long()
    found = principal_directions(h, few, classes=3, subclasses=4, strict=False)
    assert found.directions.shape == (3, 1, 9)
    close(null_projector(w) @ w.T, torch.zeros(9, 3).double(), atol=1e-12)
    one = two_class_head(torch.ones(1, 4))
    assert one.tolist() == [[0.0] * 4, [1.0] * 4] and two_class_head(w) is w


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_no_variance(world, dtype):
    """Embeddings of a class that are all equal, or that only the head can tell apart: P leaves rounding of them."""
    h, labels, w, _ = world
    p, how = null_projector(w), {"classes": 3, "subclasses": 2}
    equal = (torch.linspace(0.1, 142.7, 9).double()).expand(50, 9)
    for flat in (equal, torch.randn(50, 3).double() @ w):
        x = torch.where((labels == 1)[:, None], flat, h).to(dtype)
        found = principal_directions(x, labels, projector=p, **how)
        assert found.scale.gt(0).tolist() == [True, False, True]
        for normalise in (True, False):
            tables = SPLITTERS["linear"].fit(Known(x, labels, labels), Shape(3, 2, projector=p, normalise=normalise))
            r = SPLITTERS["linear"].assign(h @ p, labels, tables, 0.5)
            assert (
                torch.equal(r[:, 1], torch.full_like(r[:, 1], -math.log(2))) and (r[:, 0] - r[:, 1]).abs().max() > 0.1
            )


def test_directions_in_which_nothing_varies_are_refused(world):
    h, labels, w, _ = world
    p = null_projector(w)
    two = torch.where((labels == 1)[:, None], h[torch.arange(50) % 9], h)  # class 1 has three distinct embeddings
    with pytest.raises(InputError, match="17 embeddings of class 1 vary in 2 directions alone and 4 subclasses"):
        principal_directions(two, labels, classes=3, subclasses=4, projector=p)
    found = principal_directions(two, labels, classes=3, subclasses=4, projector=p, strict=False)
    assert found.directions.shape == (3, 2, 9) and found.variances.shape == (3, 2) and found.scale.gt(0).all()
    with pytest.raises(
        InputError, match=r"class 2 has 1 examples and any split needs at least 2. Give more examples\.$"
    ):
        principal_directions(
            h, labels.clamp(max=1).index_fill(0, torch.tensor(0), 2), classes=3, subclasses=4, strict=False
        )


def bad_embedding(h):
    h = h.clone()
    h[17, 2] = float("nan")
    return h


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda h, y, w: principal_directions(h[:8], y[:8], classes=3, subclasses=3), "class 2 has 2 examples"),
        (lambda h, y, w: principal_directions(h, y, classes=4, subclasses=2), "class 3 has 0 examples"),
        (lambda h, y, w: principal_directions(h, y, classes=4, subclasses=2, strict=False), "class 3 has 0 examples"),
        (
            lambda h, y, w: principal_directions(h, y, classes=3, subclasses=7, projector=null_projector(w)),
            "the most is 6",
        ),
        (lambda h, y, w: principal_directions(h, y, classes=3, subclasses=0), "subclasses is 0"),
        (lambda h, y, w: principal_directions(bad_embedding(h), y, classes=3, subclasses=2), "embedding 17 is not"),
        (lambda h, y, w: null_projector(w * float("inf")), "not finite"),
        (lambda h, y, w: subclass_log_probs(torch.rand(2, 2, 2), beta=0.0), "beta is 0.0"),
        (lambda h, y, w: split_log_targets(h, torch.rand(50, 9, 2), temperature=-1.0), "temperature is -1.0"),
        (lambda h, y, w: split_log_targets(h, torch.rand(50, 3, 2)), "rows and classes must agree"),
        (lambda h, y, w: marginal_logits(torch.rand(2, 7), 2), "7 outputs cannot be shared among 2"),
        (lambda h, y, w: marginal_cross_entropy(h[:, :8], torch.full((50,), 2), classes=2), "label 2 is outside"),
        (lambda h, y, w: cross_entropy(h, torch.full((50,), -1)), "needs labels"),
    ],
)
def test_bad_input(call, says, world):
    with pytest.raises(InputError, match=says):
        call(*world[:3])


def test_splitters_share_an_interface(world):
    h, labels, _, _ = world
    ids = torch.arange(50) + 100
    parts = torch.stack([labels, labels + 3 * (torch.arange(50) % 4 < 2)], 1)
    known, shape = Known(h, labels, ids, parts), Shape(3, 2, seed=1)
    for name, splitter in SPLITTERS.items():
        tables = splitter.fit(known, shape)
        whole = splitter.assign(h, ids, tables, 0.5)
        assert whole.shape == (50, 3, 2) and int(tables["subclasses"]) == 2, name
        close(whole.exp().sum(-1), torch.ones(50, 3).double())
        cut = torch.cat([splitter.assign(h[i : i + 1], ids[i : i + 1], tables, 0.5) for i in range(50)])
        close(cut, whole, atol=1e-9)
    chosen = whole[torch.arange(50), labels].argmax(-1)  # the oracle's, which came last
    assert torch.equal(chosen, (parts[:, 1] > 2).long())
    hard, soft = (SPLITTERS[n].assign(h, ids, SPLITTERS[n].fit(known, shape), 1e-9) for n in ("kmeans", "kmeans_soft"))
    close(hard.exp(), soft.exp(), atol=1e-9)
    with pytest.raises(InputError, match="tells no subclasses"):
        SPLITTERS["oracle"].fit(known._replace(parts=None), shape)
    with pytest.raises(InputError, match=r"set options.subclasses=2"):
        SPLITTERS["oracle"].fit(known, Shape(3, 4))
    with pytest.raises(InputError, match="Example 7 was not among"):
        SPLITTERS["oracle"].assign(h[:1], torch.tensor([7]), tables, 0.5)
    with pytest.raises(InputError, match="distinct embeddings"):
        SPLITTERS["kmeans"].fit(known._replace(features=torch.zeros_like(h)), shape)
