"""22 KD³: where the original images are gone, choosing among images from elsewhere and sharing the teacher's head help.

Digits whose teacher saw 500, and a pool of other digits in other styles among noise, textures and shuffled digits. Every arm
takes as many steps. On real data: a teacher of ten kinds of photographs, and a pool of a hundred other kinds and of digits.
"""

from typing import Any

from understudy.claims._photographs import photographs
from understudy.claims.experiment import Arm, Check, Claim

_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (3e-3, 1e-2))
_KD = {"ce_weight": 0.0, "kd_weight": 1.0, "temperature": 4.0}


def _arms(original: Any, rates: Any) -> dict[str, Arm]:
    def kd3(**options: Any) -> Arm:
        return Arm("kd3", options, rates)

    return {
        "kd": Arm("kd", _KD, rates),
        "features": kd3(select="all", weighted=False, contrast_weight=0.0),
        "kd3": kd3(),
        "kd3/all": kd3(select="all"),
        "kd3/teacher": kd3(select="teacher"),
        "kd3/unweighted": kd3(weighted=False),
        "kd3/unmixed": kd3(contrast_weight=0.0),
        "original/kd": Arm("kd", _KD, rates, {"data": original}),
    }


_DIGITS = {"name": "digits", "teacher_limit": 500}
_POOL = ["cifar100", "mnist10k"]
_CHECKS = (
    Check("kd3", "kd", 0.0, "accuracy", True, "it is above KD on the whole pool"),
    Check(
        "kd3", "features", 0.0, "accuracy", True, "and above features of the whole pool without weights and contrast"
    ),
    Check("kd3", "kd3/all", 0.0, "accuracy", True, "choosing images helps"),
    Check("kd3", "kd3/teacher", 0.0, "accuracy", True, "choosing them with the student is above the teacher's choice"),
    Check("kd3", "kd3/unweighted", 0.0, "accuracy", True, "weights of disagreement help"),
    Check("kd3", "kd3/unmixed", 0.0, "accuracy", True, "the contrast with mixed images helps"),
    Check("original/kd", "kd3", 0.0, "accuracy", True, "KD on the original images stays above it"),
)

CLAIM = Claim(
    name="kd3",
    statement="With a pool of images from elsewhere in place of the original ones, KD³ is above KD on the whole pool.",
    recipe={
        "task": "image_classification",
        "data": {**_DIGITS, "pool": "digits_web"},
        "teacher": {
            "model": "convnet:16",
            "train": {"max_steps": 600, "per_device_train_batch_size": 32, "learning_rate": 3e-3},
        },
        "student": "convnet:4",
        "trainer": {"max_steps": 800, "per_device_train_batch_size": 64, "save_strategy": "no"},
    },
    arms=_arms({**_DIGITS, "limit": 500}, _RATES),
    checks=(
        *_CHECKS,
        Check(
            "kd3",
            "kd3",
            0.0,
            "kept_from_digits",
            True,
            "more of what it selects are digits than of the pool",
            "pool_from_digits",
        ),
    ),
    knobs=({"cutoff": 0.5}, {"selection_steps": 100}),
    tuned_on=("accuracy", True),
    settings={
        "real": photographs(
            {"pool": _POOL},
            needs=_POOL,
            caveat="600 steps see the pool twice, where the paper trains for 240 epochs.",
            arms=_arms({"name": "cifar10"}, tuple({"trainer": {"learning_rate": rate}} for rate in (1e-3, 3e-3))),
            checks=_CHECKS,
        )
    },
)
