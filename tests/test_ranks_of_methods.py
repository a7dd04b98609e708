"""Friedman's test and the critical difference against Demšar's published numbers, scipy and a case by hand; its plot."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from understudy.reporting import render_comparison, summarise
from understudy.reporting.ranks import (
    block_ranks,
    compared_ranks,
    critical_difference,
    friedman,
    joined,
    over_data,
    over_seeds,
)

# Demšar 2006, table 5 (a): critical values of the two-tailed Nemenyi test for 2 to 10 classifiers.
Q = {
    0.05: (1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164),
    0.10: (1.645, 2.052, 2.291, 2.459, 2.589, 2.693, 2.780, 2.855, 2.920),
}
# Its table 6: AUC of C4.5, with m tuned, with cf tuned, and with both, on 14 data sets. Of data set 13 the last two are
# equal as printed and ranked 2 and 3 by its mean ranks, so the third has one more digit here.
AUC = """
0.763 0.768 0.771 0.798
0.599 0.591 0.590 0.569
0.954 0.971 0.968 0.967
0.628 0.661 0.654 0.657
0.882 0.888 0.886 0.898
0.936 0.931 0.916 0.931
0.661 0.668 0.609 0.685
0.583 0.583 0.563 0.625
0.775 0.838 0.866 0.875
1.000 1.000 1.000 1.000
0.940 0.962 0.965 0.962
0.619 0.666 0.614 0.669
0.972 0.981 0.9751 0.975
0.957 0.978 0.946 0.970
"""
SCORES = np.array([[float(x) for x in line.split()] for line in AUC.split("\n") if line])
NAMES = ("C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf")


@pytest.mark.parametrize("alpha", Q)
def test_critical_values_are_those_of_the_paper(alpha):
    for k, q in enumerate(Q[alpha], 2):
        # The table rounds, in places the last digit down.
        assert critical_difference(k, 7, alpha) / math.sqrt(k * (k + 1) / 42) == pytest.approx(q, abs=1.1e-3)


def test_the_example_of_the_paper():
    ranks = block_ranks(SCORES)
    np.testing.assert_allclose(ranks.mean(0), [3.143, 2.000, 2.893, 1.964], atol=5e-4)
    assert list(ranks[9]) == [2.5] * 4 and list(ranks[7]) == [2.5, 2.5, 4, 1]
    found = friedman(ranks)
    # The paper's χ² leaves out the correction for ties: one block of 4 equal scores, and 3 of 2.
    ties = 1 - ((4**3 - 4) + 3 * (2**3 - 2)) / (14 * (4**3 - 4))
    assert found.n == 14 and found.statistic * ties == pytest.approx(9.28, abs=0.01)
    reference = stats.friedmanchisquare(*SCORES.T)
    assert (found.statistic, found.p) == pytest.approx((reference.statistic, reference.pvalue))
    assert critical_difference(4, 14, 0.05) == pytest.approx(1.25, abs=5e-3)
    assert critical_difference(4, 14, 0.10) == pytest.approx(1.12, abs=5e-3)
    # At 5 % the post-hoc test tells nothing apart; at 10 % C4.5+m and C4.5+m+cf are better than C4.5.
    scores = dict(zip(NAMES, SCORES.T, strict=True))
    at5, at10 = compared_ranks(scores), compared_ranks(scores, 0.10)
    assert at5.names == ["C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5"] and at5.groups == [(0, 3)]
    assert at10.groups == [(0, 2), (2, 3)]


def test_a_case_by_hand():
    """Two methods, four blocks, always the same first: mean ranks 1 and 2, χ² = 12·4/(2·3)·(1 + 4 − 9/2) = 4."""
    found = compared_ranks({"worse": [1, 2, 3, 4], "better": [2, 3, 4, 5]})
    assert found.names == ["better", "worse"] and found.ranks == [1, 2]
    assert found.friedman.statistic == pytest.approx(4) and found.friedman.p == pytest.approx(0.0455, abs=1e-4)
    assert found.difference == pytest.approx(1.959964 * math.sqrt(6 / 24)) and found.groups == []


def test_groups_are_the_largest_and_hold_two_at_least():
    assert joined([1.0, 1.4, 2.2, 4.0, 4.5], 1.0) == [(0, 1), (1, 2), (3, 4)]
    assert joined([1.0, 2.0], 1.0) == []  # at the difference they differ
    assert joined([2.0, 2.0, 2.0], 0.5) == [(0, 2)]


def test_methods_that_friedman_does_not_tell_apart_share_one_bar():
    found = compared_ranks({"a": [1, 2, 3], "b": [2, 1, 3.5], "c": [0, 3, 1]})
    assert found.friedman.p > 0.05 and found.groups == [(0, 2)]


@pytest.mark.parametrize(
    "scores,says",
    [
        ({"a": [1.0, 2.0]}, "there are 1 and 2"),
        ({"a": [1.0], "b": [2.0]}, "there are 2 and 1"),
        ({}, "there are 0 and 0"),
        ({"a": [1.0, 2.0], "b": [1.0, 2.0]}, "equal values in every block"),
        ({"a": [1.0, math.nan], "b": [1.0, 2.0]}, "without a number"),
    ],
)
def test_what_has_no_ranks_is_said(scores, says):
    assert says in compared_ranks(scores)


def comparison(folder, values, metric="accuracy", higher=True):
    """A comparison's file with `values` by method and seed."""
    runs = []
    for method, found in values.items():
        for seed, value in found.items():
            home = folder / f"{method}-s{seed}"
            home.mkdir(parents=True)
            cost = {"time_share": {"student": 1.0}}
            runs.append({"method": method, "seed": seed, "folder": home.name, "metrics": {metric: value}, "cost": cost})
    first = next(iter(values))
    value = {
        "title": folder.name,
        "baseline": first,
        "metric": metric,
        "higher_is_better": higher,
        "seeds": sorted({r["seed"] for r in runs}),
        "runs": runs,
        "table": summarise(runs, first, metric),
    }
    (folder / "comparison.json").write_text(json.dumps(value))
    return value


