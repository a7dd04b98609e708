"""4 Distillation-DPO: a student of one call that completes scans better than its teacher at as many calls. The card's plan:
streets in the plane, a small denoiser of points as teacher, and the student with the best validation of its run.

The paper's loser term (`pairs`) is compared with score distillation on the winners alone (`winners`), at equal updates. The
paper weighs losers by 1; here that diverges, and 0.1 is the weight of the main arm.
"""

from understudy.claims.experiment import Arm, Check, Claim, Setting

_RATES = tuple({"trainer": {"learning_rate": rate}, "options": {"assistant_rate": 5 * rate}} for rate in (3e-5, 1e-4))
_ARMS = {
    "pairs": Arm("distillation-dpo", {"lambda_l": 0.1}, _RATES),
    "winners": Arm("distillation-dpo", {"lambda_l": 0.0}, _RATES),
}
_TRAINER = {
    "max_steps": 240,
    "eval_strategy": "steps",
    "eval_steps": 60,
    "save_steps": 60,
    "load_best_model_at_end": True,
}


def _teacher(steps: int, says: str) -> Check:
    """The Chamfer distance of one call of the student is below the teacher's at `steps`."""
    return Check("pairs", "pairs", 0.0, "chamfer", False, says, other_metric=f"teacher_{steps}_chamfer")


_CHECKS = (
    _teacher(1, "one call of the student beats the teacher at 1 step"),
    Check(
        "pairs",
        "winners",
        0.0,
        "chamfer",
        False,
        "losers help: it beats score distillation on the winners (not expected)",
    ),
    _teacher(2, "one call of the student beats the teacher at 2 steps (not expected)"),
    _teacher(8, "one call of the student beats the teacher at 8 steps (not expected)"),
)

CLAIM = Claim(
    name="distillation-dpo",
    statement="A student of one call, drawn to its teacher by better samples and driven away by worse ones, completes scans "
    "better than the teacher at one step.",
    recipe={
        "task": "scene_completion",
        "data": {"name": "street2d", "teacher_steps": 8},
        "student": "teacher",
        "trainer": _TRAINER,
    },
    arms=_ARMS,
    checks=_CHECKS,
    tuned_on=("chamfer", False),
    knobs=({"lambda_l": 0.0}, {"lambda_l": 0.03}, {"assistant_rate": 1e-3}, {"t_min": 0.2}),
    settings={
        "real": Setting(
            statement="The same on scans of a real street, each of which is completed from 128 of its points.",
            recipe={
                "task": "scene_completion",
                "data": {"name": "lidar_street", "radius": 20.0, "teacher_steps": 8},
                "student": "teacher",
                "trainer": _TRAINER,
            },
            needs=("lidar_street",),
            caveat="22 scans of one drive train, and 6 of another test: the scans of a drive are much alike. "
            "On the validation scans the student beats its teacher at one step (see the search), on the test scans it does not.",
        )
    },
)
