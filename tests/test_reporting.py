"""Statistics in closed form, panels, the report in a browser, and the commands end to end."""

import json
import re
import shutil
import subprocess

import pytest
import torch

from engine_cases import DIGITS
from understudy import compare
from understudy.cli import main
from understudy.evaluation import expected_calibration_error, fit_temperature, reliability, row_statistics
from understudy.reporting import interval, paired, render_comparison, verdict
from understudy.targets import Dense


def test_intervals_in_closed_form():
    i = interval([1.0, 2.0, 3.0])
    half = 4.302652729696142 / 3**0.5  # t(0.975, 2) times the standard error
    assert i.mean == 2 and i.low == pytest.approx(2 - half) and i.high == pytest.approx(2 + half)
    assert interval([4.0]).low is None
    assert paired([3.0, 4.0], [1.0, 2.0]) == (2.0, 2.0, 2.0)


def test_verdicts():
    assert verdict(paired([3.0, 4.0, 5.1], [1.0, 2.0, 3.0]), 1.5) == "supported"
    assert verdict(paired([3.0, 4.0, 5.1], [1.0, 2.0, 3.0]), 3.0) == "not supported"
    assert verdict(paired([1.0, 4.0], [1.0, 2.0])) == "inconclusive"
    assert verdict(paired([1.0, 2.0, 3.1], [3.0, 4.0, 5.0]), 0.5, higher_is_better=False) == "supported"
    assert verdict(interval([1.0])) == "inconclusive"


def test_calibration_by_hand():
    confidence, correct = torch.tensor([0.9, 0.9, 0.55, 0.55]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    assert expected_calibration_error(confidence, correct, 10) == pytest.approx(0.5 * 0.1 + 0.5 * 0.05)
    table = reliability(confidence, correct, 10)
    assert table["count"][8] == 2 and table["accuracy"][5] == 0.5 and table["confidence"][0] is None
    assert reliability(torch.tensor([1.0]), torch.tensor([1.0]), 10)["count"][9] == 1
    logits = torch.randn(4000, 5)
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.15)


def test_row_statistics_of_identical_models():
    logits, labels = torch.randn(50, 6), torch.randint(0, 6, (50,))
    rows = row_statistics(Dense(logits), Dense(logits + 1), labels, tile_bytes=24 * 7)
    assert rows.agree.all() and rows.kl.abs().max() < 1e-9
    torch.testing.assert_close(rows.nll.float(), torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    assert row_statistics(Dense(logits), None, labels).kl.isnan().all()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    recipe = {**DIGITS, "output": str(folder), "trainer": {**DIGITS["trainer"], "max_steps": 60}}
    return compare(recipe, ["sft", "kd", "taid"], 2)


def test_comparisons_have_equal_budgets_and_paired_intervals(comparison):
    data = json.loads((comparison.folder / "comparison.json").read_text())
    assert len(data["runs"]) == 6 and data["budget"]["micro_batches"] == [60]
    assert data["budget"]["forwards"]["sft"]["teacher"] == 0
    assert data["budget"]["forwards"]["kd"]["teacher"] == data["budget"]["forwards"]["kd"]["student"]
    for row in data["table"]:
        low, high = row["interval"]
        assert low <= row["mean"] <= high and row["seeds"] == 2
    cost = data["runs"][0]["cost"]
    assert sum(cost["time_share"].values()) == pytest.approx(1) and cost["flops_total"] > 0


def test_damaged_lines_of_a_comparisons_runs_are_said(comparison, tmp_path):
    folder = shutil.copytree(comparison.folder, tmp_path / "copy")
    runs = json.loads((folder / "comparison.json").read_text())["runs"]
    log = folder / next(run["folder"] for run in runs if run["method"] == "kd") / "metrics.jsonl"
    log.write_text(log.read_text() + "not JSON\n")
    assert "1 damaged line of metrics.jsonl is left out" in render_comparison(folder).read_text()


def test_the_report_is_one_file_that_asks_for_nothing(comparison):
    html = (comparison.folder / "report.html").read_text()
    assert not re.search(r'(src|href)="(https?:)?//', html) and "<script" not in html
    assert "prefers-color-scheme: dark" in html and html.count("<svg") >= 3 and len(html) < 1_000_000
    run = (comparison.folder / "runs" / "taid-s0" / "report.html").read_text()
    assert "Method state" in run and "Calibration" in run


def test_text_is_escaped(tmp_path):
    from understudy.reporting import render_run

    (tmp_path / "run.json").write_text(json.dumps({"method": "<script>alert(1)</script>"}))
    assert "<script>" not in render_run(tmp_path).read_text()


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_the_report_in_a_browser(comparison, tmp_path, dark):
    from PIL import Image

    shot = tmp_path / "shot.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            *scheme,
            f"--user-data-dir={tmp_path}/profile",
            "--window-size=1200,1600",
            f"--screenshot={shot}",
            (comparison.folder / "report.html").as_uri(),
        ],
        capture_output=True,
        timeout=120,
        check=True,
    )
    grey = Image.open(shot).convert("L").histogram()
    light = sum(grey[128:]) / sum(grey)
    assert (light < 0.2) if dark else (light > 0.8)


