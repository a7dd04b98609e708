"""16 DED: the teacher whose traces teach best is not the one with the best benchmark; a few hard, diverse traces do.

The card's world: running sums of six digits. One teacher is always right and shows two sums at places that nothing tells, one
shows all sums in order and errs at each step with probability 0.03, one is always right and shows all sums in a random order.
The smoke test has as many questions and steps as the card found to move a student. The two other parts of the claim have a
student that knows short sums (which questions are kept), and several right traces a question (which of them are kept).
"""

from understudy.claims.experiment import Arm, Check, Claim

_MODEL = "llama:hidden=64,layers=2,heads=4,init=0.1"
_SHARED = {"smoke_questions": 1500, "smoke_steps": 600, "samples": 1, "traces": 1}
_STARTED = {"model": _MODEL, "train": {"max_steps": 400, "per_device_train_batch_size": 64, "learning_rate": 2e-3}}
_EASY = {"digits": [3, 4], "size": 300}


def _arm(teachers: tuple[str, ...], recipe: object = None, **options: object) -> Arm:
    members = {"members": dict.fromkeys(teachers, "oracle")}
    return Arm("ded", {**_SHARED, **options}, ({},), {"teacher": members, **(recipe or {})})  # type: ignore[dict-item]


def _quarter(questions: str) -> Arm:
    warm = {"student": _STARTED, "data": {"digits": [3, 6], "size": 1500, "samples": 0}}
    return _arm(("ordered",), warm, questions=questions, start_data=_EASY, other_data=_EASY)


def _four(rule: str) -> Arm:
    return _arm(("shuffled",), samples=12, traces=4, diversity=rule)


_ALL = ("partial", "ordered", "shuffled")

CLAIM = Claim(
    name="ded",
    statement="The student of the teacher that a smoke test chooses is 0.3 better than that of the teacher with the best benchmark.",
    recipe={
        "task": "reasoning",
        "data": {"digits": [6, 6], "size": 1500, "samples": 0},
        "student": _MODEL,
        "trainer": {
            "max_steps": 600,
            "per_device_train_batch_size": 64,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
        },
    },
    arms={
        "ded": _arm(_ALL),
        "best benchmark": _arm(_ALL, choose_by="benchmark"),
        "shuffled": _arm(("shuffled",)),
        "hard questions": _quarter("hard"),
        "random questions": _quarter("random"),
        "maximin": _four("maximin"),
        "random traces": _four("random"),
        "nearest": _four("nearest"),
    },
    checks=(
        Check("ded", "best benchmark", 0.3, "accuracy", True, "the smoke test beats the benchmark by 0.3"),
        Check("ded", "shuffled", 0.3, "accuracy", True, "and sums in a random order by 0.3"),
        Check("best benchmark", "ded", 0.05, "chosen_teacher_accuracy", True, "its teacher is the worse one by itself"),
        Check("ded", "ded", 0.0, "accuracy", True, "its student is above its teacher", "chosen_teacher_accuracy"),
        Check("ded", "ded", 0.0, "shuffled_entropy", True, "traces that teach are the surer ones", "ordered_entropy"),
        Check("hard questions", "random questions", -0.02, "accuracy", True, "hard questions cost at most 0.02"),
        Check("maximin", "random traces", 0.0, "distance", True, "maximin is farther apart than random"),
        Check("random traces", "nearest", 0.0, "distance", True, "random is farther apart than nearest"),
        Check("maximin", "nearest", -0.03, "accuracy", True, "diverse traces cost at most 0.03"),
    ),
    tuned_on=("accuracy", True),
)
