"""Paper 31, data pruning with distillation: golden vectors, limits that must hold, bad input, runs."""

import math

import pytest
import torch

from engine_cases import DIGITS, killed_run, weights
from golden_vectors import close, golden, reduce
from understudy import InputError, distill
from understudy.curation import pruning
from understudy.curation.closed_forms import distilled_ridge, distilled_ridge_error, ridge
from understudy.data import collate_images
from understudy.losses import cross_entropy, forward_kl
from understudy.methods.data_pruning_kd import DataPruningKD
from understudy.methods.sft import SFT
from understudy.models import ClassifierAdapter, state_hash
from understudy.models.small import build_small
from understudy.training import Phase, SetupContext
from understudy.training.checkpoint import load_tree


@pytest.mark.golden
def test_golden_loss():
    g = golden("31-data-pruning-kd")
    student = g["logits_s"].clone().requires_grad_()
    ce = cross_entropy(student, g["labels"])
    kd = forward_kl(student, g["logits_t"], temperature=float(g["tau"]), tau_squared=True)
    total = reduce((1 - g["alpha"]) * ce + g["alpha"] * kd, "token_mean")
    for value, name in (
        (reduce(ce, "token_mean"), "loss_ce"),
        (reduce(kd, "token_mean"), "loss_kd"),
        (total, "loss_total"),
    ):
        close(value, g[name], rtol=1e-9)
    close(torch.autograd.grad(total, student)[0], g["grad_total"], rtol=1e-9)


@pytest.mark.golden
def test_golden_scores():
    g = golden("31-data-pruning-kd")
    labels, fraction = g["hist_labels"], float(g["keep_fraction"])
    right = pruning.correct(g["hist_logits"], labels)
    assert torch.equal((right[:-1] & ~right[1:]).sum(0), g["forgetting_events"])
    assert torch.equal(~right.any(0), g["never_learned"])
    forgetting, el2n = pruning.forgetting_scores(right), pruning.el2n_scores(g["hist_logits"], labels)
    close(forgetting, g["forgetting_score"], rtol=1e-9)
    close(el2n, g["el2n"], rtol=1e-9)
    assert torch.equal(pruning.kept(forgetting, fraction), g["keep_forgetting"])
    assert torch.equal(pruning.kept(el2n, fraction), g["keep_el2n"]) and len(g["keep_el2n"]) == int(g["keep_n"])


@pytest.mark.golden
def test_golden_ridge():
    g = golden("31-data-pruning-kd")
    x, y, penalty, teacher = g["lin_X"], g["lin_y"], float(g["lin_lambda"]), int(g["lin_n_teacher"])
    options = {"penalty": penalty, "alpha": float(g["alpha"]), "student": int(g["lin_n_student"]), "teacher": teacher}
    close(ridge(x[:, :teacher], y[:teacher], penalty), g["lin_theta_teacher"], rtol=1e-9)
    close(distilled_ridge(x, y, **options), g["lin_theta_student"], rtol=1e-9)
    error = distilled_ridge_error(x, g["lin_theta_true"], noise=float(g["lin_noise_sigma"]), **options)
    found = torch.tensor([error.bias_squared, error.variance, error.total], dtype=torch.float64)
    close(found, torch.stack([g["lin_bias_sq"], g["lin_variance"], g["lin_expected_sq_error"]]), rtol=1e-9)


