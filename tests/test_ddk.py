"""Paper 17, DDK: golden vectors, limits of the weights, bad input, exact resume, and a student that is drawn to its gaps."""

import json
import random

import pytest
import torch

from engine_cases import killed_run, weights
from golden_vectors import close, golden, reduce
from understudy import InputError, distill
from understudy.curation.domains import example_weights, first_weights, next_weights, perplexity_ratios
from understudy.data import Batch
from understudy.methods.ddk import DDK
from understudy.models import ModelOutput
from understudy.targets import Dense
from understudy.training import TrainState


@pytest.mark.golden
def test_golden_weights():
    g = golden("17-ddk")
    alpha, names = float(g["alpha"]), [str(i) for i in range(int(g["n_domains"]))]
    student = (g["val_nll_sum_student"] / g["val_tokens"]).exp()
    teacher = (g["val_nll_sum_teacher"] / g["val_tokens"]).exp()
    close(student, g["ppl_student"], rtol=1e-10)
    close(teacher, g["ppl_teacher"], rtol=1e-10)
    ratios = torch.stack([perplexity_ratios(row, teacher, names) for row in student])
    r = first_weights(ratios[0])
    close(r, g["r"][0], rtol=1e-10)
    for row, expected in zip(ratios[1:], g["r"][1:], strict=True):
        r = next_weights(r, row, alpha)
        close(r, expected, rtol=1e-10)
    close(torch.stack([first_weights(row) for row in ratios]), g["r_no_smoothing_reset"], rtol=1e-10)
    close(g["r"] * float(g["items_per_interval"]), g["expected_items"])
    large = perplexity_ratios(g["overflow_ppl_student"], teacher, names)
    close(first_weights(large), g["overflow_r0"], rtol=1e-10)
    close(next_weights(g["r"][0], large, alpha), g["overflow_r1"], rtol=1e-10)


@pytest.mark.golden
@pytest.mark.parametrize("divergence", ["fkl", "rkl"])
def test_golden_loss(divergence):
    g = golden("17-ddk")
    taus = [name.removeprefix("ce_tau") for name in g if name.startswith("ce_tau")]
    assert taus
    for tau in taus:
        _check_loss(g, tau, divergence)


def _check_loss(g, tau, divergence):
    labels = g["labels"]
    mask, student = labels >= 0, g["student_logits"].clone().requires_grad_()
    shifted = torch.cat([labels[:, :1] * 0 - 100, labels], 1)  # a batch predicts the next label
    batch = Batch({}, shifted, torch.arange(len(labels)))
    method = DDK(
        gamma=float(g["gamma"]),
        temperature=float(tau),
        divergence={"fkl": "forward_kl", "rkl": "reverse_kl"}[divergence],
    )
    sides = [ModelOutput(Dense(x[mask])) for x in (student, g["teacher_logits"])]
    terms = method.loss(*sides, batch, TrainState())
    ce, kd = (reduce(terms[name].values, "token_mean") for name in ("ce", "kd"))
    close(ce, g[f"ce_tau{tau}"])
    close(kd, g[f"{divergence}_tau{tau}"])
    total = ce + terms["kd"].weight * kd
    close(total, g[f"loss_{divergence}_tau{tau}"])
    if divergence == "fkl":
        total.backward()
        close(student.grad, g[f"grad_loss_fkl_tau{tau}"])


def test_limits_of_the_weights():
    x = torch.tensor([3.0, 1.0, 0.4, 2.2], dtype=torch.float64)
    r = first_weights(x)
    for alpha in (0.0, 0.3, 1.0):
        found = next_weights(r, x, alpha)
        assert float(found.sum()) == pytest.approx(1)
        assert float(found.min()) >= (1 - alpha) / 4 and float(found.max()) <= alpha + (1 - alpha) / 4
        torch.testing.assert_close(next_weights(r.flip(0), x.flip(0), alpha).flip(0), found)
        torch.testing.assert_close(next_weights(r, x + 700, alpha), found)
    even = torch.full((4,), 0.25, dtype=torch.float64)
    torch.testing.assert_close(next_weights(r, x, 0.0), even)
    torch.testing.assert_close(next_weights(even, torch.full_like(x, 1.7), 0.5), even)
    torch.testing.assert_close(next_weights(next_weights(r, x, 1.0), x, 1.0), torch.softmax(3 * x, -1))
    fixed = r
    for _ in range(200):
        fixed = next_weights(fixed, x, 0.5)
    torch.testing.assert_close(fixed, 0.5 * torch.softmax(fixed.log() + x, -1) + 0.125, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first_weights(torch.ones(1)), torch.ones(1, dtype=torch.float64))


