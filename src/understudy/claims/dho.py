"""23 DHO: two heads hold up where labels and teacher disagree, whatever the weight between them.

Digits with five labels a class and a teacher that saw 40 examples, so that it is often wrong. Every arm takes as many steps.
On real data: photographs with 1 % of labels and a teacher that saw 1,000.
"""

from typing import Any

from understudy.claims._photographs import CONVNET, photographs
from understudy.claims.experiment import Arm, Check, Claim

_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (2e-3, 6e-3))


def _arm(heads: str, lam: float) -> Arm:
    options: dict[str, Any] = {"heads": heads, "lam": lam, "select": False}
    return Arm("dho", options, _RATES)


CLAIM = Claim(
    name="dho",
    statement="At equal weight of labels and teacher, two heads are 1.5 points of accuracy or more above one.",
    recipe={
        "task": "image_classification",
        "data": {"name": "digits", "limit": 1000, "labelled": 5, "teacher_limit": 40},
        "teacher": {
            "model": "mlp:64",
            "train": {"max_steps": 300, "per_device_train_batch_size": 20, "learning_rate": 2e-3},
        },
        "student": "mlp:64,64",
        "trainer": {"max_steps": 1200, "per_device_train_batch_size": 32, "save_strategy": "no"},
    },
    arms={
        "labels": _arm("one", 1.0),
        **{f"{heads}/{lam:g}": _arm(heads, lam) for lam in (0.1, 0.5, 0.9) for heads in ("one", "two")},
    },
    checks=(
        Check("two/0.5", "one/0.5", 0.015, "accuracy", True, "two heads are 1.5 points above one at λ = 0.5"),
        Check("two/0.1", "one/0.1", 0.015, "accuracy", True, "and at λ = 0.1"),
        Check("two/0.9", "one/0.9", 0.0, "accuracy", True, "and above it at λ = 0.9"),
        Check("two/0.5", "labels", -0.005, "accuracy", True, "they are within half a point of labels alone"),
        Check(
            "two/0.1",
            "two/0.9",
            -0.03,
            "accuracy",
            True,
            "the weight matters little: λ = 0.1 is within 3 points of 0.9",
        ),
    ),
    knobs=({"select": True}, *({"temperature": t} for t in (1.0, 4.0)), {"kd_head": "cosine"}),
    tuned_on=("accuracy", True),
    settings={"real": photographs({"labelled": 45, "teacher_limit": 1000}, CONVNET)},
)
