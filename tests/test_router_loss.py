"""Mixtures of experts: the loss of their routers is a term of its own, counted once an update."""

import json

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM, set_seed

from own_texts import examples, recipe, words, write_set
from understudy import distill
from understudy.data import Batch, collate_text
from understudy.methods import get
from understudy.models import CausalLMAdapter
from understudy.training import TrainModule
from understudy.training.reduction import Counts
from understudy.training.shapes import Shapes

SIZE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.3,
    "initializer_range": 0.3,
}
KINDS = {
    "mixtral": lambda more: MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZE, **more)),
    "qwen": lambda more: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, **SIZE, **more)
    ),
}


def model(kind, tokenizer, balances=True):
    set_seed(0)
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return KINDS[kind]({"vocab_size": len(tokenizer), "output_router_logits": balances, **ends})


def module(kind, tokenizer, reduction="token_mean", balances=True):
    student = CausalLMAdapter(model(kind, tokenizer, balances), len(tokenizer))
    return TrainModule(student, get("sft")(), Shapes(len(tokenizer)), 1, reduction).train()


def update(trained, batches):
    """Each term of an update of several micro-batches, as the trainer divides it."""
    counts = Counts.total([Counts.of(b, trained.reduction, trained.counts(b)) for b in batches], lambda v: v)
    found = {}
    for batch in batches:
        for name, value in trained(batch, None).losses.items():
            found[name] = found.get(name, 0) + counts.divide(name, value)
    return found


def batch_of(items, start, end):
    return Batch.from_dict(collate_text([items[i] for i in range(start, end)]))


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_the_model_itself(kind):
    tokenizer = words()
    trained, items = module(kind, tokenizer), examples(tokenizer, 6)
    batch = batch_of(items, 0, 6)
    found = update(trained, [batch])
    assert set(found) == {"ce", "router"} and found["router"] > 0.3
    (found["ce"] + found["router"]).backward()
    own = model(kind, tokenizer).train()
    wanted = own(**batch.inputs, labels=batch.labels)
    wanted.loss.backward()
    torch.testing.assert_close(found["ce"] + found["router"], wanted.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["router"], 0.3 * wanted.aux_loss)
    for (name, mine), theirs in zip(trained.student.model.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum", "sum"])
def test_it_is_counted_once_whatever_the_split_and_the_reduction(reduction):
    """Balance is of a micro-batch, so the update has the mean of its micro-batches by their rows."""
    tokenizer = words()
    trained, items = module("mixtral", tokenizer, reduction), examples(tokenizer, 6)
    parts = [batch_of(items, 0, 2), batch_of(items, 2, 6)]
    single = [update(trained, [part])["router"].item() for part in parts]
    sizes = [part.num_items for part in parts]
    wanted = sum(v * n for v, n in zip(single, sizes, strict=True)) / sum(sizes)
    assert update(trained, parts)["router"].item() == pytest.approx(wanted, rel=1e-5)


def test_there_is_none_unless_the_model_asks_and_none_in_evaluation():
    tokenizer = words()
    batch = batch_of(examples(tokenizer, 2), 0, 2)
    assert set(update(module("mixtral", tokenizer, balances=False), [batch])) == {"ce"}
    trained = module("mixtral", tokenizer)
    assert trained.student.eval()(batch).router is None


@pytest.mark.parametrize("method,options", [("kd", {"ce_weight": 0.5, "kd_weight": 0.5}), ("gkd", {})])
def test_a_mixture_of_experts_is_a_student(method, options, tmp_path):
    tokenizer = words()
    model("mixtral", tokenizer).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    values = recipe(write_set(tmp_path / "set"), tmp_path / "run", method=method, options=options)
    values["trainer"] = {**values["trainer"], "max_steps": 6}
    distill({**values, "student": str(tmp_path / "moe")})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["terms"]["router"] > 0.3 for line in lines)
