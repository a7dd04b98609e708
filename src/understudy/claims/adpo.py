"""2 ADPO: lists with soft targets are less brittle than pairs under noisy rewards, and a moving anchor goes further.

The card's bandit in four kinds of noise; every seed is a world of its own. `value` is the mean probability of the truly
best item. The pairwise baseline comes twice: one pair drawn for each context, and all fifteen.

On real data: pairs of answers as people preferred them, whose noise is that of people; lists are of two there, and what is
judged is the order of answers to unseen prompts.
"""

from typing import Any

from understudy.claims.experiment import Arm, Check, Claim, Setting

_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (5e-4, 1.5e-3))
_TAU = {"tau": 1.0, "beta_reward": 0.5}
_ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"beta": 1.0, "pairs": "random"}),
    "dpo_all": ("dpo", {"beta": 1.0, "pairs": "all"}),
    "softmax": ("adpo", _TAU),
    "kde": ("adpo", {**_TAU, "target": "kde_rank"}),
    "dynamic": ("adpo", {**_TAU, "anchor": "dynamic", "every": 50}),
}
_NOISES = ("heavy", "outlier", "adversarial", "shift")

_PAIRS = "preferences/hh_harmless_base_test.parquet"
_REAL_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (3e-4, 1e-3))
_REAL = Setting(
    statement="On people's pairs of answers, anchored lists with soft targets order unseen answers better than DPO.",
    recipe={
        "task": "preferences",
        "data": {"name": _PAIRS, "max_length": 256},
        "student": {"model": "lm_stories260k", "train": {"max_steps": 200, "learning_rate": 1e-3}},
        "trainer": {"max_steps": 150, "per_device_train_batch_size": 8, "save_strategy": "no"},
    },
    needs=(_PAIRS, "lm_stories260k"),
    arms={label: Arm(*_ARMS[label], _REAL_RATES) for label in ("dpo", "softmax", "kde", "dynamic")},
    checks=(
        Check("softmax", "dpo", 0.0, "accuracy", True, "soft targets are above DPO"),
        Check("kde", "softmax", 0.0, "accuracy", True, "rank-smoothed targets are above the rewards' own"),
        Check("dynamic", "softmax", 0.0, "accuracy", True, "a moving anchor is above a fixed one"),
    ),
    tuned_on=("accuracy", True),
)


def _says(a: str, b: str, noise: str, threshold: float = 0.0) -> Check:
    return Check(f"{noise}/{a}", f"{noise}/{b}", threshold, "value", True, f"{noise}: {a} is above {b}")


CLAIM = Claim(
    name="adpo",
    statement="With noisy rewards, anchored lists with rank-smoothed targets beat hard pairwise DPO.",
    recipe={"task": "preference_world", "data": {"name": "bandit"}},
    arms={
        f"{noise}/{label}": Arm(method, options, _RATES, {"data": {"name": "bandit", "noise": noise}})
        for noise in _NOISES
        for label, (method, options) in _ARMS.items()
    },
    checks=(
        *(_says("kde", "dpo", noise) for noise in _NOISES),
        *(_says("kde", "dpo_all", noise) for noise in _NOISES),
        *(_says("kde", "softmax", noise) for noise in _NOISES),
        *(_says("dynamic", "softmax", noise) for noise in _NOISES),
    ),
    knobs=(
        *({"tau": t} for t in (0.25, 0.5, 2.0, 4.0)),
        *({"beta_reward": b} for b in (0.25, 1.0)),
        {"anchor": "dynamic", "every": 50},
    ),
    tuned_on=("value", True),
    settings={"real": _REAL},
)