def test_blocks_are_seeds_of_one_comparison_and_data_of_several(tmp_path):
    images = comparison(tmp_path / "images", {"sft": {0: 0.5, 1: 0.7, 2: 0.9}, "kd": {0: 0.6, 1: 0.8}})
    texts = comparison(tmp_path / "texts", {"kd": {0: 3.0}, "sft": {0: 4.0}, "taid": {0: 2.0}}, "nll", False)
    assert over_seeds(images) == {"sft": [0.5, 0.7], "kd": [0.6, 0.8]}
    assert over_data([images, texts]) == {"sft": [pytest.approx(0.7), -4.0], "kd": [pytest.approx(0.7), -3.0]}


def test_the_report_shows_ranks_and_writes_the_plot(tmp_path):
    comparison(tmp_path / "one", {m: {s: i + s for s in range(6)} for i, m in enumerate(("sft", "kd", "pld"))})
    html = render_comparison(tmp_path / "one").read_text()
    assert "Mean ranks" in html and "χ² = 12.00" in html and "critical difference 1.35" in html
    drawn = (tmp_path / "one" / "critical_difference.svg").read_text()
    assert all(name in drawn for name in ("sft 3.00", "kd 2.00", "pld 1.00", "CD")) and "var(" not in drawn


def test_a_report_without_blocks_says_so(tmp_path):
    comparison(tmp_path / "one", {"sft": {0: 0.5}, "kd": {0: 0.6}})
    html = render_comparison(tmp_path / "one").read_text()
    assert "No ranks: ranks need at least 2 methods and 2 blocks, and there are 2 and 1." in html
    assert not (tmp_path / "one" / "critical_difference.svg").exists()


def test_several_comparisons_are_ranked_over_their_data(tmp_path):
    for name, metric, higher in (("a", "accuracy", True), ("b", "nll", False), ("c", "accuracy", True)):
        comparison(
            tmp_path / name, {"sft": {0: 1.0 if higher else 2.0}, "kd": {0: 2.0 if higher else 1.0}}, metric, higher
        )
    html = render_comparison(tmp_path).read_text()
    assert "Mean ranks over 3 data sets" in html and (tmp_path / "critical_difference.svg").is_file()
    assert html.count("No ranks:") == 3  # each of them has one seed
