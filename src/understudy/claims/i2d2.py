"""15 I2D2: a model whose statements are filtered by a critic, and which imitates what is left, says more that is true.

The card's world, with a property in one type alone: 60 concepts, six relations, 160 properties. A small model is trained on
text whose plain statements are half true. All arms of a seed share world and text, and their models the same first
training. Accuracy is that of well-formed statements about concepts that no label is about, before any critic. Nothing is
tuned in an arm.

There is no setting of real data: whether a statement is true is known in the embedded world alone.
"""

from typing import Any

from understudy.claims.experiment import Arm, Check, Claim

_SHARED = {"num_beams": 10, "max_tokens": 8}


def _arm(**options: Any) -> Arm:
    return Arm("i2d2", {**_SHARED, **options}, ({},))


CLAIM = Claim(
    name="i2d2",
    caveat="The first training of the model and the steps of a round were chosen with a look at seed 0; it is judged on seeds "
    "from 1 on. Nothing is tuned within an arm.",
    first_seed=1,
    statement="Two rounds of self-imitation of critic-filtered statements raise their accuracy before the critic by 0.1.",
    recipe={
        "task": "statement_generation",
        "trainer": {"max_steps": 150, "save_strategy": "no", "logging_steps": 50},
    },
    arms={
        "start": _arm(rounds=0),
        "one_round": _arm(rounds=1),
        "two_rounds": _arm(rounds=2),
        "unfiltered": _arm(rounds=2, filter="none"),
        "beam": _arm(rounds=0, filter="none", decoding="beam"),
        "sample": _arm(rounds=0, filter="none", decoding="sample"),
    },
    checks=(
        Check("two_rounds", "start", 0.1, "accuracy", True, "two rounds raise the accuracy before the critic by 0.1"),
        Check("one_round", "start", 0.05, "accuracy", True, "one round raises it by 0.05"),
        Check("two_rounds", "one_round", 0.0, "accuracy", True, "the second round helps too"),
        Check("two_rounds", "unfiltered", 0.1, "accuracy", True, "without the critic's filter it does not"),
        Check("start", "sample", 0.4, "well_formed", True, "constraints make statements well formed"),
        Check("start", "beam", 0.0, "well_formed", True, "more so than beam search without constraints"),
    ),
    tuned_on=("accuracy", True),
)
