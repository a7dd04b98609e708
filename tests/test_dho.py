"""Paper 23, DHO: golden vectors, limits that must hold, bad input, runs."""

import dataclasses

import pytest
import torch

from engine_cases import DIGITS, killed_run, weights
from golden_vectors import close, golden
from understudy import InputError, distill
from understudy.data import UNLABELLED, Batch, load_images
from understudy.losses.two_heads import best_mixing, cosine_logits, mixed_log_probabilities
from understudy.methods.dho import DHO
from understudy.models import ClassifierAdapter, ModelOutput, load_classifier, load_small, save_small
from understudy.models.classifier_heads import mix_heads, read_as_cosines, replace_head
from understudy.models.heads import MixtureHead, TwoHeads
from understudy.targets import Dense
from understudy.training.reduction import Counts, sum_terms
from understudy.training.train_module import TrainState

RUN = {
    **DIGITS,
    "method": "dho",
    "data": {"name": "digits", "limit": 200, "labelled": 5},
    "options": {"labelled_batch": 4, "unlabelled_batch": 12},
}


def terms_of(method, ce_l, kd_l, kd_u, teacher_l, teacher_u, labels):
    """The weighted terms and the plain means of labelled and unlabelled rows, mixed up, as the engine divides them."""
    every = torch.cat([labels, torch.full((len(kd_u),), UNLABELLED)])
    wide = torch.cat([torch.cat([ce_l, kd_l], -1), torch.cat([torch.zeros_like(kd_u), kd_u], -1)])
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    batch = Batch({}, every[order], torch.arange(len(every)))
    teacher = ModelOutput(Dense(torch.cat([teacher_l, teacher_u])[order]))
    terms = method.loss(ModelOutput(Dense(wide[order])), teacher, batch, TrainState())
    own = method.counts(batch)
    sums, counts = sum_terms(terms, batch, "token_mean", own), Counts.of(batch, "token_mean", own)
    return tuple({name: counts.divide(name, v) for name, v in part.items()} for part in sums)


def total(method, *rows):
    return sum(terms_of(method, *rows)[0].values())


NAMES = ("ce_logits_labeled", "kd_logits_labeled", "kd_logits_unlabeled")


@pytest.mark.golden
@pytest.mark.parametrize(("objective", "prefix"), [("few_shot", "grad_"), ("low_shot", "grad_lowshot_")])
def test_golden_loss(objective, prefix):
    g = golden("23-dho")
    method = DHO(lam=float(g["lam"]), temperature=float(g["tau"]), objective=objective)
    sides = [g[name].clone().requires_grad_() for name in NAMES]
    rows = g["teacher_logits_labeled"], g["teacher_logits_unlabeled"], g["labels"]
    weighted, means = terms_of(method, *sides, *rows)
    for term, name in (("ce", "ce"), ("kd_labelled", "kd_labeled"), ("kd_unlabelled", "kd_unlabeled")):
        close(means[term], g[f"loss_{name}"], rtol=1e-8, atol=1e-9)
    value = sum(weighted.values())
    close(value, g["loss_" + objective.replace("_", "")], rtol=1e-8, atol=1e-9)
    found = torch.autograd.grad(value, sides)
    for gradient, name in zip(found, ("ce_logits", "kd_logits_labeled", "kd_logits_unlabeled"), strict=True):
        close(gradient, g[prefix + name], rtol=1e-8, atol=1e-9)


@pytest.mark.golden
def test_golden_mixture():
    g = golden("23-dho")
    ce, kd, grids = (
        g["val_ce_logits"],
        g["val_kd_logits"],
        {f"{n}s": g[f"{n}_grid"].tolist() for n in ("alpha", "beta")},
    )
    best = best_mixing(ce, kd, g["val_labels"], **grids)
    close(best.grid, g["acc_grid"], rtol=0, atol=1e-9)
    assert (best.alpha, best.beta) == (float(g["best_alpha"]), float(g["best_beta"]))
    assert best.accuracy == pytest.approx(float(g["best_acc"]))
    options = {"alpha": float(g["infer_alpha"]), "beta": float(g["infer_beta"])}
    close(mixed_log_probabilities(ce, kd, **options).exp(), g["infer_probs"])


