"""CRD: the contrast of embeddings with memories of both sides, on digits and on photographs."""

from understudy.claims._baselines import baseline_claim

CLAIM = baseline_claim(
    "crd",
    "A contrast of embeddings beside the labels reaches a higher accuracy than cross-entropy alone.",
    {"negatives": 1024},
)
