"""Paper 16: its golden vectors, edit distance as a metric, selectors, filters, pass rates, the shift of hidden states."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden_vectors import close, golden
from understudy.curation import Checker
from understudy.curation.diversity import by_length, edit_distances, levenshtein, select_diverse, total_distance
from understudy.curation.traces import hard_enough, has_form, pass_rates, trace_problem
from understudy.errors import InputError
from understudy.evaluation.distances import pca_shift
from understudy.evaluation.forgetting import readings
from understudy.evaluation.teacher_choice import choose_teacher
from understudy.losses import entropy
from understudy.training.solvers import student_of

WORDS = st.text("abc", max_size=12)
RULES = ("maximin", "maxsum", "random", "nearest")


@pytest.mark.golden
def test_distances_and_selections_are_the_golden_ones():
    g = golden("16-ded")
    traces = [row[:n].tolist() for row, n in zip(g["traj"], g["traj_len"].tolist(), strict=True)]
    distances, number = edit_distances(traces), int(g["P"])
    assert distances.tolist() == g["lev"].tolist()
    close(torch.from_numpy(by_length(distances, g["traj_len"].tolist())), g["lev_norm"])
    assert select_diverse(distances, number, "maximin") == g["select_maximin"].tolist()
    summed = select_diverse(distances, number, "maxsum")
    assert summed == g["select_maxsum"].tolist() and total_distance(distances, summed) == int(g["maxsum_value"])


@pytest.mark.golden
def test_questions_and_traces_are_kept_as_the_golden_ones():
    g = golden("16-ded")
    rates = pass_rates(g["rollout_correct"].numpy())
    close(torch.from_numpy(rates), g["pass_rate"])
    assert [hard_enough(r, float(g["pass_threshold"])) for r in rates] == g["question_keep"].tolist()
    columns = (g[name].flatten().tolist() for name in ("n_tokens", "format_ok", "answer_ok"))
    kept = [trace_problem(*row, int(g["max_tokens"])) is None for row in zip(*columns, strict=True)]
    assert kept == g["response_keep"].flatten().tolist()


@pytest.mark.golden
def test_diagnostics_and_the_choice_of_the_teacher_are_the_golden_ones():
    g = golden("16-ded")
    values = entropy(g["logits"].flatten(0, 1)).view_as(g["token_entropy"])
    close(values[g["token_mask"]], g["token_entropy"][g["token_mask"]])
    close(values[g["token_mask"]].mean(), g["mean_token_entropy"])
    shift = pca_shift(g["hidden_before"], g["hidden_after"], int(g["pca_dim"]))
    close(shift.explained, g["pca_explained_var"])
    close(g["pca_shift"].new_tensor(shift.distance), g["pca_shift"])
    choice = choose_teacher(g["smoke_student_acc"].tolist(), 1000)
    close(g["smoke_score"].new_tensor(choice.means), g["smoke_score"])
    assert choice.best == int(g["teacher_selected"])


@given(WORDS, WORDS, WORDS)
@settings(max_examples=200, deadline=None)
def test_edit_distance_is_a_metric(a, b, c):
    d = levenshtein(a, b)
    assert d == levenshtein(b, a) == _by_table(a, b) and (d == 0) == (a == b)
    assert d <= levenshtein(a, c) + levenshtein(c, b)
    assert abs(len(a) - len(b)) <= d <= max(len(a), len(b))


def _by_table(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@given(st.lists(WORDS, min_size=1, max_size=7), st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_selections(items, number):
    distances = edit_distances(items)
    chosen = {rule: select_diverse(distances, number, rule, seed=[3]) for rule in RULES}
    for taken in chosen.values():
        assert len(taken) == len(set(taken)) == min(number, len(items))
    if number >= len(items):
        assert all(sorted(taken) == list(range(len(items))) for taken in chosen.values())
    totals = {rule: total_distance(distances, taken) for rule, taken in chosen.items()}
    assert totals["maxsum"] == max(totals.values())
    if number == 2 <= len(items):
        assert totals["maximin"] == totals["maxsum"] == distances.max()
    apart = distances[np.ix_(chosen["maximin"], chosen["maximin"])] + np.eye(len(chosen["maximin"]))
    if len(set(items)) >= len(chosen["maximin"]):  # equal texts are not both taken while others are left
        assert (apart > 0).all()


def test_ties_go_to_the_earlier_items_and_one_is_the_first():
    same = np.ones((4, 4), int) - np.eye(4, dtype=int)
    assert [select_diverse(same, 3, rule) for rule in ("maximin", "nearest", "maxsum")] == [[0, 1, 2]] * 3
    assert [select_diverse(same, 1, rule) for rule in RULES] == [[0]] * 4
    line = np.abs(np.subtract.outer([0, 1, 5, 9], [0, 1, 5, 9]))
    assert select_diverse(line, 3, "maximin") == [0, 3, 2] and select_diverse(line, 2, "nearest") == [0, 1]
    assert select_diverse(line, 2, "random", [1]) == select_diverse(line, 2, "random", [1])


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(-1, 1), st.floats(-1, 1))
@settings(max_examples=60, deadline=None)
def test_kept_questions_are_monotone_in_the_threshold(rates, a, b):
    low, high = sorted((a, b))
    assert all(hard_enough(r, high) for r in rates if hard_enough(r, low))
    assert all(hard_enough(r, 1) for r in rates) and not any(hard_enough(r, -0.1) for r in rates)


@pytest.mark.parametrize(
    "text,good",
    [
        ("3 + 4 = 7\n#### 7", True),
        ("<think>3 + 4 = 7</think>\n#### 7", True),
        ("#### 7", False),
        ("3 + 4 = 7", False),
        ("#### 7 or #### 8", False),
        ("<think>3 + 4\n#### 7", False),
        ("</think>3 + 4<think>\n#### 7", False),
        ("<think>3</think><think>4</think>\n#### 7", False),
        ("<think>3 + 4 = 7\n#### 7</think>", False),
    ],
)
def test_a_trace_is_reasoning_and_then_an_answer(text, good):
    assert has_form(text, Checker("number")) is good


def test_entropy_limits():
    flat = torch.zeros(2, 7, dtype=torch.float64)
    close(entropy(flat), torch.full((2,), math.log(7), dtype=torch.float64))
    close(entropy(flat + 300), entropy(flat))
    sure = torch.tensor([[50.0, -50.0, -math.inf]], dtype=torch.float64)
    assert 0 <= float(entropy(sure)) < 1e-40


def test_shift_of_hidden_states():
    torch.manual_seed(0)
    before, after = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    assert pca_shift(before, before).distance == 0
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    assert pca_shift(before @ turn, after @ turn).distance == pytest.approx(pca_shift(before, after).distance)
    assert pca_shift(before, before + 3.0, 5).distance == pytest.approx(3 * math.sqrt(5))  # all of the space


def test_a_choice_is_decided_by_more_than_its_errors():
    apart, close_by = [[0.9, 0.9], [0.1, 0.1]], [[0.52], [0.5]]
    assert choose_teacher(apart, 100).decided and not choose_teacher(close_by, 100).decided
    assert choose_teacher([[0.5], [0.5]], 10).best == 0 and not choose_teacher([[0.5]], 10).decided
    noisy = [[0.9, 0.1], [0.1, 0.3]]
    assert not choose_teacher(noisy, 10**6).decided


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: pass_rates(np.zeros((3, 0))), "at least one attempt"),
        (lambda: choose_teacher([], 5), "0 teachers"),
        (lambda: choose_teacher([[0.1], []], 5), "give each as many"),
        (lambda: pca_shift(torch.zeros(3, 2), torch.zeros(4, 2)), "the same inputs"),
        (lambda: pca_shift(torch.zeros(2, 9), torch.zeros(2, 9)), "have no 2 principal"),
        (lambda: select_diverse(np.zeros((60, 60)), 30, "maxsum"), "choose maximin"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_student_is_read_as_it_is_loaded(monkeypatch):
    """Its tokenizer, dtype and trust in its code are those of its specification."""
    told = {"tokenizer": "words", "dtype": "float32", "trust_remote_code": True}

    def load(name, **how):
        raise InputError(f"{name} {how}")

    monkeypatch.setattr("understudy.training.solvers.LocalSource.load", load)
    with pytest.raises(InputError, match=re.escape(f"m {told}")):
        readings({"model": "m", **told}, [], 8)


def test_a_trained_model_is_loaded_as_the_one_it_was_trained_from(tmp_path):
    spec = {"model": "somewhere", "tokenizer": "elsewhere", "dtype": "bfloat16", "trust_remote_code": True}
    found = student_of(SimpleNamespace(folder=tmp_path), spec)
    assert found == {"model": str(tmp_path / "student"), "dtype": "bfloat16", "trust_remote_code": True}
