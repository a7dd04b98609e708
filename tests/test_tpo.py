"""Paper 24, TPO: golden vectors, limits, trees as data, bad input, splits, resume, learning."""

import json
import math
from itertools import permutations

import pytest
import torch

from engine_cases import killed_run, weights
from golden_vectors import close, golden, reduce
from test_preferences import SMALL, scorer
from test_preferences import tokenizer as tokenizer
from understudy import InputError, distill
from understudy.data import Batch, TextSet, collate_lists, encode_lists, load_preferences
from understudy.data.trees import paths, token_steps
from understudy.losses import preference, steps
from understudy.methods.tpo import TPO
from understudy.runs.recipe import make
from understudy.training import SetupContext, TrainState

TREE = {
    "prompt": "the quick",
    "tree": [
        {
            "text": " brown fox",
            "children": [
                {"text": " jumps over", "children": [{"text": " the dog", "score": 100}]},
                {"text": " again", "score": 20},
                {"text": " bar"},
            ],
        },
        {"text": " lazy", "children": [{"text": " foo", "score": -60}]},
    ],
}


@pytest.fixture(scope="module")
def g():
    return golden("24-tpo")


def cells(g):
    """Where each token's step is: over lists, answers and steps."""
    index = g["step_index"]
    lists, answers, length = index.shape
    number = g["step_weight"].shape[-1] - 1
    answer = torch.arange(lists * answers)[:, None].expand(-1, length).reshape(-1)
    flat = index.reshape(-1)
    return torch.where(flat > 0, answer * number + flat - 1, -1), (lists, answers, number)


def rewards(g, tokens, how="adaptive"):
    cell, shape = cells(g)
    total = math.prod(shape)
    ratios = steps.pool_steps((tokens - g["ref_token_logp"]).reshape(-1), cell, total).view(shape)
    hidden = steps.pool_steps(g["hidden"].reshape(-1, g["hidden"].shape[-1]), cell, total).view(*shape, -1)
    present = steps.pool_steps(torch.ones(len(cell)), cell, total, reduce="sum").view(shape) > 0
    w = steps.step_weights(hidden, present, torch.zeros(shape[0], dtype=torch.long), how=how)
    return w, steps.step_reward(ratios, w)


@pytest.mark.golden
def test_golden_rewards(g):
    w, r = rewards(g, g["policy_token_logp"])
    close(w, g["step_weight"][..., 1:], rtol=1e-9)
    close(r, g["resp_reward"], rtol=1e-9)
    close(rewards(g, g["policy_token_logp"], "one_minus_cos")[0], g["step_weight_one_minus_cos"][..., 1:], rtol=1e-9)
    close(rewards(g, g["policy_token_logp"], "uniform")[1], g["resp_reward_uniform"], rtol=1e-9)


@pytest.mark.golden
def test_golden_losses(g):
    grades, beta = (g["score"] + 100) / 200, float(g["beta"])
    mask = torch.ones_like(grades, dtype=torch.bool)
    ordered = grades[:, :, None] > grades[:, None, :]
    for name, weighted in (("lambda", True), ("unweighted", False)):
        tokens = g["policy_token_logp"].clone().requires_grad_()
        _, r = rewards(g, tokens)
        if weighted:
            assert torch.equal(steps.ranks(r, mask), g["rank_pos"])
            close(steps.lambdas(r, grades, mask) * ordered, g["lam"] * ordered, rtol=1e-9)
        values = steps.lambda_rank(r, grades, beta=beta, weighted=weighted)
        mean = reduce(values, "token_mean")
        close(mean, g[f"loss_{name}"], rtol=1e-9)
        (slope,) = torch.autograd.grad(mean, tokens)
        close(slope, g[f"grad_loss_{name}"], rtol=1e-9)


def listed(number=5):
    r = torch.randn(3, number, dtype=torch.float64)
    grades = torch.rand(3, number, dtype=torch.float64)
    return r, grades


