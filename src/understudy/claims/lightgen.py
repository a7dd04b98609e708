"""01 LightGen: preferences over its own samples mend what a student learned from a teacher's images.

Handwritten digits of 8 × 8 pixels by class, and a small U-Net as teacher. Every arm has the same first phase on the
teacher's images; the second, of as many steps, goes on with them (`none`), trains on 512 real images (`sft`), or
prefers these to the student's own (`dpo`). A sample is right if a classifier of real digits sees the class asked for.

On real data: the same with handwritten digits of 28 × 28 pixels, in patches of 7 × 7.
"""

from understudy.claims.experiment import Arm, Check, Claim, Setting

_RATES = tuple({"options": {"preference_rate": rate}} for rate in (2e-5, 1e-4))
_OPTIONS = {"samples": 2000, "pairs": 512, "preference": 0.2, "ema": 0.99}
_TRAIN = {"save_strategy": "no", "lr_scheduler_type": "cosine"}

_STUDENT = {**_TRAIN, "max_steps": 1000, "per_device_train_batch_size": 64, "learning_rate": 1e-3}
_DATA = {"conditional": True, "size": 2000, "samples": 500, "compare_steps": [4], "teacher_steps": 8}


def _teacher(steps: int) -> dict[str, object]:
    """A small U-Net and its training."""
    train = {**_TRAIN, "max_steps": steps, "per_device_train_batch_size": 32, "learning_rate": 2e-3}
    return {"model": "unet:8,16", "train": train}


_REAL = Setting(
    recipe={
        "task": "image_generation",
        "data": {"name": "mnist10k", **_DATA},
        "teacher": _teacher(1200),
        "student": "mar:64,2,7",
        "trainer": _STUDENT,
    },
    needs=("mnist10k",),
    caveat="Rates, steps and β are those of the embedded digits, without tuning on these.",
)

CLAIM = Claim(
    name="lightgen",
    statement="After equally many steps, preferences of real images over its own samples raise the share of samples of the "
    "class asked for by at least 3 points over going on with the teacher's images.",
    recipe={
        "task": "image_generation",
        "data": {"name": "digits", **_DATA},
        "teacher": _teacher(600),
        "student": "mar:48,2,2",
        "trainer": _STUDENT,
    },
    arms={
        "dpo": Arm("lightgen", {**_OPTIONS, "refine": "dpo"}, _RATES),
        "sft": Arm("lightgen", {**_OPTIONS, "refine": "sft"}, _RATES),
        "none": Arm("lightgen", {**_OPTIONS, "refine": "none"}, _RATES),
    },
    checks=(
        Check("dpo", "none", 0.03, "class_accuracy", True, "DPO is 3 points above going on with the teacher's images"),
        Check("dpo", "none", 0.0, "distance", False, "its samples are nearer to real digits"),
        Check("dpo", "none", 0.0, "detail_gap", False, "its samples have more nearly the detail of real digits"),
        Check("dpo", "sft", 0.0, "class_accuracy", True, "DPO beats training on the same real images (not expected)"),
    ),
    tuned_on=("distance", False),
    caveat="Rates and steps were chosen after a look at the test figures of seed 0.",
    first_seed=1,
    settings={"real": _REAL},
)
