"""The room `curation` and paper 11's golden vectors: filters, cutoffs, splits, critics, and their limits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_curve

from golden_vectors import close, golden
from understudy import InputError
from understudy.curation import (
    Funnel,
    above,
    base_rate_bias,
    binary_labels,
    cutoff_at,
    cutoff_at_recall,
    first_occurrences,
    mean_probability,
    most_likely,
    recall_curve,
    score,
    softened,
    spelling,
    split_by_group,
    summary,
)
from understudy.curation.triples import LabelledTriple
from understudy.losses import binary_cross_entropy
from understudy.methods.symbolic_kd import SymbolicKD


@pytest.mark.golden
def test_golden():
    g = golden("11-symbolic-kd")
    ids = g["head_id"].tolist()
    kept = most_likely(ids, g["head_loglik"].tolist(), keep=float(g["head_keep_frac"]))
    assert [ids[i] for i in kept] == g["head_kept"].tolist()
    cutoffs = {}
    for split in ("val", "test"):
        labels, scores = g[f"{split}_labels"].tolist(), g[f"{split}_preds"].tolist()
        found = [cutoff_at_recall(labels, scores, r) for r in g["recalls"].tolist()]
        cutoffs[split] = torch.tensor([c.value for c in found], dtype=torch.float64)
        close(cutoffs[split], g[f"cutoff_{split}"], rtol=1e-12, atol=0)
        precisions = torch.tensor([c.precision for c in found], dtype=torch.float64)
        close(precisions, g[f"precision_at_recall_{split}"], rtol=1e-12, atol=0)
        if split == "val":
            for rule in ("precision", "recall"):
                strict = torch.tensor([getattr(c, f"strict_{rule}") for c in found], dtype=torch.float64)
                close(strict, g[f"strict_{rule}_val"], rtol=1e-12, atol=0)
    mean = (cutoffs["val"] + cutoffs["test"]) / 2
    close(mean, g["cutoff_mean"], rtol=1e-12, atol=0)
    corpus = g["corpus_preds"].tolist()
    for values, name in ((cutoffs["val"], "kept_by_val_cutoff"), (g["cutoff_mean"], "kept_by_mean_cutoff")):
        for cutoff, mask in zip(values.tolist(), g[name], strict=True):
            assert above(corpus, cutoff) == mask.nonzero()[:, 0].tolist()
    assert binary_labels(g["raw_valid"].tolist()) == g["binary_valid"].tolist()
    close(torch.tensor(base_rate_bias(float(g["bias_prior"])), dtype=torch.float64), g["bias_init"], rtol=1e-12)
    assert first_occurrences(map(tuple, g["triples"].tolist())) == g["triples_keep"].tolist()
    logits = g["critic_logits"].clone().requires_grad_()
    loss = binary_cross_entropy(logits, g["critic_targets"])
    close(loss, g["critic_bce_per"], rtol=1e-12, atol=1e-20)
    close(loss.mean(), g["critic_bce_mean"], rtol=1e-12)
    close(torch.autograd.grad(loss.mean(), logits)[0], g["grad_critic_logits"], rtol=1e-12, atol=1e-20)
    close(mean_probability(g["view_logits"]), g["view_mean_prob"], rtol=1e-12)


labelled = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=40).filter(
    lambda rows: len({a for a, _ in rows}) == 2
)


@given(labelled)
@settings(max_examples=60, deadline=None)
def test_the_curve_is_that_of_scikit_learn_and_recall_never_rises(rows):
    labels, scores = [int(a) for a, _ in rows], [b / 7 for _, b in rows]
    curve = recall_curve(labels, scores)
    precision, recall, values = precision_recall_curve(labels, scores)
    assert [c.value for c in curve] == values.tolist()
    np.testing.assert_allclose([c.precision for c in curve], precision[:-1])
    np.testing.assert_allclose([c.recall for c in curve], recall[:-1])
    assert all(a.recall >= b.recall and a.strict_recall == b.recall for a, b in zip(curve, curve[1:], strict=False))
    kept = [set(above(scores, c.value)) for c in curve]
    assert all(a > b for a, b in zip(kept, kept[1:], strict=False))  # shrinks with the cutoff
    assert above(scores, min(scores) - 1) == list(range(len(scores)))


@given(labelled, st.sampled_from([0.3, 0.5, 0.8, 1.0]))
@settings(max_examples=60, deadline=None)
def test_a_monotone_transform_keeps_the_same_items_and_ties_share_a_fate(rows, recall):
    labels, scores = [int(a) for a, _ in rows], [b / 7 for _, b in rows]
    corpus = [0.0, 1 / 7, 0.5, 3 / 7, 5 / 7, 0.9]
    try:
        cutoff = cutoff_at_recall(labels, scores, recall)
    except InputError as error:
        assert "largest score keeps" in str(error)
        return
    bent = [math.exp(3 * s) for s in scores]
    assert above(corpus, cutoff.value) == above(
        [math.exp(3 * s) for s in corpus], cutoff_at_recall(labels, bent, recall).value
    )
    assert cutoff.strict_recall <= cutoff.recall <= recall
    assert all(c.recall > recall for c in recall_curve(labels, scores) if c.value < cutoff.value)  # the smallest such
    kept = above(scores, cutoff.value)
    assert len({scores[i] for i in kept} & {s for i, s in enumerate(scores) if i not in kept}) == 0
    if recall == 1.0:
        assert cutoff.value == min(scores)


@given(labelled, st.floats(-0.1, 1.1))
@settings(max_examples=60, deadline=None)
def test_any_value_as_a_cutoff_has_the_recall_of_what_it_keeps(rows, value):
    labels, scores = [int(a) for a, _ in rows], [b / 7 for _, b in rows]
    assert all(cutoff_at(labels, scores, point.value) == point for point in recall_curve(labels, scores))
    kept, found = above(scores, value), cutoff_at(labels, scores, value)
    assert found.strict_recall == sum(labels[i] for i in kept) / sum(labels)
    assert found.strict_precision == (sum(labels[i] for i in kept) / len(kept) if kept else 1.0)


def test_the_report_is_of_the_cutoff_that_filters():
    """Also where that is the mean with the cutoff of test labels."""
    scored = {"validation": [(1, 0.2), (0, 0.3), (1, 0.4), (1, 0.9)], "test": [(0, 0.1), (1, 0.2), (1, 0.95)]}
    labels = [
        LabelledTriple(head=str(i), relation="r", tail="t", good=good, score=score, split=split)
        for split, rows in scored.items()
        for i, (good, score) in enumerate(rows)
    ]
    found = SymbolicKD(recall=0.7, legacy_mean=True)._cutoff(labels)
    assert found["cutoff"] == pytest.approx((0.3 + 0.95) / 2) == found["estimate"]["value"]
    assert found["estimate"]["recall"] == pytest.approx(1 / 3) == found["estimate"]["strict_recall"]


def test_a_perfect_critic_and_a_blind_one():
    torch.manual_seed(0)
    good = (torch.rand(4000) < 0.7).int()
    cutoff = cutoff_at_recall(good.tolist(), good.double().tolist(), 1.0)
    assert good[above(good.double().tolist(), cutoff.value)].float().mean() == 1
    blind = torch.rand(4000, dtype=torch.float64)
    kept = above(blind.tolist(), cutoff_at_recall(good.tolist(), blind.tolist(), 0.5).value)
    assert good[kept].float().mean().item() == pytest.approx(good.float().mean().item(), abs=0.03)


def test_views():
    logits = torch.randn(7, dtype=torch.float64)
    close(mean_probability(logits.expand(5, 7)), torch.sigmoid(logits), rtol=1e-15)
    pairs = [("a", "x"), ("b", "y")]
    seen = []

    def critic(batch):
        seen.append(batch)
        return torch.tensor([len(a + b) - 2.0 for a, b in batch])

    views = [lambda i, p: p, lambda i, p: (p[0] * (i + 1), p[1])]
    expected = [0.5, (0.5 + torch.sigmoid(torch.tensor(1.0)).item()) / 2]
    assert score(pairs, critic, views) == pytest.approx(expected) and len(seen) == 2
    assert score([], critic, views) == []


def test_most_likely_sums_unless_asked_for_means_a_token():
    texts, log_probs = ["short", "a longer one", "bad"], [-3.0, -4.0, -9.0]
    assert most_likely(texts, log_probs, keep=0.8) == [0, 1]
    assert most_likely(texts, log_probs, keep=0.8, tokens=[1, 4, 2]) == [1, 0]
    assert most_likely(texts, log_probs, keep=1.0) == [0, 1, 2]
    assert most_likely([], [], keep=0.5) == []


@given(st.lists(st.integers(0, 9), max_size=40))
@settings(max_examples=40, deadline=None)
def test_exact_duplicates_change_nothing(keys):
    kept = [keys[i] for i in first_occurrences(keys)]
    assert kept == list(dict.fromkeys(keys)) == [(keys + keys)[i] for i in first_occurrences(keys + keys)]


@given(st.lists(st.sampled_from("abcdefgh"), min_size=8, max_size=60), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_no_group_leaks(groups, seed):
    shares = {"train": 0.6, "validation": 0.2, "test": 0.2}
    if len(set(groups)) < 3:
        with pytest.raises(InputError, match="cannot be split into 3 parts"):
            split_by_group(groups, shares, seed)
        return
    splits = split_by_group(groups, shares, seed)
    held = [{groups[i] for i in part} for part in splits.values()]
    assert sorted(i for part in splits.values() for i in part) == list(range(len(groups)))
    assert all(held) and not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])
    again = split_by_group(groups[::-1], shares, seed)  # neither order nor duplicates move a group
    assert [{groups[::-1][i] for i in part} for part in again.values()] == held


def test_the_funnel_counts():
    funnel = Funnel()
    texts = ["PersonX runs", "PersonX", "PersonX <runs>", ""]
    kept = funnel.sieve("spelling", texts, lambda t: spelling(t, shortest=8))
    assert kept == ["PersonX runs"]
    assert funnel.rows[0]["dropped"] == {"shorter than 8 characters": 2, "characters outside the alphabet": 1}
    assert funnel.pick("dedup", ["a", "a"], [0], "seen before") == ["a"]
    assert funnel.rows[1] == {"step": "dedup", "before": 2, "after": 1, "dropped": {"seen before": 1}}


def test_the_summary_counts_unique_and_nearly_unique_texts():
    found = summary(["the Cats", "cat", "dog", "dog"], ["h", "h", "g", "g"], lambda i: None if i == 0 else i > 1)
    assert found == {
        "size": 4,
        "groups": 2,
        "unique": 3,
        "soft_unique": 2,
        "most_common": 0.5,
        "precision": pytest.approx(2 / 3),
    }
    assert softened("to the Buses!") == "buse" and summary([], [])["precision"] is None


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: recall_curve([1, 1], [0.1, 0.2]), "only label 1"),
        (lambda: recall_curve([], []), "no label at all"),
        (lambda: recall_curve([0, 1], [0.1]), "2 labels and 1 scores"),
        (lambda: recall_curve([0, 3], [0.1, 0.2]), "found 3"),
        (lambda: recall_curve([0, 1], [0.1, math.nan]), "Score 1 .* finite"),
        (lambda: cutoff_at_recall([0, 1], [0.1, 0.2], 0.0), "recall is 0.0"),
        (lambda: cutoff_at_recall([0, 1], [0.1, 0.2], 1.5), "recall is 1.5"),
        (lambda: cutoff_at_recall([0, 1, 1], [0.1, 0.2, 0.2], 0.5), "largest score keeps 1.000"),
        (lambda: above([0.1, math.nan], 0.0), "Score 1 is not a number"),
        (lambda: most_likely(["a"], [-1.0], keep=0.0), "is 0.0"),
        (lambda: most_likely(["a"], [], keep=0.5), "1 items have 0 log-prob"),
        (lambda: most_likely(["a"], [None], keep=0.5), "Item 0 has no log-probability"),
        (lambda: split_by_group(["a", "b"], {"x": 0.5, "y": 0.6}), "sum to 1"),
        (lambda: binary_labels([1, 5]), "Label 1 is 5"),
        (lambda: base_rate_bias(1.0), "base rate is 1.0"),
        (lambda: mean_probability(torch.zeros(3)), r"shape \(3,\)"),
        (lambda: binary_cross_entropy(torch.zeros(2), torch.zeros(3)), "must both be"),
        (lambda: binary_cross_entropy(torch.zeros(1), torch.tensor([2.0])), "target 2.0 is outside"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()
