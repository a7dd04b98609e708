"""What a report says: texts, before and after, validation, scales that can be read, and a sentence for every metric."""

import json
import re
from pathlib import Path

import pytest
import torch

from engine_cases import DIGITS, TEXT
from understudy import distill
from understudy.claims import claims
from understudy.data import train_tokenizer
from understudy.evaluation import image_texts
from understudy.evaluation.texts import sample_texts
from understudy.methods import diswot
from understudy.reporting import comparison_table, render_comparison, render_run
from understudy.reporting.metrics import meaning
from understudy.reporting.plots import alike
from understudy.runs.recipe import make
from understudy.tasks import get

CLAIMS = Path(__file__).parent.parent / "docs" / "claims"
FALLBACK = meaning("no such metric")
SHORT = {"max_steps": 6, "per_device_train_batch_size": 8, "logging_steps": 1}


def cells(folder, metric):
    html = (folder / "report.html").read_text()
    row = re.search(rf"<tr><td>{re.escape(metric)}</td>(.*?)</tr>", html, re.DOTALL)
    return re.findall(r"<td[^>]*>(.*?)</td>", row[1])


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "run"
    trainer = {**SHORT, "eval_strategy": "steps", "eval_steps": 3}
    data = {**TEXT["data"], "characters": 20_000}
    values = {**TEXT, "method": "kd", "data": data, "teacher": TEXT["student"], "trainer": trainer}
    return distill({**values, "output": str(folder)})


def test_a_language_run_shows_what_the_student_writes(text_run):
    html = (text_run.folder / "report.html").read_text()
    table = next(
        t
        for t in json.loads((text_run.folder / "evaluation.json").read_text())["tables"]
        if t["title"].startswith("Sample texts")
    )
    assert table["headings"] == ["prompt (its end)", "in the data", "student", "teacher"] and len(table["rows"]) == 4
    assert all(row[0].strip() and row[1].strip() for row in table["rows"]) and "Sample texts" in html


def test_before_and_after_stand_side_by_side_in_one_scale(text_run):
    scores = json.loads((text_run.folder / "run.json").read_text())["preflight"]["scores"]
    for name in ("accuracy", "nll", "teacher_nll"):
        before, after, says = cells(text_run.folder, name)
        assert before == f"{scores[name]:.4f}" and after == f"{text_run.metrics[name]:.4f}" and says.endswith(".")


def test_the_validation_curve_is_that_of_the_tasks_metric(text_run):
    html = (text_run.folder / "report.html").read_text()
    assert "Validation bits_per_byte" in html and "Validation nll" in html and "no validation curve" not in html


def test_a_run_without_a_teacher_has_a_row_before_training_too(tmp_path):
    result = distill({**DIGITS, "method": "sft", "teacher": None, "trainer": SHORT, "output": str(tmp_path / "run")})
    before, after, _ = cells(tmp_path / "run", "accuracy")
    assert 0 <= float(before) <= 1 and after == f"{result.metrics['accuracy']:.4f}"
    assert "There is no validation curve: trainer.eval_strategy=steps" in (tmp_path / "run" / "report.html").read_text()


def test_samples_are_greedy_continuations_of_the_prompt():
    from transformers import LlamaConfig, LlamaForCausalLM

    from understudy.models import CausalLMAdapter

    tokenizer = train_tokenizer(["the cat sat on the mat"] * 9, 280)
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=280, max_position_embeddings=24, **config)).eval()
    student = CausalLMAdapter(model, 280)
    rows = []
    for text, start in (("the cat sat on the mat " * 9, 40), ("the mat sat on the cat", 2)):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        rows.append(
            {"input_ids": ids, "labels": ids.clone().masked_fill(torch.arange(len(ids)) < start, -100), "id": 0}
        )
    found = sample_texts(student, None, rows, tokenizer)["rows"]
    for row, (prompt, _, written), start in zip(rows, found, (40, 2), strict=True):
        asked = row["input_ids"][max(0, start - 12) : start]  # 24 positions: 12 of the prompt, 12 written
        assert prompt == tokenizer.decode(asked, skip_special_tokens=True)
        ids = asked[None]
        for _ in range(12):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1)[None]], 1)
            if int(ids[0, -1]) == model.config.eos_token_id:
                break
        assert written == tokenizer.decode(ids[0, len(asked) :], skip_special_tokens=True)
    small = torch.nn.Linear(2, 2)
    assert sample_texts(small, None, rows, tokenizer) is None