def test_examples_are_drawn_as_often_as_the_weights_say():
    domains = torch.tensor([0] * 5 + [1] * 50 + [2] * 20)
    r = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = domains[torch.multinomial(example_weights(r, domains), 10_000, replacement=True, generator=generator)]
    expected = 10_000 * r
    chi = float(((torch.bincount(drawn) - expected).square() / expected).sum())
    assert chi < 13.8  # p > 0.001 with two degrees of freedom


def test_a_student_that_is_its_teacher_has_no_divergence():
    logits = torch.randn(4, 5, requires_grad=True)
    side = ModelOutput(Dense(logits))
    batch = Batch({}, torch.arange(4), torch.arange(4))
    values = DDK().loss(side, ModelOutput(Dense(logits.detach())), batch, TrainState())["kd"].values
    torch.testing.assert_close(values, torch.zeros(4))
    torch.testing.assert_close(torch.autograd.grad(values.sum(), logits)[0], torch.zeros(4, 5))
    assert set(DDK(gamma=0).loss(side, side, batch, TrainState())) == {"ce"}


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_bad_perplexities_name_their_domain(value):
    with pytest.raises(InputError, match="teacher's perplexity in domain 'books'"):
        perplexity_ratios(torch.tensor([2.0, 2.0]), torch.tensor([2.0, value]), ["web", "books"])


def test_ratios_depend_on_no_common_factor_of_perplexities():
    """Limit 4, also where the factor brings them below 1."""
    student, teacher = torch.tensor([3.0, 4.0]).double(), torch.tensor([2.0, 2.0]).double()
    expected = perplexity_ratios(student, teacher, ["a", "b"])
    torch.testing.assert_close(perplexity_ratios(student / 10, teacher / 10, ["a", "b"]), expected)


def records(number=60):
    """Three kinds of text: one word over and over, digits in order, letters at random."""
    draw, found = random.Random(0), []
    for i in range(number):
        found.append({"text": "again and again and " * 8, "kind": "easy"})
        found.append({"text": " ".join(str(i + j) for j in range(40)), "kind": "digits"})
        found.append({"text": "".join(draw.choice("abcdefgh ") for _ in range(160)), "kind": "random"})
    return found


MODEL = "llama:hidden=16,layers=1,heads=2"
RECIPE = {
    "task": "language_modeling",
    "method": "ddk",
    "options": {"interval": 5, "samples": 4},
    "data": {"name": records(), "domain_column": "kind", "max_length": 32, "vocab_size": 300},
    "teacher": {"model": MODEL, "train": {"max_steps": 60, "learning_rate": 1e-2, "per_device_train_batch_size": 8}},
    "student": MODEL,
    "trainer": {"max_steps": 15, "per_device_train_batch_size": 4, "save_steps": 5, "logging_steps": 1},
}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddk")
    return folder, distill(RECIPE, output=str(folder)), {"model": str(folder / "teacher" / "student")}


def test_domains_with_larger_gaps_are_drawn_more(taught):
    folder, result, _ = taught
    assert result.metrics["worst_ratio"] >= result.metrics["mean_ratio"] > 1
    states = [json.loads(line)["state"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len({s["worst_ratio"] for s in states}) == 3  # one an interval
    assert all(s["largest_weight"] > 0.4 for s in states)
    table = json.loads((folder / "evaluation.json").read_text())["tables"][0]
    assert [row[0] for row in table["rows"]] == ["digits", "easy", "random"]
    shares = [float(row[-1]) for row in table["rows"]]
    ratios = [float(row[-2]) for row in table["rows"]]
    assert shares.index(max(shares)) == ratios.index(max(ratios))


@pytest.mark.slow
@pytest.mark.parametrize("step,moment", [(7, "after"), (10, "before")])
def test_killed_inside_an_interval_and_at_its_end(taught, tmp_path, step, moment):
    _, _, teacher = taught
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records()))
    values = {**RECIPE, "teacher": teacher, "data": {**RECIPE["data"], "name": str(path)}}
    distill(values, output=str(tmp_path / "whole"))
    assert killed_run({**values, "output": str(tmp_path / "cut")}, step, moment)
    distill(values, output=str(tmp_path / "cut"))
    torch.testing.assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_data_that_name_no_domain(taught, tmp_path):
    _, _, teacher = taught
    bare = {k: v for k, v in RECIPE["data"].items() if k != "domain_column"}
    with pytest.raises(InputError, match=r"the data name none: set data.domain_column"):
        distill({**RECIPE, "data": bare}, teacher=teacher, output=str(tmp_path / "a"))
    split = {"train": records(4), "validation": records(4)[:1], "test": records(4)}
    with pytest.raises(InputError, match="Domain 'digits' has no example in the validation split"):
        distill({**RECIPE, "data": {**RECIPE["data"], "name": split}}, teacher=teacher, output=str(tmp_path / "b"))
