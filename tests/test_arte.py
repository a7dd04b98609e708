"""Paper 5: its golden vectors, in-context scores, scores by a step of training, and item response theory."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from golden_vectors import close, golden, reduce
from understudy.curation import Funnel
from understudy.curation.drafts import (
    Draft,
    DraftRationale,
    NewQuestions,
    Preference,
    one_of_each,
    preference_records,
    question_preferences,
    rationale_preferences,
    read_questions,
    scores_of,
    write_questions,
)
from understudy.curation.in_context import in_context_scores
from understudy.curation.item_response import ItemResponse, fit_item_response, most_discriminating
from understudy.data.tokenize import train_tokenizer
from understudy.errors import InputError
from understudy.evaluation.readings import StepReader
from understudy.evaluation.tailoring import stepped, tailoring_report
from understudy.generation import Completion, LocalSource, Prompt, Request
from understudy.losses.preference import dpo
from understudy.methods.arte import ARTE
from understudy.models import load_causal_lm, state_hash
from understudy.runs.recipe import make
from understudy.training.arguments import checked_arguments
from understudy.training.solvers import Solver


def tensor(values):
    return torch.from_numpy(np.asarray(values))


@pytest.mark.golden
def test_in_context_scores_are_the_golden_ones():
    g = golden("05-arte")
    found = in_context_scores(g["icl_correct"].numpy(), g["rationale_mask"].numpy())
    for name, values in (("s_rationale", found.rationales), ("s_question", found.questions)):
        torch.testing.assert_close(tensor(values), g[name], rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.golden
def test_item_response_is_the_golden_one():
    g = golden("05-arte")
    model = ItemResponse(*(g[f"irt_{n}"].numpy() for n in ("theta", "alpha", "beta")))
    close(tensor(model.probabilities), g["irt_p"], atol=1e-9)
    answers = g["irt_responses"].numpy()
    close(tensor(model.nll(answers).sum()), g["irt_nll_sum"], atol=1e-9)
    slope = model.gradient(answers)
    for name, values in zip(("theta", "alpha", "beta"), slope, strict=True):
        close(tensor(values), g[f"irt_grad_{name}"], atol=1e-9)
    assert most_discriminating(g["irt_alpha"].tolist(), int(g["irt_topk"])) == g["irt_top_items"].tolist()


def log_probs(logits, labels):
    """Summed over the tokens that count, `[sequences]`."""
    counted = labels != -100
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(counted, picked, 0.0).sum(-1)


@pytest.mark.golden
def test_the_teachers_alignment_is_the_golden_one():
    g = golden("05-arte")
    sides = ("chosen", "rejected")
    logits = {s: g[f"policy_{s}_logits"].clone().requires_grad_() for s in sides}
    policy = [log_probs(logits[s], g[f"{s}_labels"]) for s in sides]
    reference = [log_probs(g[f"ref_{s}_logits"], g[f"{s}_labels"]) for s in sides]
    for side, ours, theirs in zip(sides, policy, reference, strict=True):
        close(ours, g[f"policy_{side}_logp"], atol=1e-9)
        close(theirs, g[f"ref_{side}_logp"], atol=1e-9)
    beta = float(g["dpo_beta"])
    close(beta * ((policy[0] - reference[0]) - (policy[1] - reference[1])), g["dpo_margin"], atol=1e-9)
    total = reduce(dpo(*policy, *reference, beta=beta), "token_mean")
    close(total, g["dpo_loss"], atol=1e-9)
    for side, gradient in zip(sides, torch.autograd.grad(total, list(logits.values())), strict=True):
        close(gradient, g[f"grad_policy_{side}_logits"], atol=1e-9)


def test_scores_are_shares_that_no_order_of_rationales_changes():
    chance = np.random.default_rng(0)
    correct, asked = chance.random((5, 3, 4)) < 0.5, chance.random((5, 3, 4)) < 0.8
    found, turned = in_context_scores(correct, asked), in_context_scores(correct[:, ::-1], asked[:, ::-1])
    np.testing.assert_allclose(found.questions, turned.questions)
    known = found.rationales[~np.isnan(found.rationales)]
    assert ((known >= 0) & (known <= 1)).all()
    full = in_context_scores(correct, np.ones((5, 3))).rationales * 4
    assert (full == full.round()).all() and (full == correct.sum(-1)).all()
    none = in_context_scores(correct, np.zeros((5, 3)))
    assert np.isnan(none.rationales).all() and np.isnan(none.questions).all()


def test_item_response_limits():
    chance = np.random.default_rng(1)
    theta, alpha, beta = chance.normal(size=4), chance.uniform(0.5, 2, 6), chance.normal(size=6)
    model, answers = ItemResponse(theta, alpha, beta), chance.random((4, 6)) < 0.5
    for other in (ItemResponse(theta + 3, alpha, beta + 3), ItemResponse(2 * theta, alpha / 2, 2 * beta)):
        np.testing.assert_allclose(other.probabilities, model.probabilities)
    assert (ItemResponse(beta[:4], alpha[:4], beta[:4]).probabilities.diagonal() == 0.5).all()
    slope = model.gradient(answers)
    np.testing.assert_allclose(slope.difficulty, -alpha * (model.probabilities - answers).sum(0))
    step = 1e-6
    for place in range(6):
        near = alpha.copy()
        near[place] += step
        moved = ItemResponse(theta, near, beta).nll(answers).sum() - model.nll(answers).sum()
        assert moved / step == pytest.approx(slope.discrimination[place], abs=1e-4)


def test_a_fit_finds_what_discriminates_and_stays_finite():
    chance = np.random.default_rng(2)
    true = ItemResponse(chance.normal(size=60), np.tile([0.2, 3.0], 10), chance.normal(size=20) * 0.5)
    answers = chance.random((60, 20)) < true.probabilities
    answers[:, 0], answers[:, 1] = True, False
    found = fit_item_response(answers)
    assert all(np.isfinite(part).all() for part in found) and (found.discrimination > 0).all()
    assert found.ability.mean() == pytest.approx(0) and found.ability.std() == pytest.approx(1)
    assert np.corrcoef(found.ability, true.ability)[0, 1] > 0.8
    order = most_discriminating(found.discrimination.tolist(), 20, answers)
    assert set(order[:9]) == set(range(3, 20, 2)) and set(order[-2:]) == {0, 1}
    assert most_discriminating([1.0, 2.0, 2.0], 2) == [1, 2]
    slope = found.gradient(answers)  # at the mode likelihood and priors balance
    assert np.abs(slope.ability).max() < 5


def test_questions_are_read_as_they_are_written():
    for tagged in (True, False):
        assert read_questions(write_questions(["a b?", "c?"], tagged)) == ["a b?", "c?"]
    assert read_questions("Here:\n<question>a\nb?</question> and <question>c") == ["a\nb?"]
    assert read_questions(" 1. a?\n\n2) b?\n- c?\n12= d?", cut=True) == ["a?", "b?", "c?"]


def test_questions_are_new_and_counted():
    found, funnel = NewQuestions(["Known?"]), Funnel()
    for text, finish in (("a?\nA\nknown", "stop"), ("b?\nc", "length"), ("...\nb", "stop")):
        found.add(Request("", text), Completion(text, finish))
    found.note("questions", funnel)
    assert [d.question for d in found.drafts.values()] == ["a?", "b?"]
    assert funnel.rows[0] == {
        "step": "questions",
        "before": 6,
        "after": 2,
        "dropped": {"written before": 2, "asked or evaluated": 1, "empty": 1},
    }


def rationale(draft, place, *right):
    said = {"rationale": f"r{draft}{place}", "answer": "1"}
    return DraftRationale(id=f"{draft}/{place}", draft=draft, place=place, right=right, **said)


def test_preferences_are_under_the_plain_prompt_and_never_of_equal_scores():
    rows = [
        *(rationale(0, 0, True, False), rationale(0, 1, True, True), rationale(0, 2, False, False)),
        *(rationale(1, 0, True, False), rationale(1, 2, False, True)),
        rationale(3, 1, False, False),
    ]
    scores, funnel = scores_of(rows, 4, 3), Funnel()
    np.testing.assert_allclose(scores.questions, [0.5, 0.5, np.nan, 0.0])
    texts = [r.rationale for r in rows]
    (pair,) = rationale_preferences(rows, scores, ["p0", "p1", "p2", "p3"], texts, funnel)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.parents) == ("p0", "r01", "r02", ("0/1", "0/2"))
    assert funnel.rows[0]["dropped"] == {"all scores equal": 1, "fewer than two scored": 1}
    drafts = [Draft(id=f"d{i}", question=f"q{i}") for i in range(4)]
    pairs = question_preferences(drafts, scores, 0.25, ["x", "y"], ["q0", "q1", "q2", "q3"], 0)
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [("x", "q0", "q3"), ("y", "q0", "q3")]
    same = [rationale(i, j, True, False) for i in range(4) for j in range(2)]
    equal = scores_of(same, 4, 2)
    assert rationale_preferences(same, equal, ["p"] * 4, ["r"] * 8, Funnel()) == []
    with pytest.raises(InputError, match="carry no signal"):
        question_preferences(drafts, equal, 0.25, ["x"], ["q"] * 4, 0)
    assert [r.id for r in one_of_each(rows, best=True)] == ["0/1", "1/0", "3/1"]
    assert [r.id for r in one_of_each(rows, best=False)] == ["0/0", "1/0", "3/1"]


def test_every_tenth_preference_is_set_aside_where_there_are_enough():
    pairs = [
        Preference(kind="question", prompt=str(i), chosen="a", rejected="b", chosen_score=1, rejected_score=0)
        for i in range(30)
    ]
    few, many = preference_records(pairs[:19], chat=True), preference_records(pairs, chat=False)
    assert len(few["train"]) == len(few["test"]) == 19 and few["train"][0]["chosen"][0]["role"] == "assistant"
    assert [r["prompt"] for r in many["test"]] == ["0", "10", "20"] and len(many["train"]) == 27


# -- a step of training on an example -----------------------------------------------------------------------------------

PROBES = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}\n#### {a + b}"} for a, b in ((1, 2), (3, 14), (5, 5))]
EXAMPLE = {"prompt": "2 + 7 =", "completion": " 9, since 7 and 2 are 9\n#### 9"}


@pytest.fixture(scope="module")
def words():
    return train_tokenizer([p["prompt"] + p["completion"] for p in PROBES], 260)


@pytest.fixture
def student(words):
    torch.manual_seed(0)
    return load_causal_lm("llama:hidden=16,layers=1,heads=2,init=0.1", tokenizer=words).double().eval()


def tokens_of(words, record):
    asked = words(record["prompt"])["input_ids"]
    said = words(record["completion"], add_special_tokens=False)["input_ids"] + [words.eos_token_id]
    return torch.tensor([asked + said]), len(said)


def by_hand(model, words, record):
    """Log-probability of a completion, and the number of its tokens."""
    ids, said = tokens_of(words, record)
    log_p = model(ids).logits[0, :-1].log_softmax(-1)
    return log_p.gather(1, ids[0, 1:, None])[-said:, 0].sum(), said


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_likelihoods_after_a_step_are_those_of_a_manual_one(student, words, batch):
    reader, held = StepReader(student, words, PROBES, 64, 0.3, batch=batch), state_hash(student)
    before, after, again = reader.read(None), reader.read(EXAMPLE), reader.read(None)
    assert before == again and state_hash(student) == held and reader.read(EXAMPLE) == after
    moved = copy.deepcopy(student)
    total, said = by_hand(moved, words, EXAMPLE)
    (-total / said).backward()
    torch.optim.SGD(moved.parameters(), lr=0.3).step()
    for found, model in ((before, student), (after, moved)):
        for one, record in zip(found, PROBES, strict=True):
            log_p, said = by_hand(model, words, record)
            assert one.tokens == said
            assert one.log_prob == pytest.approx(float(log_p.detach()), rel=1e-9)
    assert sum(a.log_prob - b.log_prob for a, b in zip(after, before, strict=True)) > 1  # it is a step worth making


def test_the_weights_are_the_old_ones_after_an_exception_too(student, words):
    reader, held, calls = StepReader(student, words, PROBES, 64, 0.3), state_hash(student), []

    def second(*_):
        calls.append(0)
        if len(calls) == 2:  # of the probes, with the weights after the step
            raise KeyboardInterrupt

    hook = student.model.layers[0].register_forward_pre_hook(second)
    with pytest.raises(KeyboardInterrupt):
        reader.read(EXAMPLE)
    hook.remove()
    assert state_hash(student) == held and not student.training
    assert all(p.grad is None and p.requires_grad for p in student.parameters())


def test_half_precision_weights_make_the_step_in_single_precision(student, words):
    exact = StepReader(student.bfloat16().float(), words, PROBES, 64, 1e-3)
    expected = [exact.read(None), exact.read(EXAMPLE)]
    half = StepReader(student.bfloat16(), words, PROBES, 64, 1e-3)
    found = [half.read(None), half.read(EXAMPLE)]
    gains = [[a.log_prob - b.log_prob for a, b in zip(*pair, strict=True)] for pair in (found, expected)]
    assert gains[0] == pytest.approx(gains[1], rel=1e-3) and state_hash(student) == state_hash(student.bfloat16())


def test_a_step_is_made_once_and_goes_on_behind_a_kill(student, words, tmp_path, monkeypatch):
    solver = Solver(LocalSource(student, words, "student"), Prompt.load("bare"), 8)
    context, questions = SimpleNamespace(folder=tmp_path, prefix=""), ["2 + 7 =", "1 + 1 ="]
    rows = [
        DraftRationale(id=f"r/{i}", draft=d, place=i, rationale=r, answer="9")
        for i, (d, r) in enumerate([(0, "9, yes"), (0, ""), (1, "9, yes"), (0, "9, yes")])
    ]
    made, read = [], StepReader.read

    def reading(self, example):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(example)
        return read(self, example)

    def run(some=rows):
        return stepped(context, solver, some, questions, PROBES, 64, 0.3, Funnel())

    with monkeypatch.context() as patch:
        patch.setattr(StepReader, "read", reading)
        with pytest.raises(KeyboardInterrupt):
            run()
    monkeypatch.setattr(StepReader, "read", lambda self, example: made.append(example) or read(self, example))
    found, funnel = run(), Funnel()
    assert len(made) == 4 and made[0] is None  # the student as it is, and three different examples
    assert [r.parents for r in found] == [("r/0",), ("r/1",), ("r/2",), ("r/3",)] and found[0].gains == found[3].gains
    (example,) = [e for e in made if e and e["completion"] == " 9, yes\n#### 9" and e["prompt"].startswith("2")]
    reader = StepReader(student, words, PROBES, 64, 0.3)
    before, after = read(reader, None), read(reader, example)
    expected = [(a.log_prob - b.log_prob) / a.tokens for a, b in zip(after, before, strict=True)]
    assert found[0].gains == pytest.approx(expected) and found[0].score == pytest.approx(np.mean(expected))
    stepped(context, solver, rows[:1], questions, PROBES, 64, 0.3, funnel)
    assert len(made) == 4 and funnel.rows[0]["before"] == 1
    scores = scores_of(found, 2, 4)
    np.testing.assert_allclose(scores.rationales[0, [0, 1, 3]], [found[i].score for i in (0, 1, 3)])
    assert np.isnan(scores.rationales[1, [0, 1, 3]]).all() and scores.questions[1] == pytest.approx(found[2].score)
    best = max((r for r in found if r.draft == 0), key=lambda r: r.score)
    assert one_of_each(found, best=True)[0].id == best.id
    metrics, table = tailoring_report({"drafts": found}, "sft_step")
    assert (
        metrics["drafts_score"] == pytest.approx(np.mean([r.score for r in found])) and "step" in table["headings"][3]
    )
    with pytest.raises(InputError, match="belongs to source"):  # of other steps
        stepped(context, solver, rows, questions, PROBES, 64, 0.1, Funnel())


def test_a_step_too_long_is_told_the_remedy(student, words, tmp_path):
    solver = Solver(LocalSource(student, words, "student"), Prompt.load("bare"), 8)
    context, rows = SimpleNamespace(folder=tmp_path, prefix=""), [rationale(0, 0)]
    with pytest.raises(InputError, match=r"step on .* Lower options\.step_rate \(1e\+300\)"):
        stepped(context, solver, rows, ["2 + 7 ="], PROBES, 64, 1e300, Funnel())


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: in_context_scores(np.zeros((2, 3, 0)), np.zeros((2, 3))), "one probe at least"),
        (lambda: fit_item_response(np.zeros((0, 3))), "at least one of each"),
        (lambda: fit_item_response([[0, 1], [1, np.nan]]), "model 1 to item 1 is nan"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_arguments_of_the_alignment_are_checked_with_the_recipe_and_the_default_ones_exist():
    assert checked_arguments(dict(ARTE().alignment), "options.alignment") == ARTE().alignment
    recipe = {"task": "reasoning", "method": "arte", "student": {"train": {"max_steps": 2}}}
    read = make({**recipe, "options": {"alignment": {"learning_rate": "1e-5"}}})
    assert read.build_method().alignment == {"learning_rate": 1e-5}
    for alignment, says in (
        ({"warmup": 3}, r"options\.alignment\.warmup"),
        ({"max_steps": "many"}, r"options\.alignment\.max_steps"),
    ):
        with pytest.raises(InputError, match=says):
            make({**recipe, "options": {"alignment": alignment}})
