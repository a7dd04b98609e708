"""19 TAID: a moving target teaches a small language model better than a fixed one, without mode collapse.

Text of the standard library with a teacher of its own; or, as real data, essays with a pretrained teacher.
"""

from understudy.claims.experiment import Arm, Check, Claim, Setting

_STEPS = 300
_LR = tuple({"trainer": {"learning_rate": lr}} for lr in (3e-3, 6e-3))
# The card scales alpha so that alpha · steps is the paper's 8; with 5e-4 a short run would be linear to the last digit.
_TAID = {"t_start": 0.2, "alpha": 8 / _STEPS}
_REAL = Setting(
    recipe={
        "task": "language_modeling",
        "data": {"name": "lm_domains", "domains": ["essays_dubois"], "max_length": 64},
        "teacher": "lm_domains_6m",
        "student": "llama:hidden=48,layers=2,heads=4",
        "trainer": {"max_steps": _STEPS, "per_device_train_batch_size": 16, "save_strategy": "no"},
    },
    needs=("lm_domains", "lm_domains_6m"),
)

CLAIM = Claim(
    name="taid",
    statement="TAID's student reaches lower bits per byte than plain forward KL's.",
    recipe={
        "task": "language_modeling",
        "data": {"name": "stdlib", "characters": 400_000, "max_length": 64, "vocab_size": 512},
        "teacher": {
            "model": "llama:hidden=96,layers=3,heads=4",
            "train": {"max_steps": 400, "per_device_train_batch_size": 32, "learning_rate": 4e-3},
        },
        "student": "llama:hidden=32,layers=2,heads=2",
        "trainer": {"max_steps": _STEPS, "per_device_train_batch_size": 16},
    },
    arms={
        "forward_kl": Arm("kd", {"temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0}, _LR),
        "reverse_kl": Arm(
            "kd", {"divergence": "reverse_kl", "temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0}, _LR
        ),
        "taid": Arm("taid", _TAID, _LR),
        "taid_linear": Arm("taid", {**_TAID, "adaptive": False}, _LR),
    },
    checks=(
        Check("taid", "forward_kl", 0.0, "bits_per_byte", False, "TAID is below forward KL"),
        Check("taid", "reverse_kl", 0.0, "bits_per_byte", False, "TAID is below reverse KL"),
        Check("taid", "taid_linear", 0.0, "bits_per_byte", False, "the adaptive pace helps"),
    ),
    knobs=(*({"t_start": t} for t in (0.4, 0.6, 0.8)), {"alpha": 32 / _STEPS}, {"drive": "kl"}),
    tuned_on=("bits_per_byte", False),
    settings={"real": _REAL},
)