def test_commands_end_to_end(comparison, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert stop.value.code == 0
        return capsys.readouterr().out

    entries = json.loads(call("methods", "--json"))
    assert {e["status"] for e in entries} == {"works"} and {
        "number",
        "name",
        "title",
        "year",
        "family",
    } <= entries[0].keys()
    assert "Plackett" in call("show", "pld") or "list-wise" in call("show", "pld").lower()
    folder = str(comparison.folder / "runs" / "kd-s0")
    metrics = json.loads(call("evaluate", folder, "--json"))["metrics"]
    saved = json.loads((comparison.folder / "runs" / "kd-s0" / "evaluation.json").read_text())["metrics"]
    assert metrics["accuracy"] == saved["accuracy"] and metrics["nll"] == pytest.approx(saved["nll"])
    assert "report.html" in call("report", folder)
    assert json.loads(call("check", "task=image_classification", "--json"))["warnings"] == []
    out = call(
        "train", "task=image_classification", "method=sft", "student=mlp:4", "trainer.max_steps=5", "output=x", "--json"
    )
    assert json.loads(out)["metrics"]["accuracy"] >= 0
    text = call("check", "task=language_modeling", "data.characters=40000", "data.vocab_size=300")
    assert "rows of" in text


def test_a_claim_runs_and_says_what_it_found(tmp_path):
    """A student that learns against one whose learning rate is next to nothing: no doubt what to find."""
    from understudy.claims.experiment import Arm, Check, Claim, reproduce

    learn = ({"trainer": {"learning_rate": 1e-3}}, {"trainer": {"learning_rate": 1e-2}})
    idle = ({"trainer": {"learning_rate": 1e-9}}, {"trainer": {"learning_rate": 2e-9}})
    claim = Claim(
        name="toy",
        statement="Learning beats idling.",
        recipe={**DIGITS, "output": "unused", "trainer": {**DIGITS["trainer"], "max_steps": 120, "save_steps": 500}},
        arms={"learns": Arm("sft", {}, learn), "idles": Arm("sft", {}, idle)},
        checks=(
            Check("learns", "idles", 0.1, "accuracy", True, "it learns"),
            Check("idles", "learns", 0.0, "accuracy", True, "idling learns"),
        ),
        tuned_on=("accuracy", True),
    )
    result = reproduce(claim, 3, tmp_path)
    assert [c["verdict"] for c in result["checks"]] == ["supported", "not supported"]
    assert result["verdict"] == "supported" and result["difference"] > 0.1
    assert {"claim", "arms", "metric", "difference", "interval", "budget"} <= result.keys()
    assert result["budget"]["tuning_trials_per_arm"] == 2 and len(set(result["budget"]["micro_batches"].values())) == 1
    assert result["arms"]["learns"]["chosen"] == learn[1]
    judged = json.loads((tmp_path / "tuning" / "learns-0" / "evaluation.json").read_text())
    assert judged["split"] == "validation"
