"""39 DPO and its variants: KTO and CPO do without a supervised start, DPO and IPO do not.

The card's chains: pairs labelled by return; the start is fitted to this chain (`sft`) or mostly to another (`base`).
`value` is the exact return minus KL to the chain. Every arm chooses among the same learning rates.
"""

from understudy.claims.experiment import Arm, Check, Claim

_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (5e-3, 2e-2))
_LOSSES = ("dpo", "ipo", "kto", "cpo", "simpo")
_STARTS = {"sft": "own", "base": "mixture"}


def _above(a: str, b: str, threshold: float, says: str) -> Check:
    return Check(a, b, threshold, "value", True, says)


CLAIM = Claim(
    name="dpo",
    statement="Skipping the supervised start costs DPO at least 3 in return minus KL, and KTO and CPO little.",
    recipe={"task": "preference_world", "data": {"name": "chains"}},
    arms={
        f"{start}/{loss}": Arm(
            "dpo", {"loss_type": loss}, _RATES, {"data": {"name": "chains", "start": _STARTS[start]}}
        )
        for start in _STARTS
        for loss in _LOSSES
    },
    checks=(
        _above("sft/dpo", "base/dpo", 3.0, "skipping the start costs DPO 3 or more"),
        _above("sft/ipo", "base/ipo", 3.0, "skipping the start costs IPO 3 or more"),
        _above("base/kto", "sft/kto", -2.0, "it costs KTO less than 2"),
        _above("base/cpo", "sft/cpo", -0.5, "it costs CPO less than 0.5"),
        _above("sft/cpo", "sft/kto", 0.0, "CPO is above KTO"),
        *(_above("sft/kto", f"sft/{other}", 0.0, f"KTO is above {other}") for other in ("dpo", "ipo", "simpo")),
    ),
    tuned_on=("value", True),
)