def test_the_mixture_is_chosen_by_probabilities():
    """Two saturated heads that disagree evenly tie, and the lower class wins, as with the mixed probabilities."""
    ce = torch.randint(-100, 100, (300, 3), generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(300) % 3
    found = best_mixing(ce, ce.flip(-1), labels, alphas=(0.5,), betas=(1.0,))
    mixed = 0.5 * ce.softmax(-1) + 0.5 * ce.flip(-1).softmax(-1)
    assert found.accuracy == float((mixed.argmax(-1) == labels).double().mean()) * 100


@pytest.mark.golden
def test_golden_aligned_head():
    g = golden("23-dho")
    close(cosine_logits(g["feat"], g["text_weights"]), g["aligned_kd_logits"], rtol=1e-8, atol=1e-9)
    classes, width = g["text_weights"].shape
    head = TwoHeads(width, classes, bias=False, scale=100.0).double()
    head.weight.data = g["text_weights"].repeat(2, 1)
    first, second = head(g["feat"]).chunk(2, -1)  # the label head reads the features as they are
    close(first, g["feat"] @ g["text_weights"].T)
    close(second, g["aligned_kd_logits"], rtol=1e-8, atol=1e-9)


@pytest.fixture
def rows():
    torch.manual_seed(0)
    ce, kd, teacher = torch.randn(3, 5, 4, dtype=torch.float64)
    kd_u, teacher_u = torch.randn(2, 6, 4, dtype=torch.float64)
    return [ce, kd, kd_u, teacher, teacher_u, torch.tensor([0, 1, 2, 3, 0])]


def test_limits_of_the_mixture(rows):
    ce, kd = rows[:2]
    for beta in (0.5, 4.0):
        close(mixed_log_probabilities(ce, kd, alpha=1.0, beta=beta), ce.log_softmax(-1))
        assert torch.equal(mixed_log_probabilities(ce, kd, alpha=0.0, beta=beta).argmax(-1), kd.argmax(-1))
    close(mixed_log_probabilities(ce, kd, alpha=0.0, beta=1.0), kd.log_softmax(-1))
    mixed = mixed_log_probabilities(ce, kd, alpha=0.3, beta=2.0)
    close(mixed.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    close(mixed_log_probabilities(ce + 3, kd - 2, alpha=0.3, beta=2.0), mixed)
    assert torch.equal(mixed_log_probabilities(ce, kd, alpha=0.3, beta=1e9).argmax(-1), ce.argmax(-1))
    assert torch.equal(mixed_log_probabilities(ce, kd, alpha=0.49, beta=1e-9).argmax(-1), kd.argmax(-1))
    grid = best_mixing(ce, kd, rows[5]).grid
    assert (grid[:, 0] == grid[0, 0]).all() and (grid[:, -1] == grid[0, -1]).all()
    same = best_mixing(ce, ce, ce.argmax(-1))  # every pair is right: the first one
    assert (same.alpha, same.beta, same.accuracy) == (0.0, 0.5, 100.0)


def test_limits_of_the_loss(rows):
    def gradients(method, values):
        sides = [v.clone().requires_grad_() for v in values[:3]]
        value = total(method, *sides, *values[3:])
        return value, torch.autograd.grad(value, sides)

    value, (ce, kd, kd_u) = gradients(DHO(), rows)
    others = [*rows[:3], torch.randn(5, 4).double(), torch.randn(6, 4).double(), rows[5]]
    close(gradients(DHO(), others)[1][0], ce)  # the label head knows no teacher
    relabelled = gradients(DHO(), [*rows[:5], rows[5].flip(0)])[1]
    close(relabelled[1], kd)
    close(relabelled[2], kd_u)
    assert (
        all(x.eq(0).all() for x in gradients(DHO(lam=1.0), rows)[1][1:])
        and gradients(DHO(lam=0.0), rows)[1][0].eq(0).all()
    )
    followed = [rows[0], rows[3], rows[4], *rows[3:]]
    value_followed, found = gradients(DHO(lam=0.0), followed)
    assert abs(float(value_followed)) < 1e-12 and max(float(x.abs().max()) for x in found) < 1e-12
    close(gradients(DHO(objective="low_shot"), rows)[0], 2 * value)
    twice = [rows[0], rows[1], rows[2].repeat(2, 1), rows[3], rows[4].repeat(2, 1), rows[5]]
    close(gradients(DHO(), twice)[0], value)
    close(gradients(DHO(), [rows[0] + 2, rows[1] - 1, rows[2] + 5, rows[3] + 1, rows[4] - 7, rows[5]])[0], value)
    # One head for both is both heads tied.
    batch = Batch({}, rows[5], torch.arange(5))
    found = []
    for method, wide in ((DHO(), rows[0].repeat(1, 2)), (DHO(heads="one"), rows[0])):
        terms = method.loss(ModelOutput(Dense(wide)), ModelOutput(Dense(rows[3])), batch, TrainState())
        found.append({name: float(term.values.sum()) for name, term in terms.items()})
    assert found[0] == found[1] and found[0]["kd_unlabelled"] == 0


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: mixed_log_probabilities(torch.rand(2, 3), torch.rand(2, 4), alpha=0.5, beta=1), "same classes"),
        (lambda: mixed_log_probabilities(torch.rand(2, 3), torch.rand(2, 3), alpha=1.5, beta=1), "alpha in"),
        (lambda: mixed_log_probabilities(torch.rand(2, 3), torch.rand(2, 3), alpha=0.5, beta=0), "beta above 0"),
        (lambda: best_mixing(*torch.rand(2, 0, 3), torch.zeros(0).long()), "no examples"),
        (lambda: DHO(lam=1.1), "less than or equal to 1"),
        (lambda: DHO(temperature=0), "greater than 0"),
        (lambda: DHO(mix_beta=0), "greater than 0"),
        (lambda: DHO(heads="one", kd_head="cosine"), "kd_head has no effect with heads=one"),
        (lambda: load_images({"name": "digits", "labelled": 0}), "data.labelled is 0"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 2.0), (1.0, 2.0), (0.0, 2.0)])
