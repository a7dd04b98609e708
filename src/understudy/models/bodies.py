"""The body of a causal LM below its head, and a trial of whether the head alone reproduces the model's own logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from understudy.errors import InputError
from understudy.models.modes import evaluating
from understudy.models.positions import positions

SAME = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Relative difference of logits that counts as rounding, by dtype."""
LARGE = 20.0
"""Root mean square of logits at which a soft-cap has an effect."""


def body(model: Any) -> Any:
    """The part of a causal LM that returns hidden states: its base model, or the child that holds its embeddings."""
    if model.base_model is not model:
        return model.base_model
    embeddings = model.get_input_embeddings()
    return next((c for c in model.children() if c is not embeddings and embeddings in c.modules()), model)


@contextmanager
def watched(model: Any, factor: float = 1.0) -> Iterator[list[Tensor]]:
    """Collect the hidden states that the body passes to later layers, multiplied by `factor` for both."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            return None
        if factor != 1.0:
            output.last_hidden_state = hidden = hidden * factor
        seen.append(hidden)
        return output

    hook = body(model).register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


@torch.no_grad()
def try_head(model: Any, head: Callable[[Tensor], Tensor], vocabulary: int) -> bool:
    """Whether `head` of the hidden states equals the model's own logits, on a few tokens.

    It is tried a second time with hidden states that give large logits, since those of a new model are too small for a
    soft-cap to have an effect.

    Args:
        model: a causal LM of transformers, without PEFT.
        head: from `[…, width]` to `[…, vocabulary]`.
        vocabulary: number of tokens.

    Raises:
        InputError: the output at a token depends on later ones, or the model does not accept plain text.
    """
    with evaluating(model):
        ids = _tokens(model)
        with watched(model) as seen:
            own = _logits(model, ids)
        check_causal(model)
        if not seen or not _near(head(seen[-1])[..., :vocabulary], own[..., :vocabulary]):
            return False
        size = float(own.float().square().mean().sqrt())
        with watched(model, LARGE / size if size > 0 else 1.0) as seen:
            own = _logits(model, ids)
        return _near(head(seen[-1])[..., :vocabulary], own[..., :vocabulary])


def _tokens(model: Any, length: int = 8) -> Tensor:
    known = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(min(length, positions(model) or length)) * 7919 + 13) % known
    return ids[None].to(next(model.parameters()).device)


def _logits(model: Any, ids: Tensor, zeros: Sequence[str] = ()) -> Tensor:
    beside = {name: torch.zeros_like(ids) for name in zeros}
    try:
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **beside).logits
    except Exception as error:  # models raise any type on inputs that they do not support
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{type(model).__name__} cannot read a text of {ids.shape[1]} tokens: {reason}") from error
    if logits.isnan().any():
        raise InputError(
            f"{type(model).__name__} gives logits that are no numbers (nan): weights or settings are damaged."
        )
    return logits


def check_causal(model: Any) -> None:
    """Raise an error for a model whose output at a token depends on later ones."""
    if not is_causal(model):
        raise not_causal(model)


@torch.no_grad()
def is_causal(model: Any, zeros: Sequence[str] = ()) -> bool:
    """Whether a model's outputs at the tokens of a text stay the same when later ones change.

    Args:
        zeros: names of further inputs with a value for each token, which are 0.
    """
    ids = _tokens(model)
    own, half = _logits(model, ids, zeros), ids.shape[1] // 2
    later = ids.clone()
    later[:, half:] = (later[:, half:] + 1) % model.get_input_embeddings().weight.shape[0]
    return _near(_logits(model, later, zeros)[:, :half], own[:, :half])


def not_causal(model: Any) -> InputError:
    """What is said of a model that reads later tokens."""
    return InputError(
        f"{type(model).__name__} reads later tokens to predict earlier ones: it is a bidirectional encoder, not a causal "
        "language model. Name a decoder, or use the encoder as a ranker (task=ranking)."
    )


def _near(found: Tensor, wanted: Tensor) -> bool:
    found, wanted = found.float(), wanted.float()
    return bool((found - wanted).norm() <= SAME.get(wanted.dtype, 1e-4) * wanted.norm())
