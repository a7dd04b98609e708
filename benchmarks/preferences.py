r"""The preference methods on the same pairs, at equal steps. CSV to standard output.

    python benchmarks/preferences.py > benchmarks/results/preferences-world-cpu.csv
    python benchmarks/preferences.py --pairs --seeds 3 --steps 20 > benchmarks/results/preferences-hh-cpu.csv

The world is the chains of `preference_world`: pairs labelled by the return of sequences, and a student that was first trained
on sequences of the chain. `value` is the exact return less the KL divergence from the chain, `accuracy` the share of test pairs
in the order of their labels. In `noisy` a quarter of the training labels is flipped. Each seed is a world of its own.

With `--pairs` they are people's pairs of harmless and harmful answers, the student is a pretrained causal LM of 6 M parameters,
and `accuracy` is what is judged.

Every arm takes the same steps and batches. Of several `--rates` it has the one that is best on the validation split of `--tuning`
other seeds (two in the world; of one rate, as with `--pairs`, nothing is chosen). Intervals are Student's, 95 %; differences are to DPO at the same seed.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from understudy.reporting.table import summarise
from understudy.runs.comparison import places, run_all
from understudy.runs.recipe import Recipe, make

COLUMNS = (
    "setting arm learning_rate seeds metric mean low high difference difference_low difference_high accuracy "
    "seconds_per_run steps machine torch threads"
).split()
TUNING_SEED, NOISE = 100, 0.25
PAIRS, MODEL = "preferences/hh_harmless_base_test.parquet", "lm_domains_6m"
Arm = tuple[str, dict[str, Any]]
WORLD: dict[str, Arm] = {
    "dpo": ("dpo", {}),
    "sft": ("sft", {}),
    "dpo + sft": ("dpo", {"loss_type": ["dpo", "sft"]}),
    "dpo, weighted": ("dpo", {"use_weighting": True}),
    "cdpo": ("dpo", {"loss_type": "cdpo"}),
    "robust": ("dpo", {"loss_type": "robust"}),
    "robust, e = 0.25": ("dpo", {"loss_type": "robust", "label_smoothing": NOISE}),
    "ipo": ("dpo", {"loss_type": "ipo"}),
    "kto": ("dpo", {"loss_type": "kto"}),
    "cpo": ("dpo", {"loss_type": "cpo"}),
    "simpo": ("dpo", {"loss_type": "simpo"}),
    "apo_zero": ("dpo", {"loss_type": "apo_zero"}),
    "adpo": ("adpo", {"tau": 1.0, "beta_reward": 0.5}),
    "tpo": ("tpo", {}),
    "dpo-pg": ("dpo-pg", {}),
    "redi": ("redi", {}),
    "dckd, exact teacher": ("adpa", {"objective": "dckd"}),
}
REAL = {
    name: WORLD[name]
    for name in ("dpo", "sft", "dpo, weighted", "robust", "ipo", "kto", "simpo", "adpo", "tpo", "dpo-pg")
}


def recipe(
    args: argparse.Namespace, setting: str, arm: Arm, rate: float, seed: int, split: str, output: Path
) -> Recipe:
    """One run, evaluated on a split."""
    method, options = arm
    if method == "redi":  # of its second phase, as in its paper a fiftieth of the first one's
        options = {**options, "learning_rate": rate / 50}
    trainer = {"max_steps": args.steps, "learning_rate": rate, "save_strategy": "no", "logging_steps": args.steps}
    values: dict[str, Any] = {
        "method": method,
        "options": options,
        "seed": seed,
        "output": str(output),
        "eval_split": split,
    }
    if setting == "pairs":
        trainer |= {"per_device_train_batch_size": 4}
        data = {"name": PAIRS, "max_length": args.length, "limit": 4 * args.steps}
        return make({**values, "task": "preferences", "data": data, "student": MODEL, "trainer": trainer})
    data = {"name": "chains", "label_noise": NOISE if setting == "noisy" else 0.0}
    teacher = {"teacher": "soft_optimal"} if method == "adpa" else {}
    return make({**values, **teacher, "task": "preference_world", "data": data, "trainer": trainer})


def rows(args: argparse.Namespace, setting: str, folder: Path) -> list[list[Any]]:
    """One setting: choose each arm's learning rate, then judge it."""
    arms = {name: arm for name, arm in (REAL if args.pairs else WORLD).items() if not args.arms or name in args.arms}
    metric = "accuracy" if args.pairs else "value"
    rates = args.rates or ((1e-4,) if args.pairs else (5e-3, 2e-2))
    homes = places(arms)

    def results(rate_of: Mapping[str, float], seeds: range, split: str) -> list[dict[str, Any]]:
        cells = [(name, seed) for name in rate_of for seed in seeds]
        plans = [
            recipe(args, setting, arms[n], rate_of[n], s, split, folder / setting / f"{homes[n]}-{rate_of[n]}-s{s}")
            for n, s in cells
        ]
        found = run_all(plans, folder / setting / "start", workers=args.workers)
        return [{"method": n, "seed": s, **one} for (n, s), one in zip(cells, found, strict=True)]

    rate_of = dict.fromkeys(arms, rates[0])
    if len(rates) > 1:
        others = range(TUNING_SEED, TUNING_SEED + args.tuning)
        tried = {rate: results(dict.fromkeys(arms, rate), others, "validation") for rate in rates}
        score = {
            (rate, n): fmean(d["metrics"][metric] for d in done if d["method"] == n)
            for rate, done in tried.items()
            for n in arms
        }
        rate_of = {name: max(rates, key=lambda rate: score[rate, name]) for name in arms}
    done = results(rate_of, range(args.seeds), "test")
    out = []
    for row in summarise(done, "dpo", metric):
        own = [d for d in done if d["method"] == row["method"]]
        numbers = [row["mean"], *row["interval"], row["difference"], *row["difference_interval"]]
        numbers.append(fmean(d["metrics"]["accuracy"] for d in own))
        numbers.append(fmean(d["cost"]["seconds"] for d in own))
        shown = ["" if v is None else f"{v:.4f}" for v in numbers]
        where = [args.steps, platform.machine(), torch.__version__, 1]
        out.append([setting, row["method"], rate_of[row["method"]], args.seeds, metric, *shown, *where])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", action="store_true", help="people's pairs and a small causal LM")
    parser.add_argument("--arms", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tuning", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="learning rates to choose from")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--length", type=int, default=96, help="most tokens of a pair's side")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder of the runs, to go on where it was stopped")
    args = parser.parse_args()
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(COLUMNS)
    with tempfile.TemporaryDirectory() as temporary:
        for setting in ("pairs",) if args.pairs else ("clean", "noisy"):
            out.writerows(rows(args, setting, args.output or Path(temporary)))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
