"""What a run is said to cost: operations are those of torch's counter, and counting them costs no memory."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from understudy.evaluation.cost import ALSO, Operations

PEAK = """
import sys, torch
from contextlib import nullcontext
from pathlib import Path
from torch import nn
from torch.utils.checkpoint import checkpoint
from understudy.evaluation.cost import Operations

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 1024), nn.Linear(1024, 64)

    def forward(self, x):
        return self.down(torch.sigmoid(self.up(x)))

torch.set_num_threads(1)
blocks = nn.ModuleList(Block() for _ in range(12))

def step():
    hidden = torch.randn(2048, 64)
    for block in blocks:
        hidden = checkpoint(block, hidden, use_reentrant=False)
    hidden.sum().backward()

def resident(key):
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key)).split()[1])

step()
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
with Operations() if sys.argv[1] == "counted" else nullcontext():
    step()
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads the peak as Linux tells it")
def test_the_step_that_is_counted_keeps_what_checkpointing_gave_up_no_longer_than_others():
    quiet = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    plain, counted = (
        int(
            subprocess.run(
                [sys.executable, "-c", PEAK, how], capture_output=True, text=True, env=quiet, check=True
            ).stdout
        )
        for how in ("plain", "counted")
    )
    one_block = 2048 * 1024 * 4 // 1024  # KiB of an inner activation; a block keeps two, and there are twelve blocks
    assert counted < plain + 3 * one_block


def test_operations_are_those_of_torchs_counter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    query = torch.randn(2, 4, 16, 8, requires_grad=True)

    def work():
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
        torch.zeros(3, 5).addmm_(torch.ones(3, 2), torch.ones(2, 5))

    also = {name: count.__wrapped__ for name, count in ALSO.items()}  # that counter takes the shapes itself
    with FlopCounterMode(display=False, custom_mapping=also, depth=None) as torchs:
        work()
    with Operations() as ours:
        work()
    assert ours.total == torchs.get_total_flops() > 2 * 3 * 2 * 5
