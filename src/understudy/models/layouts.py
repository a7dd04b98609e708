"""Layouts of batches for causal LMs: packing without padding, and common prefixes of candidates computed once.

Packing changes how a batch is computed and not its outputs: rows, labels, ids and caches are those of the padded batch.
Whether a model supports it is tested on the model itself with a few short sequences: leakage from one sequence into the
next (recurrent and linear attention), or positions that cannot be given, change its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from understudy.data import Batch
from understudy.data.batch import COUNT
from understudy.data.packing import Layout, Tree, group_trees, is_padded_right, lay_out, shared_beginnings
from understudy.errors import InputError
from understudy.models.bodies import body
from understudy.models.modes import evaluating

Packing = Literal["auto", "free", "none"]
PACKING = ("auto", "free", "none")
"""free: always packed; none: as collated; auto: the one with fewer operations, if the model supports packing.

| attention | padded, no mask | packed |
|---|---|---|
| `sdpa`, `eager` | causal kernel: half of each square | a mask over every row: whole squares, but fewer and shared ones |
| `flash_attention_*` | the same | one row, split by `cu_seq_lens`: no waste; prefixes are not shared |
| others | as collated, with the padding mask | not packed |
"""
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
CLOSE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative difference of hidden states that counts as rounding, by dtype (`eager` takes its softmax in float32)."""


