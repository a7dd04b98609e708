"""25 BOOT: one call in place of many, from noise alone. The card's world: eight Gaussians and their exact denoiser.

The regression arm stores pairs of noise and the teacher's 32-step output, and its pairs cost as many teacher calls as
BOOT makes in training: 2,500 steps · 256 rows · 2 calls = 40,000 pairs · 32 calls. (An epoch ends in a smaller batch,
so BOOT makes 0.5 % fewer.)

On real data: handwritten digits, a small U-Net as teacher, and no regression arm, whose pairs would cost hours.
"""

from understudy.claims.experiment import Arm, Check, Claim, Setting

_LR = tuple({"trainer": {"learning_rate": lr}} for lr in (1e-3, 2e-3))

_TRAIN = {"per_device_train_batch_size": 32, "save_strategy": "no", "lr_scheduler_type": "cosine"}


def _teacher(calls: int, share: float, says: str) -> Check:
    """BOOT's distance is less than `share` of the teacher's at `calls` calls."""
    return Check("boot", "boot", 0.0, "distance", False, says, other_metric=f"teacher_{calls}_distance", factor=share)


_REAL = Setting(
    statement="A generator of one call, trained on noise alone, is nearer to real digits than its teacher at two calls.",
    recipe={
        "task": "image_generation",
        "data": {"name": "mnist10k", "size": 20_000, "samples": 400, "compare_steps": [1, 2, 4], "teacher_steps": 16},
        "teacher": {"model": "unet:8,16", "train": {**_TRAIN, "max_steps": 1200, "learning_rate": 2e-3}},
        "student": "teacher",
        "trainer": {**_TRAIN, "max_steps": 600},
    },
    needs=("mnist10k",),
    arms={
        "boot": Arm("boot", {}, tuple({"trainer": {"learning_rate": lr}} for lr in (3e-4, 1e-3))),
        "boundary": Arm(
            "boot", {"target": "boundary"}, tuple({"trainer": {"learning_rate": lr}} for lr in (3e-4, 1e-3))
        ),
    },
    checks=(
        _teacher(2, 1.0, "one call of BOOT beats the teacher at 2 calls"),
        _teacher(1, 0.5, "one call of BOOT beats half the teacher's distance at 1 call"),
        Check("boot", "boundary", 0.0, "distance", False, "the boundary loss alone is worse"),
    ),
)

CLAIM = Claim(
    name="boot",
    statement="A generator of one call, trained on noise alone, is less than half as far from the data as its teacher "
    "at four calls.",
    recipe={
        "task": "image_generation",
        "data": {"name": "ring8", "size": 40_000, "compare_steps": [1, 2, 4, 32]},
        "student": "denoiser:128,128,128",
        "trainer": {"max_steps": 2500, "per_device_train_batch_size": 256, "save_strategy": "no"},
    },
    arms={
        "boot": Arm("boot", {}, _LR),
        "boundary": Arm("boot", {"target": "boundary"}, _LR),
        "regression": Arm("boot", {"target": "regression", "steps": 32}, _LR),
    },
    checks=(
        _teacher(4, 0.5, "one call of BOOT beats half the teacher's distance at 4 calls"),
        _teacher(2, 0.05, "one call of BOOT beats a twentieth of the teacher's distance at 2 calls"),
        _teacher(1, 0.05, "one call of BOOT beats a twentieth of the teacher's distance at 1 call"),
        _teacher(32, 1.0, "one call of BOOT beats the teacher at 32 calls (not expected)"),
        Check("boot", "boot", -0.2, "rmse", False, "RMSE to the teacher's 200-call output is below 0.2", factor=0.0),
        Check("boot", "boundary", 0.1, "distance", False, "the boundary loss alone is far worse"),
        Check("boot", "regression", 0.0, "distance", False, "BOOT beats regression on stored pairs (not expected)"),
    ),
    tuned_on=("distance", False),
    settings={"real": _REAL},
)
