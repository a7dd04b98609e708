"""31 Data pruning: with few examples kept, a teacher of all the data helps, whatever chose them.

Digits with a tenth of the labels replaced by random ones; every run takes as many steps. On real data: photographs.
"""

from typing import Any

from understudy.claims._photographs import photographs
from understudy.claims.experiment import Arm, Check, Claim

_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (1e-3, 3e-3))


def _arm(score: str, fraction: float, alpha: float) -> Arm:
    options: dict[str, Any] = {"score": score, "fraction": fraction, "alpha": alpha, "class_balanced": True}
    return Arm("data-pruning-kd", options, _RATES)


_ARMS = {
    f"{score}/{fraction:g}{'/kd' if alpha else ''}": _arm(score, fraction, alpha)
    for score in ("random", "forgetting", "el2n")
    for fraction in (0.1, 0.5)
    for alpha in (0.0, 1.0)
}
CLAIM = Claim(
    name="data-pruning-kd",
    statement="On a tenth of the data, chosen at random, distillation is at least 4 points above cross-entropy.",
    recipe={
        "task": "image_classification",
        "data": {"name": "digits", "limit": 1000, "label_noise": 0.1},
        "teacher": {
            "model": "mlp:128,128",
            "train": {"max_steps": 800, "per_device_train_batch_size": 32, "learning_rate": 1e-3},
        },
        "student": "mlp:128,128",
        "trainer": {"max_steps": 600, "per_device_train_batch_size": 32, "save_strategy": "no"},
    },
    arms=_ARMS,
    checks=(
        Check(
            "random/0.1/kd", "random/0.1", 0.04, "accuracy", True, "at random, 4 points above cross-entropy at f = 0.1"
        ),
        Check("random/0.5/kd", "random/0.5", 0.0, "accuracy", True, "at random, above cross-entropy at f = 0.5"),
        Check("forgetting/0.1/kd", "forgetting/0.1", 0.0, "accuracy", True, "distillation repairs hard examples"),
        Check("el2n/0.1/kd", "el2n/0.1", 0.0, "accuracy", True, "and those of large error"),
        Check("random/0.1/kd", "forgetting/0.1/kd", 0.0, "accuracy", True, "random is above hard examples at f = 0.1"),
        Check("random/0.1/kd", "el2n/0.1/kd", 0.0, "accuracy", True, "and above those of large error"),
        Check("random/0.1", "forgetting/0.1", 0.0, "accuracy", True, "without a teacher, hard examples are worse"),
    ),
    tuned_on=("accuracy", True),
    knobs=({"temperature": 1.0}, {"temperature": 2.0}, {"alpha": 0.5}, {"alpha": 0.5, "temperature": 1.0}),
    settings={"real": photographs({"limit": 10000, "label_noise": 0.1})},
)
