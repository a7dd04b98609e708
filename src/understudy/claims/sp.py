"""SP: similarities among images, on digits and on photographs."""

from understudy.claims._baselines import baseline_claim

CLAIM = baseline_claim(
    "sp", "Similarities among images beside the labels reach a higher accuracy than cross-entropy alone."
)
