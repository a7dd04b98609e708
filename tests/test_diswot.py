"""DisWOT: the scores against golden vectors, and the limits that must hold."""

import pytest
import torch

from golden_vectors import close, golden
from understudy.errors import InputError
from understudy.losses.features import channel_similarity_mse
from understudy.losses.instances import class_map_mse, similarity_mse

G = golden("12-diswot")


def rotated(x):
    """`x` with its coordinates rotated."""
    width = x.flatten(1).shape[1]
    turn, _ = torch.linalg.qr(torch.randn(width, width, dtype=x.dtype, generator=torch.Generator().manual_seed(0)))
    return x.flatten(1) @ turn


def relation(student, teacher):
    return similarity_mse(student.flatten(1), teacher.flatten(1)).mean()


def by_class(student, teacher):
    return channel_similarity_mse(student[..., None, None], teacher[..., None, None])


@pytest.mark.golden
def test_golden_relation():
    close(relation(G["feat_s"], G["feat_t"]), G["relation_loss"])
    live = G["feat_s_live"].clone().requires_grad_()
    value = relation(live, G["feat_t"])
    close(value, G["relation_loss_live"])
    value.backward()
    close(live.grad, G["relation_grad_feat_s_live"])


@pytest.mark.golden
def test_golden_semantics_and_score():
    semantic = by_class(G["clsgrad_s"], G["clsgrad_t"]).mean()
    close(semantic, G["semantic_loss_code"])
    close(-(relation(G["feat_s"], G["feat_t"]) + semantic), G["score_code"])
    heads = {"student_head": G["fcw_s"], "teacher_head": G["fcw_t"]}
    close(class_map_mse(G["feat_s"], G["feat_t"], **heads).mean(), G["semantic_loss_paper_cam"])


@pytest.mark.golden
def test_golden_channels():
    student = G["chan_feat_s"].clone().requires_grad_()
    value = channel_similarity_mse(student, G["chan_feat_t"]).mean()
    close(value, G["channel_loss"])
    value.backward()
    close(student.grad, G["channel_grad_feat_s"])


def test_relation_limits():
    student, teacher = G["feat_s_live"], G["feat_t"]
    value, images = relation(student, teacher), len(teacher)
    assert relation(teacher, teacher) == 0
    close(relation(7.5 * student, teacher), value)
    close(relation(rotated(student), teacher), value)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(1))
    close(
        similarity_mse(student[order].flatten(1), teacher[order].flatten(1)),
        similarity_mse(student.flatten(1), teacher.flatten(1))[order],
    )
    assert 0 <= value <= 4 / images
    assert relation(student.relu(), teacher.relu()) <= 2 / images


def test_small_features_are_divided_by_the_bound_of_the_norm():
    """Card 12: each row is divided by max(‖row‖, 1e-12)."""
    student, teacher = (
        1e-8 * torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    )
    grams = [a @ a.T for a in (student, teacher)]
    rows = [g / g.norm(dim=1, keepdim=True).clamp(min=1e-12) for g in grams]
    close(similarity_mse(student, teacher), (rows[0] - rows[1]).square().mean(1))
    leaf = student.clone().requires_grad_()
    similarity_mse(leaf, teacher).sum().backward()
    assert leaf.grad.abs().max() == 0


def test_a_dead_image_or_class_has_finite_value_and_gradient():
    student = G["feat_s"].clone().requires_grad_()
    relation(student, G["feat_t"]).backward()
    dead = student.detach().flatten(1).abs().sum(1) == 0
    assert dead.any() and student.grad.abs().max() < 1  # divided by 1e-12 it would be of order 1e11
    head = G["fcw_s"].clone()
    head[0] = 0
    head.requires_grad_()
    value = class_map_mse(G["feat_s"], G["feat_t"], student_head=head, teacher_head=G["fcw_t"]).mean()
    value.backward()
    assert value.isfinite() and head.grad.abs().max() < 1


def test_gradients_of_a_class_by_the_rank_one_identity():
    student, teacher = torch.randn(2, 1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    width = student.shape[1]
    signs = (student.sign() * teacher.sign()).sum()
    cosine = torch.cosine_similarity(student, teacher)[0]
    close(by_class(student, teacher)[0] * width, 2 * width - 2 * signs * cosine)
    assert by_class(3 * teacher, teacher)[0] < 1e-20
    assert by_class(-teacher, teacher)[0] < 1e-20


def test_class_maps_ignore_scale():
    heads = {"student_head": G["fcw_s"], "teacher_head": G["fcw_t"]}
    value = class_map_mse(G["feat_s"], G["feat_t"], **heads)
    close(class_map_mse(3 * G["feat_s"], G["feat_t"], **heads), value)
    close(class_map_mse(G["feat_s"], G["feat_t"], **{**heads, "student_head": 5 * G["fcw_s"]}), value)


def test_bad_shapes():
    with pytest.raises(InputError, match="student's map has 8 channels and its head reads 5"):
        class_map_mse(G["feat_s"], G["feat_t"], student_head=G["fcw_t"], teacher_head=G["fcw_t"])
    with pytest.raises(InputError, match="two or more"):
        class_map_mse(G["feat_t"], G["feat_t"], student_head=G["fcw_t"][:1], teacher_head=G["fcw_t"][:1])
    with pytest.raises(InputError, match="use class_map_mse"):
        channel_similarity_mse(G["feat_s"], G["feat_t"])
