"""Vision-language models of transformers with their processors, and a new small LLaVA."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from understudy.data.folders import find, hub_id
from understudy.errors import InputError
from understudy.models.bodies import is_causal
from understudy.models.layouts import needs_gpu
from understudy.models.loading import auto_model
from understudy.models.modes import evaluating
from understudy.models.weights import reason

IMAGE = "<image>"
"""The placeholder of a new processor."""
_SIZES = {"hidden": 64, "layers": 2, "heads": 4, "vision": 64, "context": 256}


def load_processor(name: str, *, trust_remote_code: bool = False) -> Any:
    """The processor of a model, from a folder, a set in `UNDERSTUDY_DATA` or the Hub.

    Raises:
        InputError: it cannot be loaded, or prepares no images.
    """
    try:
        found = AutoProcessor.from_pretrained(str(find(name) or hub_id(name)), trust_remote_code=trust_remote_code)
    except Exception as error:  # loaders raise many types
        raise InputError(f"No processor can be loaded from {name!r}: {reason(error)}") from error
    if not hasattr(found, "image_processor") or not hasattr(found, "tokenizer"):
        raise InputError(
            f"{name!r} has a {type(found).__name__}, which does not prepare images with text: name a vision-language model."
        )
    return found


def new_processor(tokenizer: Any, *, image: int, patch: int) -> Any:
    """A processor of a new model: images of `image` × `image` pixels in patches of `patch` × `patch`."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    if image % patch:
        raise InputError(f"data.image_size is {image} and must be a multiple of data.patch_size, which is {patch}.")
    # The one without torchvision, where there are two, so that pixels do not depend on what is installed.
    kind: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    pixels = kind(size={"height": image, "width": image}, do_center_crop=False)
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def is_new_vision_language(name: str) -> bool:
    """Whether `name` is a new, untrained model: `llava:hidden=64,layers=2,heads=4,vision=64`."""
    return name.split(":", 1)[0] == "llava" and find(name) is None


def load_vision_language(
    name: str | Path | nn.Module,
    *,
    processor: Any,
    dtype: str = "auto",
    quantization: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A vision-language model: a module, `llava:hidden=…,layers=…,heads=…,vision=…` (new), a folder, a set in
    `UNDERSTUDY_DATA`, a Hub id.

    Args:
        processor: what a new model is made for.
    """
    if isinstance(name, nn.Module):
        model = name
    elif is_new_vision_language(name := str(name)):
        model = _new_llava(name, processor)
        model = model if dtype == "auto" else model.to(getattr(torch, dtype))
    else:
        model = auto_model(AutoModelForImageTextToText, name, find(name), dtype, quantization, trust_remote_code)
    _check_answers_are_causal(model, processor)
    return model


def _check_answers_are_causal(model: Any, processor: Any) -> None:
    """Raise an error for a model that sees an answer's later tokens, as PaliGemma does unless token types say where an answer
    begins: the processor's have a value for each token of the prompt, and 0 after it."""
    if getattr(model, "get_output_embeddings", lambda: None)() is None or needs_gpu(model):
        return  # said, or tried, where the model is used
    embeddings = model.get_input_embeddings().weight
    if embeddings.is_meta or not embeddings.numel():
        return
    read = inspect.signature(model.forward).parameters
    types = [
        name for name in getattr(processor, "model_input_names", ()) if name.endswith("token_type_ids") and name in read
    ]
    with evaluating(model):
        if is_causal(model, types):
            return
    raise InputError(
        f"{type(model).__name__} reads a prompt and what follows it in both directions (prefix attention), which is not "
        "supported: answers are predicted token by token here. Name a model of causal attention, such as LLaVA or Qwen2-VL."
    )


def _new_llava(name: str, processor: Any) -> nn.Module:
    values = dict(_SIZES)
    for item in filter(None, name.partition(":")[2].split(",")):
        key, _, value = item.partition("=")
        if key not in values or not value.isdigit() or int(value) < 1:
            raise InputError(f"{name!r}: {item!r} is not one of {', '.join(f'{k}=N' for k in values)}.")
        values[key] = int(value)
    width, heads, seen = values["hidden"], values["heads"], values["vision"]
    if width % (2 * heads) or seen % heads:
        raise InputError(f"{name!r}: hidden must be an even multiple of heads, and vision a multiple.")
    if not isinstance(processor, LlavaProcessor):
        raise InputError(f"{name!r} needs images as LLaVA prepares them, and these are by {type(processor).__name__}.")
    size, tokenizer = processor.image_processor.size, processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=seen,
        intermediate_size=2 * seen,
        num_hidden_layers=1,
        num_attention_heads=heads,
        image_size=size["height"] if "height" in size else size["shortest_edge"],
        patch_size=processor.patch_size,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=-(-width * 8 // 48) * 16,  # kernels of experts need a multiple of 16
        num_hidden_layers=values["layers"],
        num_attention_heads=heads,
        max_position_embeddings=values["context"],
        tie_word_embeddings=False,
        initializer_range=0.08,  # small networks learn faster from larger weights than 0.02
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids(processor.image_token),
            vision_feature_layer=-1,
            vision_feature_select_strategy=processor.vision_feature_select_strategy,
            tie_word_embeddings=False,
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
