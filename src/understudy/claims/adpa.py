"""10 ADPA: a preference-trained teacher's advantages teach a small student more than its own preference training.

Embedded: chains whose soft-optimal policy is the aligned teacher and whose sampling chain is its reference; 60 pairs of its
sequences; a student of rank 4 that begins after supervised training. The worse sequences stand for the student's own answers.
"""

from understudy.claims.experiment import Arm, Check, Claim

_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (5e-3, 2e-2))
_BOTH = {"teacher": {"members": {"aligned": "soft_optimal", "reference": "reference"}}}
_ALIGNED = {"teacher": "soft_optimal"}
_NONE = {"teacher": None}


def _dckd(rejected: float) -> Arm:
    weights = {"objective": "dckd", "chosen_weight": 1.0, "rejected_weight": rejected}
    return Arm("adpa", weights, _RATES, _ALIGNED)


def _above(a: str, b: str, threshold: float, says: str) -> Check:
    return Check(a, b, threshold, "return", True, says)


CLAIM = Claim(
    name="adpa",
    statement="ADPA reaches a higher return than DPO of the student, in as many steps.",
    recipe={
        "task": "preference_world",
        "data": {"name": "chains", "limit": 60},
        "student": {"model": "bigram:4", "train": {"max_steps": 400, "per_device_train_batch_size": 32}},
        "trainer": {"max_steps": 300},
    },
    arms={
        "sft": Arm("sft", {}, _RATES, _NONE),
        "kd": _dckd(0.0),
        "dckd": _dckd(1.0),
        "dpo": Arm("dpo", {}, _RATES, _NONE),
        "adpa": Arm("adpa", {}, _RATES, _BOTH),
        "adpa without reference": Arm("adpa", {"advantage": "log_prob"}, _RATES, _ALIGNED),
    },
    checks=(
        _above("adpa", "dpo", 0.0, "ADPA is above DPO of the student"),
        _above("adpa", "adpa without reference", 0.3, "the reference teacher is worth 0.3"),
        _above("dckd", "kd", 0.0, "divergences on both sides are above those on the better one"),
        _above("kd", "sft", 0.0, "distillation is above supervised training"),
    ),
    tuned_on=("return", True),
)