def test_a_mixed_head_is_saved_and_read_as_it_was(alpha, beta, tmp_path):
    rows = ClassifierAdapter(load_classifier("mlp:8", classes=3, input_shape=(1, 4, 4)), 3)
    replace_head(rows, 6)
    x = torch.rand(5, 1, 4, 4)
    first, second = rows.model(x).chunk(2, -1)
    assert mix_heads(rows, 3, alpha, beta) and rows.classes == 3
    wanted = mixed_log_probabilities(first, second, alpha=alpha, beta=beta)
    close(rows.model(x).log_softmax(-1), wanted, rtol=1e-5, atol=1e-6)
    assert isinstance(rows.model.head, MixtureHead) == (alpha == 0.3)
    save_small(rows.model, tmp_path)
    close(load_small(tmp_path)(x), rows.model(x), rtol=0, atol=0)


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 2.0), (1.0, 2.0), (0.0, 2.0)])
def test_a_mixed_head_on_cosines_is_saved_and_read_as_it_was(alpha, beta, tmp_path):
    rows = ClassifierAdapter(load_classifier("mlp:8", classes=3, input_shape=(1, 4, 4)), 3)
    replace_head(rows, 6)
    x = torch.rand(5, 1, 4, 4)
    plain = rows.model(x)
    read_as_cosines(rows, 4.0)
    first, second = rows.model(x).chunk(2, -1)
    close(first, plain[:, :3], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(second, plain[:, 3:])
    assert mix_heads(rows, 3, alpha, beta)
    close(
        rows.model(x).log_softmax(-1),
        mixed_log_probabilities(first, second, alpha=alpha, beta=beta),
        rtol=1e-5,
        atol=1e-6,
    )
    assert isinstance(rows.model.head, MixtureHead) == (alpha < 1)  # no linear layer divides by the features' length
    save_small(rows.model, tmp_path)
    close(load_small(tmp_path)(x), rows.model(x), rtol=0, atol=0)


def test_a_run_with_a_head_on_cosines(tmp_path):
    trainer = {**DIGITS["trainer"], "max_steps": 3, "save_strategy": "no"}
    options = {**RUN["options"], "kd_head": "cosine", "select": False}
    result = distill({**RUN, "trainer": trainer, "options": options, "output": str(tmp_path)})
    assert result.student.head.scale == 100 and result.metrics["mix_alpha"] == 0.5
    again = load_classifier(tmp_path / "student", classes=10, input_shape=(1, 8, 8))
    x = torch.rand(2, 1, 8, 8)
    close(again.eval()(x), result.student.eval()(x), rtol=0, atol=0)


def test_it_learns_and_reads_no_hidden_label(tmp_path, caplog):
    trainer = {**DIGITS["trainer"], "max_steps": 150, "learning_rate": 1e-2, "save_strategy": "no"}
    teacher = {"model": "mlp:32", "train": {"max_steps": 150, "learning_rate": 1e-2}}
    result = distill({**RUN, "trainer": trainer, "teacher": teacher, "output": str(tmp_path)})
    assert result.metrics["accuracy"] > 0.6  # chance is 0.1
    assert {"mix_alpha", "mix_beta", "ce_head_validation", "kd_head_validation"} <= result.metrics.keys()
    assert "no more than chance" not in caplog.text
    part = load_images(RUN["data"]).train
    assert int((part.labels >= 0).sum()) == 50 and int((part.labels == UNLABELLED).sum()) == 150


def test_other_models_get_the_linear_head_that_fits_best(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10, "hidden_size": 8}
    vit = ViTForImageClassification(ViTConfig(**shape, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    trainer = {**DIGITS["trainer"], "max_steps": 3, "save_strategy": "no"}
    options = {**RUN["options"], "select": False}
    result = distill({**RUN, "trainer": trainer, "options": options, "output": str(tmp_path)}, student=vit)
    assert result.metrics["mix_agreement"] > 0.5 and result.metrics["mix_alpha"] == 0.5
    assert vit.classifier.out_features == 10 and vit.config.num_labels == 10


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_weights(tmp_path):
    trainer = {**DIGITS["trainer"], "max_steps": 8, "save_steps": 2}
    recipes = [{**RUN, "trainer": trainer, "output": str(tmp_path / way)} for way in ("whole", "cut")]
    distill(recipes[0])
    assert killed_run(recipes[1], 5, "after")
    distill(recipes[1])
    torch.testing.assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_data_without_any_label_is_refused_and_all_labels_are_told(tmp_path, caplog):
    with pytest.raises(InputError, match="no training example has one"):
        distill({**RUN, "data": {**DIGITS["data"], "unlabelled": True}, "output": str(tmp_path / "a")})
    trainer = {**DIGITS["trainer"], "max_steps": 1, "save_strategy": "no"}
    distill({**RUN, "data": DIGITS["data"], "trainer": trainer, "output": str(tmp_path / "b")})
    assert "Every training example has a label" in caplog.text


def test_any_split_gives_the_same_update(rows):
    """The counts are those of the update, so two micro-batches add up to one."""
    method, labels = DHO(), torch.cat([rows[5], torch.full((6,), UNLABELLED)])
    wide, teacher = torch.randn(11, 8).double(), torch.cat(rows[3:5])
    batch = Batch({}, labels, torch.arange(11))
    own = method.counts(batch)

    def sums(index):
        part = dataclasses.replace(batch, labels=labels[index], ids=batch.ids[index])
        sides = ModelOutput(Dense(wide[index])), ModelOutput(Dense(teacher[index]))
        return sum_terms(method.loss(*sides, part, TrainState()), part, "token_mean", own).losses

    whole, parts = sums(torch.arange(11)), [sums(torch.arange(3)), sums(torch.arange(3, 11))]
    for name, value in whole.items():
        close(sum(p[name] for p in parts), value)
