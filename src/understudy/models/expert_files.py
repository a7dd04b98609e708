"""Models with mixtures of experts on disk: as an architecture of transformers where there is one, else in their own form.

| text model | becomes |
|---|---|
| Llama, Mistral with experts in every layer | Mixtral |
| Llama, Mistral, Qwen2 | Qwen2-MoE; its shared expert adds 0 |
| Qwen3 | Qwen3-MoE |

A vision-language model whose text model may be any (LLaVA and its kin) keeps its class. All others are saved as weights
with the configuration of the dense model, whose key `understudy_experts` says what `upcycle` made of it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from understudy.errors import InputError
from understudy.models.bodies import SAME
from understudy.models.modes import evaluating
from understudy.models.upcycling import MixtureOfExperts, mixtures, upcycle
from understudy.models.weights import reason, write_model

EXPERTS = "understudy_experts"
"""Key of `config.json` of a model in its own form."""
_PLAIN = {"llama": "qwen2_moe", "mistral": "qwen2_moe", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
_OWN = frozenset({"model_type", "architectures", "transformers_version", EXPERTS, "auto_map", "_name_or_path"})


@torch.no_grad()
def as_transformers(model: Any) -> Any | None:
    """The same model in an architecture of transformers, or `None` if none gives the same outputs.

    Args:
        model: of transformers, up-cycled; it is left as it is.
    """
    config = model.config.get_text_config()
    made = mixtures(model)
    kind = _PLAIN.get(config.model_type)
    if not made or kind is None or any(m.capacity_factor is not None for m in made) or not all(map(_gated, made)):
        return None
    text = _text_config(config, kind, made, model)
    if text is None:
        return None
    whole = config is model.config
    if not whole and model.config.sub_configs.get("text_config") is not AutoConfig:
        return None
    if whole:
        found = AutoModelForCausalLM.from_config(text)
    else:
        outer = copy.deepcopy(model.config)
        outer.text_config = text
        delattr(outer, EXPERTS)
        found = type(model)(outer)
    found = found.to(model.dtype).to(model.device)
    rest = found.load_state_dict(_fused(model), strict=False)
    if rest.unexpected_keys or any("shared_expert" not in key for key in rest.missing_keys):
        return None
    for name, parameter in found.named_parameters():
        if "shared_expert" in name:
            parameter.zero_()
    found.generation_config = copy.deepcopy(model.generation_config)
    return found if _alike(model, found) else None


def save_experts(model: Any, folder: Path) -> None:
    """Write configuration and weights as `load_experts` reads them."""
    model.config.save_pretrained(str(folder))
    model.generation_config.save_pretrained(str(folder))
    write_model(model, folder)


def load_experts(kind: Any, folder: Path, facts: Mapping[str, Any]) -> nn.Module:
    """A model in its own form.

    Args:
        kind: the Auto class of the dense model. facts: `understudy_experts` of its configuration.

    Raises:
        InputError: the facts or the weights do not fit.
    """
    try:
        model = kind.from_config(AutoConfig.from_pretrained(str(folder)))
        upcycle(model, **facts)
        load_model(model, str(folder / "model.safetensors"))
    except InputError:
        raise
    except Exception as error:  # the message says whether a key, a shape or the file is wrong
        raise InputError(f"{folder} holds experts that cannot be loaded: {reason(error)}") from error
    loaded: nn.Module = model.eval()
    return loaded


def _gated(mixture: MixtureOfExperts) -> bool:
    """Whether an expert is SiLU(gate x) · up x, then down, without biases, as in the architectures above."""
    held = set(mixture.experts[0].state_dict())
    return held == {f"{name}_proj.weight" for name in ("gate", "up", "down")}


def _text_config(config: Any, kind: str, made: list[MixtureOfExperts], model: Any) -> Any | None:
    """The configuration of the text model with experts, or `None` where the new kind lacks something."""
    sparse = [layer for layer, block in enumerate(_blocks(model)) if isinstance(block, MixtureOfExperts)]
    every = len(sparse) == config.num_hidden_layers
    if config.model_type in ("llama", "mistral") and every:
        kind = "mixtral"
    if kind == "qwen2_moe" and (getattr(config, "sliding_window", None) and config.model_type == "mistral"):
        return None
    values = {k: v for k, v in config.to_dict().items() if k not in _OWN}
    number, k = len(made[0].experts), made[0].k
    values |= {
        "num_experts_per_tok": k,
        "norm_topk_prob": True,
        "output_router_logits": False,
        "decoder_sparse_step": 1,
    }
    if kind == "mixtral":
        values |= {"num_local_experts": number}
    else:
        dense = [i for i in range(config.num_hidden_layers) if i not in sparse]
        values |= {"num_experts": number, "moe_intermediate_size": config.intermediate_size, "mlp_only_layers": dense}
    if kind == "qwen2_moe":
        values |= {"shared_expert_intermediate_size": 1, "qkv_bias": config.model_type == "qwen2"}
    return AutoConfig.for_model(kind, **values)


def _blocks(model: Any) -> list[nn.Module]:
    """The feed-forward network of each layer of the text decoder."""
    decoder = model.get_decoder()
    return [layer.mlp for layer in decoder.layers]


def _fused(model: nn.Module) -> dict[str, Tensor]:
    """The state of an up-cycled model, with the weights of a layer's experts in one tensor each."""
    state = dict(model.state_dict())
    single = re.compile(r"(.*\.experts)\.0\.gate_proj\.weight")
    for match in [m for m in map(single.fullmatch, list(state)) if m]:
        prefix, number = match[1], 0
        parts: list[dict[str, Tensor]] = []
        while f"{prefix}.{number}.gate_proj.weight" in state:
            parts.append({n: state.pop(f"{prefix}.{number}.{n}_proj.weight") for n in ("gate", "up", "down")})
            number += 1
        state[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([p["gate"], p["up"]]) for p in parts])
        state[f"{prefix}.down_proj"] = torch.stack([p["down"] for p in parts])
    return state


def _alike(model: Any, other: Any) -> bool:
    """Whether two models give the same logits for a few tokens; the kernels of transformers refuse some widths."""
    ids = (torch.arange(12, device=model.device) * 7919 + 13)[None] % model.get_input_embeddings().weight.shape[0]
    with evaluating(model, other):
        wanted = model(input_ids=ids, use_cache=False).logits.float()
        try:
            found = other(input_ids=ids, use_cache=False).logits.float()
        except RuntimeError:
            return False
    return bool((found - wanted).norm() <= SAME.get(model.dtype, 1e-4) * wanted.norm())
