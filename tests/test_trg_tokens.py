"""Paper 8, TRG: which layer the tokens come from, and which of them are drawn."""

from types import SimpleNamespace

import pytest
import torch

from understudy import InputError
from understudy.data import Batch
from understudy.losses.relations import grid_tokens
from understudy.methods.trg import TRG
from understudy.models import ClassifierAdapter
from understudy.training.shapes import look


def test_the_pooled_features_of_a_windowed_transformer_are_no_tokens():
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    rows = ClassifierAdapter(
        SwinForImageClassification(SwinConfig(image_size=64, patch_size=4, num_labels=3, **sizes)), 3
    )
    batch = Batch({"pixel_values": torch.rand(2, 3, 64, 64)}, torch.zeros(2, dtype=torch.long), torch.arange(2))
    found = look(rows, batch, taps=TRG().taps("student", rows, batch)).taps["tokens"]
    assert found.shape == (2, 64, 16)


def test_registers_before_the_patches_are_dropped():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_register_tokens": 4}
    config = Dinov2WithRegistersConfig(image_size=32, patch_size=8, num_labels=3, **sizes)
    rows = ClassifierAdapter(Dinov2WithRegistersForImageClassification(config), 3)
    batch = Batch({"pixel_values": torch.rand(2, 3, 32, 32)}, torch.zeros(2, dtype=torch.long), torch.arange(2))
    tokens = look(rows, batch, taps=TRG().taps("teacher", rows, batch)).taps["tokens"]
    assert tokens.shape == (2, 1 + 4 + 16, 8)
    torch.testing.assert_close(TRG(teacher_prefix=5)._patches(tokens, "teacher"), grid_tokens(tokens[:, 5:], 2))
    shapes = SimpleNamespace(taps={"tokens": (21, 8)}, teacher_taps={"tokens": (21, 8)})
    with pytest.raises(InputError, match=r"21 tokens are no square grid behind 1 others.*student_prefix"):
        TRG().modules(shapes)
    assert TRG(student_prefix=5, teacher_prefix=5).modules(shapes)["projector"].weight.shape == (8, 8)


def test_the_drawn_tokens_are_the_same_on_both_sides_and_hang_on_image_step_and_seed():
    method, x, ids = TRG(gamma=0.0, group=4, tokens=8, k=3, sigma=9.0), torch.randn(4, 4, 6), torch.arange(4)

    def local(other, step=0, seed=0):
        return method._group(x, other, ids, SimpleNamespace(step=step, total=9, modules={}, seed=seed))["local"]

    other = torch.randn(4, 4, 6)
    assert local(x).eq(0).all() and local(other).equal(local(other))
    assert not local(other).equal(local(other, seed=1)) and not local(other).equal(local(other, step=1))
