"""Samplers of a few calls beside their teacher, from a finished comparison. CSV to standard output.

    understudy compare benchmarks/few_step.yaml --seeds 3
    python benchmarks/few_step.py runs/few-step > benchmarks/results/few-step-cpu.csv

One row for each run, then the teacher with each number of calls. `student` and `teacher` are rows that each network
computed in training steps, `stored` those that the teacher computed before.
"""

from __future__ import annotations

import csv
import platform
import sys
from pathlib import Path

import torch

from understudy.files import read_json

COLUMNS = "arm seed calls distance rmse coverage steps student teacher stored seconds machine torch".split()


def main() -> None:
    found = read_json(Path(sys.argv[1]) / "comparison.json")
    assert found is not None, "run the comparison first"
    out, where = csv.writer(sys.stdout, lineterminator="\n"), [platform.machine(), torch.__version__]
    out.writerow(COLUMNS)
    for run in found["runs"]:
        m, cost = run["metrics"], run["cost"]
        quality = [f"{m[name]:.4f}" for name in ("distance", "rmse", "coverage")]
        rows = [cost["forwards"].get(side, 0) for side in ("student", "teacher")]
        spent = [cost["steps"], *rows, int(m.get("stored_teacher_calls", 0)), f"{cost['seconds']:.1f}"]
        out.writerow([run["method"], run["seed"], int(m["nfe"]), *quality, *spent, *where])
    first = found["runs"][0]["metrics"]
    for calls in (1, 2, 4, 8, 16):
        out.writerow(["teacher", "", calls, f"{first[f'teacher_{calls}_distance']:.4f}", *[""] * 7, *where])


if __name__ == "__main__":
    main()
