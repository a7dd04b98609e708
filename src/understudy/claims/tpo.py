"""24 TPO: a whole ranked list of answers teaches more than its best and worst, at equal steps over the same prompts.

Embedded: five orders of the same words, graded by the share of words in their place; each word is a step. Whether λ and the step
weights add to that is asked beside it.
"""

from understudy.claims.experiment import Arm, Check, Claim

_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (1e-4, 3e-4))


def _above(a: str, b: str, says: str) -> Check:
    return Check(a, b, 0.0, "accuracy", True, says)


CLAIM = Claim(
    name="tpo",
    statement="Learning from all ordered pairs of a graded list orders unseen lists better than DPO on best and worst.",
    recipe={
        "task": "preferences",
        "data": {"name": "word_order", "candidates": 5},
        "trainer": {"per_device_train_batch_size": 8},
    },
    arms={
        "dpo": Arm("dpo", {"beta": 0.5}, _RATES),
        "tpo": Arm("tpo", {}, _RATES),
        "tpo without lambda": Arm("tpo", {"lambda_weights": False, "divide_by": "pairs"}, _RATES),
        "tpo without step weights": Arm("tpo", {"step_weights": "uniform"}, _RATES),
        "tpo with 1 - cos": Arm("tpo", {"step_weights": "one_minus_cos"}, _RATES),
    },
    checks=(
        _above("tpo", "dpo", "TPO is above DPO on best and worst"),
        _above("tpo", "tpo without lambda", "weights of pairs help"),
        _above("tpo", "tpo without step weights", "step weights help"),
        _above("tpo", "tpo with 1 - cos", "likeness to the best answer is the right way round"),
    ),
    knobs=(
        *({"beta": beta} for beta in (0.1, 1.0, 2.0)),
        {"lambda_weights": False, "divide_by": "pairs"},
        *({"step_weights": how} for how in ("uniform", "one_minus_cos")),
    ),
    tuned_on=("accuracy", True),
)