def test_a_pair_is_dpo():
    r, _ = listed(2)
    values = steps.lambda_rank(r, torch.tensor([[1.0, 0.0]] * 3).double(), beta=0.1, weighted=False)
    zero = torch.zeros(3, dtype=torch.float64)
    close(values, preference.dpo(r[:, 0], r[:, 1], zero, zero, beta=0.1))


def test_the_start_costs_ln_two_times_lambda():
    r, grades = listed()
    zero = torch.zeros_like(r)
    factor = steps.lambdas(zero, grades, torch.ones_like(r, dtype=torch.bool)).sum((1, 2)) / 2
    close(steps.lambda_rank(zero, grades), math.log(2) * factor)
    close(steps.lambda_rank(zero, grades, divide_by="lambda"), torch.full((3,), math.log(2)).double())
    pairs = torch.full((3,), math.log(2)).double()
    close(steps.lambda_rank(zero, grades, divide_by="pairs", weighted=False), pairs)


def test_order_shift_ties_and_masks_of_a_list():
    r, grades = listed(4)
    values = steps.lambda_rank(r, grades)
    for order in permutations(range(4)):
        close(steps.lambda_rank(r[:, order], grades[:, order]), values)
    close(steps.lambda_rank(r + 7.5, grades), values)
    leaf = r.clone().requires_grad_()
    (slope,) = torch.autograd.grad(steps.lambda_rank(leaf, grades).sum(), leaf)
    close(slope.sum(1), torch.zeros(3).double(), atol=1e-12)
    again = torch.cat([r, r[:, :1]], 1), torch.cat([grades, grades[:, :1]], 1)
    ordered = (again[1][:, :, None] > again[1][:, None, :]).sum((1, 2))
    assert (ordered == 6 + 3).all()  # the twin pairs with the other three alone
    equal = steps.lambda_rank(r, torch.full_like(grades, 0.5))
    assert equal.tolist() == [0, 0, 0]
    assert steps.lambda_rank(r[:, :1], grades[:, :1], divide_by="lambda").tolist() == [0, 0, 0]
    garbage = torch.full((3, 1), torch.nan).double()
    mask = torch.tensor([[True] * 4 + [False]]).expand(3, 5)
    close(steps.lambda_rank(torch.cat([r, garbage], 1), torch.cat([grades, garbage], 1), mask=mask), values)


def test_a_right_order_with_wide_margins_costs_nothing():
    _, grades = listed()
    close(steps.lambda_rank(1e4 * grades, grades), torch.zeros(3).double(), atol=1e-6)


def test_step_weights_and_rewards_at_their_ends():
    e = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], [[-1.0, 0.0], [2.0, 3.0], [1.0, 1.0]]])[None].double()
    present = torch.tensor([[[True, True, False], [True, True, True]]])
    w = steps.step_weights(e, present, torch.tensor([0]))
    close(w, torch.tensor([[[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]]]).double())
    ratios = torch.tensor([[[1.0, 4.0, math.nan], [9.0, 9.0, 9.0]]]).double()
    close(steps.step_reward(ratios, w), torch.tensor([[2.0, 9.0]]).double())
    nothing = torch.zeros_like(w)
    close(steps.step_reward(ratios, nothing), torch.zeros(1, 2).double())
    uniform = steps.step_weights(e, torch.ones_like(present), torch.tensor([0]), how="uniform")
    close(steps.step_reward(ratios[:, 1:], uniform[:, 1:]), torch.tensor([[9.0]]).double())


@pytest.mark.parametrize("how,sign", [("adaptive", -1.0), ("one_minus_cos", 1.0)])
def test_steps_without_weight_have_no_reward_whatever_the_rounding(how, sign):
    e = torch.randn(200, 1, 1, 7, generator=torch.Generator().manual_seed(0))
    e = torch.cat([e, sign * e], 1)
    w = steps.step_weights(e, torch.ones(200, 2, 1, dtype=torch.bool), torch.zeros(200, dtype=torch.long), how=how)
    assert (steps.step_reward(torch.full((200, 2, 1), 7.0), w)[:, 1] == 0).all()


