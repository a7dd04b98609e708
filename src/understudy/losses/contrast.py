"""Contrast between two views of the images of a group: one value an image, unreduced.

A group is `[images, width]`; its images are coupled, so a batch may be cut between groups and not inside one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.errors import InputError
from understudy.losses._pairs import check_temperature, unit


def nt_xent(first: Tensor, second: Tensor, *, temperature: float = 0.3) -> Tensor:
    """Cross-entropy of finding an image's other view among all other vectors of both views, by cosine similarity.

    Args:
        first, second: the two views `[images, width]`; row i of both is the same image. Both get gradient. Scales do not
            matter.
        temperature: divides the similarities.

    Returns:
        `[images]`, the mean over both views of −log softmax over the other 2 · images − 1 vectors. At least 0, and 0 for
        a single image; log(2 · images − 1) where all vectors are equal.

    Raises:
        InputError: the shapes differ, or a temperature that is not above 0.

    Source: Chen et al. 2020 (SimCLR), Eq. 1; Tang et al. 2023 (KD³), as released.
    """
    check_temperature("nt_xent", temperature)
    if first.shape != second.shape:
        raise InputError(
            f"nt_xent: the first view is {tuple(first.shape)} and the second {tuple(second.shape)}: give two of one shape."
        )
    number = len(first)
    x = unit(torch.cat([first, second]))
    own = torch.eye(2 * number, dtype=torch.bool, device=x.device)
    log_p = (x @ x.T / temperature).masked_fill(own, -torch.inf).log_softmax(1)
    return -(log_p.diagonal(number) + log_p.diagonal(-number)) / 2
