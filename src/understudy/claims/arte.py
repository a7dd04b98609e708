"""5 ARTE: a teacher that is aligned with what helps the student as an example writes better data for it.

Running sums of four and five digits, written in four styles: sums in order, sums of pairs, sums from the end, and the answer
alone. The teacher writes all four alike. The student knows four digits, most of them in order, with an example before each; so
an example in one style makes it answer in that style. All arms train on as many steps.
"""

from understudy.claims.experiment import Arm, Check, Claim

_MODEL = "llama:hidden=64,layers=2,heads=4,init=0.1"
_FIRST = {"max_steps": 800, "per_device_train_batch_size": 64, "learning_rate": 2e-3, "save_strategy": "no"}
_STYLES = ("ordered", "paired", "reversed", "bare")
_SHARED = {
    "drafts": 200,
    "probes": 20,
    "validation_questions": 60,
    "examples": 1000,
    "per_prompt": 1,
    "question_pairs": 100,
    "max_tokens": 24,
    "chat": False,
    "question_prompt": "write_bare",
    "style_prompts": ["bare"],
    "plain_prompt": "bare",
    "teacher_data": {"styles": dict.fromkeys(_STYLES, 1.0)},
    "student_data": {"digits": [4, 4], "shots": 1, "styles": {**dict.fromkeys(_STYLES, 0.1), "ordered": 0.7}},
    "alignment": {"max_steps": 100, "per_device_train_batch_size": 16, "learning_rate": 1e-4},
}


def _arm(**options: object) -> Arm:
    return Arm("arte", {**_SHARED, **options}, ({},))


CLAIM = Claim(
    name="arte",
    statement="A student of the aligned teacher's data is 0.05 better than one of the teacher's data before.",
    recipe={
        "task": "reasoning",
        "data": {"digits": [4, 5], "size": 3000, "samples": 0, "max_length": 64, "max_new_tokens": 16},
        "student": {"model": _MODEL, "train": _FIRST},
        "teacher": {"model": _MODEL, "train": _FIRST},
        "trainer": {
            "max_steps": 400,
            "per_device_train_batch_size": 64,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
        },
    },
    arms={
        "original": _arm(align="none", draft_choice="first"),
        "best drafts": _arm(align="none"),
        "rationales": _arm(align="rationales"),
        "questions": _arm(align="questions"),
        "arte": _arm(),
    },
    checks=(
        Check("arte", "original", 0.05, "accuracy", True, "alignment is worth 0.05"),
        Check("arte", "original", 0.0, "few_shot_accuracy", True, "and something with examples before a question"),
        Check("arte", "best drafts", 0.0, "accuracy", True, "it is above the best draft of each question"),
        Check("arte", "arte", 0.0, "tailored_score", True, "what it writes helps more as an example", "drafts_score"),
    ),
    tuned_on=("accuracy", True),
    caveat="Its settings are a design and were not calibrated: in the first three seeds the students of all arms answer at chance "
    "(0.1), so that nothing is to be told apart. Arms without new questions train on 200 of them, others on 1000.",
)
