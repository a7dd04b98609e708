"""Paper 38 for networks: the loss of a generation, generations with a given and an estimated alpha, resume, bad input."""

import json

import pytest
import torch
import yaml

from engine_cases import DIGITS, killed_run, weights
from golden_vectors import close, golden, reduce
from understudy import InputError, distill
from understudy.curation.closed_forms import best_alpha
from understudy.data import Batch
from understudy.methods import ground_truth_self_distillation as paper
from understudy.methods.ground_truth_self_distillation import ProbabilityMSE
from understudy.models import ModelOutput
from understudy.runs.recipe import make
from understudy.targets import Dense
from understudy.training import PipelineContext, TrainState

TINY = {
    "method": "ground-truth-self-distillation",
    **{k: DIGITS[k] for k in ("task", "data", "student")},
    "trainer": {**DIGITS["trainer"], "max_steps": 10},
}


def rows_of(student, teacher, labels, alpha):
    """The loss of each row, as the method has it."""
    batch = Batch({}, labels, torch.arange(len(labels)))
    taught = ModelOutput(Dense(teacher)) if teacher is not None else None
    terms = ProbabilityMSE(alpha=alpha).loss(ModelOutput(Dense(student)), taught, batch, TrainState())
    return sum(term.weight * term.values for term in terms.values())


@pytest.mark.golden
def test_golden_loss_over_any_split():
    g = golden("38-ground-truth-self-distillation")
    student, teacher, labels = (
        g["net_student_logits"].clone().requires_grad_(),
        g["net_teacher_logits"],
        g["net_labels"],
    )
    rows = rows_of(student, teacher, labels, float(g["alpha"]))
    value = reduce(rows, "token_mean")
    close(value, g["net_loss"], rtol=1e-7, atol=1e-9)
    (gradient,) = torch.autograd.grad(value, student)
    close(gradient, g["net_grad_student"], rtol=1e-7, atol=1e-9)
    halves = [
        reduce(rows_of(student[part], teacher[part], labels[part], float(g["alpha"])), "token_mean", count=len(labels))
        for part in (slice(0, 1), slice(1, None))
    ]
    close(torch.autograd.grad(sum(halves), student)[0], gradient)


def test_alpha_one_reads_no_teacher_and_alpha_zero_no_label():
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(6, 4), torch.randn(6, 4), torch.randint(4, (6,))
    assert ProbabilityMSE(alpha=1.0).requires.teacher == "none"
    close(rows_of(student, None, labels, 1.0), rows_of(student, teacher, labels, 1.0))
    close(rows_of(student, teacher, labels, 0.0), rows_of(student, teacher, torch.full((6,), -1), 0.0))
    assert rows_of(teacher, teacher, labels, 0.0).abs().max() < 1e-12
    with pytest.raises(InputError, match="example without one"):
        rows_of(student, teacher, torch.full((6,), -1), 0.5)


def test_each_generation_learns_from_the_one_before_with_the_given_weights(tmp_path):
    done = distill(TINY, output=str(tmp_path / "run"), options={"generations": 3, "alpha": [0.5, 0.0]})
    assert sorted(p.name for p in done.folder.glob("generation-*")) == ["generation-1", "generation-2", "generation-3"]
    seeds = set()
    for t, alpha in ((1, 1.0), (2, 0.5), (3, 0.0)):
        recipe = yaml.safe_load((done.folder / f"generation-{t}" / "recipe.yaml").read_text())
        assert recipe["options"] == {"alpha": alpha}
        before = done.folder / f"generation-{t - 1}" / "student"
        assert recipe.get("teacher", {}).get("model") == (str(before) if t > 1 else None)
        seeds.add(recipe["seed"])
    assert len(seeds) == 3
    last = json.loads((done.folder / "generation-3" / "evaluation.json").read_text())["metrics"]
    assert done.metrics["accuracy"] == last["accuracy"] and done.metrics["alpha_2"] == 0.5
    assert "Generations" in (done.folder / "report.html").read_text()


def test_the_estimated_weight_is_the_best_on_the_line(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(paper, "best_alpha", lambda *p: asked.append(p) or best_alpha(*p))
    done = distill(TINY, output=str(tmp_path / "run"), options={"generations": 2})
    ((p1, p0, truth),) = asked
    assert torch.allclose(p1.sum(1), torch.ones(len(p1)).double()) and truth.sum() == len(truth) > 50
    error = lambda a: float((a * p1 + (1 - a) * p0 - truth).square().sum())  # noqa: E731
    grid = torch.linspace(-5, 5, 10001).tolist()
    free = done.metrics["unclipped_alpha_2"]
    assert error(free) <= min(map(error, grid)) + 1e-9 and done.metrics["alpha_2"] == min(1.0, max(0.0, free))
    assert (done.folder / "generation-2-pure" / "student").is_dir()


@pytest.mark.slow
def test_stopped_between_and_inside_generations_it_ends_in_the_same_bits(tmp_path, monkeypatch):
    recipe = {**TINY, "options": {"generations": 3}}
    whole, train = distill(recipe, output=str(tmp_path / "whole")), PipelineContext.train
    cut = {**recipe, "output": str(tmp_path / "cut")}
    assert killed_run(cut, 7, "after")  # inside generation 1

    def stopped(self, name, values):
        if name == "generation-3":
            raise KeyboardInterrupt
        return train(self, name, values)

    monkeypatch.setattr(PipelineContext, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        distill(cut)
    monkeypatch.setattr(PipelineContext, "train", train)
    done = distill(cut)
    assert done.metrics == whole.metrics
    a, b = (weights(r.folder / "generation-3") for r in (whole, done))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "options,says",
    [
        ({"alpha": 1.5}, "less than or equal to 1"),
        ({"alpha": [0.5]}, "lists 1 weights and generations 2 to 5 take 4"),
        ({"generations": 1}, "greater than or equal to 2"),
    ],
)
def test_bad_input(options, says, tmp_path):
    with pytest.raises(InputError, match=says):
        distill(TINY, output=str(tmp_path / "run"), options=options)


def test_text_has_no_images():
    with pytest.raises(InputError, match="image tasks"):
        make({"method": "ground-truth-self-distillation", "task": "language_modeling"})


@pytest.mark.slow
def test_soft_targets_of_its_own_help_a_network_with_noisy_labels(tmp_path):
    recipe = {
        **TINY,
        "data": {"name": "digits", "limit": 400, "label_noise": 0.4},
        "student": "mlp:64,128",
        "trainer": {"max_steps": 600, "per_device_train_batch_size": 32, "learning_rate": 3e-3, "save_strategy": "no"},
    }
    found = {
        alpha: distill(recipe, output=str(tmp_path / f"{alpha}"), options={"generations": 2, "alpha": alpha}).metrics
        for alpha in (0.0, 1.0)
    }
    assert found[0.0]["first_accuracy"] == found[1.0]["first_accuracy"]
    assert found[0.0]["accuracy"] > found[1.0]["accuracy"] + 0.01
