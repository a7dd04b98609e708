"""A text classifier into a smaller one, from a CSV with the columns `text` and `label`.

    python examples/classifier.py --teacher FOLDER --student FOLDER --data reviews.csv --output runs/classifier

The teacher is any Auto sequence classifier. Methods are compared over seeds on equal budgets; the best of them on the
validation split is trained once more and saved, and plain transformers loads it with its label names.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForSequenceClassification

from understudy import compare, distill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="Folder or Hub id of a sequence classifier.")
    parser.add_argument("--student", required=True, help="Folder or Hub id of a smaller encoder or classifier.")
    parser.add_argument("--data", required=True, help="CSV, JSONL, Parquet, or a Hub set.")
    parser.add_argument("--output", type=Path, default=Path("runs/classifier"))
    parser.add_argument("--methods", default="sft,kd,pld,dist", help="The first is the baseline.")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()

    recipe = {
        "task": "text_classification",
        "teacher": given.teacher,
        "student": given.student,
        "data": given.data,
        "trainer": {"max_steps": given.steps, "per_device_train_batch_size": 16, "learning_rate": 5e-4},
    }
    chosen = {**recipe, "eval_split": "validation", "output": str(given.output / "compared")}
    found = compare(chosen, given.methods.split(","), seeds=given.seeds)
    for row in found.table:
        print(f"{row['method']:>8}  {row['mean']:.3f} on validation  difference {row['difference'] or 0:+.3f}")
    best = max(found.table, key=lambda row: row["mean"])["method"]

    result = distill(recipe, method=best, output=str(given.output / "best"))
    model = AutoModelForSequenceClassification.from_pretrained(result.folder / "student")
    print(f"{best}: {result.metrics['accuracy']:.3f} on test, classes {', '.join(model.config.label2id)}")
    print(f"Report: {result.folder / 'report.html'}")


if __name__ == "__main__":
    main()
