"""Paper 15's numbers: the form of a statement, the critic's filter, perplexities."""

import pytest
import torch

from golden_vectors import close, golden
from understudy import InputError
from understudy.curation import above, at_least, cutoff_at_precision
from understudy.curation.generics import malformed, perplexities


@pytest.mark.golden
def test_the_form_of_a_statement():
    g = golden("15-i2d2")
    rows = [row[:n].tolist() for row, n in zip(g["gen_tokens"], g["gen_len"].tolist(), strict=True)]
    how = {
        "function_words": set(g["func_ids"].tolist()),
        "connectives": set(g["conn_ids"].tolist()),
        "concept": g["concept_phrase"].tolist(),
        "relation": g["relation_phrase"].tolist(),
    }
    related = int(g["related_id"])
    assert [malformed(row, **how) is None for row in rows] == g["accept_no_related"].tolist()
    assert [malformed(row, **how, related=related) is None for row in rows] == g["accept_with_related"].tolist()
    alone = {**how, "concept": (-1,), "relation": (-1,)}
    for row, functions, connectives in zip(rows, g["n_func"].tolist(), g["n_conn"].tolist(), strict=True):
        exact = {**alone, "most_function": functions, "most_connective": connectives}
        assert malformed(row, **exact) is None
        assert malformed(row, **{**exact, "most_function": functions - 1}) == "function words"
        assert malformed(row, **{**exact, "most_connective": connectives - 1}) == "connectives"


@pytest.mark.golden
def test_the_critics_filter_and_perplexities():
    g = golden("15-i2d2")
    kept = torch.zeros(len(g["critic_prob"]), dtype=torch.bool)
    kept[at_least(g["critic_prob"].tolist(), float(g["critic_threshold"]))] = True
    assert kept.equal(g["critic_keep"])
    found = perplexities(g["stmt_logp"].tolist(), g["stmt_ntok"].tolist())
    close(torch.tensor(found, dtype=torch.float64), g["stmt_ppl"], rtol=1e-9, atol=0)


def test_the_filters_limits():
    """Limit 7: threshold 0 keeps all, above 1 none; the order of items does not matter; at the threshold an item stays."""
    scores = [0.2, 0.9, 0.5, 0.0, 1.0]
    assert at_least(scores, 0.0) == [0, 1, 2, 3, 4] and at_least(scores, 1.0 + 1e-9) == []
    assert at_least(scores, 0.5) == [1, 2, 4] and above(scores, 0.5) == [1, 4]
    order = [3, 1, 4, 0, 2]
    assert sorted(order[i] for i in at_least([scores[i] for i in order], 0.5)) == at_least(scores, 0.5)
    with pytest.raises(InputError, match="Score 1 is not a number"):
        at_least([0.1, float("nan")], 0.5)


def test_the_cutoff_for_a_wanted_precision():
    labels, scores = [0, 1, 0, 1, 1], [0.1, 0.2, 0.3, 0.4, 0.5]
    assert cutoff_at_precision(labels, scores, 0.6).value == 0.1
    found = cutoff_at_precision(labels, scores, 0.7)
    assert found.value == 0.2 and found.precision == 0.75 and found.recall == 1
    assert cutoff_at_precision(labels, scores, 1.0).value == 0.4
    with pytest.raises(InputError, match=r"precision of 0\.9: the best has 0\.500"):
        cutoff_at_precision([1, 0], [0.1, 0.2], 0.9)
    with pytest.raises(InputError, match="must be above 0"):
        cutoff_at_precision(labels, scores, 0.0)


def test_bad_lengths_of_texts():
    with pytest.raises(InputError, match="2 log-probabilities and 1 token counts"):
        perplexities([-1.0, -2.0], [1])
    with pytest.raises(InputError, match="token counts"):
        perplexities([-1.0], [0])
