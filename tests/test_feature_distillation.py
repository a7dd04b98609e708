"""FitNets, attention transfer, SP, RKD, DKD, DIST: losses by hand and in their limits, bad input, runs."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from engine_cases import CONV, DIGITS, killed_run, weights
from golden_vectors import close
from split_cases import ends_alike
from test_engine import trainer_for
from understudy import InputError, distill
from understudy.losses import decoupled_kl, forward_kl
from understudy.losses.features import attention_map, attention_transfer, feature_map, hint_mse, same_grid
from understudy.losses.instances import (
    angle_relation,
    by_group,
    distance_relation,
    inter_class_relation,
    intra_class_relation,
    pearson_distance,
    similarity_mse,
)
from understudy.methods.dist import DIST
from understudy.methods.dkd import DKD
from understudy.methods.feature_distillation import SP
from understudy.models.small import build_small
from understudy.models.taps import called_layers, stages

METHODS = ("fitnets", "attention-transfer", "sp", "rkd", "dkd", "dist")


@pytest.fixture
def groups():
    torch.manual_seed(0)
    return torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(3, 4, 2, 3, dtype=torch.float64), torch.randn(3, 5, 2, 3, dtype=torch.float64)


@pytest.fixture
def logits():
    torch.manual_seed(0)
    s, t = 3 * torch.randn(2, 6, 5, dtype=torch.float64)
    return s, t, torch.tensor([0, 1, 2, 3, 4, 0])


def test_gradients_agree_with_finite_differences(groups, maps, logits):
    (s, t), (m, n), (z, y, labels) = groups, maps, logits
    cases = [
        (lambda x: hint_mse(x, n[:, :4]), m),
        (lambda x: attention_transfer(x, n), m),
        (lambda x: attention_transfer(x, n, power=3), m),
        (lambda x: similarity_mse(x, t), s),
        (lambda x: distance_relation(x, t), s),
        (lambda x: angle_relation(x, t), s),
        (lambda x: inter_class_relation(x, y, temperature=2.0), z),
        (lambda x: intra_class_relation(x, y, temperature=2.0), z),
        (lambda x: decoupled_kl(x, y, labels, alpha=0.7, beta=3.0), z),
    ]
    for function, x in cases:
        assert torch.autograd.gradcheck(function, x.clone().requires_grad_())


def test_values_by_hand(groups, maps, logits):
    (s, t), (m, n), (z, y, _) = groups, maps, logits
    close(hint_mse(m, n[:, :4]).mean(), F.mse_loss(m, n[:, :4]))
    released = [F.normalize(x.pow(2).mean(1).flatten(1)) for x in (m, n)]
    close(attention_transfer(m, n).mean(), (released[0] - released[1]).pow(2).mean())
    gram = [F.normalize(x @ x.T) for x in (s, t)]
    close(similarity_mse(s, t).mean(), (gram[0] - gram[1]).pow(2).sum() / 36)
    far = [torch.cdist(x, x) for x in (s, t)]
    far = [d / d[d > 0].mean() for d in far]
    close(distance_relation(s, t).mean(), F.smooth_l1_loss(*far))
    edges = [F.normalize(x.unsqueeze(0) - x.unsqueeze(1), p=2, dim=2) for x in (s, t)]
    angles = [torch.bmm(e, e.transpose(1, 2)).view(-1) for e in edges]
    close(angle_relation(s, t).mean(), F.smooth_l1_loss(*angles))
    p, q = y.softmax(1), z.softmax(1)
    by_numpy = torch.stack([1 - torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(q, p, strict=True)])
    close(inter_class_relation(z, y), by_numpy)
    columns = torch.stack([1 - torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    close(intra_class_relation(z, y), columns.mean().expand(6))


def test_decoupled_kl_adds_up_to_kl(logits):
    z, y, labels = logits
    at = labels[:, None]
    rest = 1 - y.softmax(1).gather(1, at)[:, 0]
    label, others = (decoupled_kl(z, y, labels, alpha=a, beta=1 - a, temperature=1.0) for a in (1.0, 0.0))
    close(label + rest * others, forward_kl(z, y))
    # With two classes there is one other: nothing is left of the second part.
    close(decoupled_kl(z[:, :2], y[:, :2], labels % 2, temperature=1.0), forward_kl(z[:, :2], y[:, :2]))


def test_equal_sides_cost_nothing(groups, maps, logits):
    (s, _), (m, _), (z, _, labels) = groups, maps, logits
    for function, x in (
        (lambda x: hint_mse(x, m), m),
        (lambda x: attention_transfer(x, m), m),
        (lambda x: similarity_mse(x, s), s),
        (lambda x: distance_relation(x, s), s),
        (lambda x: angle_relation(x, s), s),
        (lambda x: decoupled_kl(x, z, labels), z),
        (lambda x: inter_class_relation(x, z), z),
        (lambda x: intra_class_relation(x, z), z),
    ):
        x = x.clone().requires_grad_()
        value = function(x).sum()
        value.backward()
        assert value.abs() < 1e-12 and x.grad.abs().max() < 1e-12


def test_what_relations_do_not_see(groups, logits):
    (s, t), (z, y, labels) = groups, logits
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    close(distance_relation(3 * s @ rotation + 5, t), distance_relation(s, t), rtol=1e-6)
    close(angle_relation(3 * s @ rotation + 5, t), angle_relation(s, t), rtol=1e-6)
    close(similarity_mse(3 * s @ rotation, t), similarity_mse(s, t))
    p, q = z.softmax(1), y.softmax(1)
    close(pearson_distance(2 * p + 1, q), pearson_distance(p, q))
    close(pearson_distance(-p, p), torch.full((6,), 2.0, dtype=torch.float64))
    close(decoupled_kl(z + 7, y - 3, labels), decoupled_kl(z, y, labels))


def test_duplicates_zeros_and_sure_teachers_stay_finite():
    zeros = torch.zeros(4, 3, requires_grad=True)
    other = torch.randn(4, 5)
    for relation in (similarity_mse, distance_relation, angle_relation):
        relation(zeros, other).sum().backward()
        assert zeros.grad.isfinite().all()
        assert relation(zeros[:1], other[:1]).item() == 0 or relation is similarity_mse
    assert attention_map(torch.zeros(2, 3, 4, 4)).eq(0).all()
    sure = torch.full((2, 5), -50.0)
    sure[:, 1] = 50.0
    z = torch.zeros(2, 5, requires_grad=True)
    value = decoupled_kl(z, sure, torch.tensor([1, 0]), temperature=1.0)
    value.sum().backward()
    assert value.isfinite().all() and z.grad.isfinite().all()
    assert decoupled_kl(-sure, sure, torch.tensor([1, 0]), temperature=1.0).isfinite().all()


def test_groups_are_cut_where_they_end(groups):
    s, t = groups
    close(
        by_group(distance_relation, s, t, 4),
        torch.cat([distance_relation(s[:4], t[:4]), distance_relation(s[4:], t[4:])]),
    )
    assert by_group(distance_relation, s[:0], t[:0], 4).shape == (0,)
    assert intra_class_relation(s[:1], s[:1]).item() == 0


def test_maps_of_any_layer():
    tokens = torch.arange(20.0).view(1, 10, 2)
    assert (
        feature_map(tokens).shape == (1, 2, 3, 3) and feature_map(tokens)[0, 0, 0, 0] == 2
    )  # the class token is dropped
    assert feature_map(torch.rand(2, 7)).shape == (2, 7, 1, 1)
    ours, theirs = same_grid(torch.rand(1, 2, 8, 8), torch.rand(1, 3, 4, 16))
    assert ours.shape == (1, 2, 4, 8) and theirs.shape == (1, 3, 4, 8)


def test_stages_are_the_last_layers_of_each_resolution():
    from transformers import ViTConfig, ViTForImageClassification

    def found(model, shape):
        with torch.no_grad():
            return stages(called_layers(model, lambda: model(torch.rand(2, *shape))))

    net = build_small("resnet8", 10, (3, 32, 32))
    assert found(net, (3, 32, 32)) == [net.layer1, net.layer2, net.layer3]
    net = build_small("mlp:16,24", 10, (1, 8, 8))
    assert found(net, (1, 8, 8)) == [net.body[2], net.body]
    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10, "hidden_size": 8}
    vit = ViTForImageClassification(ViTConfig(**shape, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    assert found(vit, (1, 8, 8)) == [vit.vit.layernorm]


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: hint_mse(torch.rand(1, 2, 3, 3), torch.rand(1, 4, 3, 3)), "differ in shape"),
        (lambda: attention_transfer(torch.rand(1, 2, 3, 3), torch.rand(1, 2, 2, 2)), "differ in height or width"),
        (lambda: attention_map(torch.rand(1, 2, 3, 3), power=0.5), "power is 0.5"),
        (lambda: feature_map(torch.rand(1, 7, 3)), "7 tokens are no square grid"),
        (lambda: feature_map(torch.rand(1)), "no map of features"),
        (lambda: by_group(distance_relation, torch.rand(3, 2), torch.rand(4, 2), 2), "student has 3 images"),
        (lambda: inter_class_relation(torch.rand(3, 2), torch.rand(3, 4)), "2 classes and the teacher 4"),
        (lambda: decoupled_kl(torch.rand(1, 3), torch.rand(1, 3), torch.tensor([-1])), "needs labels"),
        (
            lambda: decoupled_kl(torch.rand(1, 3), torch.rand(1, 3), torch.tensor([0]), temperature=0),
            "temperature is 0",
        ),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()


def case(method):
    """A run of a method; digits of an MLP have no maps."""
    return CONV if method == "attention-transfer" else DIGITS


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_digits(method, tmp_path):
    base = case(method)
    options = {"hint_share": 0.25} if method == "fitnets" else {}
    result = distill(
        {
            **base,
            "method": method,
            "options": options,
            "output": str(tmp_path),
            "data": {"name": "digits", "limit": 300},
        },
        teacher={"model": base["teacher"]["model"], "train": {"max_steps": 200, "learning_rate": 1e-2}},
        trainer={"max_steps": 200, "per_device_train_batch_size": 32, "learning_rate": 1e-2, "save_strategy": "no"},
    )
    assert result.metrics["accuracy"] > 0.4  # chance is 0.1
    assert not any("regressor" in name for name in weights(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fitnets", "sp"])
def test_killed_and_resumed_ends_in_the_same_weights(method, tmp_path):
    options = {"hint_share": 0.3} if method == "fitnets" else {"group": 8}
    trainer = {**DIGITS["trainer"], "max_steps": 10, "save_steps": 2}
    recipes = [
        {**DIGITS, "method": method, "options": options, "trainer": trainer, "output": str(tmp_path / way)}
        for way in ("whole", "cut")
    ]
    distill(recipes[0])
    assert killed_run(recipes[1], 5, "after")
    distill(recipes[1])
    torch.testing.assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"), rtol=0, atol=0)


@pytest.mark.parametrize("method", [DKD(), DIST(group=4), SP(group=4)], ids=lambda m: m.name)
def test_any_split_between_groups_gives_the_same_update(method, tmp_path):
    def untouched(trainer):
        assert all(p.grad is None for p in trainer.teacher.model.parameters())

    ends_alike(partial(trainer_for, method, tmp_path), ((12, 1), (4, 3)), 1e-9, untouched)


def test_the_hint_is_trained_alone_first_and_not_afterwards(tmp_path):
    import json

    trainer = {**DIGITS["trainer"], "max_steps": 8}
    distill(
        {**DIGITS, "method": "fitnets", "options": {"hint_share": 0.25}, "trainer": trainer, "output": str(tmp_path)}
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [sorted(line["terms"]) for line in lines] == [["hint"]] * 2 + [["ce", "kd"]] * 6


def test_a_network_without_maps_is_refused(tmp_path):
    with pytest.raises(InputError, match="'attention-transfer' compares positions, and the student's layers have one"):
        distill({**DIGITS, "method": "attention-transfer", "output": str(tmp_path)})
    assert math.isclose(float(attention_transfer(torch.ones(1, 3, 1, 1), torch.ones(1, 2, 1, 1))), 0.0, abs_tol=1e-7)
