"""The engine: resume to the bit, invariance to how a batch is cut, garbage under the mask, who is trained."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from engine_cases import CONV, DIGITS, OPTIONS, TEXT, killed_run, weights
from split_cases import ends_alike, flat
from two_ranks import two_ranks
from understudy import distill
from understudy.data import Batch, collate_images, collate_text
from understudy.methods.dhkd import DHKD
from understudy.methods.kd import KD
from understudy.methods.pld import PLD
from understudy.methods.sft import SFT
from understudy.methods.taid import TAID
from understudy.methods.trg import TRG
from understudy.models import CausalLMAdapter, ClassifierAdapter
from understudy.models.small import build_small
from understudy.targets import Dense
from understudy.teachers import LocalTeacher
from understudy.training import DistillationTrainer, TrainModule
from understudy.training.checkpoint import load_tree, save_tree
from understudy.training.shapes import probe

HERE = Path(__file__).parent


def recipe(base, method, output, **trainer):
    return {
        **base,
        "method": method,
        "options": OPTIONS[method],
        "output": str(output),
        "trainer": {**base["trainer"], **trainer},
    }


BASES = {"digits": DIGITS, "conv": CONV, "text": TEXT}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Each task's teacher, trained once."""
    root = tmp_path_factory.mktemp("teachers")
    for name, base in BASES.items():
        distill({**recipe(base, "kd", root / name, max_steps=1), "options": {}})
    return {name: root / name / "teacher" for name in BASES}


CASES = [(task, method) for method in OPTIONS for task in (["conv"] if method == "trg" else ["digits"])]
CASES += [("text", m) for m in ("kd", "taid")]


@pytest.mark.slow
@pytest.mark.parametrize("task,method", CASES)
def test_killed_and_resumed_ends_in_the_same_weights(task, method, teachers, tmp_path):
    """One run is left alone; the other dies four times, at random steps and inside a checkpoint."""
    base = BASES[task]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        shutil.copytree(teachers[task], folder / "teacher")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    distill(recipe(base, method, whole))
    chosen = random.Random(f"{task} {method}")
    steps = sorted(chosen.sample(range(1, base["trainer"]["max_steps"]), 3))
    for step, moment in zip(steps, ("after", "before", "after"), strict=True):
        assert killed_run(recipe(base, method, cut), step, moment), f"the kill at step {step} did not land"
    assert killed_run(recipe(base, method, cut), steps[-1], "saving")
    assert not (cut / "evaluation.json").exists()
    distill(recipe(base, method, cut))
    torch.set_num_threads(threads)
    a, b = weights(whole), weights(cut)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    lines = [[json.loads(x)["loss"] for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, cut)]
    assert lines[0] == lines[1]


def patches():
    """Convolutions without batch statistics, which no cut of a batch could leave as they are."""
    layers = [torch.nn.Conv2d(1, 6, 2, 2), torch.nn.ReLU(), torch.nn.Conv2d(6, 8, 1), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(128, 5))


def trainer_for(method, tmp_path, micro, accumulate, examples=12, reduction="token_mean", text=False):
    """A trainer whose update covers the same examples however it is cut."""
    from understudy.training.arguments import training_arguments

    torch.manual_seed(1)
    if isinstance(method, TRG):  # a group of images is coupled: cut between groups
        micro, accumulate = max(micro, 4), min(accumulate, 3)
    if text:
        from transformers import LlamaConfig, LlamaForCausalLM

        def model():
            config = LlamaConfig(
                vocab_size=40,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=32,
            )
            return CausalLMAdapter(LlamaForCausalLM(config).double(), 40)

        items = []
        for i in range(examples):
            ids = torch.randint(0, 40, (4 + i,))
            labels = ids.clone()
            labels[: i // 2] = -100
            items.append({"input_ids": ids, "labels": labels, "id": i, "bytes": 0})
        collate, classes = collate_text, 40
    else:

        def model():
            return ClassifierAdapter(
                (patches() if isinstance(method, TRG) else build_small("mlp:8", 5, (1, 8, 8))).double(), 5
            )

        items = [(torch.rand(1, 8, 8).double(), i % 5, i) for i in range(examples)]
        collate, classes = collate_images, 5
    student, teacher = model(), model()
    args = training_arguments(
        {
            "max_steps": 2,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": accumulate,
            "save_strategy": "no",
            "learning_rate": 0.1,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
        },
        tmp_path,
        0,
    )
    sides = {"student": student, "teacher": teacher}
    example = Batch.from_dict(collate(items[:2]))
    taps = {side: method.taps(side, model, example) for side, model in sides.items()}
    shapes = probe(method, classes, sides, taps, example)
    train_module = TrainModule(student, method, shapes, 2, reduction, taps["student"]).double()
    local = LocalTeacher(teacher, "teacher", taps=taps["teacher"])
    return DistillationTrainer(train_module, args, items, collate, teacher=local)


METHODS = [
    SFT(),
    KD(divergence="reverse_kl"),
    PLD(),
    TAID(alpha=0.3, distil_ratio=0.7),
    DHKD(align="all"),
    DHKD(align="shared"),
    TRG(group=4, k=3),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'align', '')}")
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
def test_any_split_of_a_batch_gives_the_same_update(method, text, reduction, tmp_path):
    if text and "text" not in method.kinds:
        pytest.skip("works on images")
    ends_alike(partial(trainer_for, method, tmp_path, reduction=reduction, text=text))


