"""Paper 28, REDI, and candidates by token: golden vectors, limits, splits, bad input, phases, resume, learning."""

import ast
import math
from pathlib import Path

import pytest
import torch

from engine_cases import killed_run, weights
from golden_vectors import close, golden, reduce
from test_preferences import PAIRS, lists, scorer
from test_preferences import tokenizer as tokenizer
from understudy import InputError, distill
from understudy.data import Batch, TextSet, collate_lists
from understudy.losses import preference, signed_likelihood
from understudy.methods import redi
from understudy.methods.redi import REDI
from understudy.models import ModelOutput, SequenceAdapter
from understudy.targets import Scores
from understudy.teachers.cache.scores import ScoreStore, score_tokens
from understudy.training import SetupContext, TrainState, add_token_columns

SECOND = TrainState(phase="redi")
WORLD = {"task": "preference_world", "data": {"name": "chains"}, "method": "redi"}


@pytest.fixture(scope="module")
def g():
    return golden("28-redi")


def flat(chosen, rejected):
    """A batch of pairs whose tokens are these masks', and a student that gives the values of `[pairs, 2, length]`."""
    masks = torch.stack([chosen, rejected], 1)
    rows = []
    for i, both in enumerate(masks):
        said = [torch.tensor([1, *(10 * i + j + 2 for j in range(int(m.sum())))]) for m in both]
        sequences = [(s, torch.cat([torch.tensor([-100]), s[1:]])) for s in said]
        rows.append({"id": 100 + i, "scores": [1.0, 0.0], "sequences": sequences})
    return Batch.from_dict(collate_lists(rows)), masks


def output(batch, token_log_probs):
    values = batch.sum_tokens(token_log_probs)
    return ModelOutput(Scores(values, batch.candidates, token_log_probs, object()))


def loss_of(method, batch, tokens):
    return method.loss(output(batch, tokens), None, batch, SECOND)["redi"].values


@pytest.mark.golden
def test_golden(g):
    batch, masks = flat(g["chosen_mask"], g["rejected_mask"])
    padded = torch.stack([g["chosen_token_logp"], g["rejected_token_logp"]], 1).requires_grad_()
    tokens = padded[masks]
    alpha = float(g["alpha"])
    values = loss_of(REDI(alpha=alpha), batch, tokens)
    close(values, g["loss_per_pair"], rtol=1e-10)
    close(reduce(values, "token_mean"), g["loss"], rtol=1e-10)
    means = batch.mean_tokens(tokens)
    close(means[:, 0], g["chosen_mean_logp"], rtol=1e-10)
    close(means[:, 1], g["rejected_mean_logp"], rtol=1e-10)
    (slope,) = torch.autograd.grad(reduce(values, "token_mean"), padded, retain_graph=True)
    close(slope[:, 0], g["grad_chosen"], rtol=1e-10)
    close(slope[:, 1], g["grad_rejected"], rtol=1e-10)
    for name, a in (("loss_alpha0", 0.0), ("loss_alpha1", 1.0)):
        close(reduce(loss_of(REDI(alpha=a), batch, tokens), "token_mean"), g[name], rtol=1e-10)
    faded = reduce(loss_of(REDI(alpha=alpha, gamma=float(g["neg_gamma"])), batch, tokens), "token_mean")
    close(faded, g["negw_loss"], rtol=1e-10)
    (slope,) = torch.autograd.grad(faded, padded)
    close(slope[:, 1], g["negw_grad_rejected"], rtol=1e-10)


