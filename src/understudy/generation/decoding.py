"""Sampling from a causal LM with a KV cache, many texts in parallel, with random numbers that belong to each text."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from understudy.data.noise import uniform
from understudy.errors import InputError
from understudy.models import ModelAdapter, evaluating, is_encoder_decoder


def choose(
    logits: Tensor,
    keys: Tensor,
    step: int | Tensor,
    temperature: Tensor | float,
    top_p: Tensor | float = 1.0,
    top_k: int = 0,
) -> Tensor:
    """The next token of each row: the most probable at temperature 0, else drawn by inversion from what top-k and top-p
    leave.

    Args:
        logits: `[rows, vocabulary]`, float64.
        keys: `[rows]`, int64, seed of each row.
        step: index of the token, one for all, or `[rows]`.
        temperature, top_p: one for all, or `[rows, 1]`.
        top_k: 0 keeps all.
    """
    temperature = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device).expand(len(logits), 1)
    greedy = logits.argmax(-1)
    p = torch.softmax(logits / torch.where(temperature > 0, temperature, 1.0), -1)
    if top_k or isinstance(top_p, Tensor) or top_p < 1:
        down, order = p.sort(dim=-1, descending=True, stable=True)
        if top_k:
            down[:, top_k:] = 0
            down = down / down.sum(-1, keepdim=True)
        keep = down.cumsum(-1) - down < top_p
        keep[:, 0] = True
        if top_k:
            keep[:, top_k:] = False
        p = p * torch.zeros_like(keep).scatter(1, order, keep)
    cumulative = p.cumsum(-1)
    aim = uniform(keys.to(p.device), (1,), seed=0, step=step) * cumulative[:, -1:]
    drawn = (cumulative <= aim).sum(-1).clamp(max=p.shape[1] - 1)
    return torch.where(temperature[:, 0] > 0, drawn, greedy)


@torch.no_grad()
def written(
    model: Any,
    prompts: Sequence[Sequence[int]],
    most: int,
    pad: int,
    draw: Sequence[LogitsProcessor],
    end: StoppingCriteria,
) -> Tensor:
    """The tokens that `model.generate` appends to the prompts, `[prompts, tokens]`, in evaluation mode and without the
    model's own generation config: only `draw` and `end` apply. Mode and config are restored."""
    device = next(model.parameters()).device
    prompts = [read_by(model, p) for p in prompts]
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = _mask(prompts).to(device)
    first = {"decoder_start_token_id": model.config.decoder_start_token_id} if is_encoder_decoder(model) else {}
    config = GenerationConfig(max_new_tokens=most, do_sample=False, pad_token_id=pad, use_cache=True, **first)
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with evaluating(model):
            found: Tensor = model.generate(
                ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=list(draw),
                stopping_criteria=[end],
                **without_routers(model),
            )
    finally:
        model.generation_config = own
    return found[:, begin(model, prompts) :]


def _mask(prompts: Sequence[Sequence[int]]) -> Tensor:
    """`[prompts, longest]`: 0 where a prompt is padded, on its left."""
    longest = max(map(len, prompts))
    return torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])


def read_by(model: Any, prompt: Sequence[int]) -> list[int]:
    """A prompt as a model reads it: an encoder gets the ending token behind."""
    end = model.config.eos_token_id if is_encoder_decoder(model) else None
    return list(prompt) if end is None else [*prompt, end]


def begin(model: Any, prompts: Sequence[Sequence[int]]) -> int:
    """Where the first new token is in what `generate` returns: behind the prompt, or behind a decoder's starting token."""
    return 1 if is_encoder_decoder(model) else max(map(len, prompts))


def without_routers(model: Any) -> dict[str, bool]:
    """Arguments of `generate` that leave out the loss of a mixture's routers, which fails on a cache of keys."""
    asked = getattr(model.config.get_text_config(), "output_router_logits", False)
    return {"output_router_logits": False} if asked else {}


