"""Loading through transformers' Auto classes, from folders, and of small networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from understudy.data.folders import find, hub_id
from understudy.errors import InputError
from understudy.models.bodies import check_causal
from understudy.models.expert_files import EXPERTS, load_experts
from understudy.models.small import IMAGENET, build_small, is_small, load_small, load_weights
from understudy.models.transfer import BODY, TRANSFER, load_transfer
from understudy.models.weights import add_note, check_folder, check_sizes, check_weights, read_object, reason

ADAPTERS = "adapter_config.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_classifier(
    name: str | Path | nn.Module,
    *,
    classes: int,
    input_shape: tuple[int, ...],
    dtype: str = "auto",
    quantization: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    exact: bool = True,
) -> nn.Module:
    """An image classifier: a module, a small network's name, a folder, `cifar10_resnets/resnetN`, or a Hub id.

    Args:
        classes: number of classes. exact: refuse a model that has others.
    """
    if isinstance(name, nn.Module):
        return name
    name = str(name)
    small = is_small(name)
    path, weights = (None, None) if small else (find(name), find(f"{name}.safetensors"))
    if small:
        model = build_small(name, classes, input_shape)
    elif path is None and weights is not None:
        model = build_small(weights.stem, classes=10, shape=input_shape)
        model.understudy["normalise"] = [list(v) for v in IMAGENET]  # type: ignore[index,operator,assignment]
        load_weights(model, weights)
    elif path is not None and small_folder(path):
        model = load_small(path)
    elif path is not None and TRANSFER in _config(path):
        body = load_classifier(path / BODY, classes=classes, input_shape=input_shape)
        model = load_transfer(path, body)
    else:
        model = auto_model(
            AutoModelForImageClassification, name, path, dtype, quantization, trust_remote_code, new_head=True
        )
    if exact:
        check_classes(name, model, classes)
    return model if dtype == "auto" or quantization else model.to(_DTYPES[dtype])


def check_classes(name: str, model: nn.Module, classes: int) -> None:
    """Refuse a classifier of another number of classes."""
    found = _classes(model)
    if found is not None and found != classes and (found, classes) != (1, 2):  # one sigmoid output has two classes
        raise InputError(
            f"{name} has {found} classes and the data has {classes}. Choose a model of these classes, or data of its."
        )


def own_classes(model: nn.Module) -> int:
    """The number of a classifier's own classes: as it says, or outputs of its last linear layer; one output has two.

    Raises:
        InputError: it neither says nor has a linear layer.
    """
    last = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    found = _classes(model) or (last[-1] if last else None)
    if found is None:
        raise InputError(f"{type(model).__name__} does not say how many classes it has: set config.num_labels.")
    return max(2, found)


def _classes(model: nn.Module) -> int | None:
    facts = getattr(model, "understudy", None)
    if facts is not None:
        return int(facts["classes"])
    return getattr(getattr(model, "config", None), "num_labels", None)


def small_folder(path: Path) -> bool:
    """Whether a folder holds one of the small networks."""
    return "understudy_model" in _config(path)


def _config(path: Path) -> dict[str, Any]:
    return {} if (path / ADAPTERS).is_file() else check_folder(path)


def auto_model(
    kind: Any,
    name: str,
    path: Path | None,
    dtype: str,
    quantization: dict[str, Any] | None,
    trust_remote_code: bool,
    *,
    new_head: bool = False,
    **more: Any,
) -> nn.Module:
    """`kind.from_pretrained`, from safetensors only, optionally with PEFT adapters; any failure is an `InputError` of
    one line.

    Args:
        new_head: the head may be new, as in `check_weights`.

    Half-precision weights are converted to float32 under `dtype="auto"` if there is no GPU, with a note.
    """
    if path is not None and (path / ADAPTERS).is_file():
        return _adapted(
            path,
            lambda base: auto_model(
                kind, base, find(base), dtype, quantization, trust_remote_code, new_head=new_head, **more
            ),
        )
    facts = check_folder(path) if path is not None else {}
    if path is not None and EXPERTS in facts:
        return _for_device(name, load_experts(kind, path, facts[EXPERTS]), dtype)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "use_safetensors": True, **more}
    options["dtype"] = "auto" if dtype == "auto" else _DTYPES[dtype]
    if quantization is not None:
        options["quantization_config"] = quantization
    try:
        model, found = kind.from_pretrained(str(path or hub_id(name)), output_loading_info=True, **options)
    except Exception as error:  # loaders raise many types, all fixed by another model name
        raise InputError(f"Model {name!r} cannot be loaded: {reason(error)}") from error
    if found["missing_keys"] and kind is AutoModelForCausalLM:
        check_causal(model)  # encoders fail here: they need another task
    if not getattr(model, "is_quantized", False):
        check_weights(name, model, found, new_head=new_head)
    return _for_device(name, model, dtype)


def _for_device(name: str, model: nn.Module, dtype: str) -> nn.Module:
    """The model in the dtype to compute in: half precision is several times slower than float32 on a CPU."""
    held = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if (
        held not in (torch.float16, torch.bfloat16)
        or torch.cuda.is_available()
        or getattr(model, "is_quantized", False)
    ):
        return model
    kind = str(held).removeprefix("torch.")
    if dtype == "auto":
        add_note(
            model, f"{name} is stored in {kind} and there is no GPU: it is computed in float32 (dtype={kind} keeps it)."
        )
        return model.float()
    add_note(
        model, f"{name} is computed in {kind}, which is several times slower on a CPU than float32: dtype=float32."
    )
    return model


def _adapted(folder: Path, load: Callable[[str], nn.Module]) -> nn.Module:
    """The base model of a folder of adapters, with the adapters."""
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    except ImportError:
        raise InputError(f"{folder} holds adapters, which need the extra: pip install understudy[peft].") from None
    weights = folder / "adapter_model.safetensors"
    base = read_object(folder / ADAPTERS).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise InputError(
            f"{folder} holds adapters and does not say of which model: set base_model_name_or_path in {ADAPTERS}."
        )
    if not weights.is_file():
        raise InputError(f"{folder} is incomplete: it has an {ADAPTERS} and no {weights.name}.")
    inside = find(base)
    if inside is not None and (inside / ADAPTERS).is_file():
        raise InputError(
            f"{folder} holds adapters of {base}, which are adapters themselves: merge those into their model."
        )
    model = load(base)
    try:
        if PeftConfig.from_pretrained(str(folder)).is_prompt_learning:
            raise InputError(
                f"{folder} holds learned prompts, which are no part of the model's layers: use LoRA adapters."
            )
        adapted = PeftModel.from_pretrained(model, str(folder))  # type: ignore[arg-type]
        with safe_open(str(weights), "pt") as file:
            stored, wanted = set(file.keys()), set(get_peft_model_state_dict(adapted))
    except InputError:
        raise
    except Exception as error:  # as for models
        raise InputError(f"Adapters {folder} cannot be loaded: {reason(error)}") from error
    wrong = sorted(stored ^ wanted)
    if wrong:
        raise InputError(f"Adapters {folder} do not fit {base}: {', '.join(wrong[:3])} missing or unexpected.")
    return adapted  # type: ignore[no-any-return]


def is_new_causal_lm(name: str) -> bool:
    """Whether `name` is a new, untrained model: `llama:hidden=64,layers=2,heads=4`."""
    return name.split(":", 1)[0] == "llama" and find(name) is None


def load_causal_lm(
    name: str | Path | nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str = "auto",
    quantization: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    encoders: bool = False,
) -> nn.Module:
    """A causal LM: a module, `llama:hidden=…,layers=…,heads=…` (new; `init=0.08` sets the scale of the initial
    weights), a folder, a set in `UNDERSTUDY_DATA`, a Hub id.

    Args:
        encoders: the model may be an encoder-decoder.

    Half-precision weights of a folder are converted to float32 under `dtype="auto"` if there is no GPU.
    """
    if isinstance(name, nn.Module):
        _check_vocabulary(type(name).__name__, name, tokenizer, "Name its own with data.tokenizer")
        return name
    name = str(name)
    if is_new_causal_lm(name):
        model: nn.Module = _new_llama(name, tokenizer)
    else:
        path = find(name)
        kind: Any = AutoModelForCausalLM
        if encoders and _has_encoder(name, path, trust_remote_code):
            kind = AutoModelForSeq2SeqLM
        model = auto_model(kind, name, path, dtype, quantization, trust_remote_code)
    _check_vocabulary(name, model, tokenizer, "Use the model's own tokenizer")
    return model if dtype == "auto" or quantization else model.to(_DTYPES[dtype])


def _check_vocabulary(name: str, model: nn.Module, tokenizer: Any, remedy: str) -> None:
    """Refuse a model with fewer token embeddings than its tokenizer has tokens."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is not None and tokenizer is not None and size < len(tokenizer):
        raise InputError(f"{name} has {size} token embeddings and the tokenizer {len(tokenizer)} tokens. {remedy}.")


