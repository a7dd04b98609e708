"""Paper 21, QCRD: the losses, votes and sampling of its golden vectors, their limits and bad input."""

import math

import pytest
import torch

from golden_vectors import OWN, close, golden, reduce
from understudy import InputError
from understudy.curation import majority
from understudy.generation.decoding import choose
from understudy.losses import binary_cross_entropy, cross_entropy
from understudy.losses.anchored import tempered
from understudy.losses.rationales import many_to_one
from understudy.methods.qcrd import QCRD


@pytest.fixture(scope="module")
def g():
    return golden("21-qcrd")


@pytest.fixture(scope="module")
def own():
    """The same of known shapes, with a tie in row 3 and an empty row 4."""
    return golden("21-qcrd", OWN)


def entropies(logits, labels):
    """Mean cross-entropy of each rationale over its tokens."""
    counted = labels >= 0
    values = torch.zeros(labels.shape, dtype=logits.dtype)
    values = values.masked_scatter(counted, cross_entropy(logits[counted], labels[counted]))
    return values.sum(-1) / counted.sum(-1).clamp(min=1)


def contrast(g, ce, weighted=True, **how):
    options = {"beta": float(g["beta"]), "delta": float(g["delta"]), **how}
    return many_to_one(ce, g["rationale_kind"], g["quality"] if weighted else None, **options)


@pytest.mark.golden
@pytest.mark.parametrize("reduce_, ending", [("max", ""), ("min", "_minmin")])
def test_the_contrast_is_the_golden_one(g, reduce_, ending):
    logits = g["rationale_logits"].clone().requires_grad_()
    ce = entropies(logits, g["rationale_labels"])
    close(ce, g["per_rationale_ce"])
    found = contrast(g, ce, reduce=reduce_)
    assert found.chosen.tolist() == torch.stack([g["pos_index"], g["neg_index" + ending]], 1).tolist()
    close(found.positive, g["weighted_pos"])
    if reduce_ == "max":
        close(found.negative, g["weighted_neg"])
        close(found.values, g["contrastive_per_sample"])
        close(reduce(contrast(g, ce, weighted=False).values, "token_mean"), g["contrastive_loss_unweighted"])
    total = reduce(found.values, "token_mean")
    close(total, g["contrastive_loss" + ending])
    (gradient,) = torch.autograd.grad(total, logits)
    close(gradient, g["grad_rationale_logits" + ending])
    named = [i.tolist() for i in found.chosen]
    for row, chosen in enumerate(named):  # gradient flows through the two selected rationales alone
        others = [i for i in range(logits.shape[1]) if i not in chosen]
        assert not gradient[row, others].any()
    number = len(logits)
    parts = [
        reduce(contrast_row(g, entropies(logits, g["rationale_labels"]), i, reduce_), "token_mean", count=number)
        for i in range(number)
    ]
    close(torch.stack(parts).sum(), g["contrastive_loss" + ending])


def contrast_row(g, ce, i, how):
    rows = slice(i, i + 1)
    options = {"beta": float(g["beta"]), "delta": float(g["delta"]), "reduce": how}
    return many_to_one(ce[rows], g["rationale_kind"][rows], g["quality"][rows], **options).values


@pytest.mark.golden
def test_discriminator_label_and_total_are_the_golden_ones(g):
    there = g["rationale_kind"] != 0
    logits = g["disc_logits"].clone().requires_grad_()
    disc = reduce(binary_cross_entropy(logits[there], (g["rationale_kind"][there] > 0).double()), "token_mean")
    close(disc, g["disc_loss"])
    close(torch.autograd.grad(disc, logits)[0], g["grad_disc_logits"])
    label = reduce(cross_entropy(g["label_logits"], g["labels"]), "token_mean")
    close(label, g["label_loss"])
    method = QCRD(
        alpha_label=float(g["alpha1"]), alpha_rationale=float(g["alpha2"]), discriminator_decay=float(g["alpha3_decay"])
    )
    decayed = float(g["alpha3"]) * method.decay_of(int(g["iteration"]))
    parts = method.alpha_label * label + method.alpha_rationale * g["contrastive_loss"] + decayed * disc
    close(parts, g["total_loss"])


