"""Sampling with transformers' continuous batching: when a text ends, its slot goes to the next prompt at once.

Scheduler and paged cache are transformers'; the random numbers belong to the text, as in `decoding.sample`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from understudy.errors import InputError
from understudy.generation.decoding import choose
from understudy.models import evaluating

PAGE = 32
"""Tokens per page of the cache."""
READ = 256
"""Most prompt tokens processed in one step, in addition to one token of every text."""
Draws = tuple[float, float, int]


def sample_continuously(
    model: Any,
    prompts: Sequence[Sequence[int]],
    keys: Tensor,
    *,
    most: int,
    vocabulary: int,
    ends: set[int],
    in_flight: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> list[list[int]]:
    """Generate continuations of prompts, `in_flight` in parallel: the texts of `decoding.sample`, up to the rounding of
    batched products.

    The model runs in the dtype of its weights (autocast has no effect). Afterwards its mode, its attention and torch's
    random state are restored, and the cache is freed.

    Args:
        model, prompts, keys, most, vocabulary, ends: as in `decoding.sample`.

    Returns:
        The generated tokens, ending token included.

    Raises:
        InputError: the model or the installed transformers does not support this.
    """
    _check(model)
    slots = min(in_flight, len(prompts))
    pages = 2 + -(-(max(map(len, prompts)) + most) // PAGE)
    stop: Any = sorted(ends) or -1
    with _as_it_was(model):
        try:
            manager = model.init_continuous_batching(
                GenerationConfig(max_new_tokens=most, do_sample=False, eos_token_id=stop),
                continuous_batching_config=_bounded(slots, pages),
            )
            manager.logit_processor = _processors(prompts, keys, vocabulary, (temperature, top_p, top_k))
            for i, prompt in enumerate(prompts):  # before the start, for the same schedule every time
                manager.add_request(list(prompt), request_id=str(i), max_new_tokens=most, eos_token_id=stop)
            texts = dict(_finished(manager, len(prompts)))
        except (ValueError, RuntimeError, MemoryError) as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"Continuous batching of transformers fails with {type(model).__name__}: {reason}. Set "
                "on_policy.engine=padded."
            ) from error
    return [texts[i] for i in range(len(prompts))]


def _check(model: Any) -> None:
    """Raise an error for models that would fail, or silently generate without their context."""
    if not hasattr(getattr(transformers, "ContinuousBatchingConfig", None), "page_size"):
        raise InputError(
            f"on_policy.engine=continuous needs transformers 5.17 and there is {transformers.__version__}: install it, or "
            "set on_policy.engine=padded."
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise InputError(
            f"{type(model).__name__} has attention of its own, which cannot read the cache of continuous batching: set "
            "on_policy.engine=padded."
        )


def _bounded(slots: int, pages: int) -> Any:
    """A cache of the required size; by default it would take 60 % of the machine's memory."""
    return transformers.ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=slots * pages,
        max_batch_tokens=slots + READ,
        max_requests_per_batch=slots,
        max_blocks_per_request=0,
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=False,
        safety_margin=0.0,
        auto_switch_to_flash=False,
        disable_nccl_graph_mixing=False,
        seed=0,
    )


def _finished(manager: Any, number: int) -> Iterator[tuple[int, list[int]]]:
    """Run the manager until `number` texts are generated. Yields their slots and tokens."""
    manager.start()
    try:
        for _ in range(number):
            while (result := manager.get_result(timeout=1)) is None:
                if not manager.is_running():
                    raise RuntimeError("it stopped before all texts were written")
            if result.error is not None:
                raise RuntimeError(result.error)
            yield int(result.request_id), result.generated_tokens
    finally:
        manager.stop(block=True, hard_stop=True)
        manager.destroy()


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Evaluation mode inside; afterwards mode, attention and random state (which the manager seeds) are restored.
    Errors are raised, so the traceback that transformers also logs is suppressed."""
    attention, log = model.config._attn_implementation, logging.getLogger("ContinuousBatchingLogger")
    disabled, log.disabled = log.disabled, True
    devices = list(range(torch.cuda.device_count()))
    try:
        with evaluating(model), torch.random.fork_rng(devices):
            yield
    finally:
        log.disabled = disabled
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)


def _processors(prompts: Sequence[Sequence[int]], keys: Tensor, vocabulary: int, settings: Draws) -> Any:
    """The sampling as the only logits processor, in the form the manager requires."""
    from transformers.generation.continuous_batching import cb_logits_processors as cb

    class Draw(cb.ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
        """Draws each text's next token itself and leaves only that one possible."""

        supported_kwargs: ClassVar[dict[str, type]] = {}
        ignored_kwargs = ()

        def fill_defaults(self, int32_tensor: Tensor) -> None:
            int32_tensor.zero_()

        def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
            """Which texts the next logits belong to, and which of their tokens comes: told before each step."""
            states = [request.state for request in requests_with_new_token]
            which = [int(state.request_id) for state in states]
            self.keys = keys[which]
            tokens = [state.position_offset - len(prompts[i]) for i, state in zip(which, states, strict=True)]
            self.step = torch.tensor(tokens, dtype=torch.long, device=keys.device)
            return torch.tensor(which, dtype=torch.int32)

        def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
            own = scores[: len(self.keys), :vocabulary]  # further rows are prompts still in prefill
            chosen = choose(own.double(), self.keys, self.step, *settings)
            return torch.full_like(scores, float("-inf")).scatter(1, chosen[:, None], 0.0)

    processors = cb.ContinuousBatchingLogitsProcessorList(LogitsProcessorList([Draw()]))
    processors.tensors_required = 1
    return processors
