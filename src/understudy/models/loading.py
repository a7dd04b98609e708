"""Loading through transformers' Auto classes, folders and the small networks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from understudy.data.folders import find
from understudy.errors import InputError
from understudy.models.small import IMAGENET, build_small, is_small, load_small, load_weights

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
) -> nn.Module:
    """An image classifier: a module, a small network's name, a folder, `cifar10_resnets/resnetN`, or a Hub id."""
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
    else:
        model = auto_model(AutoModelForImageClassification, name, path, dtype, quantization, trust_remote_code)
    found = _classes(model)
    if found is not None and found != classes and (found, classes) != (1, 2):  # one sigmoid output tells two apart
        raise InputError(
            f"{name} tells {found} classes apart and the data has {classes}. Choose a model of these classes, or data of its."
        )
    return model if dtype == "auto" or quantization else model.to(_DTYPES[dtype])


def _classes(model: nn.Module) -> int | None:
    facts = getattr(model, "understudy", None)
    if facts is not None:
        return int(facts["classes"])
    return getattr(getattr(model, "config", None), "num_labels", None)


def small_folder(path: Path) -> bool:
    """Whether a folder holds one of the small networks."""
    return "understudy_model" in _config(path)


def _config(path: Path) -> dict[str, Any]:
    if (path / ADAPTERS).is_file():
        return {}
    if path.is_file() or not (path / "config.json").is_file():
        raise InputError(f"{path} is not a model folder: it has no config.json.")
    try:
        values = json.loads((path / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}/config.json is not valid JSON: {error}.") from error
    return values if isinstance(values, dict) else {}


def auto_model(
    kind: Any,
    name: str,
    path: Path | None,
    dtype: str,
    quantization: dict[str, Any] | None,
    trust_remote_code: bool,
    **more: Any,
) -> nn.Module:
    """`kind.from_pretrained`, from safetensors alone, or adapters of PEFT on it; whatever goes wrong is one line."""
    if path is not None and (path / ADAPTERS).is_file():
        return _adapted(
            path, lambda base: auto_model(kind, base, find(base), dtype, quantization, trust_remote_code, **more)
        )
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "use_safetensors": True, **more}
    options["dtype"] = "auto" if dtype == "auto" else _DTYPES[dtype]
    if quantization is not None:
        options["quantization_config"] = quantization
    try:
        return kind.from_pretrained(str(path or name), **options)
    except Exception as error:  # loaders raise a dozen kinds; the user can mend each by naming another model
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"Model {name!r} cannot be loaded: {reason}") from error


def _adapted(folder: Path, load: Callable[[str], nn.Module]) -> nn.Module:
    """The model that a folder of adapters names, with them."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError:
        raise InputError(f"{folder} holds adapters, which need the extra: pip install understudy[peft].") from None
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise InputError(
            f"{folder} holds adapters and does not say of which model: set base_model_name_or_path in {ADAPTERS}."
        )
    return PeftModel.from_pretrained(load(base), str(folder))  # type: ignore[arg-type, no-any-return]


def is_new_causal_lm(name: str) -> bool:
    """Whether `name` asks for a new, untrained model: `llama:hidden=64,layers=2,heads=4`."""
    return name.split(":", 1)[0] == "llama" and find(name) is None


def load_causal_lm(
    name: str | Path | nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str = "auto",
    quantization: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A causal LM: a module, `llama:hidden=…,layers=…,heads=…` (new; `init=0.08` widens its first weights), a folder, a set in `UNDERSTUDY_DATA`, a Hub id.

    Half-precision weights of a folder are widened to float32 under `dtype="auto"` where there is no GPU.
    """
    if isinstance(name, nn.Module):
        return name
    name = str(name)
    if is_new_causal_lm(name):
        model: nn.Module = _new_llama(name, tokenizer)
    else:
        path = find(name)
        if path is not None:
            _config(path)
        model = auto_model(AutoModelForCausalLM, name, path, dtype, quantization, trust_remote_code)
        if dtype == "auto" and quantization is None and not torch.cuda.is_available():
            model = model.float()
    size = getattr(model.config, "vocab_size", None)
    if size is not None and size < len(tokenizer):
        raise InputError(
            f"{name} has {size} token embeddings and the tokenizer {len(tokenizer)} tokens. Use the model's own tokenizer."
        )
    return model if dtype == "auto" or quantization else model.to(_DTYPES[dtype])


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