def test_limits_of_the_loss():
    torch.manual_seed(0)
    s, t = torch.randn(2, 6, 5, dtype=torch.float64)
    same = s.clone().requires_grad_()
    value = forward_kl(same, s, temperature=4.0, tau_squared=True).sum()
    assert value.abs() < 1e-12 and torch.autograd.grad(value, same)[0].abs().max() < 1e-12
    shift = torch.randn(6, 1, dtype=torch.float64)
    close(forward_kl(s + shift, t - 2 * shift, temperature=4.0), forward_kl(s, t, temperature=4.0))
    far = forward_kl(s, t, temperature=1e4, tau_squared=True)
    centred = (s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    close(far, centred.square().sum(1) / 10, rtol=1e-3)


def test_limits_of_the_scores():
    torch.manual_seed(0)
    logits, labels = 9 * torch.randn(4, 50, 3), torch.randint(0, 3, (50,))
    el2n = pruning.el2n_scores(logits, labels)
    assert float(el2n.min()) >= 0 and float(el2n.max()) <= math.sqrt(2)
    assert pruning.forgetting_scores(torch.ones(4, 7, dtype=torch.bool)).eq(0).all()
    assert pruning.forgetting_scores(torch.zeros(4, 7, dtype=torch.bool)).eq(4).all()
    close(pruning.grand_scores(logits, labels, torch.full((4, 50), 2.0)), 2 * el2n)
    uneven = torch.tensor([0] * 40 + [1] * 8 + [2] * 2)
    before = {True: set(), False: set()}
    for fraction in (0.1, 0.3, 0.31, 0.7, 1.0):
        for balanced in (True, False):
            found = pruning.kept(el2n, fraction, uneven if balanced else None)
            assert len(found) == round(fraction * 50) and before[balanced] <= set(found.tolist())
            before[balanced] = set(found.tolist())
            if balanced:
                assert uneven[found].unique().numel() == 3
    assert torch.equal(found, torch.arange(50))
    assert pruning.kept(torch.zeros(9), 0.34).tolist() == [0, 1, 2]


def test_scores_of_embeddings():
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    x = torch.randn(60, 4) + 8 * torch.eye(3, 4)[labels]
    x[7] += 20  # far from its class
    assert pruning.prototype_scores(x[torch.arange(60) != 7], 3, 0).max() < 6
    assert 7 not in pruning.kept(pruning.moderate_scores(x, labels), 0.9)
    first = pruning.kept(pruning.herding_scores(x, labels), 0.5)
    assert torch.bincount(labels[first]).tolist() == [10, 10, 10]
    some = x[first][labels[first] == 0].mean(0) - x[labels == 0].mean(0)
    drawn = [x[labels == 0][torch.randperm(20)[:10]].mean(0) - x[labels == 0].mean(0) for _ in range(50)]
    assert some.norm() < torch.stack(drawn).norm(dim=1).quantile(0.25)  # nearer to the mean than draws


def test_equals_are_herded_by_their_index_whatever_the_rounding():
    x = torch.tensor([[-1, 0], [-1, -1], [-1, 1], [0, 0], [-1, 0], [-1, 1], [-1, 0], [1, -1], [-1, 1]])
    order = pruning.herding_scores(x, torch.zeros(9, dtype=torch.long)).argsort(descending=True).tolist()
    assert order == [0, 3, 4, 6, 2, 1, 5, 7, 8]  # in exact fractions


def test_limits_of_ridge():
    torch.manual_seed(0)
    x, y, truth = torch.randn(4, 30).double(), torch.randn(30).double(), torch.randn(4).double()
    close(distilled_ridge(x, y, penalty=0.3, alpha=0.0, student=9, teacher=30), ridge(x[:, :9], y[:9], 0.3))
    for alpha in (0.0, 0.4, 1.0):
        close(
            distilled_ridge(x, y, penalty=1e-12, alpha=alpha, student=9, teacher=9),
            ridge(x[:, :9], y[:9], 0),
            rtol=1e-6,
        )
    for _ in range(40):
        x, alpha = torch.randn(4, 30).double(), float(torch.rand(()))
        options = {"noise": 0.5, "penalty": 0.2, "alpha": alpha, "student": 9}
        full, part = (distilled_ridge_error(x, truth, **options, teacher=n).total for n in (30, 9))
        assert full <= part + 1e-12


def test_the_rule_for_alpha():
    assert (
        pruning.kd_weight(0.1) == 1.0
        and pruning.kd_weight(1.0) == pytest.approx(0.5)
        and pruning.kd_weight(0.5) == pytest.approx(0.8)
    )
    assert (
        DataPruningKD(fraction=0.5).weight == pytest.approx(0.8) and DataPruningKD(alpha=0.0).requires.teacher == "none"
    )


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: pruning.kept(torch.rand(9), 0.0), "is 0.0 and must be above 0"),
        (lambda: pruning.kept(torch.rand(9), 1.1), "is 1.1 and must be above 0"),
        (lambda: pruning.kept(torch.rand(9), 0.01), "keeps none"),
        (lambda: pruning.kept(torch.rand(9), 0.2, torch.arange(9) % 3), "2 kept examples cannot cover 3 classes"),
        (lambda: pruning.kept(torch.tensor([0.0, float("nan")]), 0.5), "score of example 1 is nan"),
        (lambda: pruning.forgetting_scores(torch.ones(1, 3, dtype=torch.bool)), "the history has 1"),
        (
            lambda: pruning.correct(torch.full((2, 3, 4), torch.nan), torch.zeros(3).long()),
            "example 0 in epoch 1 of the history hold nan",
        ),
        (lambda: pruning.prototype_scores(torch.rand(3, 2), 4, 0), "3 examples cannot form 4 clusters"),
        (
            lambda: distilled_ridge(torch.rand(2, 5), torch.rand(5), penalty=1, alpha=0, student=4, teacher=3),
            "some of the",
        ),
        (lambda: DataPruningKD(fraction=0), "greater than 0"),
        (lambda: DataPruningKD(alpha=1.1), "less than or equal to 1"),
        (lambda: DataPruningKD(temperature=0), "greater than 0"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def run(folder, steps=4, **options):
    trainer = {**DIGITS["trainer"], "max_steps": steps, "save_steps": 2}
    teacher = {"model": "mlp:16", "train": {"max_steps": 30, "per_device_train_batch_size": 32}}
    values = {**DIGITS, "teacher": teacher, "trainer": trainer, "output": str(folder)}
    return {**values, "method": "data-pruning-kd", "options": {"score_epochs": 2, **options}}


@pytest.mark.parametrize("score", ["random", "forgetting", "el2n", "grand", "prototypes", "herding", "moderate"])
def test_every_score_keeps_its_share(score, tmp_path, caplog):
    result = distill(run(tmp_path, score=score, fraction=0.25, class_balanced=True))
    assert result.metrics["kept"] == 16 and result.metrics["kd_weight"] == pytest.approx(0.95)
    (file,) = (tmp_path / "store").glob("data-pruning-*")
    stored = load_tree(file)
    assert len(stored["ids"]) == len(stored["scores"]) == 64 and len(stored["kept"]) == 16
    assert "is kept" not in caplog.text


@pytest.mark.parametrize("score", ["random", "el2n", "prototypes"])
def test_what_does_not_count_is_neither_scored_nor_kept(score, tmp_path):
    """The others are scored and kept as if it were not there."""
    x, labels = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    counted = torch.arange(20) % 3 != 1
    labels[~counted] = -100
    items = [(a, int(b), i) for i, (a, b) in enumerate(zip(x, labels, strict=True))]
    method, found = DataPruningKD(score=score, fraction=0.4, clusters=2, score_epochs=2), []
    for examples in (items, [item for item, c in zip(items, counted.tolist(), strict=True) if c]):
        torch.manual_seed(0)
        model = ClassifierAdapter(build_small("mlp:8", 2, (1, 4, 4)), 2)
        store = tmp_path / str(len(examples))
        context = SetupContext(model, model, {"train": examples}, collate_images, 2, store, "key")
        tables = method.setup(context)
        found.append((tables["ids"], tables["scores"], [examples[i][2] for i in tables["kept"]]))
    torch.testing.assert_close(found[0], found[1])
    assert len(found[0][2]) == round(0.4 * int(counted.sum()))


def test_one_training_gives_the_scores_of_every_fraction_and_kind(tmp_path, monkeypatch):
    seen, history = [], DataPruningKD._history
    monkeypatch.setattr(DataPruningKD, "_history", lambda *args: seen.append(args) or history(*args))
    x = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    items = [(a, i % 2, i) for i, a in enumerate(x)]
    model, scores = ClassifierAdapter(build_small("mlp:8", 2, (1, 4, 4)), 2), {}

    def setup(store, **options):
        context = SetupContext(model, model, {"train": items}, collate_images, 2, store, "key")
        return DataPruningKD(score_epochs=2, **options).setup(context)["scores"]

    for score, fraction in (("el2n", 0.4), ("el2n", 0.8), ("forgetting", 0.4)):
        scores[score, fraction] = setup(tmp_path / "shared", score=score, fraction=fraction)
    assert len(seen) == 1 and torch.equal(scores["el2n", 0.4], scores["el2n", 0.8])
    torch.testing.assert_close(scores["forgetting", 0.4], setup(tmp_path / "own", score="forgetting", fraction=0.4))
    setup(tmp_path / "shared", score="el2n", score_rate=1e-2)
    assert len(seen) == 3


class OnTheSame(SFT):
    """Cross-entropy on what the method keeps."""

    name = "on-the-same"

    def setup(self, context):
        return DataPruningKD(fraction=0.5, alpha=0.0).setup(context)

    def phases(self):
        return (Phase("kept", split="kept"),)


def test_alpha_0_is_cross_entropy_on_the_kept_and_alpha_1_reads_no_label(tmp_path):
    plain = distill(run(tmp_path / "a", fraction=0.5, alpha=0.0))
    same = distill({**run(tmp_path / "b"), "method": OnTheSame, "options": {}})
    assert state_hash(plain.student) == state_hash(same.student)
    ends = []
    for noise in (0.0, 0.9):
        values = run(tmp_path / f"noise{noise}", fraction=0.5, alpha=1.0)
        teacher = {"model": str(tmp_path / "noise0.0" / "teacher" / "student")} if noise else values["teacher"]
        result = distill({**values, "teacher": teacher, "data": {**DIGITS["data"], "label_noise": noise}})
        ends.append(state_hash(result.student))
    assert ends[0] == ends[1] and result.metrics["kept_wrong"] > 0.5


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_weights(tmp_path):
    recipes = [run(tmp_path / way, steps=8, score="el2n", fraction=0.5) for way in ("whole", "cut")]
    distill(recipes[0])
    assert killed_run(recipes[1], 5, "after")
    distill(recipes[1])
    torch.testing.assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_it_learns_and_warns_of_lost_classes(tmp_path, caplog):
    values = run(tmp_path, steps=200, fraction=0.05)
    trainer = {**values["trainer"], "learning_rate": 1e-2, "save_strategy": "no"}
    teacher = {"model": "mlp:32", "train": {"max_steps": 200, "learning_rate": 1e-2}}
    result = distill({**values, "data": {"name": "digits", "limit": 300}, "trainer": trainer, "teacher": teacher})
    assert result.metrics["accuracy"] > 0.3  # chance is 0.1; 15 examples
    assert "No example of class" in caplog.text
    with pytest.raises(InputError, match="has no label"):
        values = run(tmp_path / "b", score="el2n")
        distill({**values, "data": {**DIGITS["data"], "unlabelled": True}})
