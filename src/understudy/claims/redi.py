"""28 REDI: wrong traces teach a student that supervised training on correct ones has taught all it can.

The card's chains: of two sequences the one with the likelier higher return is the correct trace. After the same start every
arm trains half the steps on correct traces, and half with its own loss at a twentieth of the rate.
"""

from understudy.claims.experiment import Arm, Check, Claim

_ALPHAS = {"0.5": 0.5, "0.8": 0.8, "1": 1.0}
_RATES = tuple({"options": {"learning_rate": rate}} for rate in (3e-4, 1e-3))


def _above(a: str, b: str, threshold: float, metric: str, says: str) -> Check:
    return Check(a, b, threshold, metric, True, says)


CLAIM = Claim(
    name="redi",
    statement="REDI at alpha 0.8 gains 0.3 of return over supervised training of the same length on the correct traces.",
    recipe={
        "task": "preference_world",
        "data": {"name": "chains"},
        "trainer": {"max_steps": 600, "learning_rate": 5e-3},
    },
    arms={
        "sft": Arm("sft", {}, tuple({"trainer": {"learning_rate": rate}} for rate in (5e-3, 1e-3))),
        **{f"alpha {name}": Arm("redi", {"alpha": alpha}, _RATES) for name, alpha in _ALPHAS.items()},
    },
    checks=(
        _above("alpha 0.8", "sft", 0.3, "return", "REDI is above supervised training of the same length"),
        _above("alpha 0.8", "alpha 0.5", 0.0, "return", "0.8 is above 0.5"),
        Check("alpha 0.5", "alpha 0.8", 0.0, "nll", False, "0.5 keeps the correct traces likelier than 0.8"),
        Check("alpha 0.8", "alpha 1", 0.0, "nll", False, "0.8 keeps them likelier than 1"),
    ),
    tuned_on=("return", True),
)
