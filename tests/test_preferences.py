"""The preference path: formats, sequence log-probabilities without logits, the start at margin 0, TRL, resume, splits."""

import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine_cases import killed_run, weights
from split_cases import ends_alike
from understudy import InputError, distill
from understudy.data import Batch, ListBatch, collate_lists, encode_lists, load_preferences, train_tokenizer
from understudy.methods.adpo import ADPO
from understudy.methods.dpo import DPO
from understudy.models import SequenceAdapter, load_causal_lm
from understudy.teachers.cache.scores import ScoreStore, score_lists
from understudy.training import DistillationTrainer, SetupContext, TrainModule
from understudy.training.arguments import training_arguments
from understudy.training.shapes import Shapes

WORDS = ["the quick brown fox jumps over the lazy dog again and again"] * 5 + ["hello world foo bar"] * 4
PAIRS = [
    {"prompt": "the quick", "chosen": " brown fox jumps", "rejected": " dog lazy"},
    {"prompt": "hello world", "chosen": " foo bar", "rejected": " bar foo foo foo"},
    {"prompt": "again", "chosen": " and again", "rejected": " fox"},
    {"prompt": "the lazy dog", "chosen": " jumps", "rejected": " hello hello over"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORDS, 300)


def lists(tokenizer, records=PAIRS, **more):
    rows = [
        {"id": i, "prompt": r["prompt"], "completions": [r["chosen"], r["rejected"]], "scores": [1.0, 0.0], **more}
        for i, r in enumerate(records)
    ]
    return encode_lists(rows, tokenizer, max_length=64)[0]


def scorer(tokenizer, seed=0):
    torch.manual_seed(seed)
    model = load_causal_lm("llama:hidden=32,layers=1,heads=2", tokenizer=tokenizer).double()
    return SequenceAdapter(model, len(tokenizer))


def test_sequence_scores_equal_the_sum_of_token_log_probs(tokenizer):
    rows, examples = scorer(tokenizer), lists(tokenizer)
    batch = Batch.from_dict(collate_lists(list(examples.records)))
    assert isinstance(batch, ListBatch) and batch.num_items == 4
    found = rows(batch).signal.values
    for i, example in enumerate(examples.records):
        for j, (ids, labels) in enumerate(example["sequences"]):
            log_p = torch.log_softmax(rows.model(input_ids=ids[None]).logits[0, :-1].double(), -1)
            kept = labels[1:] != -100
            expected = log_p.gather(-1, labels[1:].clamp(min=0)[:, None])[:, 0][kept].sum()
            torch.testing.assert_close(found[i, j], expected, rtol=1e-9, atol=1e-9)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.size = max(self.size, value.numel())
        return out


def test_no_logits_tensor_exists(tokenizer, monkeypatch):
    """Nothing half as large as the logits is ever made, forward or backward."""
    from functools import partial

    from understudy.models import sequences

    rows = scorer(tokenizer)
    monkeypatch.setattr(sequences, "rowwise", partial(sequences.rowwise, tile_bytes=8 * 8 * rows.vocabulary))
    long = [{"prompt": "the", "chosen": " brown fox" * 7, "rejected": " over" * 14}] * 8
    batch = Batch.from_dict(collate_lists(list(lists(tokenizer, long).records)))
    with Largest() as seen:
        rows(batch).signal.values.sum().backward()
    assert seen.size < int(batch.tokens.mask.sum()) * rows.vocabulary / 2


def test_dpo_gradients_agree_with_trl(tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    policy, reference = scorer(tokenizer, 0), scorer(tokenizer, 1)
    args = trl.DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to="none", beta=0.3, bf16=False
    )
    trainer = trl.DPOTrainer(
        policy.model, reference.model, args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer
    )
    theirs = next(iter(trainer.get_train_dataloader()))
    policy.model.double().eval()
    reference.model.double()
    loss = trainer.compute_loss(policy.model, theirs)
    said = {k: v[-1] for k, v in trainer._metrics["eval"].items() if k.startswith(("rewards/", "logps/"))}
    loss.backward()
    expected = [p.grad.clone() for p in policy.model.parameters()]
    policy.zero_grad()

    labels = theirs["input_ids"].masked_fill(theirs["completion_mask"] == 0, -100)
    batch = ListBatch(
        inputs={k: theirs[k] for k in ("input_ids", "attention_mask")},
        labels=labels,
        ids=torch.arange(4),
        slots=torch.tensor([[i, 4 + i] for i in range(4)]),
        scores=torch.tensor([[1.0, 0.0]] * 4),
    )
    with torch.no_grad():
        batch.reference = reference(batch).signal.values
    from understudy.training import TrainState

    terms = DPO(beta=0.3, reference="teacher").loss(policy(batch), None, batch, TrainState(step=1))
    ours = terms["dpo"].values.mean()
    assert len(said) == 6
    assert {k: float(terms[k].values.mean()) for k in said} == pytest.approx(said, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(
        ours.double(), loss.double(), rtol=1e-6, atol=0
    )  # TRL takes log-probabilities in float32
    ours.backward()
    for p, wanted in zip(policy.model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-7)


SMALL = {
    "task": "preferences",
    "data": {"name": "word_order", "characters": 30_000, "max_length": 96, "vocab_size": 300},
    "student": {
        "model": "llama:hidden=16,layers=1,heads=2",
        "train": {"max_steps": 5, "per_device_train_batch_size": 8},
    },
    "trainer": {"max_steps": 8, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1},
}


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
@pytest.mark.parametrize("method", ["dpo", "tpo", "adpo"])
def test_a_run_starts_at_margin_zero(tmp_path, method, precision):
    """In mixed precision too, where a reference in another precision than the policy's would differ from it."""
    trainer = {**SMALL["trainer"], **precision}
    distill({**SMALL, "method": method, "trainer": trainer, "output": str(tmp_path / "run")})
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    if method != "tpo":  # whose pairs have weights
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["terms"]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert first["terms"]["rewards/rejected"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method,options",
    [
        ("dpo", {}),
        ("dpo", {"loss_type": "cpo"}),
        ("adpo", {"anchor": "ema", "decay": 0.5}),
        ("adpo", {"anchor": "dynamic", "every": 3}),
    ],
)
def test_killed_and_resumed_ends_in_the_same_weights(method, options, tmp_path):
    recipe = {**SMALL, "method": method, "options": options}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    distill({**recipe, "output": str(tmp_path / "whole")})
    cut = {**recipe, "output": str(tmp_path / "cut")}
    for step, moment in ((3, "after"), (5, "before"), (6, "saving")):
        assert killed_run(cut, step, moment)
    distill(cut)
    torch.set_num_threads(threads)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a)


def anchored(method, tokenizer, tmp_path, micro, accumulate, reference=1, examples=None):
    """A trainer over four examples, by default pairs, whose update covers all of them, however it is cut."""
    student, other = scorer(tokenizer, 0), scorer(tokenizer, reference)
    if examples is None:
        examples = lists(tokenizer, log_probs=[-9.0, -11.0])
        for row in examples.records:
            row["log_probs"] = [-9.0, -11.0]
    splits = {"train": examples}
    context = SetupContext(student, other, splits, collate_lists, len(tokenizer), tmp_path / "store", "key")
    tables = method.setup(context)
    values = {
        "max_steps": 2,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulate,
        "save_strategy": "no",
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    train_module = TrainModule(student, method, Shapes(len(tokenizer)), 2, tables=tables, context=context).double()
    return DistillationTrainer(train_module, training_arguments(values, tmp_path, 0), examples.records, collate_lists)


METHODS = [
    DPO(),
    DPO(loss_type="ipo"),
    DPO(loss_type="cpo"),
    DPO(loss_type="orpo"),
    DPO(loss_type="simpo"),
    DPO(loss_type="robust", length="mean"),
    DPO(reference="recorded"),
    ADPO(),
    ADPO(target="given", length="mean"),
    ADPO(target="teacher", anchor="teacher"),
    ADPO(anchor="dynamic", every=1),
    ADPO(anchor="ema", decay=0.5),
    ADPO(target="exact_teacher", anchor="uniform"),
    ADPO(target="plackett_luce", anchor="recorded"),
    ADPO(target="exact_teacher", tau_entropy=0.5, tau_reward=1.0),
]


@pytest.mark.parametrize(
    "method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'loss_type', getattr(m, 'anchor', ''))}"
)
def test_any_split_of_a_batch_gives_the_same_update(method, tokenizer, tmp_path):
    before = dict(anchored(method, tokenizer, tmp_path / "start", 4, 1).model.student.named_parameters())

    def all_moved(trainer):
        assert not any(torch.equal(p, before[n]) for n, p in trainer.model.student.named_parameters())

    splits = ((4, 1), (2, 2), (1, 4))
    ends_alike(lambda micro, n: anchored(method, tokenizer, tmp_path / f"{micro}", micro, n), splits, done=all_moved)


def test_reference_scores_are_paid_for_once(tokenizer, tmp_path):
    rows, examples = scorer(tokenizer), lists(tokenizer)
    first = score_lists(rows, examples, collate_lists, ScoreStore(tmp_path), column="reference")
    kept = [r["reference"] for r in examples.records]
    again = lists(tokenizer, list(reversed(PAIRS)))  # another order, ids and padding
    second = score_lists(rows, again, collate_lists, ScoreStore(tmp_path), column="reference", batch=1)
    assert first == 8 and second == 0
    torch.testing.assert_close(torch.tensor(kept), torch.tensor([r["reference"] for r in reversed(again.records)]))
    assert score_lists(scorer(tokenizer, 5), again, collate_lists, ScoreStore(tmp_path), column="reference") == 8
    batch = Batch.from_dict(collate_lists(list(examples.records)))
    torch.testing.assert_close(batch.reference, rows(batch).signal.values.detach(), rtol=1e-9, atol=1e-9)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"\x10" + bytes(7) + b"damaged")
    with pytest.raises(InputError, match="cannot be read"):
        ScoreStore(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method,options", [("dpo", {}), ("adpo", {"tau": 5.0})])
def test_it_learns_which_completion_is_better(method, options, tmp_path):
    start = {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 5e-3}
    recipe = {
        **SMALL,
        "data": {**SMALL["data"], "characters": 150_000},
        "student": {"model": "llama:hidden=32,layers=2,heads=2", "train": start},
        "trainer": {"max_steps": 150, "per_device_train_batch_size": 16, "learning_rate": 2e-3, "save_strategy": "no"},
    }
    metrics = distill({**recipe, "method": method, "options": options, "output": str(tmp_path / "run")}).metrics
    assert metrics["rewards/accuracies"] > 0.65 and metrics["rewards/margins"] > 0


FORMATS = {
    "pairs": {"prompt": "a b", "chosen": " c", "rejected": " d"},
    "lists": {"prompt": "a b", "completions": [" c", " d", " e f"], "scores": [0.1, 2, -1]},
    "unpaired": {"prompt": "a b", "completion": " c", "label": True},
    "messages": {
        "chosen": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}],
        "rejected": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "d e"}],
    },
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_trl(name, tmp_path, tokenizer):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(FORMATS[name]) + "\n" for _ in range(20)))
    record = load_preferences({"name": str(tmp_path / "x.jsonl")}).train[0]
    assert len(record["completions"]) == len(record["scores"])
    if name == "messages":
        tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    examples, _ = encode_lists([record], tokenizer, max_length=64)
    for ids, labels in examples.records[0]["sequences"]:
        kept = labels != -100
        text = tokenizer.decode(ids[kept], skip_special_tokens=True)
        assert "a b" not in text and any(c in text for c in "cde")  # the prompt is masked
    tokenizer.chat_template = None