@pytest.mark.golden
def test_golden_is_the_limit_of_simpo_at_a_small_beta(g):
    batch, masks = flat(g["chosen_mask"], g["rejected_mask"])
    padded = torch.stack([g["chosen_token_logp"], g["rejected_token_logp"]], 1).requires_grad_()
    sums = batch.sum_tokens(padded[masks])
    beta, gamma = float(g["simpo_beta"]), float(g["simpo_gamma"])
    simpo = preference.simpo(sums[:, 0], sums[:, 1], *batch.lengths.T, beta=beta, gamma=gamma)
    scaled = reduce(simpo, "token_mean") / (beta / (1 + math.exp(-gamma)))
    (slope,) = torch.autograd.grad(scaled, padded, retain_graph=True)
    close(slope[:, 0], g["simpo_grad_scaled_chosen"], rtol=1e-8)
    (limit,) = torch.autograd.grad(reduce(loss_of(REDI(alpha=1.0), batch, padded[masks]), "token_mean"), padded)
    means = sums.detach() / batch.lengths
    apart = math.expm1(beta * float((means[:, 0] - means[:, 1]).abs().max()))  # σ(γ − β m) / σ(γ) is as near to 1
    torch.testing.assert_close(slope, limit, rtol=apart, atol=1e-12)


def pair(chosen, rejected):
    masks = torch.zeros(2, 1, max(chosen, rejected), dtype=torch.bool)
    masks[0, :, :chosen], masks[1, :, :rejected] = True, True
    batch, _ = flat(*masks)
    return batch, -torch.rand(chosen + rejected, dtype=torch.float64)


def test_limits_of_alpha():
    batch, tokens = pair(5, 3)
    w, lost = tokens[:5].mean(), tokens[5:].mean()
    close(loss_of(REDI(alpha=0.0), batch, tokens)[0], -w)
    swapped, _ = pair(3, 5)
    both = torch.cat([tokens[5:], tokens[:5]])
    close(loss_of(REDI(alpha=1.0), swapped, both), -loss_of(REDI(alpha=1.0), batch, tokens))
    close(loss_of(REDI(alpha=0.3, gamma=0.0), batch, tokens)[0], -w + 0.3 * lost)


def test_the_gradient_is_linear_in_the_tokens_and_blind_to_the_length_of_equal_means():
    batch, tokens = pair(5, 3)
    for values in (tokens, 7 * tokens):
        leaf = values.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss_of(REDI(alpha=0.8), batch, leaf).sum(), leaf)
        close(slope, torch.tensor([-1 / 5] * 5 + [0.8 / 3] * 3, dtype=torch.float64))
    double, _ = pair(5, 6)
    twice = torch.cat([tokens[:5], tokens[5:], tokens[5:]])
    close(loss_of(REDI(), double, twice), loss_of(REDI(), batch, tokens))


