"""Golden vectors: expected values from the papers' equations and official code."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from understudy.training.reduction import Counts, Term, sum_terms

OWN = Path(__file__).parent / "golden"
FOLDER = Path(os.environ.get("UNDERSTUDY_GOLDEN") or OWN)


def golden(name, folder=None):
    """All arrays of one file as tensors. Tests that need its shapes rather than its values take `folder=OWN`."""
    with np.load((folder or FOLDER) / f"{name}.npz", allow_pickle=False) as file:
        return {k: torch.from_numpy(np.asarray(file[k])) for k in file.files}


def close(actual, expected, rtol=1e-8, atol=1e-10):
    torch.testing.assert_close(actual.detach().to(expected), expected, rtol=rtol, atol=atol, equal_nan=True)


def reduce(values, how, sequence=None, count=None):
    """One number from row values by the engine's own sum and division; `count` stands for that of a whole update."""
    sequence = torch.zeros(len(values), dtype=torch.long) if sequence is None else sequence
    batch = SimpleNamespace(num_items=len(values), sequence=sequence)
    counts = Counts.of(batch, how, {}) if count is None else Counts(count, count)
    return counts.divide("loss", sum_terms({"loss": Term(values)}, batch, how).losses["loss"])
