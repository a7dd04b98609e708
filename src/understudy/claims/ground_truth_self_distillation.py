"""38 Ground-truth self-distillation: soft targets of its own kind help a network whose labels are noisy.

Digits, 400 training examples with two fifths of the labels random; generations of one network, each new. The control
trains as many networks on the labels alone. On real data: photographs.
"""

from understudy.claims._photographs import photographs
from understudy.claims.experiment import Arm, Check, Claim

_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (1e-3, 3e-3))
_NAME = "ground-truth-self-distillation"

CLAIM = Claim(
    name=_NAME,
    statement="With noisy labels, one step of self-distillation gains at least a point of accuracy over fitting the labels "
    "again.",
    recipe={
        "task": "image_classification",
        "data": {"name": "digits", "limit": 400, "label_noise": 0.4},
        "student": "mlp:64,128",
        "trainer": {"max_steps": 600, "per_device_train_batch_size": 32, "save_strategy": "no"},
    },
    arms={
        "labels": Arm(_NAME, {"generations": 2, "alpha": 1.0}, _RATES),
        "pure": Arm(_NAME, {"generations": 2, "alpha": 0.0}, _RATES),
        "fixed": Arm(_NAME, {"generations": 2, "alpha": 0.35}, _RATES),
        "estimated": Arm(_NAME, {"generations": 2}, _RATES),
    },
    checks=(
        Check("fixed", "labels", 0.01, "accuracy", True, "α = 0.35 gains a point over the labels again"),
        Check("pure", "labels", 0.01, "accuracy", True, "so does α = 0, with so much noise"),
        Check("estimated", "labels", 0.01, "accuracy", True, "so does the estimated α"),
        Check("estimated", "fixed", -0.01, "accuracy", True, "the estimated α is within a point of α = 0.35"),
    ),
    knobs=(*({"alpha": a} for a in (0.0, 0.2, 0.5, 0.7)), *({"generations": g} for g in (3, 5))),
    tuned_on=("accuracy", True),
    settings={"real": photographs({"limit": 5000, "label_noise": 0.4}, None, 500)},
)
