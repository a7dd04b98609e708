"""17 DDK: at an equal number of steps, weights by domain gaps lower the worst gap, and smoothing keeps the weights steady."""

from understudy.claims.experiment import Arm, Check, Claim

_STEPS, _K = 600, 50
_LR = tuple({"trainer": {"learning_rate": lr}} for lr in (3e-3, 6e-3))
_DDK = {"interval": _K, "samples": 50}

CLAIM = Claim(
    name="ddk",
    statement="DDK's worst ratio of perplexities is 10 % below that of drawing all domains alike.",
    recipe={
        "task": "language_modeling",
        "data": {"name": "lm_domains", "domain_column": "domain", "max_length": 64, "vocab_size": 512},
        "teacher": {
            "model": "llama:hidden=96,layers=3,heads=4",
            "train": {"max_steps": 1500, "per_device_train_batch_size": 32, "learning_rate": 4e-3},
        },
        "student": "llama:hidden=32,layers=2,heads=2",
        "trainer": {"max_steps": _STEPS, "per_device_train_batch_size": 16},
    },
    arms={
        "ddk": Arm("ddk", _DDK, _LR),
        "uniform": Arm("ddk", {**_DDK, "alpha": 0.0, "start": "uniform"}, _LR),
        "unsmoothed": Arm("ddk", {**_DDK, "alpha": 1.0}, _LR),
    },
    checks=(
        Check("ddk", "uniform", 0.0, "worst_ratio", False, "the worst ratio is 10 % below uniform's", factor=0.9),
        Check("ddk", "uniform", 0.0, "mean_ratio", False, "the mean ratio is not higher"),
        Check("ddk", "unsmoothed", 0.0, "weight_change", False, "weights move less than without smoothing"),
    ),
    tuned_on=("bits_per_byte", False),
    caveat="It needs `lm_domains` in UNDERSTUDY_DATA. The arm without smoothing is α = 1, which multiplies all ratios so far.",
)
