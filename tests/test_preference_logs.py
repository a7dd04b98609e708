"""What a tracker sees of preferences: TRL's names and values for every variant, each step, and the metrics at the end."""

import json
import sys
import types
from typing import ClassVar

import pytest
import torch

from test_preference_methods import SINGLES, singles, staged
from test_preferences import PAIRS, SMALL, lists, scorer
from test_preferences import tokenizer as tokenizer
from understudy import distill
from understudy.data import collate_lists
from understudy.evaluation.preference import evaluate_preferences
from understudy.methods.adpo import ADPO
from understudy.methods.dpo import DPO
from understudy.training import TrainState
from understudy.training.reference import NAMES

CASES = {
    # method: β, whether a reference is taken off, whether log-probabilities are means a token
    "dpo": (DPO(beta=0.3, reference="teacher"), 0.3, True, False),
    "ipo": (DPO(loss_type="ipo", reference="teacher"), 0.1, True, False),
    "kto": (DPO(loss_type="kto", reference="teacher"), 0.1, True, False),
    "cpo": (DPO(loss_type="cpo"), 0.1, False, False),
    "simpo": (DPO(loss_type="simpo"), 2.0, False, True),
    "orpo": (DPO(loss_type="orpo", beta=0.2), 0.2, False, True),
    "adpo": (ADPO(tau=5.0, anchor="teacher", target="best"), 0.2, True, False),
}


@pytest.mark.parametrize("name", CASES)
def test_rewards_and_log_probabilities_are_those_of_trl(name, tokenizer, tmp_path):
    method, beta, anchored, mean = CASES[name]
    student, reference, examples = scorer(tokenizer, 0), scorer(tokenizer, 1), lists(tokenizer, PAIRS)
    batch = staged(method, examples, student, tmp_path, reference)
    terms = method.loss(student(batch), None, batch, TrainState(student=student, step=1))
    with torch.no_grad():
        ours, theirs = student(batch).signal.values, reference(batch).signal.values
    scale = batch.lengths if mean else torch.ones_like(batch.lengths)
    logps, rewards = ours / scale, beta * (ours - theirs if anchored else ours) / scale
    chosen, rejected = rewards[:, 0], rewards[:, 1]  # `PAIRS` name the chosen side first
    wanted = [chosen, rejected, chosen - rejected, (chosen > rejected).double(), logps[:, 0], logps[:, 1]]
    for key, values in zip(NAMES, wanted, strict=True):
        torch.testing.assert_close(terms[key].values, values, rtol=1e-6, atol=1e-9)
        assert terms[key].weight == 0 and not terms[key].values.requires_grad
    loader = torch.utils.data.DataLoader(examples, batch_size=2, collate_fn=collate_lists)
    judged = evaluate_preferences(student, loader)["metrics"]
    assert {k: judged[k] for k in NAMES} == pytest.approx(
        {k: float(v.mean()) for k, v in zip(NAMES, wanted, strict=True)}, rel=1e-5
    )


def test_single_answers_are_means_over_their_own_side(tokenizer, tmp_path):
    method = DPO(loss_type="kto", reference="teacher", beta=0.5)
    student, reference, examples = scorer(tokenizer, 0), scorer(tokenizer, 1), singles(tokenizer, SINGLES[:3])
    batch = staged(method, examples, student, tmp_path, reference)
    terms, counts = method.loss(student(batch), None, batch, TrainState(student=student, step=1)), method.counts(batch)
    with torch.no_grad():
        rewards = 0.5 * (student(batch).signal.values - reference(batch).signal.values)[:, 0]
    means = {k: float(t.values.sum()) / counts[k] for k, t in terms.items() if counts.get(k)}
    found = method.logged(means)
    chosen, rejected = float(rewards[[0, 2]].mean()), float(rewards[1])
    assert found["rewards/chosen"] == pytest.approx(chosen) and found["rewards/rejected"] == pytest.approx(rejected)
    assert found["rewards/margins"] == pytest.approx(chosen - rejected) and "rewards/accuracies" not in found


def test_a_step_without_one_side_logs_no_mean_of_it(tmp_path):
    sides = [SINGLES[(i + i // 10) % 4] for i in range(40)]
    rows = [{**one, "prompt": f"{one['prompt']} {i}"} for i, one in enumerate(sides)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"name": str(tmp_path / "x.jsonl"), "max_length": 64, "vocab_size": 300}
    trainer = {**SMALL["trainer"], "per_device_train_batch_size": 1, "max_steps": 6}
    recipe = {**SMALL, "data": data, "trainer": trainer, "method": "dpo", "options": {"loss_type": "kto"}}
    metrics = distill({**recipe, "output": str(tmp_path / "run")}).metrics
    terms = [json.loads(line)["terms"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(("rewards/chosen" in t) != ("rewards/rejected" in t) for t in terms) and len(terms) == 6
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"])


class Writer:
    """Stands for TensorBoard's: remembers where it writes and what."""

    seen: ClassVar[list] = []

    def __init__(self, log_dir):
        self.folder = log_dir

    def add_text(self, *args): ...
    def flush(self): ...
    def close(self): ...

    def add_scalar(self, name, value, step):
        self.seen.append((self.folder, name, value, step))


def test_every_term_is_an_event_in_the_run_folder(tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Writer, "seen", [])
    trainer = {**SMALL["trainer"], "max_steps": 2, "report_to": "tensorboard"}
    result = distill({**SMALL, "trainer": trainer, "method": "dpo", "output": str(tmp_path / "run")})
    assert {folder for folder, *_ in Writer.seen} == {str(tmp_path / "run" / "tensorboard")}
    steps = {name: [s for _, n, _, s in Writer.seen if n == name] for _, name, _, _ in Writer.seen}
    assert all(steps[f"train/{name}"] == [1, 2] for name in (*NAMES, "terms/dpo", "loss"))
    last = {name: value for _, name, value, _ in Writer.seen}
    assert last["test/accuracy"] == result.metrics["accuracy"]
    assert last["test/rewards/margins"] == result.metrics["rewards/margins"]


def test_tpo_logs_the_accuracy_of_its_rewards(tmp_path):
    trainer = {**SMALL["trainer"], "max_steps": 1}
    distill({**SMALL, "trainer": trainer, "method": "tpo", "output": str(tmp_path / "run")})
    terms = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["terms"]
    assert {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")} <= terms.keys()
