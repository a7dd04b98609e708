"""Paper 10, ADPA and DCKD: golden vectors, limits, stored teachers, bad input, splits, resume, learning."""

import math

import pytest
import torch

from engine_cases import killed_run, weights
from golden_vectors import close, golden, reduce
from test_preferences import PAIRS, lists, scorer
from test_preferences import tokenizer as tokenizer
from understudy import InputError, distill
from understudy.data import Batch, TextSet, collate_lists
from understudy.losses import cross_entropy, forward_kl
from understudy.losses._pairs import bucketed
from understudy.losses.advantage import BOUND, expected_advantage, log_ratio_advantage
from understudy.methods.adpa import ADPA
from understudy.streaming import logits_of, rowwise
from understudy.targets import TopK, top_k
from understudy.teachers import Ensemble
from understudy.training import SetupContext, TrainState


@pytest.fixture(scope="module")
def g():
    return golden("10-adpa")


def rows(g, name, side):
    """Logits of the tokens that count, as part of a leaf."""
    leaf = g[name].clone().requires_grad_()
    keep = g[f"labels_{side}"] != -100
    return leaf, leaf[keep], g[f"labels_{side}"][keep]


def mean(values):
    return reduce(values, "token_mean")


@pytest.mark.golden
def test_golden_dckd(g):
    chosen, w, labels = rows(g, "student_logits_chosen", "chosen")
    rejected, lost, _ = rows(g, "student_logits_rejected", "rejected")
    teacher = [rows(g, f"teacher_logits_{side}", side)[1] for side in ("chosen", "rejected")]
    nll, *kl = mean(cross_entropy(w, labels)), mean(forward_kl(w, teacher[0])), mean(forward_kl(lost, teacher[1]))
    for value, name in zip((nll, *kl), ("nll", "kl_chosen", "kl_rejected"), strict=True):
        close(value, g[f"dckd_{name}"], rtol=1e-8)
    total = g["sft_weight"] * nll + g["chosen_weight"] * kl[0] + g["rejected_weight"] * kl[1]
    close(total, g["dckd_loss"], rtol=1e-8)
    slopes = torch.autograd.grad(total, (chosen, rejected))
    close(slopes[0], g["dckd_grad_chosen"], rtol=1e-8)
    close(slopes[1], g["dckd_grad_rejected"], rtol=1e-8)


@pytest.mark.golden
def test_golden_adpa(g):
    close(
        log_ratio_advantage(*(g[f"{n}_teacher_logits"].flatten(0, 1) for n in ("dpo", "ref"))).view_as(g["adpa_adv"]),
        g["adpa_adv"],
    )
    student, mine, _ = rows(g, "student_logits_rejected", "rejected")
    chosen, w, labels = rows(g, "student_logits_chosen", "chosen")
    keep = g["labels_rejected"] != -100
    every = torch.arange(mine.shape[-1]).expand_as(mine)
    values = -expected_advantage(mine, every, g["adpa_adv"][keep])
    close(mean(values), g["adpa_term"], rtol=1e-8)
    nll = mean(cross_entropy(w, labels))
    close(nll, g["adpa_nll"], rtol=1e-8)
    total = g["sft_weight"] * nll + g["adpa_weight"] * mean(values)
    close(total, g["adpa_loss"], rtol=1e-8)
    slopes = torch.autograd.grad(total, (student, chosen))
    close(slopes[0], g["adpa_grad_self"], rtol=1e-8)
    close(slopes[1], g["adpa_grad_chosen"], rtol=1e-8)


@pytest.mark.golden
def test_golden_of_stored_teachers(g):
    chosen, w, _ = rows(g, "student_logits_chosen", "chosen")
    k = int(g["topk"])
    _, teacher, _ = rows(g, "teacher_logits_chosen", "chosen")
    kept = top_k(teacher, k)
    assert torch.equal(kept.ids, g["off_topk_idx"])
    close(kept.log_probs.exp(), g["off_topk_val"], rtol=1e-6)
    close(kept.log_tail.exp()[:, 0], g["off_topk_rest"], rtol=1e-6, atol=1e-7)
    p = torch.cat([g["off_topk_val"], g["off_topk_rest"].clamp(min=0)[:, None]], 1)
    buckets = bucketed(w.log_softmax(-1), g["off_topk_idx"], "tail")
    released = buckets.clamp(min=-BOUND)  # the released code clips the student's probabilities at 1e-7
    value = mean((torch.special.xlogy(p, p) - p * released).sum(-1))
    close(value, g["off_topk_kl_chosen"], rtol=1e-6)
    (slope,) = torch.autograd.grad(value, chosen, retain_graph=True)
    close(slope, g["off_topk_kl_chosen_grad"], rtol=1e-6)
    ours = forward_kl(w, TopK(g["off_topk_idx"], p[:, :-1].log(), p[:, -1:].log()))
    exact = (buckets == released).all(1)  # where the student's probabilities are not clipped
    close(ours[exact], (torch.special.xlogy(p, p) - p * released).sum(-1)[exact], rtol=1e-6)
    student, mine, _ = rows(g, "student_logits_rejected", "rejected")
    term = mean(-expected_advantage(mine, g["off_margin_idx"], g["off_margin_val"]))
    close(term, g["off_adpa_unclamped"], rtol=1e-6)
    (slope,) = torch.autograd.grad(term, student, retain_graph=True)
    close(slope, g["off_adpa_unclamped_grad"], rtol=1e-6)
    # The released loader takes advantages for probabilities and clamps them.
    clamped = mean(-expected_advantage(mine, g["off_margin_idx"], g["off_margin_val"].clamp(1e-8, 1 - 1e-8)))
    close(clamped, g["off_adpa_clamped"], rtol=1e-6)
    close(torch.autograd.grad(clamped, student)[0], g["off_adpa_clamped_grad"], rtol=1e-6)


