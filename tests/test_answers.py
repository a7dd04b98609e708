"""Final answers and pairs made of them: readers, votes, pair builders, and metrics of attempts and graders."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golden_vectors import close, golden
from understudy.curation import (
    Checker,
    Funnel,
    Vote,
    best_and_worst,
    best_and_worst_shares,
    correct_after_wrong,
    first_correct,
    kind_of,
    majority,
)
from understudy.errors import InputError
from understudy.evaluation.answers import cohen_kappa, consistent_verdicts, mcnemar, pass_at_k, wilson, win_rate


def test_a_digit_that_is_repeated_without_end_is_no_number():
    loop = "7" * 5000
    assert Checker("number").parse(f"#### {loop}").reason == "no number"
    assert Checker("number", "last").parse(f"so 12 and {loop}").value == "12"
    with pytest.raises(InputError, match="is not one number"):
        Checker("number").gold(loop)


@pytest.mark.parametrize(
    "text,value",
    [
        ("so 3+4 = 7", "7"),
        ("it costs $1,200.50.", "2401/2"),
        ("3.0 apples", "3"),
        ("about 18km", "18"),
        ("1/2 of it", "1/2"),
        ("2/4", "1/2"),
        ("minus −5 degrees", "-5"),
        ("10-4", "4"),
        ("a loss of -$5", "-5"),
        (".5", "1/2"),
        ("1/0 is 3", "3"),
        ("1, 2, 3", "3"),
    ],
)
def test_the_last_number_of_a_text(text, value):
    assert Checker("number", "last").parse(text).value == value


@pytest.mark.parametrize(
    "kind,text,value,reason",
    [
        ("number", "3 + 4 = 7\n#### 7", "7", None),
        ("number", "#### 5\nno:\n#### 1,000", "1000", None),
        ("number", "so it is 7", None, "no mark"),
        ("number", "####  \n", None, "nothing behind the mark"),
        ("number", "#### seven", None, "no number"),
        ("number", "#### 3 or 4", None, "several numbers"),
        ("number", "#### 3 = 3.0", "3", None),
        ("choice", "#### (B)", "B", None),
        ("choice", "#### B) A large tree", "B", None),
        ("choice", "#### A or B", None, "several choices"),
        ("choice", "#### Because", None, "no letter of a choice"),
        ("yes_no", "#### Yes.", "yes", None),
        ("yes_no", "#### False", "no", None),
        ("yes_no", "#### yes and no", None, "several answers"),
        ("yes_no", "#### Noon", None, "no yes or no"),
        ("text", "####  New  York. ", "new york", None),
    ],
)
def test_what_stands_behind_the_mark(kind, text, value, reason):
    found = Checker(kind).parse(text)
    assert (found.value, found.reason) == (value, reason)


@pytest.mark.parametrize(
    "text,value,reason",
    [
        (r"\boxed{3} then \boxed{\frac{1}{2} = 0.5}", None, "several numbers"),
        (r"so \boxed{ 42 }", "42", None),
        (r"\boxed{4", None, "box without end"),
        (r"\boxed{}", None, "empty box"),
        ("42", None, "no box"),
    ],
)
def test_what_stands_in_the_box(text, value, reason):
    found = Checker("number", "box").parse(text)
    assert (found.value, found.reason) == (value, reason)


@given(st.integers(-(10**9), 10**9), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_number_is_read_as_it_was_written(whole, cents):
    sign, checker = "-" if whole < 0 else "", Checker("number")
    for text in (
        f"{sign}{abs(whole)}.{cents:02d}",
        f"{sign}${abs(whole):,}.{cents:02d}",
        f"{sign}{abs(whole):,}.{cents:02d}0 m",
    ):
        assert checker.correct(f"x\n#### {text}", checker.gold(f"{sign}{abs(whole)}.{cents:02d}")), text


@given(
    st.text(max_size=40),
    st.sampled_from(["number", "choice", "yes_no", "text"]),
    st.sampled_from(["mark", "box", "last"]),
)
@settings(max_examples=150, deadline=None)
def test_any_text_has_an_answer_or_a_reason(text, kind, form):
    found = Checker(kind, form).parse(text)
    assert (found.value is None) != (found.reason is None)
    if found.value is not None and form == "mark":
        assert Checker(kind, "mark").parse(f"#### {found.value}") == found  # reading it again changes nothing


def test_the_kind_of_reference_answers():
    assert kind_of(["18", "1,000", "$3", "51.0", "5%"]) == "number"
    assert kind_of(["A", "(C)"]) == "choice" and kind_of(["yes", "False"]) == "yes_no"
    assert kind_of(["18", "eighteen"]) == kind_of(["5 apples"]) == kind_of([]) == "text"
    with pytest.raises(InputError, match=r"The answer '3 or 4' is not one number: name its kind in data\.answers"):
        Checker("number").gold("3 or 4")


@pytest.mark.golden
def test_votes_are_those_of_paper_21():
    g = golden("21-qcrd")
    for answers, winner, positive in zip(g["sc_answers"].tolist(), g["sc_majority"], g["sc_positive"], strict=True):
        vote = majority([str(a) if a >= 0 else None for a in answers])
        assert vote.value == (str(int(winner)) if winner >= 0 else None)
        assert [a >= 0 and str(a) == vote.value for a in answers] == positive.tolist()
    assert majority([None, None]).value is None and majority(["b", "a"]).tied
    assert majority(["a", None, "b", "b"]) == Vote("b", 2, 3, False)


@pytest.mark.golden
def test_best_and_worst_are_those_of_paper_5():
    g = golden("05-arte")
    scores, (m, n) = g["s_rationale"], g["s_rationale"].shape
    funnel = Funnel()
    pairs = best_and_worst([i // n for i in range(m * n)], scores.flatten().tolist(), funnel)
    wanted = [(i * n + int(g["r_chosen"][i]), i * n + int(g["r_rejected"][i])) for i in range(m) if g["r_has_pair"][i]]
    assert pairs == wanted
    few = int(((~scores.isnan()).sum(1) < 2).sum())
    wrong = {"fewer than two scored": few, "all scores equal": int((~g["r_has_pair"]).sum()) - few}
    assert funnel.rows[0]["dropped"] == {reason: number for reason, number in wrong.items() if number}
    best, worst = best_and_worst_shares(g["s_question"].tolist(), float(g["quartile"]))
    assert (best, worst) == (g["q_chosen_pool"].tolist(), g["q_rejected_pool"].tolist()) and len(best) == g["n_side"]


def test_pairs_of_correct_after_wrong_by_hand():
    groups = ["a", "b", "a", "c", "a", "c", "d", "b", "e", "e"]
    correct = [False, True, False, False, True, False, True, False, False, True]
    texts = ["w", "r", "w2", "w", "r", "w", "r", "w", "same", "same"]
    funnel = Funnel()
    assert correct_after_wrong(groups, correct, funnel, texts) == [(4, 0)]
    assert funnel.rows[0]["dropped"] == {
        "correct at once": 2,
        "no correct attempt": 1,
        "wrong and correct attempt are the same text": 1,
    }
    assert correct_after_wrong(groups, correct, Funnel()) == [(4, 0), (9, 8)]
    assert first_correct(groups, correct, funnel) == [4, 1, 6, 9]
    assert funnel.rows[1]["dropped"] == {"no correct attempt": 1}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=30))
@settings(max_examples=80, deadline=None)
def test_pairs_are_within_a_problem_and_their_first(rows):
    groups, correct = [g for g, _ in rows], [c for _, c in rows]
    funnel = Funnel()
    pairs, firsts = correct_after_wrong(groups, correct, funnel), first_correct(groups, correct, Funnel())
    assert {p.chosen for p in pairs} <= set(firsts) and len({groups[i] for i in firsts}) == len(firsts)
    for chosen, rejected in pairs:
        assert groups[chosen] == groups[rejected] and rejected < chosen and correct[chosen] and not correct[rejected]
        earlier = [i for i in range(chosen) if groups[i] == groups[chosen]]
        assert not any(correct[i] for i in earlier) and rejected == earlier[0]
    assert funnel.rows[0]["after"] + sum(funnel.rows[0]["dropped"].values()) == len(set(groups))


@pytest.mark.golden
def test_pass_at_k_is_that_of_paper_16():
    g = golden("16-ded")
    found = [
        pass_at_k(n, c, int(g["passk_k"])) for n, c in zip(g["passk_n"].tolist(), g["passk_c"].tolist(), strict=True)
    ]
    close(g["passk"].new_tensor(found), g["passk"])
    assert pass_at_k(5, 0, 3) == 0 and pass_at_k(5, 5, 3) == 1 and pass_at_k(8, 3, 1) == pytest.approx(3 / 8)


@pytest.mark.golden
def test_graders_and_paired_models_are_those_of_paper_36():
    g = golden("36-frontier-synthetic")
    first, second = g["model_a_correct"].tolist(), g["model_b_correct"].tolist()
    found, turned = mcnemar(first, second), mcnemar(second, first)
    assert (found.second_only, found.first_only) == (g["mcnemar_n01"], g["mcnemar_n10"])
    close(g["mcnemar_exact_p"].new_tensor(found.p), g["mcnemar_exact_p"])
    assert turned[:2] == found[1::-1] and turned.p == pytest.approx(found.p)
    human, judge = g["human_grade"].tolist(), g["judge_grade"].tolist()
    close(g["cohen_kappa"].new_tensor(cohen_kappa(human, judge)), g["cohen_kappa"])
    shown, swapped = g["verdict_first_slot_AB"].tolist(), g["verdict_first_slot_BA"].tolist()
    verdicts = consistent_verdicts(shown, swapped)
    assert verdicts == g["consistent_verdict_A"].tolist() and win_rate(verdicts) == pytest.approx(
        float(g["win_rate_A"])
    )
    assert win_rate(consistent_verdicts(swapped, shown)) == pytest.approx(1 - win_rate(verdicts))
    assert mcnemar([True, False], [True, False]).p == 1 and math.isnan(cohen_kappa([1, 1], [1, 1]))


def test_an_interval_covers_as_often_as_it_says():
    from scipy.stats import binom

    for p in (0.05, 0.5, 0.9):
        found = [wilson(k, 40) for k in range(41)]
        assert sum(binom.pmf(k, 40, p) for k, w in enumerate(found) if w.low <= p <= w.high) == pytest.approx(
            0.95, abs=0.03
        )
    assert wilson(0, 10).low == 0 and wilson(10, 10).high == pytest.approx(1)


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: pass_at_k(4, 1, 5), "pass@5 of 4 attempts"),
        (lambda: wilson(3, 2), "3 of 2 is no share"),
        (lambda: mcnemar([True], []), "1 verdicts and the other 0"),
        (lambda: cohen_kappa([], []), "0 grades"),
        (lambda: win_rate([]), "no verdict"),
        (lambda: first_correct(["a"], [], Funnel()), "1 attempts have 0 verdicts"),
        (lambda: best_and_worst_shares([1.0] * 8), "carry no signal"),
        (lambda: best_and_worst_shares([math.nan]), "carry no signal"),
        (lambda: best_and_worst_shares([1.0, 2.0], 0.7), "share of best and worst items is 0.7"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()
