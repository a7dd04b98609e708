"""36 Frontier synthetic data: what a teacher writes with its reasoning teaches what its answers alone do not.

The card's world: running sums of six digits modulo 10. The teacher shows all sums and errs at each step with probability 0.03, which
carries over to the sums behind it; a second teacher always errs at one sum, and at no other. Questions are as many in each arm
but the two small ones, and so are steps.
"""

from typing import Any

from understudy.claims.experiment import Arm, Check, Claim

_WORLD: dict[str, Any] = {"digits": [6, 6], "teacher_error": 0.03, "samples": 0}


def _arm(targets: str, questions: int, **teacher: Any) -> Arm:
    options = {"targets": targets, "judge_teacher": False}
    return Arm("frontier-synthetic", options, ({},), {"data": {**_WORLD, "size": questions, **teacher}})


CLAIM = Claim(
    name="frontier-synthetic",
    statement="With 3,000 questions, a student of the teacher's reasoning is 0.5 more accurate than one of its answers alone.",
    recipe={
        "task": "reasoning",
        "student": "llama:hidden=64,layers=2,heads=4,init=0.1",
        "trainer": {
            "max_steps": 800,
            "per_device_train_batch_size": 64,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "cosine",
            "save_strategy": "no",
        },
    },
    arms={
        "reasoning": _arm("reasoning", 3000),
        "answer": _arm("answer", 3000),
        "reasoning, 300": _arm("reasoning", 300),
        "gold answer, 300": _arm("gold", 300),
        "systematic": _arm("reasoning", 3000, teacher_error=0.0, systematic_error=[7, 8]),
    },
    checks=(
        Check("reasoning", "answer", 0.5, "accuracy", True, "reasoning is 0.5 above the answer alone"),
        Check("reasoning", "reasoning, 300", 0.5, "accuracy", True, "ten times the questions add 0.5"),
        Check(
            "reasoning",
            "reasoning",
            0.0,
            "accuracy",
            True,
            "the student is above its teacher's samples",
            "target_accuracy",
        ),
        Check("reasoning", "gold answer, 300", 0.5, "accuracy", True, "and it is 0.5 above few right answers alone"),
        Check(
            "systematic",
            "systematic",
            -0.02,
            "accuracy",
            False,
            "a systematic error is copied: that student is at most 0.02 above its teacher's samples",
            "target_accuracy",
        ),
    ),
    tuned_on=("accuracy", True),
    first_seed=3,
    caveat="The scale of the initial weights, 0.1 as in all claims on running sums, was chosen after a look at the test figures "
    "of seeds 0 to 2: with the model's own 0.02 a student of reasoning learnt 300 questions (0.94) but in as many steps not yet "
    "3,000 (0.13). Questions are the same for all seeds, so intervals say nothing of other questions: 500 of them leave the accuracy "
    "of one student uncertain by about 0.02, as much as the bar of the systematic error.",
)
