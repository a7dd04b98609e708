"""32 Differential information: with rejected answers from the right distribution DPO's reward, and no other, reaches the target.

The card's world of 32 responses. Chosen answers come from the reference, rejected ones from the distribution that is optimal for
DPO at β, or from wrong ones. `value` is minus the exact KL from the target, `start_value` that of the reference.
"""

from typing import Any

from understudy.claims.experiment import Arm, Check, Claim

_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (5e-3, 2e-2))
_ANCHORED = {"beta": 0.5, "reference": "recorded"}
_OTHERS: dict[str, dict[str, Any]] = {
    **{loss: {"loss_type": loss, **_ANCHORED} for loss in ("hinge", "ipo", "kto")},
    "cpo": {"loss_type": "cpo", "beta": 0.5},
    "reference-free": {"loss_type": "cpo", "beta": 0.5, "nll_weight": 0.0},
    "orpo": {"loss_type": "orpo", "beta": 0.5},
}


def _data(rejected: str) -> dict[str, Any]:
    return {"data": {"name": "responses", "rejected": rejected}}


def _worse_than_start(rejected: str) -> Check:
    says = f"with rejected answers from {rejected} DPO ends further from the target than it began"
    return Check(f"dpo, {rejected}", f"dpo, {rejected}", 0.0, "value", False, says, other_metric="start_value")


CLAIM = Claim(
    name="dpo-pg",
    statement="With optimally rejected answers DPO comes 0.05 nats nearer to the target than any other loss.",
    recipe={"task": "preference_world", **_data("optimal")},
    arms={
        "dpo": Arm("dpo", _ANCHORED, _RATES),
        **{name: Arm("dpo", options, _RATES) for name, options in _OTHERS.items()},
        "dpo-pg": Arm("dpo-pg", _ANCHORED, _RATES),
        **{f"dpo, {wrong}": Arm("dpo", _ANCHORED, _RATES, _data(wrong)) for wrong in ("perturbed", "target")},
    },
    checks=(
        *(Check("dpo", name, 0.05, "value", True, f"DPO is 0.05 nats nearer than {name}") for name in _OTHERS),
        _worse_than_start("perturbed"),
        _worse_than_start("target"),
        Check("dpo-pg", "dpo", 0.0, "did_entropy", False, "projected gradients lower the entropy of what is learned"),
    ),
    tuned_on=("value", True),
)
