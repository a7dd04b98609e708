"""The scripts of `examples/` as a newcomer would start them, on small models."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from own_texts import model, records, words
from scoring_server import Scorer
from served_cases import made, sides
from text_classes import as_csv, classifier, reviews

EXAMPLES = Path(__file__).parent.parent / "examples"


def started(name, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def test_every_example_is_short():
    found = sorted(EXAMPLES.glob("*.py"))
    assert [f.stem for f in found] == ["causal_lm", "classifier", "on_policy"]
    assert all(len(f.read_text().splitlines()) <= 100 for f in found)


@pytest.mark.slow
def test_causal_lm(tmp_path, monkeypatch, capsys):
    made(tmp_path / "teacher", steps=5)
    lines = [json.dumps({"text": f"line {i} of a text that counts to {i * i}"}) for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    said = started(
        "causal_lm", monkeypatch, capsys, "--teacher", tmp_path / "teacher", "--data", tmp_path / "texts.jsonl",
        "--student", "llama:hidden=16,layers=1,heads=2", "--output", tmp_path / "out", "--steps", 4, "--length", 32, "--seeds", 1,
    )  # fmt: skip
    assert "examples are captured" in said and "bits_per_byte" in said
    assert (tmp_path / "out" / "runs" / "report.html").is_file()


@pytest.mark.slow
def test_classifier(tmp_path, monkeypatch, capsys):
    classifier(tmp_path / "teacher")
    classifier(tmp_path / "student", steps=0, hidden_size=8)
    as_csv(tmp_path / "reviews.csv", reviews(120))
    said = started(
        "classifier", monkeypatch, capsys, "--teacher", tmp_path / "teacher", "--student", tmp_path / "student",
        "--data", tmp_path / "reviews.csv", "--output", tmp_path / "out", "--methods", "sft,kd", "--steps", 6, "--seeds", 1,
    )  # fmt: skip
    assert "on validation" in said and "classes" in said and "good" in said


def test_on_policy(tmp_path, monkeypatch, capsys):
    tokenizer = words()
    for name in ("teacher", "student"):
        model(tokenizer, seed=len(name)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    lines = [json.dumps({k: v for k, v in r.items() if k != "id"}) for r in records(24)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    with Scorer(*sides(tmp_path / "teacher")) as server:
        said = started(
            "on_policy", monkeypatch, capsys, "--url", server.url, "--name", "toy", "--tokenizer", tmp_path / "teacher",
            "--student", tmp_path / "student", "--data", tmp_path / "prompts.jsonl", "--output", tmp_path / "out",
            "--steps", 2, "--tokens", 4,
        )  # fmt: skip
    assert "bits_per_byte" in said and (tmp_path / "out" / "student" / "README.md").is_file()
