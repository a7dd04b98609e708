"""21 QCRD: a vote over several rationales denoises them, and the student's own mistakes are a signal.

The card's world: running sums of four digits, 800 questions, a teacher whose every step is wrong with probability 0.15 and
whose error is carried on. Answers are read behind a rationale: in this world nobody can say them at once. All arms take the
same steps in as many iterations. The paper's gain by negatives was not seen on the card, so that check is that they do no harm.
"""

from understudy.claims.experiment import Arm, Check, Claim

_SHARED = {"iterations": 6, "temperature": 1.0, "discriminator": "bytes:width=32,length=64"}


def _arm(**options: object) -> Arm:
    return Arm("qcrd", {**_SHARED, **options}, ({},))


_METRIC = "rationale_accuracy"

CLAIM = Claim(
    name="qcrd",
    statement="Rationales by vote make a student 0.15 better than the first rationale of each question, at equal steps.",
    recipe={
        "task": "reasoning",
        "data": {"digits": [4, 4], "size": 800, "teacher_error": 0.15, "max_new_tokens": 16},
        "student": "llama:hidden=64,layers=2,heads=4,init=0.1",
        "trainer": {
            "max_steps": 900,
            "per_device_train_batch_size": 96,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
        },
    },
    arms={
        "first rationale": _arm(samples=1, beta=0.0, quality=False),
        "vote": _arm(beta=0.0, quality=False),
        "vote, negatives": _arm(quality=False),
        "qcrd": _arm(),
    },
    checks=(
        Check("vote", "first rationale", 0.15, _METRIC, True, "a vote is worth 0.15"),
        Check(
            "vote",
            "vote",
            0.0,
            _METRIC,
            True,
            "its student is above one sample of its teacher",
            "teacher_sample_accuracy",
        ),
        Check("qcrd", "vote", -0.05, _METRIC, True, "negatives and discriminator cost at most 0.05"),
        Check("qcrd", "vote, negatives", -0.05, _METRIC, True, "weights cost at most 0.05"),
        Check(
            "qcrd",
            "qcrd",
            0.8,
            "discriminator_auc",
            True,
            "the discriminator tells right from wrong by 0.8",
            "discriminator_auc",
            0.0,
        ),
    ),
    tuned_on=(_METRIC, True),
)
