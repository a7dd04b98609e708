"""34 Strategy teaching: a library of strategies lifts a student whose weights do not change.

The card's world: twelve types of request with a hidden best action each. The student is right about a third of them, the
judge gives 8 to the right action and 4 to others. Arms use the same 144 training conversations; `first` meets all of them
with the student as it was, `full` meets half of them with the library that the first half gave. `random` and `global` retrieve
so in training too. Nothing is tuned.

There is no setting of real data: satisfaction is known in the embedded world alone, and elsewhere people or a judge model
that one pays for would say it.
"""

from typing import Any

from understudy.claims.experiment import Arm, Check, Claim


def _arm(**options: Any) -> Arm:
    return Arm("strategy-teaching", options, ({},))


CLAIM = Claim(
    name="strategy-teaching",
    caveat="Student, teacher and judge are functions of the world, and the gains follow from its constants: this shows that the "
    "procedure finds, keeps and retrieves the right strategies, not that language models follow them. How many words of a "
    "request are common ones was chosen with a look at seeds 0 and 1; it is judged on seeds from 2 on.",
    first_seed=2,
    statement="Retrieved strategies raise the judge's mean score of the student's answers by 1.2 of 10.",
    recipe={"task": "conversation", "roles": {"transfer": "oracle"}},
    arms={
        "full": _arm(),
        "first": _arm(rounds=1),
        "random": _arm(retrieval="random", k=1),
        "global": _arm(retrieval="global", k=1),
    },
    checks=(
        Check("full", "full", 1.2, "satisfaction", True, "the library helps by 1.2", "baseline_satisfaction"),
        Check("full", "random", 1.2, "satisfaction", True, "similar strategies beat random ones by 1.2"),
        Check("full", "global", 1.2, "satisfaction", True, "and one strategy for all by 1.2"),
        Check("full", "first", 0.0, "satisfaction", True, "scenarios of the advised student help"),
        Check(
            "full",
            "full",
            0.8,
            "transfer_satisfaction",
            True,
            "it helps another student",
            "transfer_baseline_satisfaction",
        ),
        Check("full", "full", 0.85, "right_type", True, "the first strategy is for the right type", factor=0.0),
    ),
    tuned_on=("satisfaction", True),
)
