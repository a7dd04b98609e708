"""Fidelity to the teacher and the statistics of gains, against the golden vectors and limits of paper 14."""

import math
import random

import numpy as np
import pytest
import torch

from golden_vectors import close, golden, reduce
from understudy import InputError, losses
from understudy.evaluation import row_statistics
from understudy.evaluation.fidelity import (
    answer_agreement,
    answers_agree,
    by_teacher,
    rationale_bleu,
    sentence_bleu,
)
from understudy.reporting.significance import anova, gains_above_zero, rank_correlation
from understudy.targets import Dense


@pytest.fixture(scope="module")
def g():
    return golden("14-generalization-fidelity")


def objective(g, name):
    """The card's names as the project's: function, and whether it is ours with temperature² already in it."""
    base, _, tau = name.partition("_tau")
    function = {"kld": losses.forward_kl, "reversekld": losses.reverse_kl}[base]
    return lambda s, t: function(s, t, temperature=float(tau), tau_squared=True)


def sequence_mean(values, mask):
    sequence = torch.arange(len(mask))[:, None].expand_as(mask)[mask]
    return reduce(values, "sequence_mean", sequence)


@pytest.mark.golden
def test_objectives_have_the_values_and_gradients_of_the_official_code(g):
    mask = g["mask"].bool()
    names = [k.removeprefix("exact_") for k in g if k.startswith("exact_")]
    assert {name.partition("_")[0] for name in names} == {"kld", "reversekld"}
    for name in names:
        student = g["student_logits"].clone().requires_grad_()
        loss = sequence_mean(objective(g, name)(student[mask], g["teacher_logits"][mask]), mask)
        loss.backward()
        close(loss, g[f"exact_{name}"])
        close(loss, g[f"code_{name}"], rtol=1e-6)
        close(student.grad, g[f"grad_code_{name}"], rtol=1e-6, atol=1e-7)
    student = g["student_logits"].clone().requires_grad_()
    loss = reduce(losses.jsd(student[mask], g["teacher_logits"][mask], beta=0.5), "token_mean")
    loss.backward()
    close(loss, g["code_gkd"], rtol=1e-6)
    close(student.grad, g["grad_code_gkd"], rtol=1e-6)
    sides, noise = [g[f"{side}_logits"][mask] for side in ("student", "teacher")], g["sigma"] * g["unit_noise"][mask]
    values = losses.with_noise(losses.forward_kl, *sides, noise)
    assert torch.equal(losses.with_noise(losses.forward_kl, *sides, 0 * noise), losses.forward_kl(*sides))
    close(sequence_mean(values, mask), g["noisy_exact_kld_tau1.0"])
    assert float(g["epsilon"]) <= 1e-9  # what the official code adds, and ours leaves out


@pytest.mark.golden
def test_predictions_of_classifiers(g):
    rows = row_statistics(Dense(g["cls_student_logits"]), Dense(g["cls_teacher_logits"]), g["cls_labels"])
    found = by_teacher(rows.agree, rows.teacher_correct)
    close(rows.agree.mean(), g["top1_agreement"])
    close(rows.kl.mean(), g["avg_predictive_kl"])
    close(rows.correct.mean(), g["acc_student"])
    close(rows.teacher_correct.mean(), g["acc_teacher"])
    assert found["right"] == pytest.approx(float(g["agree_given_teacher_right"]))
    assert found["wrong"] == pytest.approx(float(g["agree_given_teacher_wrong"]))
    assert sum(found["count"].values()) == len(g["cls_labels"])
    assert by_teacher(torch.ones(2), torch.ones(2))["wrong"] is None


@pytest.mark.golden
def test_bleu(g):
    pairs = [
        [[int(i) for i in row if i >= 0] for row in (teacher, student)]
        for teacher, student in zip(g["bleu_teacher_ids"], g["bleu_student_ids"], strict=True)
    ]
    found = torch.tensor([sentence_bleu(t, s) for t, s in pairs], dtype=torch.float64)
    close(found, g["bleu_sentence"])
    close(found.mean(), g["bleu_mean"])


@pytest.mark.golden
def test_statistics_of_the_published_table_and_of_one_with_ties(g):
    for prefix, more in (("stat", "agreement"), ("paper_math", "teacher_score")):
        if f"{prefix}_improvement" not in g:
            continue  # only the public file holds the published table
        gains, method = g[f"{prefix}_improvement"], g[f"{prefix}_method"]
        groups = {str(int(m)): gains[method == m].tolist() for m in method.unique()}
        suffix = "agreement" if more == "agreement" else "teacher"
        for test, name in (
            (gains_above_zero(gains.tolist()), "ttest"),
            (anova(groups), "anova"),
            (rank_correlation(g[f"{prefix}_size"].tolist(), gains.tolist()), "spearman"),
            (rank_correlation(g[f"{prefix}_{more}"].tolist(), gains.tolist()), f"spearman_{suffix}"),
        ):
            close(torch.tensor(test[:2], dtype=torch.float64), g[f"{prefix}_{name}"], rtol=1e-9)
            assert test.n == len(gains) and test.reason is None


