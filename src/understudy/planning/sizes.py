"""Student and teacher on the `meta` device, built from configurations alone with all layers, and their sizes."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

from understudy.data.folders import find
from understudy.errors import InputError
from understudy.models import is_new_causal_lm, load_causal_lm
from understudy.models.adapters import CausalLMAdapter, ClassifierAdapter, ModelAdapter
from understudy.models.bodies import is_causal, not_causal
from understudy.models.small import IMAGENET, build_small, is_small, normalisation
from understudy.models.transfer import BODY, TRANSFER, TransferClassifier, read_facts
from understudy.models.weights import SIZES, check_sizes, reason
from understudy.models.zero_shot import is_zero_shot
from understudy.runs.specs import ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRIED = 100_000_000
"""Most parameters of a model that is built to be tried."""
OPTIMIZERS = {  # bytes of state a parameter, from those of the parameter itself (p)
    "adamw": lambda p: 2 * p,
    "8bit": lambda p: 2 * (1 + 4 / 256),  # one byte and a float32 scale for 256
    "lion_8bit": lambda p: 1 + 4 / 256,
    "lion": lambda p: p,
    "sgd": lambda p: 0,
    "adagrad": lambda p: p,
    "rmsprop": lambda p: p,
}


def config_of(spec: ModelSpec) -> Any:
    """The configuration of a pretrained model, without its weights; one that cannot be read is an `InputError` of one
    line."""
    path = find(spec.model)
    try:
        config = AutoConfig.from_pretrained(str(path or spec.model), trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # as at loading: many types, all fixed by another model name
        raise InputError(f"The configuration of {spec.model!r} cannot be read: {reason(error)}") from error
    check_sizes({key: getattr(config.get_text_config(), key, None) for key in SIZES}, repr(spec.model), least=1)
    return config


def outline_lm(spec: ModelSpec, vocabulary: int | None, gpu: bool) -> CausalLMAdapter:
    """A causal LM on `meta`, in the dtype it would be loaded in; `vocabulary` is that of a new model."""
    with torch.device("meta"):
        if is_new_causal_lm(spec.model):
            assert vocabulary is not None
            stand_in: Any = _Tokens(vocabulary)
            model: nn.Module = load_causal_lm(spec.model, tokenizer=stand_in, dtype=spec.dtype)
        else:
            config = config_of(spec)
            if getattr(config, "is_encoder_decoder", False):
                raise InputError(
                    f"plan knows language models of a decoder alone, and {spec.model!r} has an encoder: run a few steps and read "
                    "`cost` in its evaluation.json."
                )
            held = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
            own = held if isinstance(held, torch.dtype) else DTYPES.get(str(held), torch.float32)
            dtype = DTYPES.get(spec.dtype) or (own if gpu else torch.float32)
            try:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=spec.trust_remote_code)
            except (ValueError, KeyError) as error:
                raise InputError(f"{spec.model!r} is no causal LM: {str(error).splitlines()[0]}") from error
            _try_one_layer(config, spec)
        model.to("meta")  # what a model makes by numbers of its own is elsewhere
        rows = CausalLMAdapter(model, vocabulary or model.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
        _even_experts(model)
        if spec.peft is not None:
            rows.add_adapters(spec.peft)
    return rows


def _try_one_layer(config: Any, spec: ModelSpec) -> None:
    """Refuse a model that reads later tokens, as its run does: on `meta` it could be planned. One layer with random weights
    tells, and is not tried where it is large."""
    config = copy.deepcopy(config)
    config.get_text_config().num_hidden_layers = 1
    build = partial(AutoModelForCausalLM.from_config, config, trust_remote_code=spec.trust_remote_code)
    try:
        if sum(p.numel() for p in build().parameters()) > TRIED:
            return
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            model = build(dtype=torch.float32).eval()
            causal = is_causal(model)
    except Exception:  # a configuration that does not go with one layer; its run has all layers to try
        return
    if not causal:
        raise not_causal(model)


class _Tokens(SimpleNamespace):
    """Stands for the length of a tokenizer that does not exist yet."""

    def __init__(self, number: int) -> None:
        super().__init__(number=number, bos_token_id=1, eos_token_id=2, pad_token_id=0)

    def __len__(self) -> int:
        return int(self.number)


def outline_classifier(spec: ModelSpec, classes: int, shape: tuple[int, ...]) -> ClassifierAdapter:
    """An image classifier on `meta`."""
    path, weights = find(spec.model), find(f"{spec.model}.safetensors")
    with torch.device("meta"):
        if is_small(spec.model):
            model = build_small(spec.model, classes, shape)
        elif path is None and weights is not None:
            model = build_small(weights.stem, 10, shape)
            model.understudy["normalise"] = [list(v) for v in IMAGENET]  # type: ignore[index,operator,assignment]
        elif path is not None and "understudy_model" in _facts(path):
            facts = _facts(path)
            model = build_small(facts["understudy_model"], facts["classes"], tuple(facts["shape"]))
        elif path is not None and TRANSFER in _facts(path):
            body = outline_classifier(spec.model_copy(update={"model": str(path / BODY)}), classes, shape).model
            model = TransferClassifier(body, read_facts(path))
        elif is_zero_shot(spec.model, spec.trust_remote_code):
            raise InputError(
                f"plan does not know {spec.model!r}, which compares images with texts: run a few steps and read `cost` in its "
                "evaluation.json."
            )
        else:
            model = AutoModelForImageClassification.from_config(config_of(spec))
        if spec.dtype in DTYPES:
            model = model.to(DTYPES[spec.dtype])
        rows = ClassifierAdapter(model, classes, normalise=normalisation(model))
        if spec.peft is not None:
            rows.add_adapters(spec.peft)
    return rows


def _facts(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        values = json.loads(file.read_text()) if file.is_file() else {}
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is not valid JSON: {error}.") from error
    return values if isinstance(values, dict) else {}


def _even_experts(model: nn.Module) -> None:
    """Replace the experts by one product over all chosen (token, expert) pairs, since the choice is not known on
    `meta`."""
    for module in model.modules():
        up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        if isinstance(up, nn.Parameter) and isinstance(down, nn.Parameter) and up.dim() == down.dim() == 3:

            def forward(hidden: Tensor, index: Tensor, weights: Tensor, up: Any = up, down: Any = down) -> Tensor:
                width, chosen = hidden.shape[-1], index.shape[-1]
                rows = hidden.reshape(-1, width).repeat_interleave(chosen, 0)
                gate, value = _times(rows, up[0]).chunk(2, -1)
                out = _times(F.silu(gate) * value, down[0]).view(-1, chosen, width)
                return out.mean(1).view_as(hidden)

            module.forward = forward


def _times(rows: Tensor, weight: Tensor) -> Tensor:
    return F.linear(rows, weight) if weight.shape[-1] == rows.shape[-1] else rows @ weight


@dataclass(frozen=True)
class Side:
    """Sizes of one model.

    Args:
        parameters: number of all parameters, tied ones once.
        active: number of parameters that a token uses (without experts that are not chosen).
        trained: number of trained parameters.
        weights, trained_bytes: bytes of all and of the trained parameters.
        largest: bytes of the largest block.
        outside: bytes outside of blocks.
        matrices: number of parameters in matrices, which autocast copies.
    """

    parameters: int
    active: int
    trained: int
    weights: int
    trained_bytes: int
    largest: int
    outside: int
    matrices: int


def side(rows: ModelAdapter, quantization: dict[str, Any] | None = None) -> Side:
    """Count a model."""
    parameters = list(rows.parameters())  # each once, also where two layers share it
    config = getattr(rows.model, "config", None)
    config = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    chosen, experts = getattr(config, "num_experts_per_tok", None), 0
    active = 0.0
    for p in parameters:
        experts = p.shape[0] if p.dim() == 3 and chosen else 0
        active += p.numel() * (float(chosen or 1) / experts if experts else 1)
    buffers = sum(b.numel() * b.itemsize for b in rows.buffers())
    kept = quantised(rows, quantization) if quantization else sum(p.numel() * p.itemsize for p in parameters)
    trained = [p for p in parameters if p.requires_grad]
    blocks = [m for stack in rows.modules() if isinstance(stack, nn.ModuleList) for m in stack]
    inside = [sum(p.numel() * p.itemsize for p in b.parameters()) for b in blocks]
    own_bytes, whole = sum(p.numel() * p.itemsize for p in trained), sum(p.numel() * p.itemsize for p in parameters)
    matrices = sum(p.numel() for p in parameters if p.dim() > 1)
    own = sum(p.numel() for p in trained)
    number = sum(p.numel() for p in parameters)
    return Side(
        number,
        round(active),
        own,
        kept + buffers,
        own_bytes,
        max(inside, default=0),
        max(0, whole - sum(inside)),
        matrices,
    )


def quantised(rows: ModelAdapter, config: dict[str, Any]) -> int:
    """Bytes of a quantised model: the layers' matrices at their bits; embeddings, head and all others unchanged."""
    if config.get("load_in_4bit"):  # bitsandbytes: 4 bits, a float32 scale for 64 or, quantised itself, 8.5 bits for 64
        bits = 4 + ((8 + 32 / 256) if config.get("bnb_4bit_use_double_quant") else 32) / 64
    elif config.get("load_in_8bit"):
        bits = 8.0
    elif "bits" in config:  # GPTQ, AWQ: a 16-bit scale and a zero point for each group
        group = config.get("group_size", 128)
        bits = config["bits"] + ((16 + config["bits"]) / group if group > 0 else 0)
    else:
        raise InputError(
            f"plan does not know the bytes of quantization {config}: known are load_in_4bit, load_in_8bit, bits."
        )
    head = rows.model.get_output_embeddings() if hasattr(rows.model, "get_output_embeddings") else None
    layers = {id(m.weight): m.weight for m in rows.modules() if isinstance(m, nn.Linear) and m is not head}
    layers |= {id(p): p for p in rows.parameters() if p.dim() == 3}
    shared = {id(head.weight)} if head is not None else set()
    small = {k: v for k, v in layers.items() if k not in shared}
    rest = sum(p.numel() * min(2, p.itemsize) for p in rows.parameters() if id(p) not in small)
    return rest + math.ceil(sum(p.numel() for p in small.values()) * bits / 8)


def optimizer_bytes(name: str, rows: ModelAdapter, notes: list[str]) -> int:
    """Bytes of state of an optimiser of transformers' Trainer for the trained parameters."""
    trained = [p for p in rows.parameters() if p.requires_grad]
    if name == "adafactor":  # a row's and a column's means of each matrix, float32, without momentum
        return sum(4 * (sum(p.shape[-2:]) * math.prod(p.shape[:-2]) if p.dim() > 1 else p.numel()) for p in trained)
    kind = next((k for k in ("lion_8bit", "8bit", "lion", "sgd", "adagrad", "rmsprop", "adamw") if k in name), None)
    if kind is None:
        notes.append(f"Optimiser {name!r} is not known here: its state is taken to be AdamW's.")
        kind = "adamw"
    return round(sum(p.numel() * OPTIMIZERS[kind](p.itemsize) for p in trained))
