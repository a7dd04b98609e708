"""7 Survey: what a student that is too small keeps of its teacher depends on how it is taught, and each way has its own place.

The card's world: the teacher is a chain that looks two tokens back, the student looks one back, and all distances are exact.
Texts, soft targets and pairs are of the teacher, and every arm takes as many steps. Pairs are ranked by the teacher's likelihood;
their policies begin as a student of its texts.
"""

from typing import Any

from understudy.claims.claim import Overrides
from understudy.claims.experiment import Arm, Check, Claim

_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (1e-3, 1e-2, 3e-2))
_STEPS = {"max_steps": 600, "per_device_train_batch_size": 64, "lr_scheduler_type": "linear", "save_strategy": "no"}
_PAIRS: Overrides = {"task": "preference_world"}


def _kd(divergence: str) -> Arm:
    options: dict[str, Any] = {"divergence": divergence, "temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0}
    return Arm("kd", options, _RATES)


CLAIM = Claim(
    name="survey-llm-kd",
    statement="A student that is too small ends with a lower reverse KL if it is taught by reverse KL than by forward KL.",
    recipe={"task": "text_world", "data": {"name": "markov"}, "trainer": _STEPS},
    arms={
        "sft": Arm("sft", {}, _RATES),
        "forward_kl": _kd("forward_kl"),
        "reverse_kl": _kd("reverse_kl"),
        "sft, of pairs": Arm("sft", {}, _RATES, _PAIRS),
        "dpo": Arm("dpo", {}, _RATES, _PAIRS),
        "rrhf": Arm("rrhf", {}, _RATES, _PAIRS),
        "pro": Arm("pro", {}, _RATES, _PAIRS),
    },
    checks=(
        Check("reverse_kl", "forward_kl", 0.0, "reverse_kl", False, "reverse KL's student has the lower reverse KL"),
        Check("forward_kl", "reverse_kl", 0.0, "forward_kl", False, "and forward KL's the lower forward KL"),
        Check("sft", "reverse_kl", 0.0, "forward_kl", False, "as has a student of texts"),
        Check("reverse_kl", "sft", 0.0, "reverse_kl", False, "whose reverse KL is higher too"),
        Check(
            "reverse_kl",
            "forward_kl",
            0.0,
            "true_log_prob",
            True,
            "reverse KL writes what the teacher finds likelier",
        ),
        *(
            Check(
                arm, "sft, of pairs", 0.0, "accuracy", True, f"{arm.upper()} ranks pairs better than their better texts"
            )
            for arm in ("dpo", "rrhf", "pro")
        ),
    ),
    tuned_on=("accuracy", True),
)