RANKS = """
import sys, torch
sys.path.insert(0, {here!r})
from pathlib import Path
from test_engine import trainer_for, METHODS
trainer = trainer_for(METHODS[int(sys.argv[1])], Path(sys.argv[2]), 6, 1, text=sys.argv[3] == "1")
trainer.train()
if trainer.args.process_index == 0:
    torch.save(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), sys.argv[2] + "/two.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("index,text", [(1, True), (3, False), (4, False)])
def test_two_ranks_give_the_result_of_one(index, text, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(here=str(HERE)))
    done = two_ranks(script, index, tmp_path, int(text))
    assert done.returncode == 0, done.stderr
    single = trainer_for(METHODS[index], tmp_path, 12, 1, text=text)
    single.train()
    alone = flat(single.model)
    torch.testing.assert_close(torch.load(tmp_path / "two.pt"), alone, rtol=0, atol=1e-6)


def test_garbage_under_the_mask_changes_nothing():
    hidden = torch.randn(2, 5, 4, requires_grad=True)
    labels = torch.tensor([[1, 2, 3, -100, -100], [-100, 1, 1, 1, -100]])
    batch = Batch({}, labels, torch.arange(2))
    clean = batch.select(hidden).sum()
    with torch.no_grad():
        poisoned = hidden.clone()
        poisoned[:, :-1][~batch.mask] = float("nan")
        poisoned[:, -1] = float("inf")
    poisoned.requires_grad_()
    value = batch.select(poisoned).sum()
    assert value == clean
    value.backward()
    assert poisoned.grad.isfinite().all() and (poisoned.grad[:, :-1][~batch.mask] == 0).all()
    assert (
        batch.num_items == 5
        and batch.row_labels.tolist() == [2, 3, 1, 1, 1]
        and batch.sequence.tolist() == [0, 0, 1, 1, 1]
    )


@pytest.mark.parametrize("method", METHODS[:5], ids=lambda m: m.name)
def test_gradients_reach_the_student_and_own_modules_only(method, tmp_path):
    trainer = trainer_for(method, tmp_path, 12, 1)
    seen = {}
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.0)
    step = trainer.optimizer.step

    def record(*args, **kwargs):
        seen.update(
            {n: p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in trainer.model.named_parameters()}
        )
        return step(*args, **kwargs)

    trainer.optimizer.step = record
    trainer.train()
    assert seen and all(seen.values()), seen
    assert all(p.grad is None and not p.requires_grad for p in trainer.teacher.model.parameters())


def test_a_teacher_keeps_its_own_mode_and_the_students():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 5))
    rows = ClassifierAdapter(net, 5).train()
    teacher = LocalTeacher(rows, "t")
    batch = Batch({"pixel_values": torch.rand(4, 1, 3, 3)}, torch.zeros(4).long(), torch.arange(4))
    a, b = teacher(batch).signal, teacher(batch).signal
    assert isinstance(a, Dense) and torch.equal(a.logits, b.logits) and not a.logits.requires_grad
    assert all(m.training for m in rows.modules())


def test_auxiliary_head_stays_behind_and_alpha_zero_is_plain_training(tmp_path):
    plain = trainer_for(SFT(), tmp_path, 12, 1)
    plain.train()
    dual = trainer_for(DHKD(alpha=0.0), tmp_path, 12, 1)
    dual.train()
    a, b = plain.model.student.state_dict(), dual.model.student.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key])


def test_checkpoint_trees_round_trip(tmp_path):
    tree = {"a": [1, 2.5, None, ("x", True)], 3: {"t": torch.randn(2, 2), "s": torch.tensor(4)}}
    save_tree(tree, tmp_path / "x.safetensors")
    back = load_tree(tmp_path / "x.safetensors")
    assert back["a"] == tree["a"] and torch.equal(back[3]["t"], tree[3]["t"])


LEARN = {
    **DIGITS,
    "data": {"name": "digits", "limit": 300},
    "teacher": {"model": "mlp:64", "train": {"max_steps": 300, "learning_rate": 3e-3}},
    "student": "mlp:16",
    "trainer": {"max_steps": 300, "per_device_train_batch_size": 32, "learning_rate": 1e-2, "save_strategy": "no"},
}


@pytest.fixture(scope="module")
def able_teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("able")
    distill({**LEARN, "method": "kd", "output": str(folder), "trainer": {**LEARN["trainer"], "max_steps": 1}})
    return folder / "teacher"


@pytest.mark.parametrize("method", ["sft", "kd", "pld", "taid", "dhkd"])
def test_every_method_learns_digits(method, able_teacher, tmp_path):
    shutil.copytree(able_teacher, tmp_path / "run" / "teacher")
    options = {**OPTIONS[method], **({"align": "none"} if method == "dhkd" else {})}
    metrics = distill({**LEARN, "method": method, "options": options, "output": str(tmp_path / "run")}).metrics
    assert metrics["accuracy"] > 0.85  # chance is 0.1
    assert {"nll", "ece"} <= metrics.keys()


def test_modules_teach_and_learn(tmp_path):
    """Teacher and student handed over as modules; a student without save_pretrained must be one of ours."""
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    student = build_small("mlp:8", 10, (1, 8, 8))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    result = distill(recipe(DIGITS, "kd", tmp_path / "run", max_steps=5), teacher=teacher, student=student)
    assert result.student is student and "teacher_accuracy" in result.metrics
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


@pytest.mark.slow
def test_an_interrupt_leaves_a_run_that_resumes(teachers, tmp_path):
    shutil.copytree(teachers["digits"], tmp_path / "run" / "teacher")
    long = recipe(DIGITS, "kd", tmp_path / "run", max_steps=3000, save_steps=5000)
    values = [f"{k}={json.dumps(v)}" for k, v in long.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "understudy", "train", *values], stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "goes on" in error
    assert len(list((tmp_path / "run" / "checkpoints").glob("*/complete.json"))) == 1