def logits(*shape):
    return 2 * torch.randn(*shape, dtype=torch.float64)


def test_limits_of_the_advantage():
    aligned, reference, student = logits(6, 9), logits(6, 9), logits(6, 9).requires_grad_()
    every = torch.arange(9).expand(6, 9)
    a = log_ratio_advantage(aligned, reference, beta=0.5)
    close(log_ratio_advantage(aligned + 3, reference - 2, beta=0.5), a)
    close((aligned.softmax(-1) * a).sum(-1), 0.5 * forward_kl(reference, aligned))
    assert ((reference.softmax(-1) * a).sum(-1) <= 0).all()
    assert log_ratio_advantage(aligned, aligned).abs().max() == 0
    values = expected_advantage(student, every, a)
    (slope,) = torch.autograd.grad(values.sum(), student)
    p = student.softmax(-1).detach()
    close(slope, p * (a - (p * a).sum(-1, keepdim=True)), atol=1e-12)
    close(slope.sum(-1), torch.zeros(6).double(), atol=1e-12)
    shift = logits(6, 1)
    moved = expected_advantage(student, every, a + shift)
    close(moved, values + shift[:, 0])
    close(torch.autograd.grad(moved.sum(), student)[0], slope, atol=1e-12)


def test_tokens_that_a_teacher_forbids():
    aligned, reference = torch.zeros(1, 4), torch.zeros(1, 4)
    aligned[0, 0] = reference[0, 0] = aligned[0, 1] = reference[0, 2] = -math.inf
    a = log_ratio_advantage(aligned, reference, beta=2.0)
    assert a[0, 0] == 0 and a[0, 3] == 0
    close(a[0, 1:3], torch.tensor([-2 * BOUND, 2 * BOUND]), rtol=1e-6)
    with pytest.raises(InputError, match="nan logits"):
        log_ratio_advantage(torch.full((1, 4), math.nan), reference)
    with pytest.raises(InputError, match="Choose models of one vocabulary"):
        log_ratio_advantage(aligned, torch.zeros(1, 5))


def staged(tokenizer, tmp_path, method, teacher, examples=None):
    student, examples = scorer(tokenizer), examples or lists(tokenizer)
    context = SetupContext(student, teacher, {"train": examples}, collate_lists, 300, tmp_path, "key")
    method.check_data(context)  # as a run does
    method.setup(context)
    return student, examples, TrainState(columns=context.columns)


def both(tokenizer):
    return Ensemble({"aligned": scorer(tokenizer, 1), "reference": scorer(tokenizer, 2)})


def means(method, student, batch, state):
    terms, counts = method.loss(student(batch), None, batch, state), method.counts(batch)
    return {name: term.values.sum() / counts[name] for name, term in terms.items()}


@pytest.mark.parametrize("strip", [3, 256])
def test_what_is_stored_is_what_live_teachers_say(tokenizer, tmp_path, monkeypatch, strip):
    monkeypatch.setattr("understudy.methods.adpa.STRIP", strip)
    method, teacher = ADPA(top_k=1000), both(tokenizer)
    student, examples, state = staged(tokenizer, tmp_path, method, teacher)
    batch = Batch.from_dict(collate_lists([examples.records[i] for i in (3, 0, 2)]))
    found = means(method, student, batch, state)
    worse = batch.tokens_of(batch.worst)
    ours, a, r = (m(batch).signal.by_token("test")[1].select(worse) for m in (student, *teacher.model.values()))
    advantages = log_ratio_advantage(logits_of(a), logits_of(r))
    exact = (logits_of(ours).softmax(-1) * advantages).sum(-1).mean()
    close(found["advantage"], -exact, rtol=1e-5)
    close(found["nll"], -student(batch).signal.tokens[batch.tokens_of(batch.best)].mean())
    divergences = ADPA(objective="dckd", top_k=1000)
    student, _, state = staged(tokenizer, tmp_path, divergences, scorer(tokenizer, 1))
    found = means(divergences, student, batch, state)
    close(found["kl/rejected"], rowwise(forward_kl, ours, a).mean(), rtol=1e-5, atol=1e-7)


