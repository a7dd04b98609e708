"""Where the probability of pairs went: shares by side, and the table in the report of a preference run."""

import pytest
import torch

from test_preference_methods import SINGLES, singles, staged
from test_preferences import PAIRS, SMALL, lists, scorer
from test_preferences import tokenizer as tokenizer
from understudy import distill
from understudy.data import collate_lists
from understudy.evaluation.displacement import displacement
from understudy.evaluation.preference import evaluate_preferences
from understudy.files import read_json
from understudy.methods.dpo import DPO


def test_each_pair_is_of_one_kind():
    preferred, rejected = torch.tensor([1.0, 2.0, -1.0, -3.0, 0.0]), torch.tensor([-1.0, 1.0, -2.0, 4.0, -6.0])
    found = displacement(preferred, rejected)
    assert [row[1] for row in found["table"]["rows"]] == ["40.0%", "20.0%", "20.0%", "20.0%", "100.0%"]
    assert found["table"]["rows"][0][2:] == ["+0.50", "-3.50"] and found["table"]["rows"][-1][2:] == ["-0.20", "-0.80"]
    assert found["metrics"] == {
        "displacement/both_fall": pytest.approx(0.2),
        "displacement/preferred_falls": pytest.approx(0.4),
    }
    assert displacement(preferred[:1], rejected[:1])["table"]["rows"][2][1:] == ["0.0%", "–", "–"]


def judged(examples, student):
    loader = torch.utils.data.DataLoader(examples, batch_size=2, collate_fn=collate_lists)
    return evaluate_preferences(student, loader)


def test_changes_are_sums_against_the_reference(tokenizer, tmp_path):
    student, reference, examples = scorer(tokenizer, 0), scorer(tokenizer, 1), lists(tokenizer, PAIRS)
    batch = staged(DPO(loss_type="ipo", reference="teacher"), examples, student, tmp_path, reference)
    with torch.no_grad():
        change = student(batch).signal.values - reference(batch).signal.values
    found = judged(examples, student)
    assert found["tables"] == [displacement(change[:, 0], change[:, 1])["table"]]


def test_there_is_none_without_a_reference_or_without_pairs(tokenizer, tmp_path):
    student, examples = scorer(tokenizer, 0), lists(tokenizer, PAIRS)
    staged(DPO(loss_type="simpo"), examples, student, tmp_path)
    assert "tables" not in judged(examples, student)
    alone = singles(tokenizer, SINGLES)
    staged(DPO(loss_type="kto"), alone, student, tmp_path)
    assert "tables" not in judged(alone, student)


def test_the_report_shows_it(tmp_path):
    trainer = {**SMALL["trainer"], "max_steps": 2}
    distill({**SMALL, "trainer": trainer, "method": "dpo", "output": str(tmp_path / "run")})
    tables = read_json(tmp_path / "run" / "evaluation.json")["tables"]
    assert "Where the probability of the answers went" in {table["title"] for table in tables}
    report = (tmp_path / "run" / "report.html").read_text()
    assert "likelihood displacement" in report and "displacement/both_fall" in report