def test_a_model_that_cannot_write_costs_no_run(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    def broken(*args, **kwargs):
        raise RuntimeError("no cache for this model")

    monkeypatch.setattr(LlamaForCausalLM, "generate", broken)
    values = {**TEXT, "method": "sft", "teacher": TEXT["student"], "trainer": SHORT, "output": str(tmp_path / "run")}
    assert distill(values).metrics["nll"] > 0
    assert "No sample texts: LlamaForCausalLM cannot write" in (tmp_path / "run" / "report.html").read_text()


def test_series_of_unlike_size_are_not_on_one_axis():
    steps = [1, 2]
    series = {name: (steps, values) for name, values in {"a": [1, 2], "b": [100, 90], "c": [None, 3]}.items()}
    assert [list(group) for group in alike(series)] == [["a", "c"], ["b"]]
    assert [list(g) for g in alike({"zero": (steps, [0, 0]), "one": (steps, [1, 1])})] == [["zero"], ["one"]]


def comparison(folder):
    runs = []
    for method, scale in (("sft", 1.0), ("dpo", 300.0)):
        home = folder / f"{method}-s0"
        home.mkdir()
        (home / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": scale, "terms": {}}) + "\n")
        (home / "validation.jsonl").write_text(json.dumps({"step": 1, "accuracy": 0.5}) + "\n")
        cost = {"time_share": {"student": 1.0}}
        runs.append({"method": method, "seed": 0, "folder": home.name, "metrics": {"accuracy": 0.931}, "cost": cost})
    from understudy.reporting import summarise

    value = {
        "title": "a comparison",
        "baseline": "sft",
        "metric": "accuracy",
        "higher_is_better": True,
        "seeds": [0],
        "runs": runs,
        "table": summarise(runs, "sft", "accuracy"),
        "teacher": {"name": "big", "accuracy": 0.96},
    }
    (folder / "comparison.json").write_text(json.dumps(value))
    return value


def test_a_comparison_says_numbers_in_the_scale_of_its_plots_and_keeps_losses_apart(tmp_path):
    value = comparison(tmp_path)
    html = render_comparison(tmp_path).read_text()
    assert "0.931" in html and "93.1" not in html and meaning("accuracy") in html
    assert "Loss of sft" in html and "Loss of dpo" in html and "Validation accuracy" in html
    table = comparison_table(value)
    shown = [str(cell) for column in table.columns for cell in column.cells]
    assert "0.931" in shown and "0.960" in table.caption and "%" not in str(table.title)


def test_every_metric_of_every_claim_has_a_sentence():
    names = set()

    def look(value):
        if isinstance(value, dict):
            names.update(value["metrics"] if isinstance(value.get("metrics"), dict) else ())
            for inner in value.values():
                look(inner)

    for file in CLAIMS.glob("*.json"):
        look(json.loads(file.read_text()))
    assert len(names) > 15
    for claim in claims().values():
        for setting in (claim, *claim.settings.values()):
            names |= {n for check in setting.checks or () for n in (check.metric, check.other_metric) if n}
    assert not [n for n in names if meaning(n, {**diswot.EXPLAINED, **image_texts.EXPLAINED}) == FALLBACK]


def test_metrics_made_of_others_are_explained_by_these():
    assert meaning("teacher_accuracy") == f"Of the teacher: {meaning('accuracy')}"
    assert meaning("accuracy_clean") == f"On the further test set 'clean': {meaning('accuracy')}"
    assert "4 steps" in meaning("teacher_4_distance") and "Fréchet" in meaning("distance", {"distance": "Fréchet."})
    assert "documents" in meaning("retrieval_recall_1000") and meaning("kept_size") == "Triples in the kept corpus."


@pytest.mark.parametrize(
    "trainer,given,samples", [({"max_steps": 10}, {}, 64), ({}, {}, 4000), ({"max_steps": 10}, {"samples": 300}, 300)]
)
def test_an_evaluation_is_sized_to_the_run(trainer, given, samples):
    values = {"task": "image_generation", "method": "boot", "data": {"name": "ring8", **given}, "trainer": trainer}
    prepared = get("image_generation").prepare(make(values))
    assert len(prepared.test) == len(prepared.validation) == samples
    assert any("data.samples" in note for note in prepared.notes) == (samples == 64)


def test_what_the_distance_is_stands_beside_it(tmp_path):
    data = {"name": "ring8", "size": 64, "samples": 64, "compare_steps": [1], "teacher_steps": 2}
    values = {"task": "image_generation", "method": "boot", "data": data, "trainer": {"max_steps": 2}}
    metrics = distill({**values, "student": "denoiser:8", "output": str(tmp_path / "run")}).metrics
    assert not {"fid", "energy"} & metrics.keys()
    assert "Energy distance" in cells(tmp_path / "run", "distance")[-1]


def test_an_empty_run_still_has_a_page(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"method": "kd"}))
    assert "kd" in render_run(tmp_path).read_text()