def test_a_teacher_like_the_student_or_its_reference_teaches_nothing(tokenizer, tmp_path):
    same = scorer(tokenizer, 0)
    method = ADPA(objective="dckd", nll_weight=0.0, top_k=1000)
    student, examples, state = staged(tokenizer, tmp_path, method, same)
    batch = Batch.from_dict(collate_lists(list(examples.records)))
    found = means(method, student, batch, state)
    assert found["kl/chosen"].abs() < 1e-5 and found["kl/rejected"].abs() < 1e-5
    pair = Ensemble({"aligned": scorer(tokenizer, 3), "reference": scorer(tokenizer, 3)})
    student, _, state = staged(tokenizer, tmp_path, ADPA(), pair)
    value = means(ADPA(), student, batch, state)["advantage"]
    assert value == 0
    assert all(s.abs().max() == 0 for s in torch.autograd.grad(value, list(student.parameters())))


def test_without_weights_dckd_is_supervised_training(tokenizer, tmp_path):
    method = ADPA(objective="dckd", chosen_weight=0.0, rejected_weight=0.0)
    student, examples, state = staged(tokenizer, tmp_path, method, scorer(tokenizer, 1))
    batch = Batch.from_dict(collate_lists(list(examples.records)))
    assert set(method.loss(student(batch), None, batch, state)) == {"nll"}
    one_sided = ADPA(objective="dckd", rejected_weight=0.0)
    assert set(one_sided.loss(student(batch), None, batch, state)) == {"nll", "kl/chosen"}


@pytest.mark.parametrize("objective", ["adpa", "dckd"])
def test_a_batch_has_the_gradient_of_its_parts(tokenizer, tmp_path, objective):
    method = ADPA(objective=objective, top_k=20)
    teacher = both(tokenizer) if objective == "adpa" else scorer(tokenizer, 1)
    student, examples, state = staged(tokenizer, tmp_path, method, teacher)
    parameters = list(student.parameters())
    counts = method.counts(Batch.from_dict(collate_lists(list(examples.records))))

    def gradient(part):
        batch = Batch.from_dict(collate_lists(part))
        terms = method.loss(student(batch), None, batch, state)
        return torch.autograd.grad(sum(t.weight * t.values.sum() / counts[n] for n, t in terms.items()), parameters)

    whole = gradient(list(examples.records))
    parts = [gradient(part) for part in (examples.records[:1], examples.records[1:])]
    for a, b, c in zip(whole, *parts, strict=True):
        torch.testing.assert_close(a, b + c, rtol=1e-6, atol=1e-6)


def test_bad_input(tokenizer, tmp_path):
    single = TextSet([{**r, "sequences": r["sequences"][:1], "scores": [1.0]} for r in lists(tokenizer, PAIRS).records])
    with pytest.raises(InputError, match="train example 0 has one answer"):
        staged(tokenizer, tmp_path, ADPA(objective="dckd"), scorer(tokenizer, 1), single)
    recipe = {**WORLD, "output": str(tmp_path / "run")}
    says = (
        r"reads 2 teachers one by one: name a model for each of teacher\.members\.aligned, teacher\.members\.reference"
    )
    with pytest.raises(InputError, match=says):
        distill({**recipe, "teacher": "soft_optimal"})
    with pytest.raises(InputError, match=says):
        distill({**recipe, "teacher": {"members": {"aligned": "soft_optimal", "other": "reference"}}})
    with pytest.raises(InputError, match="has no rows of classes that teachers could share"):
        distill({**recipe, "method": "dckd"})
    with pytest.raises(InputError, match="learns from a teacher"):
        distill({**recipe, "teacher": None})


WORLD = {
    "task": "preference_world",
    "data": {"name": "chains"},
    "method": "adpa",
    "teacher": {"members": {"aligned": "soft_optimal", "reference": "reference"}},
}


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_weights(tmp_path):
    recipe = {**WORLD, "trainer": {"max_steps": 8, "save_steps": 2, "logging_steps": 1}}
    distill({**recipe, "output": str(tmp_path / "whole")})
    cut = {**recipe, "output": str(tmp_path / "cut")}
    assert killed_run(cut, 5, "after")
    distill(cut)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_advantages_teach_more_than_pairs(tmp_path):
    recipe = {**WORLD, "trainer": {"max_steps": 150}}
    found = distill({**recipe, "output": str(tmp_path / "adpa")}).metrics
    dckd = {
        **recipe,
        "method": "dckd",
        "teacher": "soft_optimal",
        "options": {"chosen_weight": 1.0, "rejected_weight": 1.0},
    }
    divergences = distill({**dckd, "output": str(tmp_path / "dckd")}).metrics
    dpo = distill({**recipe, "method": "dpo", "teacher": None, "output": str(tmp_path / "dpo")}).metrics
    sft = distill({**recipe, "method": "sft", "teacher": None, "output": str(tmp_path / "sft")}).metrics
    assert divergences["return"] > sft["return"] + 0.3
    assert found["return"] > max(dpo["return"], divergences["return"])
