"""9 PLD: list-wise distillation needs no mixing weight and does as well as tuned KD.

Digits, as the card's experiment: the teacher sees the whole training part, the student 200 examples.

On real data: photographs, a pretrained ResNet-20 as teacher, a ResNet-8 as student; four candidates for each arm.
"""

from understudy.claims._photographs import photographs
from understudy.claims.experiment import Arm, Check, Claim

# Nine candidates for each arm: three learning rates by three temperatures, or nine learning rates in the same range.
_RATES = (1e-3, 3e-3, 6e-3)
_GRID = tuple(
    {"trainer": {"learning_rate": rate}, "options": {"temperature": t}} for rate in _RATES for t in (1.0, 2.0, 4.0)
)
_FINE = tuple({"trainer": {"learning_rate": 1e-3 * 6 ** (i / 8)}} for i in range(9))
_REAL_GRID = tuple(
    {"trainer": {"learning_rate": rate}, "options": {"temperature": t}} for rate in (1e-3, 3e-3) for t in (1.0, 4.0)
)
_REAL = photographs(
    arms={
        "sft": Arm("sft", {}, tuple({"trainer": {"learning_rate": rate}} for rate in (1e-3, 2e-3, 3e-3, 6e-3))),
        "kd": Arm("kd", {"ce_weight": 0.1, "kd_weight": 0.9}, _REAL_GRID),
        "pld": Arm("pld", {}, _REAL_GRID),
    },
)

CLAIM = Claim(
    name="pld",
    statement="PLD beats cross-entropy by at least 1.5 points of accuracy and is within one point of tuned KD.",
    recipe={
        "task": "image_classification",
        "data": {"name": "digits", "limit": 200},
        "teacher": {"model": "mlp:256,256", "train": {"max_steps": 1500, "learning_rate": 1e-3}},
        "student": "mlp:24",
        "trainer": {"max_steps": 1050, "per_device_train_batch_size": 32, "learning_rate": 3e-3},
    },
    arms={
        "sft": Arm("sft", {}, _FINE),
        "kd": Arm("kd", {"ce_weight": 0.1, "kd_weight": 0.9}, _GRID),
        "pld": Arm("pld", {}, _GRID),
    },
    checks=(
        Check("pld", "sft", 0.015, "accuracy", True, "PLD is 1.5 points above cross-entropy"),
        Check("pld", "kd", -0.01, "accuracy", True, "PLD is within one point of tuned KD"),
    ),
    knobs=(
        *({"temperature": t} for t in (0.5, 1.0, 4.0, 8.0)),
        *({"weights": w, "temperature": 1.0} for w in ("uniform", "position", "first")),
    ),
    tuned_on=("accuracy", True),
    settings={"real": _REAL},
)
