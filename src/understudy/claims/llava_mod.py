"""3 LLaVA-MoD: preferences with the teacher as reference take from a sparse student what it makes up.

The card's scenes: a sixth of the captions that all train on name a digit that is not in the image. Every arm starts from the
same supervised student and takes as many steps, on images that its vision encoder saw before.
"""

from typing import Any

from understudy.claims.experiment import Arm, Check, Claim

_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (1e-3, 3e-3))
_MIMIC: dict[str, Any] = {"shares": [0.25, 0.5, 0.25], "preference_rate": 3e-4}


def _mod(**options: Any) -> Arm:
    return Arm("llava-mod", _MIMIC | options, _RATES, {"data": _DATA | {"unpaired": True}})


def _fewer(arm: str, other: str, says: str, other_metric: str | None = None, factor: float = 1.0) -> Check:
    return Check(arm, other, 0.0, "hallucination_rate", False, says, other_metric, factor)


_DATA: dict[str, Any] = {"name": "scenes", "size": 4000, "pairs": 1500}
_START = {
    "max_steps": 1500,
    "per_device_train_batch_size": 32,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
}
CLAIM = Claim(
    name="llava-mod",
    statement="With the teacher as reference, sparse students name 30 % fewer absent digits than by mimicking alone.",
    recipe={
        "task": "vision_language",
        "data": _DATA,
        "teacher": {"model": "llava:hidden=96,layers=3,heads=4,vision=96", "train": _START},
        "student": {"model": "llava:hidden=48,layers=2,heads=4,vision=48", "train": _START},
        "trainer": {"max_steps": 800, "warmup_steps": 20, "save_strategy": "no"},
    },
    arms={
        "sft": Arm("sft", {}, _RATES),
        "dense mimic": Arm("kd", {"temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0}, _RATES),
        "sparse mimic": _mod(shares=[1 / 3, 2 / 3, 0.0]),
        "teacher reference": _mod(),
        "own reference": _mod(reference="start"),
        "kto": _mod(loss_type="kto_pair"),
    },
    checks=(
        _fewer(
            "teacher reference",
            "sparse mimic",
            "the teacher as reference takes 30 % of what mimicking makes up",
            "hallucination_rate",
            0.7,
        ),
        _fewer(
            "teacher reference",
            "teacher reference",
            "and the student makes up less than its teacher",
            "teacher_hallucination_rate",
        ),
        _fewer("kto", "sparse mimic", "so does paired KTO", "hallucination_rate", 0.7),
        _fewer("teacher reference", "own reference", "the teacher is a better reference than the student's own start"),
        Check("sparse mimic", "sft", 0.0, "exact_match", True, "mimicking gives more exact captions than the labels"),
        Check("sparse mimic", "dense mimic", 0.0, "exact_match", True, "and experts more than a dense student"),
    ),
    knobs=({"beta": 0.5}, {"preference_rate": 1e-3}, {"shares": [0.2, 0.3, 0.5]}),
    tuned_on=("exact_match", True),
)
