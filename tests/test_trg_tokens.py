"""Paper 8, TRG: which layer the tokens come from, and which of them are drawn."""

from types import SimpleNamespace

import torch

from understudy.data import Batch
from understudy.methods.trg import TRG
from understudy.models import ClassifierRows
from understudy.training.shapes import look


def test_the_pooled_features_of_a_windowed_transformer_are_no_tokens():
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    rows = ClassifierRows(SwinForImageClassification(SwinConfig(image_size=64, patch_size=4, num_labels=3, **sizes)), 3)
    batch = Batch({"pixel_values": torch.rand(2, 3, 64, 64)}, torch.zeros(2, dtype=torch.long), torch.arange(2))
    found = look(rows, batch, taps=TRG().taps("student", rows, batch)).taps["tokens"]
    assert found.shape == (2, 64, 16)


def test_the_drawn_tokens_are_the_same_on_both_sides_and_hang_on_image_step_and_seed():
    method, x, ids = TRG(gamma=0.0, group=4, tokens=8, k=3, sigma=9.0), torch.randn(4, 4, 6), torch.arange(4)

    def local(other, step=0, seed=0):
        return method._group(x, other, ids, SimpleNamespace(step=step, total=9, modules={}, seed=seed))["local"]

    other = torch.randn(4, 4, 6)
    assert local(x).eq(0).all() and local(other).equal(local(other))
    assert not local(other).equal(local(other, seed=1)) and not local(other).equal(local(other, step=1))
