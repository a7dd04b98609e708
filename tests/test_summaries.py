"""Metrics of summaries (paper 36): golden values, limits, bad input."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden_vectors import close, golden
from understudy import InputError
from understudy.evaluation.answers import agreement
from understudy.evaluation.summaries import entity_density, rouge_l, rouge_n


@pytest.mark.golden
def test_golden():
    g = golden("36-frontier-synthetic")
    both = zip(g["cand"].tolist(), g["ref"].tolist(), strict=True)
    pairs = [[[t for t in row if t >= 0] for row in pair] for pair in both]
    for name, metric in (("rouge1", rouge_n), ("rouge2", lambda a, b: rouge_n(a, b, 2)), ("rougeL", rouge_l)):
        close(g[name].new_tensor([metric(*pair) for pair in pairs]), g[name])
    counts = zip(g["entities"].tolist(), g["tokens"].tolist(), strict=True)
    close(g["entity_density"].new_tensor([entity_density(*count) for count in counts]), g["entity_density"])
    grades = g["human_grade"].tolist(), g["judge_grade"].tolist()
    close(g["agreement"].new_tensor(agreement(*grades)), g["agreement"])


words = st.lists(st.sampled_from("abcd"), max_size=9)


@given(words, words, st.randoms())
def test_limits(a, b, chance):
    for metric in (rouge_n, rouge_l):
        assert metric(a, a) == ((1.0,) * 3 if a else (0.0,) * 3)
        there, back = metric(a, b), metric(b, a)
        assert there[:2] == back[1::-1] and there.f1 == back.f1 and 0 <= there.f1 <= 1
    assert rouge_l(a, b).f1 <= rouge_n(a, b).f1  # a common subsequence is made of common words
    mixed = list(a)
    chance.shuffle(mixed)
    assert rouge_n(mixed, b) == rouge_n(a, b)
    assert rouge_n("the cat sat".split(), "the cat".split(), 2) == (0.5, 1.0, 2 / 3)


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: rouge_n("a", "b", 0), "n is 0"),
        (lambda: entity_density(0, 0), "0 entities in 0 tokens"),
        (lambda: entity_density(4, 3), "4 entities in 3 tokens"),
        (lambda: agreement([1], []), "1 grades and the other 0"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()