def _has_encoder(name: str, path: Path | None, trust_remote_code: bool) -> bool:
    """Whether a model's configuration is an encoder-decoder's; one that cannot be read is left to the loader."""
    if path is not None:
        return bool(_config(path).get("is_encoder_decoder", False))
    try:
        config = AutoConfig.from_pretrained(hub_id(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return False
    return bool(config.is_encoder_decoder)


def _new_llama(name: str, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    values, deviation = {"hidden": 64, "layers": 2, "heads": 4, "context": 512}, 0.02
    for item in filter(None, name.partition(":")[2].split(",")):
        key, _, value = item.partition("=")
        if key == "init" and re.fullmatch(r"0?\.\d*[1-9]\d*", value):
            deviation = float(value)
        elif key not in values or not value.isdigit():
            raise InputError(f"{name!r}: {item!r} is not one of {', '.join(f'{k}=N' for k in values)}, init=0.N.")
        else:
            values[key] = int(value)
    keys = {"hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
    check_sizes({key: values[own] for own, key in keys.items()}, repr(name), least=1)
    if values["hidden"] % (2 * values["heads"]):
        raise InputError(f"{name!r}: hidden must be an even multiple of heads.")
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=values["hidden"],
            intermediate_size=values["hidden"] * 8 // 3,
            num_hidden_layers=values["layers"],
            num_attention_heads=values["heads"],
            max_position_embeddings=values["context"],
            tie_word_embeddings=True,
            initializer_range=deviation,
            use_cache=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
