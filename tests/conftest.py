"""Shared fixtures: quiet, single-threaded, deterministic."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """What is imported is left out of full collections, of which each training has one: they take half of a small run."""
    import understudy.runs.run  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def data_folder():
    """The folder of UNDERSTUDY_DATA, or skip."""
    folder = os.environ.get("UNDERSTUDY_DATA")
    if not folder or not os.path.isdir(folder):
        pytest.skip("needs UNDERSTUDY_DATA")
    from pathlib import Path

    return Path(folder)
