"""The table of findings: results of more than one setting of a claim."""

import json
from pathlib import Path

from understudy.pages import findings, searches

CLAIMS = Path(__file__).parent.parent / "docs" / "claims"


def test_a_claim_may_have_results_in_several_settings(tmp_path):
    check = {"says": "it is better", "metric": "accuracy", "threshold": 0.0, "difference": 0.1, "verdict": "supported"}
    for name, seeds in {"taid.real": 5, "taid": 3, "ff-g2m.real": 4}.items():
        result = {"budget": {"seeds": seeds}, "checks": [{**check, "interval": [0.05, 0.15]}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    rows = [line.split("|")[1].strip() for line in findings(tmp_path).splitlines()[2:]]
    assert rows == ["19 `taid`, 3 seeds", "19 `taid` real, 5 seeds", "30 `ff-g2m` real, 4 seeds"]
    assert findings(CLAIMS) in (CLAIMS / "README.md").read_text()


def test_searches_are_a_table_where_there_are_any(tmp_path):
    (tmp_path / "taid.json").write_text("{}")
    assert searches(tmp_path) == ""
    tried = {"metric": "accuracy", "threshold": 0.01, "difference": 0.02, "interval": [-0.01, 0.05]}
    found = [{"options": {}, **tried}, {"options": {"k": 3, "c": 0.5}, **tried}]
    (tmp_path / "first.json").write_text(json.dumps({"search": found}))
    rows = searches(tmp_path).splitlines()
    assert rows[2] == "| `first` | as judged | +0.02 [-0.01, +0.05] accuracy | +0.01 |"
    assert rows[3] == "|  | k 3, c 0.5 | +0.02 [-0.01, +0.05] accuracy | +0.01 |"
