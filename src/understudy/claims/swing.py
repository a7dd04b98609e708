"""13 Swing Distillation: the student predicts private tokens worse than kd's, and the others as well.

On real data: news and government reports in place of program text.
"""

from typing import Any

from understudy.claims.experiment import Arm, Check, Claim, Setting

_LR = tuple({"trainer": {"learning_rate": lr}} for lr in (3e-3, 6e-3))
_KD = {"most": 1.0, "privacy_budget": None, "mask_labels": False}

_RECIPE: dict[str, Any] = {
    "task": "language_modeling",
    "data": {"name": "stdlib", "characters": 400_000, "max_length": 64, "vocab_size": 512},
    "teacher": {
        "model": "llama:hidden=96,layers=3,heads=4",
        "train": {"max_steps": 400, "per_device_train_batch_size": 32, "learning_rate": 4e-3},
    },
    "student": "llama:hidden=32,layers=2,heads=2",
    "trainer": {"max_steps": 300, "per_device_train_batch_size": 16},
}
_REAL: dict[str, Any] = {
    "name": "lm_domains",
    "domains": ["news_brown", "government_brown", "rural_abc"],
    "max_length": 64,
    "vocab_size": 512,
}

CLAIM = Claim(
    name="swing",
    statement="Swing's student gives private tokens a lower likelihood than kd's.",
    recipe=_RECIPE,
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
    settings={"real": Setting({**_RECIPE, "data": _REAL}, needs=("lm_domains",))},
    caveat="Private tokens are numbers and e-mail addresses of held-out text: how well they are predicted stands for how much is "
    "remembered, and is not the exposure of planted canaries.",
)