def test_an_identical_pair_learns_the_rest_of_the_correct_trace(tokenizer):
    student, examples = scorer(tokenizer), lists(tokenizer, [{**PAIRS[0], "rejected": PAIRS[0]["chosen"]}])
    batch = Batch.from_dict(collate_lists(list(examples.records)))
    parameters = list(student.parameters())

    def slopes(values):
        return torch.autograd.grad(values.sum(), parameters)

    own = slopes(REDI(alpha=0.8).loss(student(batch), None, batch, SECOND)["redi"].values)
    sft = slopes(-student(batch).signal.values[:, 0] / batch.lengths[:, 0])
    for a, b in zip(own, sft, strict=True):
        torch.testing.assert_close(a, 0.2 * b, rtol=1e-4, atol=1e-6)  # RMSNorm is computed in float32
    masked = slopes(REDI(mask_common_prefix=True).loss(student(batch), None, batch, SECOND)["redi"].values)
    for a, b in zip(masked, sft, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_shared_beginning_is_not_lowered():
    rows = []
    for i, (a, b) in enumerate([([5, 6, 7], [5, 6, 8, 9]), ([5, 6], [7]), ([4, 4], [4, 4, 3])]):
        said = [torch.tensor([1, *a]), torch.tensor([1, *b])]
        sequences = [(s, torch.cat([torch.tensor([-100]), s[1:]])) for s in said]
        rows.append({"id": i, "scores": [1.0, 0.0], "sequences": sequences})
    alone = {"id": 3, "scores": [1.0], "sequences": rows[0]["sequences"][:1]}
    batch = Batch.from_dict(collate_lists([*rows, alone]))
    assert batch.sum_tokens(batch.shared.long()).tolist() == [[2, 2], [0, 0], [2, 2], [0, 0]]
    assert batch.token_lists.tolist() == [0] * 7 + [1] * 3 + [2] * 5 + [3] * 3
    batch = Batch.from_dict(collate_lists(rows))
    tokens = -torch.rand(15, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(REDI(alpha=0.5, mask_common_prefix=True), batch, tokens).sum(), tokens)
    wrong = [0, 0, 0.25, 0.25], [0.5], [0, 0, 0.5]
    right = [-1 / 3] * 3, [-0.5] * 2, [-0.5] * 2
    expected = [x for r, w in zip(right, wrong, strict=True) for x in (*r, *w)]
    close(slope, torch.tensor(expected, dtype=torch.float64))


def test_a_batch_has_the_gradient_of_its_parts(tokenizer):
    student, examples = scorer(tokenizer), lists(tokenizer)
    parameters = list(student.parameters())
    method = REDI(alpha=0.8, gamma=0.2, mask_common_prefix=True)

    def gradient(rows):
        batch = Batch.from_dict(collate_lists(rows))
        values = method.loss(student(batch), None, batch, SECOND)["redi"].values
        return torch.autograd.grad(reduce(values, "token_mean", count=4), parameters)

    whole = gradient(list(examples.records))
    parts = [gradient(rows) for rows in (examples.records[:1], examples.records[1:])]
    for a, b, c in zip(whole, *parts, strict=True):
        torch.testing.assert_close(a, b + c, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("packing", ["none", "prefix"])
def test_token_values_are_those_of_the_model(tokenizer, packing):
    student = scorer(tokenizer)
    student = SequenceAdapter(student.model, len(tokenizer), packing)
    batch = Batch.from_dict(collate_lists(list(lists(tokenizer).records)))
    said = student(batch, features=True)
    tokens, signal = said.signal.by_token("test")
    hidden, log_probs = [], []
    for ids, labels in (s for row in lists(tokenizer).records for s in row["sequences"]):
        out = student.model(input_ids=ids[None], output_hidden_states=True)
        kept = labels[1:] != -100
        hidden.append(out.hidden_states[-1][0, :-1][kept])
        log_p = out.logits[0, :-1].log_softmax(-1)
        log_probs.append(log_p.gather(-1, labels[1:].clamp(min=0)[:, None])[:, 0][kept])
    torch.testing.assert_close(tokens, torch.cat(log_probs), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(said.features, torch.cat(hidden), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(signal.hidden, said.features)
    torch.testing.assert_close(batch.mean_tokens(tokens) * batch.lengths, said.signal.values)


def test_token_values_are_stored_by_content(tokenizer, tmp_path):
    student, examples = scorer(tokenizer), lists(tokenizer)
    context = SetupContext(student, None, {"train": examples}, collate_lists, 300, tmp_path, "key")
    add_token_columns(context, student, lambda s: {"reference": s.tokens}, kind="log_probs")
    shuffled = [examples.records[i] for i in (2, 0, 3, 1)]
    batch = Batch.from_dict(collate_lists(shuffled))
    found = context.columns["reference"].of_tokens(batch)
    torch.testing.assert_close(found, student(batch).signal.tokens.detach(), rtol=1e-9, atol=1e-9)
    store = ScoreStore(tmp_path / "tokens" / "log_probs", "log_probs")

    def never(signal):
        raise AssertionError("it was computed again")

    again = score_tokens(student, TextSet(shuffled), collate_lists, store, never)
    assert torch.equal(torch.cat([a["reference"] for a in again]), found)


def test_bad_input(tokenizer, tmp_path):
    batch, tokens = pair(2, 2)
    tokens[1] = -torch.inf
    with pytest.raises(InputError, match="a token of the correct trace of example 100 has probability 0"):
        loss_of(REDI(min_logp=-5.0), batch, tokens)
    tokens = tokens.flip(0)
    with pytest.raises(InputError, match="a token of the wrong trace of example 100"):
        loss_of(REDI(), batch, tokens)
    leaf = tokens.clone().requires_grad_()
    value = loss_of(REDI(min_logp=-5.0, alpha=1.0), batch, leaf)
    close(value[0], -tokens[:2].mean() + (-5.0 + tokens[3]) / 2)
    assert torch.autograd.grad(value.sum(), leaf)[0].isfinite().all()
    for options in ({"alpha": 1.1}, {"alpha": -0.1}, {"gamma": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            REDI(**options)
    with pytest.raises(InputError, match="gamma is -1"):
        signed_likelihood(torch.zeros(1, 2), torch.ones(2), gamma=-1.0)
    with pytest.raises(InputError, match="log-probability 1 is nan"):
        signed_likelihood(torch.tensor([[0.0, torch.nan]]), torch.ones(2))
    right = TextSet([row | {"scores": [1.0, 1.0]} for row in lists(tokenizer).records])
    context = SetupContext(scorer(tokenizer), None, {"train": right}, collate_lists, 300, tmp_path, "key")
    with pytest.raises(InputError, match="none of 4 training problems has both"):
        REDI().setup(context)
    bandit = {"task": "preference_world", "data": {"name": "bandit"}, "method": "redi", "trainer": {"max_steps": 2}}
    with pytest.raises(InputError, match="redi reads the tokens of each candidate"):
        distill({**bandit, "options": {"correct": 0.0}, "output": str(tmp_path / "run")})


def test_which_traces_each_phase_learns_from(tokenizer, tmp_path):
    rows = lists(tokenizer).records
    scores = [[1.0, 0.0], [1.0, 0.9], [0.1, 0.0], [0.2, 0.7]]
    examples = TextSet([row | {"scores": s} for row, s in zip(rows, scores, strict=True)])
    context = SetupContext(scorer(tokenizer), None, {"train": examples}, collate_lists, 300, tmp_path, "key")
    REDI().setup(context)
    assert [r["id"] for r in context.splits["correct"].records] == [0, 1, 3]
    assert [r["id"] for r in context.splits["pairs"].records] == [0, 3]
    assert context.splits["pairs"].records[1]["sequences"] == [rows[3]["sequences"][i] for i in (1, 0)]
    assert all(len(r["sequences"]) == 1 for r in context.splits["correct"].records)
    batch = Batch.from_dict(collate_lists(list(context.splits["correct"].records)))
    student = context.student
    terms = REDI().loss(student(batch), None, batch, TrainState(phase="sft"))
    mean = terms["sft"].values.sum() / REDI().counts(batch)["sft"]
    close(mean, -student(batch).signal.tokens.mean())  # token cross-entropy
    assert [p.split for p in REDI(sft_share=0.0).phases()] == ["pairs"]


@pytest.mark.slow
def test_killed_and_resumed_in_either_phase_ends_in_the_same_weights(tmp_path):
    recipe = {**WORLD, "trainer": {"max_steps": 12, "save_steps": 2, "logging_steps": 1}}
    recipe["options"] = {"learning_rate": 1e-3}
    distill({**recipe, "output": str(tmp_path / "whole")})
    cut = {**recipe, "output": str(tmp_path / "cut")}
    assert killed_run(cut, 3, "after")
    assert killed_run(cut, 4, "saving")
    distill(cut)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_wrong_traces_teach_what_correct_ones_alone_do_not(tmp_path):
    recipe = {**WORLD, "trainer": {"max_steps": 200, "learning_rate": 5e-3}}
    more = distill({**recipe, "method": "sft", "output": str(tmp_path / "sft")}).metrics
    options = {"learning_rate": 1e-3, "sft_share": 0.5}
    found = distill({**recipe, "options": options, "output": str(tmp_path / "redi")}).metrics
    assert found["return"] > more["return"] + 0.4


def test_the_method_is_small_and_public():
    source = Path(redi.__file__).read_text()
    assert source.count("\n") <= 100
    public = {"", ".data", ".losses", ".streaming", ".targets", ".training"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("understudy"):
            assert node.module.removeprefix("understudy") in public
            assert not any(name.name.startswith("_") for name in node.names)
