"""12 DisWOT: a score without training tells how well students of equal size learn from a teacher.

Of each seed, 24 candidates of 6000 to 10000 parameters are drawn from the space, scored, and distilled; the rank correlation of
score and accuracy is compared with that of scores that do not see the teacher, in the same runs. The winner is the best
of 100 such candidates by the score. Embedded: digits; on real data: MNIST.
"""

from typing import Any

from understudy.claims.experiment import Arm, Check, Claim, Setting

_OPTIONS = {"min_parameters": 6000, "parameters": 10000, "evaluations": 100, "train": 24, "distil": "kd"}


def _above(other: str, says: str) -> Check:
    return Check("diswot", "diswot", 0.0, "rank_correlation", True, says, other_metric=f"rank_correlation_{other}")


def _recipe(data: dict[str, Any], teacher: str, steps: int) -> dict[str, Any]:
    trainer = {"per_device_train_batch_size": 32, "learning_rate": 3e-3, "save_strategy": "no"}
    return {
        "task": "image_classification",
        "data": data,
        "teacher": {"model": teacher, "train": {**trainer, "max_steps": 2 * steps}},
        "trainer": {**trainer, "max_steps": steps},
    }


CLAIM = Claim(
    name="diswot",
    caveat="The paper's spaces and networks are far larger. Candidates are trained once each, so noise of training lowers "
    "every correlation.",
    statement="Among students of similar size, the score before training correlates with accuracy after distillation.",
    recipe=_recipe({"name": "digits", "limit": 600}, "convnet:16", 150),
    arms={"diswot": Arm("diswot", _OPTIONS, ({},))},
    checks=(
        Check(
            "diswot",
            "diswot",
            0.0,
            "rank_correlation",
            True,
            "the rank correlation of score and accuracy is above 0",
            other_metric="rank_correlation",
            factor=0.0,
        ),
        _above("random", "it is above that of a random number"),
        _above("parameters", "it is above that of the number of parameters"),
        _above("operations", "it is above that of operations"),
        _above("synflow", "it is above SynFlow's"),
        _above("jacobian", "it is above that of the Jacobian's correlations"),
        Check(
            "diswot",
            "diswot",
            0.0,
            "above_median",
            True,
            "the winner by score is above the median candidate",
            other_metric="above_median",
            factor=0.0,
        ),
    ),
    tuned_on=("accuracy", True),
    settings={"real": Setting(_recipe({"name": "mnist10k", "limit": 3000}, "convnet:32", 200), needs=("mnist10k",))},
)
