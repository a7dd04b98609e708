"""FitNets: a hint on a middle layer, on digits and on photographs."""

from understudy.claims._baselines import baseline_claim

CLAIM = baseline_claim("fitnets", "A hint beside distillation reaches a higher accuracy than cross-entropy alone.")