def test_real_pairs_in_one_command(data_folder, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "train.parquet").symlink_to(data_folder / "preferences" / "hh_harmless_base_test.parquet")
    metrics = distill(
        {
            **SMALL,
            "data": {"name": str(tmp_path / "p"), "limit": 60, "max_length": 96, "vocab_size": 300},
            "method": "dpo",
            "output": str(tmp_path / "run"),
        }
    ).metrics
    assert 0 <= metrics["rewards/accuracies"] <= 1


BAD = {
    "equal scores": ({"prompt": "a", "completions": [" b", " c"], "scores": [1, 1]}, {}, "no better and worse"),
    "missing scores": ({"prompt": "a", "completions": [" b", " c"], "scores": [1]}, {}, "2 completions and 1 scores"),
    "far score": ({"prompt": "a", "completions": [" b", " c"], "scores": [1, 1e300]}, {}, "finite number in single"),
    "nan score": ({"prompt": "a", "completions": [" b", " c"], "scores": [1, math.nan]}, {}, "not a finite number"),
    "empty completion": ({"prompt": "a", "chosen": " b", "rejected": ""}, {}, "completion is empty"),
    "wrong columns": ({"question": "a", "answer": "b"}, {}, "expected one of"),
    "no recorded log-probs": (FORMATS["pairs"], {"reference": "recorded"}, "needs log_probs"),
    "teacher as reference": (FORMATS["pairs"], {"reference": "teacher"}, "needs a teacher"),
    "smoothing without effect": (
        FORMATS["pairs"],
        {"loss_type": "ipo", "label_smoothing": 0.1},
        "has no effect with loss_type=ipo",
    ),
    "bad variant": (FORMATS["pairs"], {"loss_type": "ppo"}, "loss_type"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path):
    record, options, says = BAD[case]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for _ in range(20)))
    with pytest.raises(InputError, match=says):
        distill(
            {
                **SMALL,
                "method": "dpo",
                "options": options,
                "data": {"name": str(tmp_path / "x.jsonl"), "max_length": 64, "vocab_size": 300},
                "output": str(tmp_path / "run"),
            }
        )
