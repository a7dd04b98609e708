"""DIST: correlation in place of divergence, on digits and on photographs."""

from understudy.claims._baselines import baseline_claim

CLAIM = baseline_claim(
    "dist", "Correlation with the teacher beside the labels reaches a higher accuracy than cross-entropy alone."
)
