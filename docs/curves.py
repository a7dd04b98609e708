"""Run the example of each method's page, and keep what it reaches on validation data in `curves.json`, which `build.py` draws.

`python docs/curves.py NAME ...` runs the examples of these methods; without a name, of those that have no curve yet.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from understudy.methods import built_in
from understudy.pages import example
from understudy.tasks import get as get_task

FILE = Path(__file__).parent / "curves.json"


def rationales() -> str:
    """The file of one example: sums of three numbers, with a right and a wrong rationale of each, and with the answer alone."""
    records = []
    for a, b, c in itertools.product(range(1, 7), repeat=3):
        total = f" so {a + b + c}"
        said = [f" {a} and {b} is {a + b}{total}", f" {a} and {b} is {a + b + 1} so {a + b + c + 1}"]
        asked = f"{a} + {b} + {c} ="
        records += [
            {"prompt": f"Explain: {asked}", "completions": said, "scores": [1, -1], "log_probs": [-0.1, -2.0]},
            {"prompt": f"Answer: {asked}", "completions": [f" {a + b + c}"], "scores": [0], "log_probs": [0.0]},
        ]
    return "".join(json.dumps(record) + "\n" for record in records)


def curve(name: str, code: str) -> dict[str, Any]:
    """A validation metric over optimizer steps of one run: the task's, unless it never changes; of the student's last training
    where a procedure has several. Empty where no weights are trained.

    Args:
        name: of the method. code: of its example.
    """
    with tempfile.TemporaryDirectory() as home, contextlib.chdir(home):
        Path("rationales.jsonl").write_text(rationales(), encoding="utf-8")
        exec(code, {})
        logs = sorted(Path("runs", name).rglob("validation.jsonl"), key=os.path.getmtime)
        if not logs:
            return {}
        lines = [json.loads(line) for line in logs[-1].read_text(encoding="utf-8").splitlines()]
        task = get_task(json.loads((logs[-1].parent / "run.json").read_text(encoding="utf-8"))["task"])
        shown = [key for key in (task.metric, *lines[0]) if key != "step" and key in lines[0]]
        metric = next((key for key in shown if len({line[key] for line in lines}) > 1), shown[0])
        return {
            "metric": metric,
            "steps": [line["step"] for line in lines],
            "values": [line[metric] for line in lines],
        }


def main() -> None:
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    methods = {method.name: method for method in built_in()}
    for name in sys.argv[1:] or sorted(set(methods) - set(found)):
        found[name] = curve(name, example(methods[name]))
        lines = [f"{json.dumps(key)}: {json.dumps(found[key])}" for key in sorted(found)]
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
