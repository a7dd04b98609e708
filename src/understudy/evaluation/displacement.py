"""Where the probability of preferred and rejected answers went, relative to the reference model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_KINDS = (
    ("only the rejected answer falls", False, True),
    ("neither falls", False, False),
    ("both fall: probability goes to other answers (likelihood displacement)", True, True),
    ("only the preferred answer falls", True, False),
)


def displacement(preferred: Tensor, rejected: Tensor) -> dict[str, Any]:
    """Shares of pairs by which of their sides became less likely.

    A preference loss sees the difference of the two alone, so both may fall while it improves. By the paper's account this is
    smoothing: the information that the pairs teach spreads over many answers, and its distribution (`losses.differential_information`)
    has a high entropy; where it is low, the preferred ones rise.

    Args:
        preferred, rejected: log π − log π_ref of the better and the worse answer, nats, `[pairs]`.

    Returns:
        `metrics`: `displacement/both_fall` and `displacement/preferred_falls`, shares of the pairs. `table`: for the report,
        with the mean change of each side.

    Source: Won et al. 2025 (arXiv 2505.23761), on the entropy of the differential information distribution.
    """
    falls, rejected_falls = preferred < 0, rejected < 0
    rows = []
    for name, first, second in _KINDS:
        chosen = (falls == first) & (rejected_falls == second)
        share = float(chosen.double().mean())
        means = [f"{float(x[chosen].mean()):+.2f}" if bool(chosen.any()) else "–" for x in (preferred, rejected)]
        rows.append([name, f"{share:.1%}", *means])
    rows.append(["all", "100.0%", *(f"{float(x.mean()):+.2f}" for x in (preferred, rejected))])
    return {
        "metrics": {
            "displacement/both_fall": float((falls & rejected_falls).double().mean()),
            "displacement/preferred_falls": float(falls.double().mean()),
        },
        "table": {
            "title": "Where the probability of the answers went",
            "headings": ["pairs", "share", "change of log-probability, preferred", "rejected"],
            "rows": rows,
        },
    }
