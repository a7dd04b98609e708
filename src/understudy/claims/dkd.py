"""DKD: the label and the rest with weights apart, on digits and on photographs."""

from understudy.claims._baselines import baseline_claim

CLAIM = baseline_claim("dkd", "Decoupled distillation reaches a higher accuracy than cross-entropy alone.")
