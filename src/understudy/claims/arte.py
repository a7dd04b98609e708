"""5 ARTE: a teacher that is aligned with what helps the student as an example writes better data for it.

Running sums of four and five digits. The teacher has learned to write the sums in order or the answer alone, and does either
every second time. The student knows four digits, most of them in order, with an example before each; so an example without
sums makes it guess. All arms train for as many steps, on up to 400 questions each.
"""

from understudy.claims.experiment import Arm, Check, Claim

_MODEL = "llama:hidden=64,layers=2,heads=4,init=0.1"
_FIRST = {"max_steps": 800, "per_device_train_batch_size": 64, "learning_rate": 2e-3, "save_strategy": "no"}
_TEACHER = {"max_steps": 2000, "per_device_train_batch_size": 128, "learning_rate": 3e-3, "save_strategy": "no"}
_SHARED = {
    "drafts": 400,
    "probes": 20,
    "validation_questions": 60,
    "examples": 400,
    "per_prompt": 1,
    "question_pairs": 100,
    "max_tokens": 24,
    "chat": False,
    "question_prompt": "write_bare",
    "style_prompts": ["bare"],
    "plain_prompt": "bare",
    "eval_shots": 1,
    "teacher_data": {"styles": {"ordered": 0.5, "bare": 0.5}},
    "student_data": {"digits": [4, 4], "size": 6000, "shots": 1, "styles": {"ordered": 0.7, "bare": 0.3}},
    "alignment": {"max_steps": 100, "per_device_train_batch_size": 16, "learning_rate": 1e-4},
}


def _arm(**options: object) -> Arm:
    return Arm("arte", {**_SHARED, **options}, ({},))


CLAIM = Claim(
    name="arte",
    statement="A student of the aligned teacher's data is 0.05 better than one of the teacher's data before.",
    recipe={
        "task": "reasoning",
        "data": {"digits": [4, 5], "size": 8000, "samples": 0, "max_length": 64, "max_new_tokens": 16},
        "student": {"model": _MODEL, "train": _FIRST},
        "teacher": {"model": _MODEL, "train": _TEACHER},
        "trainer": {
            "max_steps": 300,
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
    first_seed=1,
    caveat="The sizes, the steps and the two ways of writing were chosen with a look at seed 0; with four ways a teacher of this "
    "size learns none of them well. It is judged on seeds from 1 on and the same test questions, and nothing is tuned within an arm.",
)
