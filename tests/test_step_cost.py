"""What a step leaves out changes nothing: whole batches read at once, rows not picked out where all count."""

import numpy as np
import pytest
import torch

from understudy.data import IGNORE, Batch, ImageSet, collate_images


@pytest.mark.parametrize("named", [False, True])
def test_a_batch_read_at_once_is_its_examples(named):
    domains = np.array(["sketch", "photo", "photo", "sketch", "clip", "photo"], dtype=object) if named else None
    images = ImageSet(torch.rand(6, 1, 2, 2), torch.arange(6) % 3, torch.arange(10, 16), domains=domains)
    kinds = ("clip", "photo", "sketch") if named else ()
    at_once = collate_images(images.__getitems__([4, 0, 4, 5]), kinds)
    one_by_one = collate_images([images[i] for i in (4, 0, 4, 5)], kinds)
    assert at_once.keys() == one_by_one.keys() == {"pixel_values", "labels", "ids", *(["domains"] if named else [])}
    for name, column in one_by_one.items():
        assert torch.equal(at_once[name], column) and at_once[name].dtype == column.dtype


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("text", [False, True])
def test_rows_and_their_gradient_are_those_of_the_mask(text, ignored):
    labels = torch.arange(12).view(3, 4) if text else torch.arange(3)
    if ignored:
        labels[1] = IGNORE
    batch = Batch({}, labels, torch.arange(3))
    values = torch.randn(*labels.shape, 5, requires_grad=True)
    weight = torch.randn(batch.num_items, 5)
    rows = batch.select(values)
    picked = (values[:, :-1] if text else values)[batch.mask]
    assert torch.equal(rows, picked)
    assert torch.equal(*(torch.autograd.grad((r * weight).sum(), values)[0] for r in (rows, picked)))
    assert torch.equal(batch.row_labels, (labels[:, 1:] if text else labels)[batch.mask])
    assert torch.equal(batch.sequence, batch.mask.nonzero()[:, 0])
