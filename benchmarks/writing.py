"""What it costs to write the student's own samples, padded and continuously. CSV to standard output.

    python benchmarks/writing.py --threads 1 > benchmarks/results/writing-cpu.csv

A student of 4 layers of 256 and vocabulary 4,096 with weights as drawn, so that every token is about as likely: so many of
them end a text that its length has the given mean, up to `most`. Engines take turns, medians of `--repeats`; seconds are
of the process, all threads together, since a shared machine's clock says little. `useful` is the share of padded rows
that were not yet at their end, `same` the share of texts that are equal token for token.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from understudy.generation.continuous import sample_continuously
from understudy.generation.decoding import sample

COLUMNS = (
    "texts in_flight prompt most mean useful same padded continuous ratio machine torch transformers threads".split()
)
VOCABULARY = 4096
CASES = (  # texts, in_flight, longest prompt, most, mean length (0: all as long as they may be)
    (32, 32, 32, 64, 0),
    (128, 32, 32, 64, 0),
    (32, 32, 32, 128, 24),
    (128, 8, 32, 128, 24),
    (128, 32, 32, 128, 24),
    (128, 64, 32, 128, 24),
    (128, 32, 32, 256, 12),
    (64, 16, 192, 256, 100),
    (128, 64, 192, 256, 100),
    (128, 64, 768, 128, 60),
)


def student() -> LlamaForCausalLM:
    """The model that writes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).eval()


def clocked(write: Callable[..., list[list[int]]], *args: Any, **options: Any) -> tuple[list[list[int]], float]:
    """What was written, and seconds of the process."""
    start = time.process_time()
    return write(*args, **options), time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = [platform.machine(), torch.__version__, transformers.__version__, args.threads]
    model, out = student(), csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(COLUMNS)
    for texts, in_flight, longest, most, mean in CASES:
        draw = torch.Generator().manual_seed(texts + longest)
        lengths = torch.randint(longest // 8, longest + 1, (texts,), generator=draw).tolist()
        prompts = [torch.randint(2, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]
        keys = torch.randint(2**53, (texts,), generator=draw)
        ends = set(range(2, 2 + VOCABULARY // mean)) if mean else set()
        options: dict[str, Any] = {"most": most, "vocabulary": VOCABULARY, "ends": ends, "in_flight": in_flight}
        found: dict[str, list[tuple[list[list[int]], float]]] = {"padded": [], "continuous": []}
        for _ in range(args.repeats):
            found["padded"].append(clocked(sample, model, prompts, keys, pad=0, **options))
            found["continuous"].append(clocked(sample_continuously, model, prompts, keys, **options))
        one, other = (found[name][0][0] for name in ("padded", "continuous"))
        order = sorted(range(texts), key=lambda i: (lengths[i], i))
        parts = [[len(one[i]) for i in order[a : a + in_flight]] for a in range(0, texts, in_flight)]
        tokens = sum(map(sum, parts))
        useful = tokens / sum(len(part) * max(part) for part in parts)
        same = sum(a == b for a, b in zip(one, other, strict=True)) / texts
        padded, continuous = (statistics.median(s for _, s in found[name]) for name in ("padded", "continuous"))
        values = [f"{tokens / texts:.1f}", f"{useful:.2f}", f"{same:.3f}", f"{padded:.2f}", f"{continuous:.2f}"]
        out.writerow([texts, in_flight, longest, most, *values, f"{continuous / padded:.2f}", *where])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
