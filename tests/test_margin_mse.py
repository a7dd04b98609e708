"""Paper 41, Margin-MSE: golden vectors, limits that must hold, ranking metrics, files of triples and their bad input."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden_vectors import close, golden
from understudy import InputError
from understudy.data.judgements import bm25
from understudy.data.retrieval_batches import RankingSet
from understudy.data.retrieval_sources import load_rankings
from understudy.data.scored_triples import Triple, read_triples, write_triples
from understudy.evaluation.ranking import mrr, ndcg, recall, search
from understudy.losses.retrieval import (
    ensemble,
    margin_mse,
    margin_mse_all_pairs,
    pointwise_mse,
    ranknet,
    weighted_ranknet,
)
from understudy.methods.margin_mse import MarginMSE
from understudy.models.rankers import max_sim


def scores(rows=6, number=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [10 * torch.randn(rows, generator=generator, dtype=torch.float64) for _ in range(number)]


@pytest.mark.golden
def test_golden():
    g = golden("41-margin-mse")
    s_pos, s_neg = (g[n].clone().requires_grad_() for n in ("s_pos", "s_neg"))
    loss = margin_mse(s_pos, s_neg, g["t_pos"], g["t_neg"]).mean()
    close(loss, g["loss"], rtol=1e-12)
    for gradient, name in zip(torch.autograd.grad(loss, (s_pos, s_neg)), ("grad_s_pos", "grad_s_neg"), strict=True):
        close(gradient, g[name], rtol=1e-12, atol=1e-13)
    four = (g["s_pos"], g["s_neg"], g["t_pos"], g["t_neg"])
    close(pointwise_mse(*four).mean(), g["loss_pointwise_mse"], rtol=1e-12)
    close(weighted_ranknet(*four).mean(), g["loss_weighted_ranknet"], rtol=1e-12)
    close(ensemble(g["t_pos_per_teacher"]), g["ens_t_pos"], rtol=1e-12)
    close(ensemble(g["t_neg_per_teacher"]), g["ens_t_neg"], rtol=1e-12)
    many = [g[f"multi_{n}"] for n in ("s_pos", "s_neg", "t_pos", "t_neg")]
    s_first, s_others, t_first, t_others = many[0][:, :1], many[1], many[2][:, :1], many[3]
    first = margin_mse_all_pairs(s_first, s_others, t_first, t_others, negatives=g["multi_neg_mask"])
    every = margin_mse_all_pairs(*many)
    close(first.sums.sum() / first.counts.sum(), g["multi_loss_first_pos"], rtol=1e-12)
    close(every.sums.sum() / every.counts.sum(), g["multi_loss_all_pairs"], rtol=1e-12)
    assert first.counts.tolist() == g["multi_neg_mask"].sum(1).tolist()


def test_limits():
    s_pos, s_neg, t_pos, t_neg = scores()
    loss = margin_mse(s_pos, s_neg, t_pos, t_neg)
    shift = torch.linspace(-50, 50, 6, dtype=torch.float64)
    close(margin_mse(s_pos + shift, s_neg + shift, t_pos - shift, t_neg - shift), loss, rtol=1e-9)  # 1
    assert not torch.allclose(
        pointwise_mse(s_pos + shift, s_neg + shift, t_pos, t_neg), pointwise_mse(s_pos, s_neg, t_pos, t_neg)
    )
    assert not torch.allclose(margin_mse(s_pos, s_neg, 2 * t_pos, 2 * t_neg), loss)
    equal = [(t + shift).requires_grad_() for t in (t_pos, t_neg)]  # 2
    value = margin_mse(*equal, t_pos, t_neg)
    assert value.max() < 1e-20 and all(g.abs().max() < 1e-12 for g in torch.autograd.grad(value.sum(), equal))
    sides = [s.clone().requires_grad_() for s in (s_pos, s_neg)]  # 3
    a, b = torch.autograd.grad(margin_mse(*sides, t_pos, t_neg).sum(), sides)
    close(a, -b)
    close(a, 2 * ((s_pos - s_neg) - (t_pos - t_neg)))
    close(margin_mse(s_neg, s_pos, t_neg, t_pos), loss)  # 4
    columns = [x[:, None] for x in (s_pos, s_neg, t_pos, t_neg)]  # 5
    close(margin_mse_all_pairs(*columns).sums, loss)
    close(margin_mse(s_pos, s_neg, torch.full_like(s_pos, 3.0), torch.zeros_like(s_pos)), (s_pos - s_neg - 3) ** 2)
    close(ensemble(torch.stack([t_pos] * 3)), t_pos)  # 6
    assert (loss <= 4 * pointwise_mse(s_pos, s_neg, t_pos, t_neg) + 1e-12).all()  # 7: MSE⁺ + MSE⁻ is twice that
    wrong = weighted_ranknet(torch.tensor([-500.0]), torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([2.0]))  # 8
    assert wrong.item() == pytest.approx(-1000)
    assert weighted_ranknet(*(torch.tensor([v]) for v in (-500.0, 0.0, 0.0, 2.0)), clamp=True).item() == 0
    assert ranknet(torch.zeros(2), torch.zeros(2)).tolist() == pytest.approx([math.log(2)] * 2)


def test_masked_scores_leak_nowhere_and_half_precision_is_widened():
    s, t = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    garbage = torch.tensor([[0.0, math.nan, math.inf], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, False, False], [False, False, False]])
    found = margin_mse_all_pairs(s[:, :1], s + garbage, t[:, :1], t + garbage, negatives=mask)
    assert found.counts.tolist() == [1, 0] and found.sums[1] == 0
    (gradient,) = torch.autograd.grad(found.sums.sum(), s)
    assert gradient.isfinite().all() and gradient[1].eq(0).all()
    half = margin_mse(*(torch.tensor([v], dtype=torch.float16) for v in (300.0, -300.0, 5.0, 0.0)))
    assert half.dtype == torch.float32 and half.item() == 595.0**2


def test_members_of_other_scales():
    small, large = torch.tensor([1.0, -1.0, 2.0]), torch.tensor([100.0, 300.0, -100.0])
    even = ensemble(torch.stack([small, large]), spreads=torch.stack([small.std(), large.std()]))
    parts = (small / small.std() + large / large.std()) / 2
    close(even, parts * (small.std() + large.std()) / 2, rtol=1e-5)
    with pytest.raises(InputError, match="all alike"):
        ensemble(torch.stack([small, large]), spreads=torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: margin_mse(torch.rand(4, 1), *[torch.rand(4)] * 3), r"s_pos is \[4, 1\] and s_neg \[4\]"),
        (lambda: margin_mse(*[torch.rand(4)] * 3, torch.rand(3)), r"t_neg \[3\]"),
        (lambda: pointwise_mse(*[torch.rand(4)] * 3, torch.rand(4, 1)), "squeeze"),
        (lambda: ranknet(torch.rand(4), torch.rand(4, 1)), "Give one shape"),
        (lambda: margin_mse_all_pairs(*[torch.rand(4)] * 4), r"give \[rows, positives\]"),
        (lambda: search(torch.rand(2, 3), torch.rand(2, 4), 1), "3 wide and documents 4"),
    ],
)
def test_shapes_are_strict(call, says):
    with pytest.raises(InputError, match=says):
        call()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(1, 14), st.integers(0, 10_000))
def test_ndcg_is_that_of_scikit_learn_ties_included(size, k, seed):
    from sklearn.metrics import ndcg_score

    generator = torch.Generator().manual_seed(seed)
    grades = torch.randint(0, 5, (3, size), generator=generator).float()
    given_ = torch.randint(0, 4, (3, size), generator=generator).double()
    ours = ndcg(given_, grades, torch.ones_like(grades, dtype=torch.bool), k=k)
    for row in range(3):
        theirs = ndcg_score(grades[row : row + 1].numpy(), given_[row : row + 1].numpy(), k=k)
        assert ours[row].item() == pytest.approx(theirs, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 10_000))
def test_ties_count_as_the_mean_over_all_their_orders(size, k, seed):
    from itertools import permutations

    generator = torch.Generator().manual_seed(seed)
    relevant = torch.randint(0, 2, (1, size), generator=generator).bool()
    values = torch.randint(0, 2, (1, size), generator=generator).double()
    mask = torch.ones_like(relevant)
    for function in (mrr, recall):
        orders = [
            function(values + 1e-3 * torch.tensor([order], dtype=torch.float64), relevant, mask, k=k).item()
            for order in permutations(range(size))
        ]
        assert function(values, relevant, mask, k=k).item() == pytest.approx(sum(orders) / len(orders), abs=1e-12)


def test_metrics_know_documents_that_are_not_among_the_candidates():
    values, grades = torch.tensor([[2.0, 1.0, 9.0]]), torch.tensor([[1.0, 0.0, 4.0]])
    mask = torch.tensor([[True, True, False]])
    assert ndcg(values, grades, mask).item() == 1
    assert ndcg(values, grades, mask, ideal=torch.tensor([[4.0, 1.0]])).item() == pytest.approx(
        1 / (4 + 1 / math.log2(3))
    )
    assert recall(values, grades > 0, mask, k=2, total=torch.tensor([2])).item() == 0.5
    assert mrr(-values, grades > 0, mask).item() == 0.5 and mrr(-values, grades > 0, mask, k=1).item() == 0
    assert ndcg(values, torch.zeros(1, 3), mask).item() == 0 and mrr(values, grades > 9, mask).item() == 0


@pytest.mark.parametrize("gain", ["linear", "exponential"])
def test_a_grade_below_zero_gains_nothing(gain):
    """As in trec_eval, where junk and spam are graded -2: they neither pay nor cost."""
    grades = torch.tensor([[2.0, 1.0, -2.0, -2.0], [-1.0, -1.0, -1.0, -2.0]])
    mask, plain = torch.ones(2, 4, dtype=torch.bool), grades.clamp(min=0)
    for scores in (torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 2), torch.tensor([[1.0, 3.0, 4.0, 2.0]] * 2)):
        found = ndcg(scores, grades, mask, gain=gain)
        torch.testing.assert_close(found, ndcg(scores, plain, mask, gain=gain))
        torch.testing.assert_close(ndcg(scores, grades, mask, gain=gain, ideal=grades), found)
    assert ndcg(torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 2), grades, mask, gain=gain).tolist() == [1, 0]


def test_search_is_exact_in_any_tile():
    queries, documents = torch.randn(5, 8), torch.randn(40, 8)
    wanted = (queries @ documents.T).sort(1, descending=True)
    for tile in (3, 7, 100):
        values, indices = search(queries, documents, 9, tile=tile)
        close(values, wanted.values[:, :9], rtol=1e-6)
        assert indices.equal(wanted.indices[:, :9])
    assert search(queries, documents, 99)[1].shape == (5, 40)
    assert bm25(["red car"], ["a blue sky", "a red car", "the car"], 3)[0].tolist() == [1, 2, 0]


def test_late_interaction_ignores_padding():
    q, d = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    q_mask, d_mask = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    wanted = max_sim(q[:, :2], d[:, :3], q_mask[:, :2], d_mask[:, :3])
    q_mask[:, 2:], d_mask[:, 3:] = False, False
    d = d.masked_fill(~d_mask[:, :, None], 1e4).requires_grad_()
    found = max_sim(q, d, q_mask, d_mask)
    close(found, wanted)
    assert torch.autograd.grad(found.sum(), d)[0][:, 3:].eq(0).all()
    hand = sum(max(float(q[0, i] @ d[0, j]) for j in range(3)) for i in range(2))
    assert found[0].item() == pytest.approx(hand, rel=1e-5)
    assert max_sim(q, d, q_mask, torch.zeros_like(d_mask)).eq(0).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert max_sim(q, d, q_mask, d_mask).equal(found)


TRIPLES = [Triple(7.5, -1.25, f"query {i // 3}", f"good {i}", f"bad {i}") for i in range(60)]


def test_ranknet_asks_a_teacher_only_for_scores_to_write():
    assert MarginMSE(loss_type="ranknet").requires.teacher == "none"
    asked = MarginMSE(loss_type="ranknet", write_scores="scores.tsv")
    assert asked.requires.teacher == "optional" and asked.requires.teacher_model
    rows = [{"id": 0, "query": "q", "documents": ["a", "b"], "labels": [1.0, 0.0]}]
    context = SimpleNamespace(splits={"train": RankingSet(rows)}, teacher_model=None)
    with pytest.raises(InputError, match="the data has no teacher scores"):
        asked.setup(context)


@pytest.mark.parametrize("name", ["t.tsv", "t.parquet"])
def test_triples_are_written_and_read_back(tmp_path, name):
    write_triples(tmp_path / name, TRIPLES)
    assert read_triples(tmp_path / name) == TRIPLES
    assert [f.name for f in tmp_path.iterdir()] == [name]
    if name.endswith("tsv"):
        with pytest.raises(InputError, match="Triple 0 has a tab"):
            write_triples(tmp_path / name, [Triple(1, 0, "a\tb", "c", "d")])


def test_ids_are_joined_and_what_is_unknown_is_counted(tmp_path):
    (tmp_path / "q.tsv").write_text("1\twhat is it\n2\twho\n")
    (tmp_path / "c.tsv").write_text("7\tit is this\n8\tnobody\n")
    (tmp_path / "t.tsv").write_text("0.9\t0.1\t1\t7\t8\n0.5\t0.5\t1\t7\t7\n0.2\t0.1\t1\t7\t99\n")
    notes = []
    sources = {"queries": tmp_path / "q.tsv", "collection": tmp_path / "c.tsv"}
    found = read_triples(tmp_path / "t.tsv", **sources, notes=notes)
    assert found[0] == Triple(0.9, 0.1, "what is it", "it is this", "nobody") and len(found) == 2
    assert "1 of 3 triples have unknown ids" in notes[0] and "1 triples have one document" in notes[1]
    assert "like probabilities" in notes[2]
    (tmp_path / "t.tsv").write_text("0.9\t0.1\t5\t7\t8\n")
    with pytest.raises(InputError, match="none of the ids of its 1 triples"):
        read_triples(tmp_path / "t.tsv", **sources)
    with pytest.raises(InputError, match="Ids need both"):
        read_triples(tmp_path / "t.tsv", queries=tmp_path / "q.tsv")


@pytest.mark.parametrize(
    "line,says",
    [
        ("1.0\t2.0\tq\tp", "line 2: 4 columns where 5"),
        ("high\t2.0\tq\tp\tn", "line 2: pos_score is 'high'"),
        ("1.0\tnan\tq\tp\tn", "line 2: neg_score is nan"),
        ("1e300\t1.0\tq\tp\tn", r"line 2: pos_score is 1e\+300, not a finite number in single precision"),
        ("inf\t1.0\tq\tp\tn", "line 2: pos_score is inf"),
        ("\t1.0\tq\tp\tn", "line 2: pos_score is ''"),
        ("1.0\t2.0\t \tp\tn", "line 2: the query is empty"),
        ("1.0\t2.0\tq\tp\t", "line 2: the negative is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, says):
    (tmp_path / "t.tsv").write_text(f"1.0\t2.0\tq\tp\tn\n{line}\n")
    with pytest.raises(InputError, match=says):
        read_triples(tmp_path / "t.tsv")


def test_members_must_score_the_same_triples(tmp_path):
    write_triples(tmp_path / "a.tsv", TRIPLES)
    write_triples(
        tmp_path / "b.tsv", [Triple(t.pos_score + 2, t.neg_score, t.query, t.positive, t.negative) for t in TRIPLES]
    )
    spec = {"name": str(tmp_path / "a.tsv"), "members": [str(tmp_path / "b.tsv")]}
    splits = load_rankings(spec)
    assert splits.train.records[0]["members"] == [[7.5, -1.25], [9.5, -1.25]] and splits.recorded
    queries = [{r["query"] for r in s.records} for s in (splits.train, splits.validation, splits.test)]
    assert not queries[0] & (queries[1] | queries[2]) and not queries[1] & queries[2]
    write_triples(tmp_path / "b.tsv", TRIPLES[1:])
    with pytest.raises(InputError, match="not those of"):
        load_rankings(spec)