def test_half_precision_does_not_reach_the_means_of_steps():
    hidden = torch.randn(3000, 4).bfloat16()
    cell = torch.arange(3000) // 1500
    found = steps.pool_steps(hidden, cell, 2)
    torch.testing.assert_close(found, hidden.double().view(2, 1500, 4).mean(1).float(), rtol=1e-5, atol=1e-6)


def test_a_tree_is_its_paths():
    found, scores, unscored = paths("here", TREE["tree"])
    assert found == [[" brown fox", " jumps over", " the dog"], [" brown fox", " again"], [" lazy", " foo"]]
    assert scores == [100, 20, -60] and unscored == 1


DEEP = {"text": "a", "score": 1}
for _ in range(3000):
    DEEP = {"text": "a", "children": [DEEP]}


def test_a_deep_tree_is_no_recursion():
    assert len(paths("here", DEEP)[0][0]) == 3001


@pytest.mark.parametrize(
    "record,says",
    [
        ({"tree": [{"text": ""}]}, "a node of tree below step 0 is no object with text"),
        ({"tree": [{"text": "a", "children": {"text": "b"}}]}, "children of a node of tree is dict"),
        ({"tree": [{"text": "a", "score": 1, "children": [{"text": "b", "score": 1}]}]}, "children and a score"),
        ({"tree": [{"text": "a"}]}, "no leaf of tree has a score"),
        ({"tree": [{"text": "a", "score": "good"}]}, "'good', which is not a number"),
        ({"tree": [{"text": "a", "score": math.nan}]}, "nan, which is not a finite number"),
        ({"steps": ["a", "b"], "scores": [1, 2]}, "steps must be a list of answers, each a list of texts"),
        ({"steps": [["a"], []], "scores": [1, 2]}, "an answer of steps is empty"),
        ({"steps": [["a"], ["b"]], "scores": [1]}, "2 completions and 1 scores"),
    ],
)
def test_bad_trees(record, says, tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"prompt": "p", **record}) + "\n" for _ in range(9)))
    with pytest.raises(InputError, match=says) as caught:
        load_preferences({"name": str(tmp_path / "x.jsonl")})
    assert "\n" not in str(caught.value)


