"""Arguments and objects that callers bring from transformers, TRL and peft, and own methods in the arms of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from engine_cases import DIGITS
from understudy import InputError, Method, Term, compare, distill
from understudy.losses import cross_entropy
from understudy.models.adapters import ClassifierAdapter
from understudy.runs.objects import named
from understudy.runs.recipe import make
from understudy.streaming import rowwise
from understudy.training import Requirements

SHORT = {"max_steps": 2, "per_device_train_batch_size": 8}


class Weighed(Method):
    """Cross-entropy."""

    name = "own-weighed"
    weight: float = 1.0

    @property
    def requires(self) -> Requirements:
        return Requirements(teacher="none")

    def loss(self, student: Any, teacher: Any, batch: Any, state: Any) -> dict[str, Term]:
        return {"ce": Term(rowwise(cross_entropy, student.signal, None, batch.row_labels), self.weight)}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "mlp:4"}, "write student"),
        ({"train_dataset": [{"text": "a"}]}, "write data, which may be a Dataset"),
        ({"args": TrainingArguments(output_dir="x")}, "write trainer"),
        ({"optimizers": (object(), None)}, "write trainer.optim"),
        ({"compute_metrics": lambda p: {}}, "returns further metrics from finish"),
        ({"processing_class": object()}, "write data.tokenizer"),
        ({"batch_size": 8}, "write trainer.per_device_train_batch_size"),
    ],
)
def test_arguments_of_other_trainers_name_their_place(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"'{next(iter(given))}' is an argument of other trainers: .*{said}"):
        distill({**DIGITS, "method": "sft", "output": str(tmp_path / "run"), **given})


def test_training_arguments_are_their_keys(tmp_path: Path) -> None:
    """What was set by hand, and the output unless the recipe names one."""
    given = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=3, learning_rate=1e-3, lr_scheduler_type="cosine", report_to="none"
    )
    values, _ = named({"task": "image_classification", "method": "sft", "trainer": given})
    recipe = make(values)
    assert recipe.output == tmp_path / "run"
    expected = {"max_steps": 3, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
    assert {key: values["trainer"][key] for key in expected} == expected
    assert values["trainer"].keys() <= {*expected, "report_to", "logging_dir", "run_name"}


def test_dtypes_and_adapters_are_as_a_recipe_writes_them() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM")
    student = {"model": "llama:hidden=16,layers=1,heads=2", "peft": lora, "dtype": torch.float32}
    values, _ = named({"task": "language_modeling", "method": "sft", "student": student})
    spec = make(values).student
    assert spec is not None and spec.dtype == "float32"
    wanted = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    assert spec.peft == wanted and peft.LoraConfig(**wanted).r == 4


@pytest.mark.parametrize("form", ["class", "instances", "alone", "recipe"])
def test_arms_have_methods_of_the_callers_own(form: str, tmp_path: Path) -> None:
    arms: dict[str, Any] = {
        "class": {"low": {"method": Weighed, "options": {"weight": 0.1}}, "plain": {"method": "sft"}},
        "instances": {"low": {"method": Weighed(weight=0.1)}, "high": {"method": Weighed(weight=0.2)}},
        "alone": {"low": Weighed(weight=0.1), "plain": "sft"},
    }.get(form, {"low": {"method": Weighed, "options": {"weight": 0.1}}})
    base = {**DIGITS, "trainer": SHORT, "output": str(tmp_path)}
    found = compare({**base, "arms": arms}, seeds=1) if form == "recipe" else compare(base, arms=arms, seeds=1)
    assert [row["method"] for row in found.table] == list(arms)
    assert found.data["arms"]["low"] == {"method": "own-weighed", "options": {"weight": 0.1}}


def test_a_model_of_fewer_tokens_than_its_tokenizer_is_one_line(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    values = {"task": "language_modeling", "method": "sft", "student": LlamaForCausalLM(config), "trainer": SHORT}
    rows = [{"text": f"many words of text number {i}"} for i in range(60)]
    with pytest.raises(
        InputError, match=r"LlamaForCausalLM has 40 token embeddings and the tokenizer \d+ tokens. Name"
    ):
        distill({**values, "data": {"name": rows, "vocab_size": 300}, "output": str(tmp_path / "run")})


def test_a_module_may_return_a_mapping_with_logits() -> None:
    adapter, logits = ClassifierAdapter(nn.Linear(4, 3), 3), torch.rand(2, 3)
    assert torch.equal(adapter.checked({"logits": logits}, 2), logits)
    with pytest.raises(InputError, match="returns a tuple, not logits: return a tensor"):
        adapter.checked((logits, logits), 2)


def test_a_default_that_is_written_out_is_no_other_run(tmp_path: Path) -> None:
    """Nor is the batch of evaluations, which one lowers for want of memory after training."""
    values = {**DIGITS, "method": "sft", "trainer": SHORT, "output": str(tmp_path / "run")}
    first = distill(values)
    usual = {"push_to_hub": False, "torch_compile": False, "max_grad_norm": 1.0, "per_device_eval_batch_size": 16}
    assert distill({**values, "trainer": {**SHORT, **usual}}).metrics == first.metrics
    with pytest.raises(InputError, match=r"trainer.max_grad_norm: not set → 2\.0"):
        distill({**values, "trainer": {**SHORT, "max_grad_norm": 2.0}})
