"""39 DPO and its variants: KTO and CPO do without a supervised start, DPO and IPO do not.

The card's chains: pairs labelled by return; the start is fitted to this chain (`sft`) or mostly to another (`base`).
`value` is the exact return minus KL to the chain. Every arm chooses among the same learning rates.

`losses` has every loss that fits pairs, from a third start too, one that was tuned towards the reward before.

On real data: pairs of answers as people preferred them, and a small pretrained model that begins as it is (`base`) or after
training on the preferred answers (`sft`). What is judged is the order of answers to unseen prompts.
"""

from collections.abc import Mapping
from typing import Any

from understudy.claims.experiment import Arm, Check, Claim, Setting

_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (5e-3, 2e-2))
_LOSSES = ("dpo", "ipo", "kto", "cpo", "simpo")
_STARTS = {"sft": "own", "base": "mixture"}
_ALL_STARTS = {**_STARTS, "tuned": "tuned"}
_OF_PAIRS = (
    "dpo ipo kto cpo simpo hinge cdpo robust sigmoid_norm exo_pair discopop nca_pair bco_pair sppo_hard aot aot_unpaired "
    "apo_zero apo_down cpo_simpo orpo sft"
).split()
_ALL: dict[str, dict[str, Any]] = {
    **{loss: {"loss_type": loss} for loss in _OF_PAIRS},
    "dpo+sft": {"loss_type": ["dpo", "sft"]},
}

_PAIRS = "preferences/hh_harmless_base_test.parquet"
_REAL_RATES = tuple({"trainer": {"learning_rate": rate}} for rate in (3e-4, 1e-3))
_REAL_STARTS: dict[str, Any] = {
    "sft": {"student": {"model": "lm_stories260k", "train": {"max_steps": 200, "learning_rate": 1e-3}}},
    "base": {"student": "lm_stories260k"},
}


def _costs(loss: str, threshold: float, says: str) -> Check:
    return Check(f"sft/{loss}", f"base/{loss}", threshold, "accuracy", True, says)


_REAL = Setting(
    statement="Skipping the supervised start costs DPO at least 1 point of accuracy on people's pairs.",
    recipe={
        "task": "preferences",
        "data": {"name": _PAIRS, "max_length": 256},
        "trainer": {"max_steps": 150, "per_device_train_batch_size": 8, "save_strategy": "no"},
    },
    needs=(_PAIRS, "lm_stories260k"),
    arms={
        f"{start}/{loss}": Arm("dpo", {"loss_type": loss}, _REAL_RATES, recipe)
        for start, recipe in _REAL_STARTS.items()
        for loss in ("dpo", "ipo", "kto", "cpo")
    },
    checks=(
        _costs("dpo", 0.01, "skipping the start costs DPO 1 point or more"),
        _costs("ipo", 0.01, "skipping the start costs IPO 1 point or more"),
        Check("base/kto", "sft/kto", -0.01, "accuracy", True, "it costs KTO less than 1 point"),
        Check("base/cpo", "sft/cpo", -0.01, "accuracy", True, "it costs CPO less than 1 point"),
    ),
    tuned_on=("accuracy", True),
)


def _above(a: str, b: str, threshold: float, says: str) -> Check:
    return Check(a, b, threshold, "value", True, says)


def _arms(losses: Mapping[str, dict[str, Any]], starts: Mapping[str, str]) -> dict[str, Arm]:
    return {
        f"{start}/{loss}": Arm("dpo", options, _RATES, {"data": {"name": "chains", "start": data}})
        for start, data in starts.items()
        for loss, options in losses.items()
    }


_LOSSES_SETTING = Setting(
    statement="From every start an SFT term in DPO's loss raises return minus KL, and KTO and CPO are above DPO.",
    recipe={"task": "preference_world", "data": {"name": "chains"}},
    needs=(),
    arms=_arms(_ALL, _ALL_STARTS),
    checks=tuple(
        _above(f"{start}/{better}", f"{start}/dpo", 0.0, f"{start}: {better} is above DPO")
        for better in ("dpo+sft", "kto", "cpo")
        for start in _ALL_STARTS
    )
    + tuple(_above(f"sft/{loss}", f"base/{loss}", 0.0, f"skipping the start costs {loss}") for loss in _ALL),
)

CLAIM = Claim(
    name="dpo",
    statement="Skipping the supervised start costs DPO at least 3 in return minus KL, and KTO and CPO little.",
    recipe={"task": "preference_world", "data": {"name": "chains"}},
    arms=_arms({loss: {"loss_type": loss} for loss in _LOSSES}, _STARTS),
    checks=(
        _above("sft/dpo", "base/dpo", 3.0, "skipping the start costs DPO 3 or more"),
        _above("sft/ipo", "base/ipo", 3.0, "skipping the start costs IPO 3 or more"),
        _above("base/kto", "sft/kto", -2.0, "it costs KTO less than 2"),
        _above("base/cpo", "sft/cpo", -0.5, "it costs CPO less than 0.5"),
        _above("sft/cpo", "sft/kto", 0.0, "CPO is above KTO"),
        *(_above("sft/kto", f"sft/{other}", 0.0, f"KTO is above {other}") for other in ("dpo", "ipo", "simpo")),
    ),
    tuned_on=("value", True),
    settings={"losses": _LOSSES_SETTING, "real": _REAL},
)
