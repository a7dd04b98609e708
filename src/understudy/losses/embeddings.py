"""Distances between the embeddings of a student and a teacher, one value a text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cos(student, teacher): 0 where they point the same way, 2 where they are opposed. Scales do not matter.

    Args:
        student, teacher: `[..., width]`.

    Returns:
        `[...]`; a vector of zeros has distance 1 to any other, and no gradient.
    """
    return 1 - (F.normalize(student, dim=-1) * F.normalize(teacher, dim=-1)).sum(-1)


def embedding_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over entries of (student − teacher)².

    Args:
        student, teacher: `[..., width]`.

    Returns:
        `[...]`.

    Source: Reimers and Gurevych 2020 (arXiv 2004.09813), Equation 1, for the texts of one language.
    """
    return (student - teacher).square().mean(-1)


def principal_directions(vectors: Tensor, number: int) -> Tensor:
    """The directions in which vectors vary most, the first the most.

    Args:
        vectors: `[texts, width]`.

    Returns:
        `[width, number]`, float64, orthonormal columns; the largest entry of each is positive.
    """
    centred = vectors.double() - vectors.double().mean(0)
    found = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :number]
    largest = found.gather(0, found.abs().argmax(0, keepdim=True))
    return found * largest.sign()
