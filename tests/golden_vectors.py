"""Golden vectors: expected values from the papers' equations and official code."""

import os
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(os.environ.get("UNDERSTUDY_GOLDEN") or Path(__file__).parent / "golden")


def golden(name):
    """All arrays of one file as tensors."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {k: torch.from_numpy(np.asarray(file[k])) for k in file.files}


def close(actual, expected, rtol=1e-8, atol=1e-10):
    torch.testing.assert_close(actual.detach().to(expected), expected, rtol=rtol, atol=atol)
