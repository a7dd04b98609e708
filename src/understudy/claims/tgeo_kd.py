"""35 TGeo-KD: a weight learned for each example beats the best weight for all, where teacher and labels err apart.

Digits: 500 examples with 30 % random labels, 150 clean ones for validation, and a teacher that learned random labels
for three classes. Every arm has seven candidates to choose from on the validation set. The untrained network has no
weight to choose, so it tunes the learning rate, which the others may not; `ce_all` has nothing to tune, since its
validation data are training data.

On real data: the same of larger handwritten digits (28 × 28).
"""

from typing import Any

from understudy.claims.experiment import Arm, Check, Claim, Setting

_ALPHAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
_FIXED = tuple({"options": {"kd_weight": a, "ce_weight": 1 - a}} for a in _ALPHAS)
_RATES = ((5e-3, 0.1), (5e-3, 0.03), (5e-3, 0.3), (2e-3, 0.1), (1e-2, 0.1), (1e-2, 0.3), (2e-2, 0.1))
_LEARNED = tuple({"options": {"ratio_learning_rate": r, "virtual_rate": v}} for r, v in _RATES)
_LR = tuple({"trainer": {"learning_rate": lr}} for lr in (3e-3, 5e-4, 1e-3, 2e-3, 5e-3, 8e-3, 1.2e-2))
_TGEO = {"temperature": 2.0, "validation": None}
_RECIPE: dict[str, Any] = {
    "task": "image_classification",
    "data": {
        "name": "digits",
        "limit": 500,
        "validation_size": 150,
        "label_noise": 0.3,
        "teacher_random_classes": [7, 8, 9],
    },
    "teacher": {"model": "mlp:128", "train": {"max_steps": 500, "per_device_train_batch_size": 64}},
    "student": "mlp:32",
    "trainer": {"max_steps": 480, "per_device_train_batch_size": 64, "learning_rate": 3e-3},
}

CLAIM = Claim(
    name="tgeo-kd",
    statement="With noisy labels and a teacher wrong on some classes, learned weights beat the best fixed one by 0.7 points.",
    recipe=_RECIPE,
    arms={
        "fixed": Arm("kd", {"temperature": 2.0}, _FIXED),
        "tgeo": Arm("tgeo-kd", _TGEO, _LEARNED),
        "untrained": Arm("tgeo-kd", {**_TGEO, "every": 0}, _LR),
        "no_inter": Arm("tgeo-kd", {**_TGEO, "inter": False}, _LEARNED),
        "ce_all": Arm("sft", {}, ({"data": {"with_validation": True}},) * 7),
    },
    checks=(
        Check("tgeo", "fixed", 0.007, "accuracy", True, "learned weights beat the best fixed weight by 0.7 points"),
        Check(
            "tgeo", "untrained", 0.015, "accuracy", True, "they beat a ratio network that never learns by 1.5 points"
        ),
        Check("tgeo", "untrained", 0.4, "alpha_gap", True, "α tells a right teacher from a right label by 0.4"),
        Check("tgeo", "no_inter", 0.0, "accuracy", True, "where the class average lies helps (no gate of the claim)"),
        Check("tgeo", "ce_all", 0.0, "accuracy", True, "they beat labels alone with validation data added"),
    ),
    tuned_on=("accuracy", True),
    settings={"real": Setting({**_RECIPE, "data": {**_RECIPE["data"], "name": "mnist10k"}}, needs=("mnist10k",))},
)
