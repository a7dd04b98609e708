"""CTKD: a temperature that is learned against the student, on digits and on photographs."""

from understudy.claims._baselines import baseline_claim

CLAIM = baseline_claim(
    "ctkd", "A temperature learned against the student reaches a higher accuracy than cross-entropy alone."
)
