"""11 Symbolic KD: what a critic removes from a teacher's text, the student no longer says.

The card's world: 320 events, five relations, 200 tails. A teacher that is right four times in five writes ten tails a
question about three quarters of the events, and students are asked about events they have not seen. All arms of a seed
share world, text, labels and critic, and take the same steps. Nothing is tuned in an arm: the one setting was chosen
for the unfiltered student to fit its text.

There is no setting of real data: whether a text is true is known in the embedded world alone, and elsewhere only people
could say it.
"""

from typing import Any

from understudy.claims.experiment import Arm, Check, Claim

_SHARED = {
    "head_samples": 3000,
    "head_top_p": 1.0,
    "head_keep": 1.0,
    "shares": [0.75, 0.05, 0.2],
    "tail_top_p": 1.0,
    "student_samples": 5,
}


def _arm(**options: Any) -> Arm:
    return Arm("symbolic-kd", {**_SHARED, **options}, ({},))


CLAIM = Claim(
    name="symbolic-kd",
    caveat="The student's steps (for all arms alike) and the critic's patience were chosen with a look at the test worlds of "
    "seeds 0 to 2; it is judged on seeds from 3 on. Nothing is tuned within an arm.",
    first_seed=3,
    statement="A student of critic-filtered text beats one of as much unfiltered text by 0.08 of valid answers, at equal "
    "steps.",
    recipe={
        "task": "text_generation",
        "trainer": {"max_steps": 2400, "save_strategy": "no", "logging_steps": 100},
    },
    arms={
        "all": _arm(filter="none"),
        "random": _arm(filter="random", recall=0.5),
        "rho_0.8": _arm(recall=0.8),
        "rho_0.5": _arm(recall=0.5),
        "oracle": _arm(filter="oracle"),
    },
    checks=(
        Check("rho_0.5", "random", 0.08, "student_valid", True, "filtered text beats as much unfiltered text by 0.08"),
        Check("rho_0.5", "all", 0.06, "student_valid", True, "filtered text beats all text by 0.06"),
        Check("rho_0.5", "all", 0.05, "kept_precision", True, "the critic makes the text more precise"),
        Check("rho_0.8", "all", 0.0, "student_valid", True, "so does a loose cutoff"),
        Check("oracle", "all", 0.2, "student_valid", True, "perfect filtering is worth much more"),
    ),
    tuned_on=("student_valid", True),
)