def test_a_student_that_is_its_teacher():
    logits, labels = torch.randn(30, 4).double(), torch.randint(0, 4, (30,))
    rows = row_statistics(Dense(logits), Dense(logits), labels)
    assert rows.agree.mean() == 1 and rows.kl.abs().max() < 1e-12
    for loss in (losses.forward_kl, losses.reverse_kl, losses.jsd):
        assert loss(logits, logits).abs().max() < 1e-12
    for text in ("1 + 2 = 3, so 3 it is", "yes"):
        assert rationale_bleu([text], [text]) == pytest.approx(100)
    assert answer_agreement(["3", None, "b"], ["3", None, "b"]) == 1


def test_directions_mirror_each_other():
    p, q = torch.randn(2, 7, 5).double()
    close(losses.reverse_kl(q, p), losses.forward_kl(p, q))
    close(losses.jsd(q, p, beta=0.5), losses.jsd(p, q, beta=0.5))
    mask = torch.ones(3, 4, dtype=torch.bool)
    values = torch.rand(12).double()
    close(sequence_mean(values, mask), reduce(values, "token_mean"))
    mask[1] = False  # a row of padding alone does not count
    close(sequence_mean(values[:8], mask), values[:8].mean())


def test_agreement_is_bounded_by_accuracies():
    draw = random.Random(0)
    for classes in (2, 5):
        for _ in range(50):
            gold, first, second = ([str(draw.randrange(classes)) for _ in range(17)] for _ in range(3))
            agreement = answer_agreement(first, second)
            total = answer_agreement(first, gold) + answer_agreement(second, gold) - 1
            bound = abs(total) if classes == 2 else total
            assert agreement >= bound - 1e-12


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("3", "3.0009", True),
        ("1/3", "0.333", True),
        ("3", "3.01", False),
        ("B", "b", True),
        ("B", "C", False),
        (None, None, True),
        (None, "3", False),
        ("paris", "3", False),
    ],
)
def test_answers_are_compared_as_parsed(first, second, same):
    assert answers_agree(first, second) is same and answers_agree(second, first) is same


def test_an_empty_rationale_has_no_bleu():
    assert sentence_bleu("a b".split(), []) == sentence_bleu([], "a b".split()) == sentence_bleu([], []) == 0
    with pytest.raises(InputError, match="teacher has 1 rationales and the student 2"):
        rationale_bleu(["a"], ["a", "b"])
    with pytest.raises(InputError, match="One model has 0 answers and the other 1"):
        answer_agreement([], ["3"])


def test_limits_of_the_statistics():
    gains, size = [0.1, 0.3, -0.05, 0.2, 0.4], [1.0, 2.0, 2.0, 8.0, 16.0]
    assert gains_above_zero([-x for x in gains]).statistic == pytest.approx(-gains_above_zero(gains).statistic)
    assert gains_above_zero([-x for x in gains]).p == pytest.approx(1 - gains_above_zero(gains).p)
    monotone = rank_correlation([math.log(x) for x in size], [x**3 for x in gains])
    assert monotone == rank_correlation(size, gains)


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        (lambda: gains_above_zero([0.1, 0.2]), "2 of at least 3 values"),
        (lambda: gains_above_zero([]), "0 of at least 3 values"),
        (lambda: gains_above_zero([0.9 - 0.8, 0.5 - 0.4, 0.1]), "all gains are equal"),
        (lambda: gains_above_zero([0.0, 0.0, 0.0]), "all gains are equal"),
        (lambda: anova({"a": [0.1, 0.2, 0.3]}), "one method only"),
        (lambda: anova({"a": [0.1, 0.2, 0.3], "b": []}), "one method only"),
        (lambda: anova({"a": [0.1], "b": [0.2], "c": [0.3]}), "one run of each method only"),
        (lambda: anova({"a": [0.1, 0.1], "b": [0.2, 0.2]}), "all gains of a method are equal"),
        (lambda: rank_correlation([1, 1, 1], [1, 2, 3], "sizes"), "sizes are all equal"),
        (lambda: rank_correlation([1, 2, 3], [1, 1, 1]), "all gains are equal"),
        (lambda: rank_correlation([1, 2], [1, 2]), "2 of at least 3 values"),
    ],
)
def test_no_statistic_is_infinite_or_without_a_reason(test, reason):
    found = test()
    assert math.isnan(found.statistic) and math.isnan(found.p) and found.reason == reason
    assert found.as_json()["statistic"] is found.as_json()["p"] is None


def test_values_that_are_none_are_refused():
    for call in (
        lambda: gains_above_zero([0.1, math.nan, 0.2]),
        lambda: anova({"kd": [0.1, np.inf], "b": [0.2, 0.1]}),
        lambda: rank_correlation([1, 2, math.inf], [1, 2, 3]),
    ):
        with pytest.raises(InputError, match=r" is (nan|inf): leave out runs"):
            call()
    with pytest.raises(InputError, match="Rank correlation of 2 and 3 values"):
        rank_correlation([1, 2], [1, 2, 3])
