"""20 Teacher hacking: a student that sees the same texts of its teacher again and again leaves the truth; fresh texts prevent it.

A random network is the truth, teacher and student have learned from its texts, and the student distils on 20 prompts.
"""

from typing import Any

from understudy.claims.claim import Overrides
from understudy.claims.experiment import Arm, Check, Claim

_ONE: tuple[Overrides, ...] = ({},)
_KD = {"divergence": "forward_kl", "temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0}


def _arm(more: Overrides | None = None, **source: Any) -> Arm:
    written = {"fraction": 1.0, "steps": 1, "max_new_tokens": 8, **source}
    return Arm("kd", _KD, _ONE, {"on_policy": written, **(more or {})})


CLAIM = Claim(
    name="teacher-hacking",
    statement="Distilled on one text of the teacher a prompt, the student ends further from the truth than it once was; on fresh "
    "texts it does not.",
    recipe={
        "task": "text_world",
        "data": {"name": "letters"},
        "oracle": {"model": "oracle", "prompts": 500, "max_new_tokens": 8},
        "trainer": {
            "max_steps": 300,
            "eval_strategy": "steps",
            "eval_steps": 20,
            "eval_on_start": True,
            "logging_steps": 20,
            "save_strategy": "no",
        },
    },
    arms={
        "offline": _arm(teacher_share=1.0, generations=1),
        "offline, 4 texts": _arm(teacher_share=1.0, generations=4),
        "online teacher": _arm(teacher_share=1.0),
        "online student": _arm(),
        "half replayed": _arm(teacher_share=1.0, replay={"size": 20, "probability": 0.5}),
        "offline, taught by the truth": _arm({"teacher": "oracle"}, teacher_share=1.0, generations=1),
    },
    checks=(
        Check("offline", "online teacher", 0.05, "golden_rise", True, "golden rises by 5 % more offline than online"),
        Check("online teacher", "offline", 0.0, "golden", False, "online golden ends 15 % below offline's", None, 0.85),
        Check("online student", "offline", 0.0, "golden", False, "so it does on the student's texts", None, 0.85),
        Check("offline, 4 texts", "offline", 0.0, "golden", False, "four texts a prompt are better than one"),
        Check("online teacher", "offline, 4 texts", 0.0, "golden", False, "fresh texts are better than four"),
        Check(
            "offline, taught by the truth",
            "offline, taught by the truth",
            -0.5,
            "hacking",
            False,
            "a teacher that is the truth cannot be hacked",
            None,
            0.0,
        ),
    ),
    tuned_on=("golden", False),
    new_data=True,
    caveat="A transformer of random weights in place of the card's network, and prompts of letters in place of Gaussian vectors. "
    "Equal updates: online arms write 20 texts in every one of them, which offline arms do once.",
)
