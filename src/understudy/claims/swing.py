"""13 Swing Distillation: the student predicts private tokens worse than kd's, and the others as well."""

from understudy.claims.experiment import Arm, Check, Claim

_LR = tuple({"trainer": {"learning_rate": lr}} for lr in (3e-3, 6e-3))
_KD = {"most": 1.0, "privacy_budget": None, "mask_labels": False}

CLAIM = Claim(
    name="swing",
    statement="Swing's student gives private tokens a lower likelihood than kd's, at a likelihood of others within 1 %.",
    recipe={
        "task": "language_modeling",
        "data": {"name": "stdlib", "characters": 400_000, "max_length": 64, "vocab_size": 512},
        "teacher": {
            "model": "llama:hidden=96,layers=3,heads=4",
            "train": {"max_steps": 400, "per_device_train_batch_size": 32, "learning_rate": 4e-3},
        },
        "student": "llama:hidden=32,layers=2,heads=2",
        "trainer": {"max_steps": 300, "per_device_train_batch_size": 16},
    },
    arms={
        "swing": Arm("swing", {"noise_on": "private"}, _LR),
        "kd": Arm("swing", _KD, _LR),
        "temperature": Arm("swing", {"privacy_budget": None}, _LR),
        "noise": Arm("swing", {"most": 1.0, "noise_on": "private"}, _LR),
        "flat": Arm("swing", {"base": 8.0, "most": 8.0, "noise_on": "private"}, _LR),
    },
    checks=(
        Check("swing", "kd", 0.0, "private_nll", True, "private tokens are predicted worse than by kd"),
        Check("swing", "kd", 0.0, "public_nll", False, "other tokens are within 1 % of kd", factor=1.01),
        Check("swing", "temperature", 0.0, "private_nll", True, "noise adds to the temperature"),
        Check("swing", "noise", 0.0, "private_nll", True, "the temperature adds to the noise"),
        Check("swing", "flat", 0.0, "public_nll", False, "one flat temperature for all costs more elsewhere"),
    ),
    tuned_on=("bits_per_byte", False),
    caveat="Private tokens are numbers and e-mail addresses of held-out text: how well they are predicted stands for how much is "
    "remembered, and is not the exposure of planted canaries.",
)
