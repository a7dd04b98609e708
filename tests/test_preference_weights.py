"""Weights of preference records: what they multiply, in every method, and what they are refused with."""

import json

import pytest
import torch

from engine_cases import weights
from understudy import InputError, distill
from understudy.data import Batch, collate_lists, encode_lists, load_preferences, train_tokenizer

PAIRS = [
    {"prompt": "one two", "chosen": " three four", "rejected": " four"},
    {"prompt": "five", "chosen": " six seven", "rejected": " two one"},
]
HELD = [{"prompt": f"held {i}", "chosen": " a b", "rejected": " c"} for i in range(4)]


def saved(folder, records):
    folder.mkdir()
    for split, rows in {"train": records, "validation": HELD, "test": HELD}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder)


def trained(folder, records, method, tokenizer, **options):
    trainer = {
        "max_steps": 2 if method == "redi" else 1,
        "per_device_train_batch_size": len(records),
        "optim": "sgd",
        "learning_rate": 0.5,
    }
    recipe = {
        "task": "preferences",
        "method": method,
        "options": options,
        "data": {"name": saved(folder, records), "tokenizer": tokenizer, "max_length": 24},
        "teacher": None,
        "student": "llama:hidden=16,layers=1,heads=2",
        "trainer": {**trainer, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "save_strategy": "no"},
        "output": str(folder / "run"),
    }
    return weights(distill(recipe).folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([f"{r['prompt']}{r['chosen']}{r['rejected']}" for r in PAIRS + HELD], 300).save_pretrained(folder)
    return str(folder)


CASES = {
    "dpo": ("dpo", {}),
    "ipo": ("dpo", {"loss_type": "ipo"}),
    "simpo": ("dpo", {"loss_type": "simpo"}),
    "adpo": ("adpo", {}),
    "dpo-pg": ("dpo-pg", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_two_and_zero_are_one_record_alone(case, tokenizer, tmp_path):
    """2 l₁ / 2 + 0 l₂ / 2 = l₁ / 1."""
    method, options = CASES[case]
    both = [{**PAIRS[0], "weight": 2}, {**PAIRS[1], "weight": 0}]
    found = trained(tmp_path / "both", both, method, tokenizer, **options)
    alone = trained(tmp_path / "alone", PAIRS[:1], method, tokenizer, **options)
    plain = trained(tmp_path / "plain", PAIRS, method, tokenizer, **options)
    for name, value in found.items():
        torch.testing.assert_close(value, alone[name], atol=2e-6, rtol=1e-5)
    assert any(not torch.allclose(value, plain[name], atol=1e-5) for name, value in found.items())


@pytest.mark.parametrize("case", [("dpo", {}), ("redi", {}), ("sft", {}), ("dpo", {"loss_type": "orpo"})])
def test_weights_of_one_change_nothing_and_others_do(case, tokenizer, tmp_path):
    """Also where a term is of tokens or has a count of its own."""
    method, options = case
    plain = trained(tmp_path / "plain", PAIRS, method, tokenizer, **options)
    ones = trained(tmp_path / "ones", [{**p, "weight": 1} for p in PAIRS], method, tokenizer, **options)
    some = trained(tmp_path / "some", [{**PAIRS[0], "weight": 3.5}, PAIRS[1]], method, tokenizer, **options)
    assert all(torch.equal(value, ones[name]) for name, value in plain.items())
    assert any(not torch.allclose(value, some[name]) for name, value in plain.items())


def test_a_batch_weighs_values_of_lists_and_of_tokens(tokenizer, tmp_path):
    records = load_preferences({"name": saved(tmp_path / "set", [{**PAIRS[0], "weight": 3}, PAIRS[1]])}, {}).train
    from transformers import AutoTokenizer

    sets, _ = encode_lists(records, AutoTokenizer.from_pretrained(tokenizer), max_length=24)
    batch = Batch.from_dict(collate_lists(sets.records))
    assert batch.weights.tolist() == [3, 1]
    assert batch.weighted(torch.tensor([1.0, 1.0])).tolist() == [3, 1]
    tokens = batch.weighted(torch.ones(len(batch.token_lists)))
    assert torch.equal(tokens, torch.where(batch.token_lists == 0, 3.0, 1.0))
    assert Batch.from_dict(collate_lists(sets.records[1:])).weights is None


@pytest.mark.parametrize(
    ("record", "options", "says"),
    [
        ({"weight": -1}, {}, "weight is -1 and must be at least 0"),
        ({"weight": "much"}, {}, "weight holds 'much', which is not a number"),
        ({"weight": 2}, {"loss_type": "aot"}, "has a weight, and loss_type aot sorts the batch"),
    ],
)
def test_bad_weights(record, options, says, tokenizer, tmp_path):
    with pytest.raises(InputError, match=says):
        trained(tmp_path / "set", [{**PAIRS[0], **record}, PAIRS[1]], "dpo", tokenizer, **options)