def writer(rows: ModelAdapter) -> Any:
    """The model that generates; for a model with adapters its base, which contains them."""
    model: Any = rows.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Token ids that end a text, by tokenizer and model."""
    own = model.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return {i for i in ids if i is not None}


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    keys: Tensor,
    *,
    most: int,
    vocabulary: int,
    ends: set[int],
    pad: int,
    in_flight: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    teacher: Any = None,
    teacher_share: float = 0.0,
) -> list[list[int]]:
    """Generate continuations of prompts, `in_flight` in parallel, grouped by length.

    A text depends on its prompt, its key and the weights alone, up to the rounding of batched products.

    Args:
        model: a causal LM with `generate`.
        prompts: token ids, none empty.
        keys: `[prompts]`, int64.
        most: most tokens to generate.
        vocabulary: size of the vocabulary; further rows of the head are padding.
        ends: ids that end a text.
        teacher, teacher_share: a second model p; tokens are drawn from share · p + (1 − share) · q.

    Returns:
        The generated tokens, ending token included.
    """
    if teacher is not None and (is_encoder_decoder(model) or is_encoder_decoder(teacher)):
        raise InputError("on_policy.teacher_share mixes two decoders, and a model has an encoder: set it to 0 or 1.")
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    found: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), in_flight):
        chosen = order[start : start + in_flight]
        part = [prompts[i] for i in chosen]
        mixed = [_Mix(teacher, teacher_share, part, vocabulary)] if teacher is not None else []
        draw = [*mixed, _Draw(keys[chosen], begin(model, part), vocabulary, (temperature, top_p, top_k))]
        for i, ids in zip(chosen, written(model, part, most, pad, draw, _End(ends)).tolist(), strict=True):
            last = next((n for n, token in enumerate(ids) if token in ends), len(ids) - 1)
            found[i] = ids[: last + 1]  # a batch runs until its longest text ends
    return found


class _Mix(LogitsProcessor):
    """Replaces the scores of a model q by log(share · p + (1 − share) · q), with a model p that reads the same tokens."""

    def __init__(self, model: Any, share: float, prompts: Sequence[Sequence[int]], vocabulary: int) -> None:
        self.model, self.share, self.vocabulary = model, share, vocabulary
        self.mask, self.cache = _mask(prompts), None
        self.placed = "position_ids" in inspect.signature(model.forward).parameters

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        device, new = next(self.model.parameters()).device, input_ids
        if self.cache is not None:
            self.mask, new = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1), input_ids[:, -1:]
        places = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :].to(device)
        with evaluating(self.model), torch.autocast(device.type, enabled=False):
            found = self.model(
                input_ids=new.to(device),
                attention_mask=self.mask.to(device),
                past_key_values=self.cache,
                use_cache=True,
                **({"position_ids": places} if self.placed else {}),
                **without_routers(self.model),
            )
        self.cache = found.past_key_values
        log_p = found.logits[:, -1, : self.vocabulary].double().log_softmax(-1).to(scores.device)
        log_q = scores[:, : self.vocabulary].double().log_softmax(-1)
        return torch.logaddexp(math.log(self.share) + log_p, math.log1p(-self.share) + log_q)


class _Draw(LogitsProcessor):
    """Samples each row's next token and masks all others."""

    def __init__(self, keys: Tensor, start: int, vocabulary: int, settings: tuple[float, float, int]) -> None:
        self.keys, self.start, self.vocabulary, self.settings = keys, start, vocabulary, settings

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores[:, : self.vocabulary].double()
        chosen = choose(logits, self.keys, input_ids.shape[1] - self.start, *self.settings)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen[:, None], 0.0)


class _End(StoppingCriteria):
    """Ends each row at an ending token."""

    def __init__(self, ends: set[int]) -> None:
        self.ends = sorted(ends)
        self.done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        now = torch.isin(input_ids[:, -1], input_ids.new_tensor(self.ends))
        self.done = now if self.done is None else self.done | now
        return self.done
