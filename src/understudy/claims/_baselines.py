"""What the claims of image baselines share: each method beside cross-entropy and KD on the same data and budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from understudy.claims._photographs import photographs
from understudy.claims.experiment import Arm, Check, Claim

_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (3e-3, 1e-2, 3e-2))
_REAL_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (1e-3, 3e-3))


def baseline_claim(name: str, statement: str, options: Mapping[str, Any] | None = None) -> Claim:
    """That a method is above cross-entropy, and beside it whether it is above KD.

    Args:
        options: of the method, on the small digits. On photographs it has its defaults.
    """

    def arms(given: Mapping[str, Any], rates: Any) -> dict[str, Arm]:
        kd = {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0}
        return {"sft": Arm("sft", {}, rates), "kd": Arm("kd", kd, rates), name: Arm(name, given, rates)}

    return Claim(
        name=name,
        statement=statement,
        recipe={
            "task": "image_classification",
            "data": {"name": "digits", "limit": 200},
            "teacher": {
                "model": "convnet:16",
                "train": {"max_steps": 600, "per_device_train_batch_size": 32, "learning_rate": 3e-3},
            },
            "student": "convnet:4",
            "trainer": {"max_steps": 400, "per_device_train_batch_size": 32, "save_strategy": "no"},
        },
        arms=arms(options or {}, _RATES),
        checks=(
            Check(name, "sft", 0.0, "accuracy", True, "it is above cross-entropy"),
            Check(name, "kd", 0.0, "accuracy", True, "it is above KD"),
        ),
        tuned_on=("accuracy", True),
        settings={"real": photographs(arms=arms({}, _REAL_RATES))},
    )