@pytest.mark.golden
def test_votes_and_temperatures_are_the_golden_ones(g):
    for answers, most, positive in zip(g["sc_answers"], g["sc_majority"], g["sc_positive"], strict=True):
        said = [None if a < 0 else str(int(a)) for a in answers]
        vote = majority(said)
        assert (vote.value is None and most < 0) or vote.value == str(int(most))
        assert [a is not None and a == vote.value for a in said] == positive.tolist()
    for answers, right, positive in zip(g["sc_answers"], g["gold"], g["gold_positive"], strict=True):
        assert (answers == right).tolist() == positive.tolist()
    for temperature, expected in zip(g["temperatures"], g["temp_probs"], strict=True):
        close(tempered(g["temp_logits"][None], temperature=float(temperature))[0], expected)
    keys, cold = torch.arange(20), torch.full((20, 1), 1e-6, dtype=torch.float64)
    drawn = choose(g["temp_logits"].expand(20, -1), keys, 0, cold, torch.ones(20, 1, dtype=torch.float64))
    assert drawn.unique().tolist() == [int(g["temp_logits"].argmax())]


def test_limits(own):
    ce, kind, quality = own["per_rationale_ce"], own["rationale_kind"], own["quality"]
    one, plus = torch.full((1, 1), 1.7, dtype=torch.float64), torch.ones(1, 1)
    close(many_to_one(one, plus, plus.double(), beta=0.0).values, one[0])  # the rationale part of DSS
    assert not contrast(own, ce, delta=0.0).negative.any() and not contrast(own, ce, delta=-1.0).negative.any()
    assert not many_to_one(ce, kind, torch.ones_like(quality)).negative.any()
    half = many_to_one(ce, kind, torch.full_like(quality, 0.5)).values
    close(half, 0.5 * many_to_one(ce, kind).values)
    far = contrast(own, ce, delta=1e3)  # no floor
    rows = (far.chosen[:, 1] >= 0).nonzero()[:, 0]
    at = far.chosen[rows, 1]
    close(far.negative[rows], (1 - quality[rows, at]) * (ce[rows, at] - 1e3))
    order = torch.tensor([3, 0, 4, 2, 1])
    swapped = many_to_one(ce[:, order], kind[:, order], quality[:, order]).values
    close(swapped[:3], contrast(own, ce, beta=0.2, delta=3.0).values[:3])  # question 3 has a tie
    shifted = entropies(own["rationale_logits"] + 5.0, own["rationale_labels"])
    close(shifted, ce)
    zeros = torch.zeros(3, dtype=torch.float64)
    close(
        binary_cross_entropy(zeros, torch.tensor([0.0, 1.0, 1.0])), torch.full((3,), math.log(2), dtype=torch.float64)
    )


def test_absent_rationales_may_hold_anything(own):
    ce, quality = own["per_rationale_ce"].clone(), own["quality"].clone()
    gone = own["rationale_kind"] == 0
    ce[gone], quality[gone] = torch.nan, torch.inf
    ce.requires_grad_()
    values = many_to_one(ce, own["rationale_kind"], quality).values
    close(values, own["contrastive_per_sample"])
    (gradient,) = torch.autograd.grad(values.sum(), ce)
    assert gradient.isfinite().all() and not gradient[gone].any() and values[4] == 0


def test_bad_input_of_the_loss(own):
    ce, kind, quality = own["per_rationale_ce"], own["rationale_kind"], own["quality"]
    with pytest.raises(InputError, match="differ: give one value"):
        many_to_one(ce, kind[:, :3])
    with pytest.raises(InputError, match="a negative one imitates mistakes"):
        many_to_one(ce, kind, beta=-0.2)
    with pytest.raises(InputError, match="rationale 0 of question 0 is inf"):
        many_to_one(ce.masked_fill(ce == ce[0, 0], torch.inf), kind)
    with pytest.raises(InputError, match="quality 2 is outside 0 … 1"):
        many_to_one(ce, kind, quality.masked_fill(kind == 1, 2.0))
