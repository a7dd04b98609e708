"""27 Talking Models: messages to and from a teacher of another task help a student that has few labels.

Digits in noise, in four groups of which 150 have a label, and a teacher that was trained on other digits, in ten classes. Each
seed draws noise of its own and trains its own teacher on it. On real data: photographs of a hundred kinds, and a teacher of ten
other kinds.
"""

from typing import Any

from understudy.claims._photographs import photographs
from understudy.claims.experiment import Arm, Check, Claim

_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (2e-3, 5e-3))
_REAL_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (1e-3, 3e-3))


def _arms(rates: Any, student: str, teacher: str) -> dict[str, Arm]:
    """Each arm reads the last layer before the head, by its name in both networks."""

    def talking(**options: Any) -> Arm:
        return Arm("talking-models", options, rates)

    features = {"kd_weight": 0.0, "hint_weight": 1.0, "student_layer": student, "teacher_layer": teacher}
    return {
        "sft": Arm("sft", {}, rates),
        "features": Arm("fitnets", features, rates),
        "talking-models": talking(),
        "talking-models/no-interact": talking(interact_weight=0.0),
        "talking-models/no-message": talking(message_weight=0.0),
    }


_CHECKS = (
    Check("talking-models", "sft", 0.0, "accuracy", True, "it is above cross-entropy alone"),
    Check("talking-models", "features", 0.0, "accuracy", True, "and above regression of the teacher's features"),
    Check("talking-models", "talking-models/no-interact", 0.0, "accuracy", True, "the loss after the exchange helps"),
    Check("talking-models", "talking-models/no-message", 0.0, "accuracy", True, "the consistency of messages helps"),
)

CLAIM = Claim(
    name="talking-models",
    statement="A student that exchanges messages with a teacher of another task is above one trained on its labels alone.",
    recipe={
        "task": "image_classification",
        "data": {"name": "digits_shift", "limit": 150, "validation_size": 100},
        "teacher": {
            "model": "mlp:256,256",
            "train": {"max_steps": 800, "per_device_train_batch_size": 64, "learning_rate": 1e-3},
        },
        "student": "mlp:24,24",
        "trainer": {
            "max_steps": 1000,
            "per_device_train_batch_size": 32,
            "weight_decay": 1e-4,
            "save_strategy": "no",
        },
    },
    arms=_arms(_RATES, "body", "body"),
    checks=_CHECKS,
    tuned_on=("accuracy", True),
    new_data=True,
    caveat="The paper's weights, layers and consistency losses are not published in full; those tried here are ours.",
    settings={
        "real": photographs(
            {"name": "cifar100", "limit": 5000},
            arms=_arms(_REAL_RATES, "layer3", "layer3"),
            caveat="The paper's weights, layers and consistency losses are not published in full; those tried here are ours.",
        )
    },
)
