"""A causal language model into a smaller one, from a teacher that answers once.

    python examples/causal_lm.py --teacher FOLDER --data texts.jsonl --output runs/causal_lm

The teacher's probabilities are captured first (38 bytes a token, unbiased), so that each arm reads them from disk: the
student trained alone and the student that is distilled, over seeds. The last lines say what distillation gained.
"""

import argparse
from pathlib import Path

from understudy import capture_recipe, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="Folder or Hub id of a causal language model.")
    parser.add_argument("--data", required=True, help="JSONL with `text`, `messages`, or `prompt` and `completion`.")
    parser.add_argument("--student", default="llama:hidden=96,layers=3,heads=4", help="Folder, Hub id, or sizes.")
    parser.add_argument("--output", type=Path, default=Path("runs/causal_lm"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--length", type=int, default=256, help="Tokens of a training sequence.")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()

    recipe = {
        "task": "language_modeling",
        "method": "kd",
        "student": given.student,
        "teacher": given.teacher,
        "data": {"name": given.data, "max_length": given.length},
        "options": {"temperature": 1.0},
        "trainer": {"max_steps": given.steps, "learning_rate": 1e-3, "warmup_steps": given.steps // 20},
    }
    cache = given.output / "teacher"
    captured = capture_recipe(recipe, cache)
    print(f"{captured.examples} examples are captured in {cache}")

    recipe["teacher"] = {"model": given.teacher, "cache": str(cache)}
    found = compare({**recipe, "output": str(given.output / "runs")}, ["sft", "kd"], seeds=given.seeds)
    for row in found.table:
        print(f"{row['method']:>4}  {row['mean']:.3f} {row['metric']}  difference {row['difference'] or 0:+.3f}")
    print(f"Report: {found.folder / 'report.html'}")


if __name__ == "__main__":
    main()
