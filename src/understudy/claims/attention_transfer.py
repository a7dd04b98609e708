"""Attention transfer: where maps are active, on digits and on photographs."""

from understudy.claims._baselines import baseline_claim

CLAIM = baseline_claim(
    "attention-transfer", "Attention maps beside the labels reach a higher accuracy than cross-entropy alone."
)
