"""Run the example of each method's page, and keep what it reaches on validation data in `curves.json`, which `build.py` draws.

`python docs/curves.py NAME ...` runs the examples of these methods; without a name, of those that have no curve yet.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from understudy.methods import built_in
from understudy.pages import example
from understudy.tasks import get as get_task

FILE = Path(__file__).parent / "curves.json"


def curve(name: str, code: str) -> dict[str, Any]:
    """The validation metric over optimizer steps of one run: of the student's last training where a procedure has several;
    empty where no weights are trained.

    Args:
        name: of the method. code: of its example.
    """
    with tempfile.TemporaryDirectory() as home, contextlib.chdir(home):
        begun = time.perf_counter()
        exec(code, {})
        logs = sorted(Path("runs", name).rglob("validation.jsonl"), key=os.path.getmtime)
        if not logs:
            return {}
        lines = [json.loads(line) for line in logs[-1].read_text(encoding="utf-8").splitlines()]
        task = get_task(json.loads((logs[-1].parent / "run.json").read_text(encoding="utf-8"))["task"])
        metric = task.metric if task.metric in lines[0] else next(key for key in lines[0] if key != "step")
        seconds = round(time.perf_counter() - begun)
        return {
            "metric": metric,
            "steps": [line["step"] for line in lines],
            "values": [line[metric] for line in lines],
            "seconds": seconds,
        }


def main() -> None:
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    methods = {method.name: method for method in built_in()}
    for name in sys.argv[1:] or sorted(set(methods) - set(found)):
        found[name] = curve(name, example(methods[name]))
        ordered = {key: found[key] for key in sorted(found)}
        FILE.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
