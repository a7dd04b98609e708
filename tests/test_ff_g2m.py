"""Paper 30, FF-G2M: golden vectors, limits that must hold, bad input, and the task it works on."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden_vectors import close, golden, reduce
from understudy import InputError
from understudy.data import GraphBatch
from understudy.losses import cross_entropy, forward_kl
from understudy.losses.edges import check_edges, high_frequency, high_frequency_cosine, low_frequency
from understudy.methods.ff_g2m import FFG2M
from understudy.methods.kd import KD
from understudy.methods.sft import SFT
from understudy.models import ModelOutput
from understudy.targets import Dense
from understudy.training import TrainState
from understudy.training.reduction import Counts, sum_terms


@pytest.mark.golden
def test_golden():
    g = golden("30-ff-g2m")
    z, h = g["logits_s"].clone().requires_grad_(), g["logits_t"]
    tau, lam, chosen = float(g["tau_high"]), float(g["lam"]), g["labelled_idx"]
    low = reduce(low_frequency(z, h, g["edge_index_with_self_loops"]), "token_mean")
    high = reduce(high_frequency(z, h, g["edge_index"], tau=tau), "token_mean")  # without edges it is 0
    ce = reduce(cross_entropy(z[chosen], g["labels"][chosen]), "token_mean")
    total = lam * ce + (1 - lam) * (low + high)
    close(forward_kl(z, h).mean(), g["loss_glnn_node_kd"], rtol=1e-9)
    close(ce, g["loss_ce"], rtol=1e-9)
    for value, name in ((low, "low"), (high, "high"), (total, "total")):
        close(value, g[f"loss_{name}"], rtol=1e-9)
        close(torch.autograd.grad(value, z, retain_graph=True)[0], g[f"grad_{name}"], rtol=1e-9, atol=1e-14)


@pytest.mark.golden
def test_golden_through_the_method():
    """The same numbers as the engine makes them: terms, weights, and each term divided by its own count."""
    g = golden("30-ff-g2m")
    batch = graph(len(g["labels"]), g["edge_index"])
    batch.loops = g["edge_index_with_self_loops"]
    batch.labels = torch.full_like(g["labels"], -100)
    batch.labels[g["labelled_idx"]] = g["labels"][g["labelled_idx"]]
    z = g["logits_s"].clone().requires_grad_()
    total = loss(FFG2M(lam=float(g["lam"]), tau=float(g["tau_high"])), z, g["logits_t"], batch)
    close(total, g["loss_total"], rtol=1e-9)
    close(torch.autograd.grad(total, z)[0], g["grad_total"], rtol=1e-9, atol=1e-14)


def graph(nodes, edges, labelled=None):
    """A graph as the data room gives it; every third node has a label unless told."""
    labels = torch.full((nodes,), -100)
    chosen = torch.arange(0, nodes, 3) if labelled is None else labelled
    labels[chosen] = chosen % 2
    ids = torch.arange(nodes)
    loops = torch.cat([edges, ids.expand(2, -1)], 1)
    every = torch.ones(nodes, dtype=torch.bool)
    return GraphBatch(inputs={}, labels=labels, ids=ids, edges=edges, loops=loops, chosen=every)


def loss(method, z, h, batch):
    counts = Counts.of(batch, "token_mean", method.counts(batch))
    terms = method.loss(ModelOutput(Dense(z)), ModelOutput(Dense(h)), batch, TrainState(tables={"logits": h}))
    sums = sum_terms(terms, batch, "token_mean", counts.own)
    return sum(counts.divide(n, v) for n, v in sums.losses.items())


def both(pairs):
    edges = torch.tensor(pairs).T
    return torch.cat([edges, edges.flip(0)], 1)


RING = both([(i, (i + 1) % 6) for i in range(6)])


def logits(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_lambda_one_is_training_on_labels_and_zero_reads_none():
    z, h, batch = logits(6, 4), logits(6, 4), graph(6, RING)
    close(loss(FFG2M(lam=1), z, h, batch), loss(SFT(), z, None, batch))
    other = graph(6, RING, labelled=torch.arange(0))
    close(loss(FFG2M(lam=0), z, h, batch), loss(FFG2M(lam=0), z, h, other))
    assert set(FFG2M(lam=0).loss(ModelOutput(Dense(z)), None, other, TrainState(tables={"logits": h}))) == {
        "low",
        "high",
    }
    with pytest.raises(InputError, match="No node of this split has a label"):
        loss(SFT(), z, None, other)


def test_without_edges_it_is_glnn():
    z, h = logits(6, 4), logits(6, 4)
    batch = graph(6, torch.empty(2, 0, dtype=torch.int64))
    glnn = KD(temperature=1.0, ce_weight=0.3, kd_weight=0.7)
    z.requires_grad_()
    ours, theirs = loss(FFG2M(lam=0.3), z, h, batch), loss(glnn, z, h, batch)
    close(ours, theirs.detach())
    close(torch.autograd.grad(ours, z)[0], torch.autograd.grad(theirs, z)[0])


def test_an_equal_student():
    h = logits(6, 4)
    z = h.clone().requires_grad_()
    high = high_frequency(z, h, RING)
    assert high.abs().max() < 1e-12
    alone = low_frequency(z, h, torch.arange(6).expand(2, -1)).sum() + high.sum()
    assert torch.autograd.grad(alone, z)[0].abs().max() < 1e-12
    i, j = RING
    close(low_frequency(z, h, RING), forward_kl(h[i], h[j]))
    halves = torch.cat([both([(0, 1), (1, 2)]), both([(3, 4), (4, 5)])], 1)
    constant = logits(2, 4).repeat_interleave(3, 0)
    assert low_frequency(constant, constant, halves).abs().max() < 1e-12


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 7), st.integers(0, 2**31), st.floats(0.5, 5.0))
def test_invariances(classes, seed, tau):
    torch.manual_seed(seed)
    z, h, shift, each = logits(6, classes), logits(6, classes), logits(1, classes), logits(6, 1)
    high, low = high_frequency(z, h, RING, tau=tau), low_frequency(z, h, RING)
    for other in (high_frequency(z + shift, h, RING, tau=tau), high_frequency(z, h + shift, RING, tau=tau)):
        close(other, high)
    close(high_frequency(-z, h, RING, tau=tau), high)
    close(high_frequency(z, h, RING.flip(0), tau=tau), high)
    close(low_frequency(z + each, h, RING), low)
    close(low_frequency(z, h - each, RING), low)
    order = torch.randperm(6)
    place = order.argsort()
    close(high_frequency(z[order], h[order], place[RING], tau=tau), high)
    close(low_frequency(z[order], h[order], place[RING]), low)
    assert (high >= -1e-12).all() and (low >= -1e-12).all()
    cosine = high_frequency_cosine(z, h, RING, tau=tau)
    assert (cosine > 0).all() and (cosine <= 1 + 1e-12).all()


def test_raw_logits_matter_to_the_high_frequency_and_a_wide_temperature_ends_it():
    z, h = logits(6, 4), logits(6, 4)
    moved = z.clone()
    moved[0] += 3.0
    assert (high_frequency(moved, h, RING) - high_frequency(z, h, RING)).abs().max() > 1e-3
    assert high_frequency(z, h, RING, tau=1e9).abs().max() < 1e-12
    close(high_frequency_cosine(h, h, RING), torch.ones(12, dtype=torch.float64))


def test_equal_neighbours_have_no_gradient_of_the_difference():
    z = logits(3, 4)
    z[1] = z[0]
    z.requires_grad_()
    edges = both([(0, 1)])
    assert torch.autograd.grad(high_frequency(z, logits(3, 4), edges).sum(), z)[0].eq(0).all()


def test_the_low_pass_filter_minimises_the_low_frequency_term():
    h, batch = logits(6, 4), graph(6, RING)
    p = torch.softmax(h, -1)
    mean = torch.zeros_like(p).index_add(0, batch.loops[0], p[batch.loops[1]]) / 3  # two neighbours and itself
    z = mean.log().requires_grad_()
    gradient = torch.autograd.grad(low_frequency(z, h, batch.loops).sum(), z)[0]
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_half_precision_and_large_logits_stay_finite(name):
    z = (40 * torch.randn(6, 5)).to(getattr(torch, name)).requires_grad_()
    values = low_frequency(z, 40 * torch.randn(6, 5), RING) + high_frequency(z, 40 * torch.randn(6, 5), RING)
    values.sum().backward()
    assert values.dtype == torch.float32 and values.isfinite().all() and z.grad.isfinite().all()


Z = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: low_frequency(Z, torch.zeros(5, 3), RING[:, :1]), r"\(4, 3\) and the teacher's \(5, 3\)"),
        (lambda: low_frequency(Z, torch.zeros(4, 2), RING[:, :1]), "one class set"),
        (lambda: low_frequency(Z[:, :1], Z[:, :1], RING[:, :1]), "there is 1 class"),
        (lambda: low_frequency(Z, Z, torch.tensor([[0, 1], [1, 4]])), r"edge 1 is \[1, 4\] and the nodes are 0 … 3"),
        (lambda: high_frequency(Z, Z, torch.tensor([[-1], [0]])), "edge 0"),
        (lambda: high_frequency(Z, Z, RING[:, :1], tau=0.0), "tau is 0.0"),
        (lambda: check_edges("x", torch.zeros(2, 3), 4), "whole numbers"),
        (lambda: low_frequency(Z, Z, RING[:, :1].to(torch.int16)), "edges are torch.int16"),
        (lambda: check_edges("x", torch.zeros(3, 2, dtype=torch.int64), 4), r"shape \(2, edges\)"),
        (lambda: low_frequency(Z, torch.full((4, 3), float("nan")), RING[:, 1:2]), "teacher's logits of node 1"),
        (lambda: high_frequency(torch.full((4, 3), float("inf")), Z, RING[:, :1]), "student's logits of node 0"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()


@pytest.mark.parametrize(
    "options,says",
    [
        ({"lam": 1.2}, "lam = 1.2"),
        ({"lam": -0.1}, "lam = -0.1"),
        ({"tau": 0}, "tau = 0"),
        ({"lam": 0, "low": 0, "high": 0}, "nothing"),
    ],
)
def test_bad_options(options, says):
    from understudy.runs.recipe import make

    with pytest.raises(InputError, match=says):
        make({"task": "node_classification", "method": "ff-g2m", "options": options})


def test_it_learns_and_beats_the_labels_without_a_teacher_in_the_loop(tmp_path):
    """The student ends far above one on labels alone, and the teacher was asked once, before training."""
    from understudy import distill

    base = {"task": "node_classification", "trainer": {"max_steps": 60, "save_steps": 60}, "patience": 60}
    base["teacher"] = {"model": "gcn:hidden=32", "train": {"max_steps": 60}}
    base["student"] = "mlp:hidden=64,layers=2,dropout=0.5"
    plain = distill({**base, "method": "sft", "output": str(tmp_path / "sft")}).metrics
    ours = distill({**base, "method": "ff-g2m", "options": {"lam": 0.1}, "output": str(tmp_path / "ff")})
    assert ours.metrics["accuracy"] > plain["accuracy"] + 0.1
    assert ours.metrics["high_frequency_cosine"] > plain["high_frequency_cosine"]
    cost = json.loads((tmp_path / "ff" / "evaluation.json").read_text())["cost"]
    assert cost["forwards"] == {"student": 60_000, "teacher": 0}
    assert len(list((tmp_path / "ff" / "store").glob("node-logits-*.safetensors"))) == 1