class Laid(NamedTuple):
    """The model's inputs, and the position of each token of the padded batch in its output (`None`: unchanged)."""

    inputs: dict[str, Any]
    place: Tensor | None = None

    def rows(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The rows of a batch that count, from hidden states `[rows, width, …]` in this layout."""
        if self.place is None:
            return batch.select(hidden)
        return hidden.flatten(0, 1).index_select(0, batch.select(self.place))


class Layouts:
    """Chooses the layout of each batch.

    Args:
        packing: see `PACKING`.
        model: a causal LM of transformers, without PEFT.
    """

    def __init__(self, packing: Packing, model: Any) -> None:
        self.packing = packing
        self.body = sum(p.numel() for p in _of_layers(body(model))) if packing == "auto" else 0
        self.reason: str | None = None
        self.tried = packing == "none"
        if self.tried:
            self.reason = "data.packing is none"
        elif not needs_gpu(model):
            self.try_on(model)  # else at the first batch, on the GPU

    def try_on(self, model: Any) -> None:
        """Test whether the model supports packing; with `free` an unsupported model is an `InputError`."""
        self.reason, self.tried = obstacle(model), True
        if self.reason is not None and self.packing == "free":
            raise InputError(
                f"data.packing=free would change what {type(model).__name__} says: {self.reason}. Set data.packing=none."
            )

    def lay(self, model: Any, batch: Batch, groups: Sequence[Sequence[int]] | None = None) -> Laid:
        """The layout of a batch.

        Args:
            groups: indices of sequences that may share a prefix; none if not given.
        """
        if not self.tried:
            self.try_on(model)
        given = {k: v for k, v in batch.inputs.items() if not k.startswith(COUNT)}
        if self.reason is not None or len(given) > 2:  # images stay in the row of their text
            return Laid({k: v.to(model.dtype) if v.is_floating_point() else v for k, v in given.items()})
        kept = given["attention_mask"].bool()
        if groups is not None and sorted(s for g in groups for s in g) != list(range(len(kept))):
            groups = None  # a sequence in several lists, or in none
        flash = _attention(model).startswith("flash")
        lengths, common, right = _measure(given["input_ids"], kept, None if flash else groups)
        window = _window(model)
        if not right or (window is not None and max(lengths) > window and not flash):
            return Laid(given)
        length = kept.shape[1]
        trees = group_trees(lengths, common, groups) if groups and not flash else [Tree((i,)) for i in range(len(kept))]
        if self.packing == "auto" and not flash and sum(t.size(lengths) for t in trees) == kept.numel():
            return _padded(given)  # no padding, nothing shared
        layout = lay_out(lengths, trees, length, one_row=flash)
        if self.packing == "auto" and self._operations(model, layout) >= self._operations(model, kept):
            return _padded(given)
        return _packed(model, given["input_ids"], layout)

    def _operations(self, model: Any, what: Layout | Tensor) -> float:
        """Operations of a forward pass through the layers: products with weights, and attention as its kernel computes
        it."""
        config = model.config.get_text_config()
        rows, width = what.shape if isinstance(what, Tensor) else what.trees.shape
        if isinstance(what, Tensor):
            pairs = rows * width**2 / 2
        elif _attention(model).startswith("flash"):
            pairs = float(sum((b - a) ** 2 for a, b in zip(what.starts(), what.starts()[1:], strict=False))) / 2
        else:
            pairs = float(rows * width**2)
        return 2.0 * self.body * rows * width + 4.0 * config.hidden_size * config.num_hidden_layers * pairs


def _measure(ids: Tensor, kept: Tensor, groups: Sequence[Sequence[int]] | None) -> tuple[list[int], list[int], bool]:
    """Lengths, common prefixes with the first sequence of the group, and whether padding is on the right, in one
    transfer."""
    lengths = kept.sum(1)
    common = torch.zeros_like(lengths)
    if groups is not None and len(groups) < len(kept):
        first = list(range(len(kept)))
        for group in groups:
            for member in group:
                first[member] = group[0]
        common = shared_beginnings(ids, kept, torch.tensor(first, device=ids.device))
    found = torch.cat([lengths, common, is_padded_right(kept)[None].long()]).tolist()
    return found[: len(kept)], found[len(kept) : -1], bool(found[-1])


def _padded(given: dict[str, Tensor]) -> Laid:
    """Without a mask: a causal model does not see later tokens, so padding on the right needs none."""
    ids = given["input_ids"]
    return Laid({"input_ids": ids}, torch.arange(ids.numel(), device=ids.device).view_as(ids))


def _packed(model: Any, ids: Tensor, layout: Layout) -> Laid:
    device, source = ids.device, layout.source.to(ids.device)
    tokens = ids.flatten()[source.clamp(min=0).flatten()].view_as(source)
    inputs: dict[str, Any] = {"input_ids": tokens, "position_ids": layout.positions.to(device)}
    attention = _attention(model)
    if attention.startswith("flash"):
        starts = layout.starts()
        cut = torch.tensor(starts, dtype=torch.int32, device=device)
        longest = max(b - a for a, b in zip(starts, starts[1:], strict=False))
        inputs |= {"cu_seq_lens_q": cut, "cu_seq_lens_k": cut, "max_length_q": longest, "max_length_k": longest}
    else:
        mask: Tensor = layout.mask(device)
        if attention == "eager":  # it adds its mask to the products
            dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
        inputs["attention_mask"] = mask
    return Laid(inputs, layout.place.to(device))


@torch.no_grad()
def obstacle(model: Any) -> str | None:
    """The reason why sequences of this model cannot share a row, or `None` if its outputs stay the same."""
    attention, config = _attention(model), model.config.get_text_config()
    if attention not in ("sdpa", "eager") and not attention.startswith("flash"):
        return f"its attention ({attention or 'none'}) takes no mask over several sequences"
    stateful = sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION)
    if stateful:
        return f"layers of kind {', '.join(stateful)} carry state from one sequence into the next"
    try:
        with evaluating(model):
            return _trial(model, attention.startswith("flash"))
    except Exception as error:  # models raise any type on inputs that they do not support
        return f"it does not take them ({' '.join(f'{type(error).__name__}: {error}'.split())})"


def _trial(model: Any, flash: bool) -> str | None:
    """Four short sequences in separate rows, packed, and packed with one of them changed."""
    lengths, length, shared = [9, 7, 6, 20], 20, 4
    device, vocabulary = next(model.parameters()).device, model.get_input_embeddings().weight.shape[0]
    kept = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    ids = (torch.arange(kept.numel()).view_as(kept) * 7919 + 13) % vocabulary
    ids[1, :shared] = ids[0, :shared]
    changed = ids.clone()
    changed[0, shared:] = (ids[0, shared:] + 1) % vocabulary
    trees = [Tree((i,)) for i in range(4)] if flash else [Tree((0, 1), shared), Tree((2,)), Tree((3,))]
    layout = lay_out(lengths, trees, length, one_row=flash)
    given = {"input_ids": ids.to(device), "attention_mask": kept.long().to(device)}
    ways = [Laid(given), _padded(given), *(_packed(model, x.to(device), layout) for x in (ids, changed))]
    wanted, padded, packed, other = (_answers(model, laid, kept) for laid in ways)
    apart = max(_distance(x, wanted) for x in (padded, packed))
    if not apart <= CLOSE.get(wanted.dtype, 5e-2):
        return f"beside others its hidden states are {apart:.2g} of their size off on a trial"
    rest = slice(lengths[0], None)
    leak = _distance(other[rest], packed[rest])
    if not leak <= 8 * torch.finfo(wanted.dtype).eps:  # a mask leaves no leakage at all
        return f"on a trial, {leak:.2g} of its hidden states came from another sequence"
    return None


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _answers(model: Any, laid: Laid, kept: Tensor) -> Tensor:
    """Hidden states of the tokens that are kept."""
    hidden = body(model)(**laid.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    place = torch.arange(kept.numel()).view_as(kept) if laid.place is None else laid.place.cpu()
    found: Tensor = hidden[place[kept].to(hidden.device)]
    return found


def _attention(model: Any) -> str:
    return str(getattr(model.config.get_text_config(), "_attn_implementation", None) or "")


def needs_gpu(model: Any) -> bool:
    """Whether the model can only be tested on a GPU, since its attention has no CPU kernel."""
    return _attention(model).startswith("flash") and next(model.parameters()).device.type == "cpu"


def _window(model: Any) -> int | None:
    """Number of tokens beyond which the model's own mask has limits that a packed mask lacks: a sliding window, or
    chunks."""
    config = model.config.get_text_config()
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((int(s) for s in sizes if s), default=None)


def _of_layers(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that a token is multiplied with before the head."""
    looked_up = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return [p for p in model.parameters() if id(p) not in looked_up]
