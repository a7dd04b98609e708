"""26 MCTS-DPO: pairs of the present policy teach more than as many pairs of the policy at the start.

The running sums of four digits; a student that supervised training leaves half-way; the world's noisy evaluator of steps, as on
the card, and exact outcomes. All arms search as many questions and take the same steps. On the card's tabular world, where the
policy's success is known exactly, the claim is a test (`tests/test_mcts_learning.py`). The card saw no gain of steps over whole
answers there, so that is no check.
"""

from understudy.claims.experiment import Arm, Check, Claim

_SHARED = {
    "rounds": 4,
    "questions": 100,
    "simulations": 3,
    "width": 3,
    "first_width": 3,
    "depth": 5,
    "step_tokens": 3,
    "anchor": "round",
}


def _arm(**options: object) -> Arm:
    return Arm("mcts-dpo", {**_SHARED, **options}, ({},))


CLAIM = Claim(
    name="mcts-dpo",
    statement="Searching with the present policy makes a better student than searching with that of the start.",
    recipe={
        "task": "reasoning",
        "data": {"digits": [4, 4], "size": 600, "eval_limit": 200, "max_new_tokens": 16, "samples": 0},
        "student": {
            "model": "llama:hidden=64,layers=2,heads=4,init=0.1",
            "train": {
                "max_steps": 115,
                "per_device_train_batch_size": 64,
                "learning_rate": 2e-3,
                "lr_scheduler_type": "constant",
                "save_strategy": "no",
            },
        },
        "roles": {"evaluator": "oracle"},
        "trainer": {
            "max_steps": 72,
            "per_device_train_batch_size": 16,
            "learning_rate": 5e-5,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "save_strategy": "no",
        },
    },
    arms={
        "online": _arm(),
        "offline": _arm(searcher="start"),
        "online, hard labels": _arm(smoothing=False),
    },
    checks=(
        Check("online", "offline", 0.0, "accuracy", True, "online is better than offline"),
        Check("online", "online", 0.0, "accuracy", True, "the student is better than at its start", "start_accuracy"),
        Check("online", "online, hard labels", 0.0, "accuracy", True, "labels softened by visits are better"),
    ),
    tuned_on=("accuracy", True),
)