def written(tmp_path, number=30):
    file = tmp_path / "trees.jsonl"
    rows = [{**TREE, "prompt": f"the quick {i}"} for i in range(number)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": str(file), "max_length": 64, "vocab_size": 300}


def test_what_trees_lose_is_counted(tmp_path):
    data = written(tmp_path)
    splits = load_preferences({"name": data["name"]})
    assert any("answers of trees were left out: their leaf has no score" in note for note in splits.notes)
    assert splits.train[0]["completions"] == [" brown fox jumps over the dog", " brown fox again", " lazy foo"]


def encoded(tokenizer, number=3):
    answers, scores, _ = paths("here", TREE["tree"])
    whole = ["".join(a) for a in answers]
    row = {"prompt": TREE["prompt"], "completions": whole, "scores": [float(s) for s in scores], "steps": answers}
    return encode_lists([{"id": i, **row} for i in range(number)], tokenizer, max_length=64)[0]


def test_tokens_are_of_the_step_they_begin_in(tokenizer):
    for row in encoded(tokenizer).records[:1]:
        for (ids, labels), step, texts in zip(row["sequences"], row["steps"], paths("", TREE["tree"])[0], strict=True):
            said = ids[1:][labels[1:] != -100]
            assert len(said) == len(step)
            for number, text in enumerate(texts, 1):
                kept = tokenizer.decode(said[step == number].tolist(), skip_special_tokens=True)
                assert kept == text
    wide = tokenizer.encode(" brown", add_special_tokens=False)
    inside = token_steps(wide, [" b", "r", "own"], tokenizer)
    assert inside[0] == 1 and (inside.diff() >= 0).all()


def staged(tokenizer, tmp_path, method, examples=None):
    examples = examples or encoded(tokenizer)
    student = scorer(tokenizer)
    context = SetupContext(student, None, {"train": examples}, collate_lists, 300, tmp_path, "key")
    tables = method.setup(context)
    return student, examples, TrainState(columns=context.columns, tables=tables)


def test_the_start_and_a_split_of_the_batch(tokenizer, tmp_path):
    method = TPO()
    student, examples, state = staged(tokenizer, tmp_path, method)
    batch = Batch.from_dict(collate_lists(list(examples.records)))
    values = method.loss(student(batch, features=True), None, batch, state)["tpo"].values
    grades = torch.tensor([[1.0, 0.5, 0.0]]).double()
    zero = torch.zeros_like(grades)
    close(values, steps.lambda_rank(zero, grades).expand(3), rtol=1e-5)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    parameters = list(student.parameters())

    def gradient(rows):
        part = Batch.from_dict(collate_lists(rows))
        values = method.loss(student(part, features=True), None, part, state)["tpo"].values
        return torch.autograd.grad(reduce(values, "token_mean", count=3), parameters)

    whole = gradient(list(examples.records))
    parts = [gradient(rows) for rows in (examples.records[:1], examples.records[1:])]
    assert max(float(w.abs().max()) for w in whole) > 1e-3
    for a, b, c in zip(whole, *parts, strict=True):
        torch.testing.assert_close(a, b + c, rtol=1e-6, atol=1e-6)


def test_the_best_score_is_the_anchor_wherever_it_stands(tokenizer, tmp_path):
    method = TPO(lambda_weights=False)
    student, examples, _ = staged(tokenizer, tmp_path, method)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def value(order):
        rows = [
            {**r, **{k: [r[k][i] for i in order] for k in ("sequences", "scores", "steps")}} for r in examples.records
        ]
        moved = staged(tokenizer, tmp_path, method, TextSet(rows))[2]
        batch = Batch.from_dict(collate_lists(rows))
        return method.loss(student(batch, features=True), None, batch, moved)["tpo"].values.detach()

    for order in ((2, 1, 0), (1, 2, 0)):
        close(value(order), value((0, 1, 2)), rtol=1e-5)


def test_steps_beyond_the_shortest_answers_are_merged(tokenizer, tmp_path):
    _, examples, state = staged(tokenizer, tmp_path, TPO())
    batch = Batch.from_dict(collate_lists(list(examples.records)))
    assert state.columns["step"].of_tokens(batch).max() == 2  # of three, as the others have two


def test_data_that_do_not_fit(tokenizer, tmp_path, caplog):
    with pytest.raises(InputError, match=r"train example 0 has the score 100 and options\.score_range is"):
        staged(tokenizer, tmp_path, TPO(score_range=(0, 1)))
    with pytest.raises(InputError, match="give the lower end first"):
        make({"task": "preferences", "method": "tpo", "options": {"score_range": [1, 0]}})
    rows = encoded(tokenizer).records
    equal = [{**row, "scores": [1.0, 1.0, 1.0]} for row in rows]
    with pytest.raises(InputError, match="none of 3 training examples has two answers of different scores"):
        staged(tokenizer, tmp_path, TPO(), TextSet(equal))
    staged(tokenizer, tmp_path, TPO(), TextSet([*rows[:2], {**equal[2]}]))
    assert "1 of 3 training examples order no answers" in caplog.text
    with pytest.raises(InputError, match=r"the grade 2\.0"):
        steps.lambda_rank(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]))
    with pytest.raises(InputError, match="beta is 0"):
        steps.lambda_rank(torch.zeros(1, 2), torch.zeros(1, 2), beta=0.0)


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_weights(tmp_path):
    recipe = {**SMALL, "data": written(tmp_path), "method": "tpo"}
    distill({**recipe, "output": str(tmp_path / "whole")})
    cut = {**recipe, "output": str(tmp_path / "cut")}
    assert killed_run(cut, 5, "after")
    distill(cut)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_it_learns_what_is_better(tmp_path):
    recipe = {"task": "preference_world", "data": {"name": "chains"}, "output": str(tmp_path / "run")}
    start = distill({**recipe, "method": "sft", "trainer": {"max_steps": 1, "learning_rate": 1e-9}}).metrics
    found = distill({**recipe, "method": "tpo", "options": {"beta": 5.0}, "output": str(tmp_path / "tpo")}).metrics
    assert found["return"] > start["return"] + 1
