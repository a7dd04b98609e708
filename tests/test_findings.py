"""The table of findings: results of more than one setting of a claim."""

import json
from pathlib import Path

from understudy.pages import findings

CLAIMS = Path(__file__).parent.parent / "docs" / "claims"


def test_a_claim_may_have_results_in_several_settings(tmp_path):
    check = {"says": "it is better", "metric": "accuracy", "threshold": 0.0, "difference": 0.1, "verdict": "supported"}
    for name, seeds in {"taid.real": 5, "taid": 3, "ff-g2m.real": 4}.items():
        result = {"budget": {"seeds": seeds}, "checks": [{**check, "interval": [0.05, 0.15]}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    rows = [line.split("|")[1].strip() for line in findings(tmp_path).splitlines()[2:]]
    assert rows == ["19 `taid`, 3 seeds", "19 `taid` real, 5 seeds", "30 `ff-g2m` real, 4 seeds"]
    assert findings(CLAIMS) in (CLAIMS / "README.md").read_text()
