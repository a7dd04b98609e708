"""A teacher whose outputs are stored: captured once, read through a memory map, refused where they do not match the
data."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from understudy.data import Batch
from understudy.errors import InputError
from understudy.files import digest, writing
from understudy.models import ModelAdapter, ModelOutput, evaluating, state_hash
from understudy.streaming import logits_of
from understudy.targets import Dense, Mixture, Projected, Sampled, Target
from understudy.teachers.cache.codecs import Support, decode, encode
from understudy.teachers.cache.store import IDENTITY, WHOLE, WHOLE_BYTES, ShardStore, content_key

SECONDS = 60.0
"""Most seconds of a teacher's work that a kill may lose."""
HEAD = re.compile(r"head-([0-9a-f]{64})\.safetensors|head\.safetensors")
"""File of the head of hidden states; its name holds its SHA-256, except for files from before there were checksums."""


def example_keys(batch: Batch) -> list[bytes]:
    """The key of each example of a batch, by its content."""
    return [content_key(*parts) for parts in batch.contents]


@dataclass(frozen=True)
class Captured:
    """Result of a capture: number of examples and rows in the cache, and how many of them are new."""

    examples: int
    rows: int
    new: int
    bytes: int


class CachedTeacher:
    """Returns the stored outputs of a teacher for the examples of a batch.

    Args:
        folder: of the cache.
        expected: required identity (tokenizer, template, …), by key; other keys are not compared.
    """

    def __init__(self, folder: Path, expected: Mapping[str, Any] | None = None) -> None:
        self._open(ShardStore(folder), expected)
        self.name = f"cache:{folder}"

    def _open(self, store: ShardStore, expected: Mapping[str, Any] | None) -> None:
        self.store, held, folder = store, store.identity, store.folder
        for key, value in (expected or {}).items():
            if held.get(key) != value:
                raise InputError(
                    f"Cache {folder} was captured with {key} {_short(held.get(key))} and the run has {_short(value)}. "
                    "Capture again with this recipe (understudy cache capture), or change the recipe to fit the cache."
                )
        wanting = [key for key in ("support", "temperature", "classes") if key not in held]
        if wanting:
            raise InputError(f"{folder / IDENTITY} is damaged: it has no {wanting[0]}. Put it back, or capture again.")
        self.support = Support.parse(str(held["support"]))
        version = held.get("support_version", 1)
        if version != self.support.codec:
            raise InputError(
                f"Cache {folder} is in version {version} of the {self.support.kind} code, which is read in "
                f"version {self.support.codec}: capture it again (understudy cache capture)."
            )
        try:
            self.temperature, self.classes = float(held["temperature"]), int(held["classes"])
        except (TypeError, ValueError):
            raise InputError(
                f"{folder / IDENTITY} is damaged: temperature is {held['temperature']!r} and classes {held['classes']!r}. "
                "Put it back, or capture again."
            ) from None
        self.head = _load_head(folder) if self.support.kind == "hidden" else None

    def __call__(self, batch: Batch) -> ModelOutput:
        """The stored targets of the batch's rows, on its device."""
        return self.recall(example_keys(batch), batch)

    def recall(self, keys: Sequence[bytes], batch: Batch) -> ModelOutput:
        """The targets stored under these keys, one for each example of the batch."""
        arrays = self.store.read(keys)
        number = len(next(iter(arrays.values())))
        if number != batch.num_items:
            raise InputError(
                f"Cache {self.store.folder} holds {number} rows for a batch of {batch.num_items}: its labels are masked otherwise."
            )
        return self._decoded(arrays, [self.store.length(key) for key in keys], batch)

    def _decoded(self, arrays: dict[str, Tensor], counts: list[int], batch: Batch) -> ModelOutput:
        found = decode(arrays, self.support, self.temperature, self.classes, self.head, counts)
        return ModelOutput(found.to(batch.labels.device))

    def imagined(self, batch: Batch) -> ModelOutput:
        """A uniform placeholder target of the stored kind, the same for every row, for trying out a loss."""
        if self.head is not None:
            width = self.head["weight"].shape[-1]
            arrays = {"hidden": torch.zeros(1, width, dtype=torch.bfloat16)}
        else:
            arrays = encode(Dense(torch.zeros(1, self.classes)), self.support, self.temperature, 0)
        repeated = {
            name: array.expand(batch.num_items, *array.shape[1:]).contiguous() for name, array in arrays.items()
        }
        return self._decoded(repeated, [1] * batch.num_items, batch)

    def through(self, batch: Batch) -> ModelOutput:
        """Not available: a cache has no gradient.

        Raises:
            InputError: always.
        """
        raise InputError(f"{self.name} cannot answer for inputs that a method makes: give a live teacher instead.")


def capture(
    teacher: ModelAdapter,
    batches: Iterator[Batch],
    folder: Path,
    *,
    support: Support,
    temperature: float,
    identity: Mapping[str, Any],
    shard: int = WHOLE,
    tick: Callable[[int], None] | None = None,
) -> Captured:
    """Run the teacher on the examples that the cache does not hold, and store its outputs.

    Args:
        identity: of teacher and data; a folder that was captured under another one is refused.
        shard: rows per file. A file is also written at 64 MiB and once a minute, so that a kill loses no more; these
            files are merged at the end.
        tick: called with the number of finished examples.
    """
    facts = {**identity, "support": str(support), "temperature": temperature, "teacher": state_hash(teacher)}
    if support.codec > 1:
        facts["support_version"] = support.codec
    store = ShardStore(folder, facts)
    new, seen = 0, set[bytes]()
    waiting: dict[tuple[torch.dtype, ...], _Waiting] = {}  # the arrays of a file share dtypes
    with torch.no_grad(), evaluating(teacher):
        for batch in batches:
            keys = example_keys(batch)
            if all(k in store or k in seen for k in keys):
                if tick:
                    tick(len(keys))
                continue
            signal = teacher(batch).signal
            _keep_head(signal, support, folder)
            counts = torch.bincount(batch.sequence.cpu(), minlength=len(keys)).tolist()
            start = 0
            for key, count in zip(keys, counts, strict=True):
                rows = signal.select(slice(start, start + count))
                start += count
                if key in store or key in seen:
                    continue
                arrays = encode(rows, support, temperature, int.from_bytes(key[:7], "big"))
                dtypes = tuple(v.dtype for v in arrays.values())
                waiting.setdefault(dtypes, _Waiting(store, shard)).add(key, count, arrays)
                for some in waiting.values():
                    if some.due:
                        some.write()
                seen.add(key)
                new += 1
            if tick:
                tick(len(keys))
    for some in waiting.values():
        some.write()
    store.compact()
    return Captured(len(store), store.rows, new, store.size)


class _Waiting:
    """Examples that wait to be written as a shard of a given number of rows."""

    def __init__(self, store: ShardStore, size: int) -> None:
        self.store, self.size = store, size
        self._empty()

    def _empty(self) -> None:
        self.keys: list[bytes] = []
        self.counts: list[int] = []
        self.arrays: dict[str, list[Tensor]] = {}
        self.since, self.bytes = time.monotonic(), 0

    @property
    def due(self) -> bool:
        """Whether there are enough for a file, or they have waited long enough."""
        late = time.monotonic() - self.since > SECONDS
        return late or self.bytes >= WHOLE_BYTES or sum(self.counts) >= self.size

    def add(self, key: bytes, count: int, arrays: Mapping[str, Tensor]) -> None:
        self.keys.append(key)
        self.counts.append(count)
        for name, value in arrays.items():
            self.arrays.setdefault(name, []).append(value.cpu())
            self.bytes += value.nbytes

    def write(self) -> None:
        if self.keys:
            self.store.append(self.keys, self.counts, {n: torch.cat(v) for n, v in self.arrays.items()})
        self._empty()


def verify(teacher: ModelAdapter, batches: Iterator[Batch], folder: Path) -> dict[str, float]:
    """Run the teacher again on some examples and compare: KL between fresh and stored targets, and the largest
    difference, over rows.

    Raises:
        InputError: the teacher's weights differ from the captured ones, or a shard was changed.
    """
    cached = CachedTeacher(folder, {"teacher": state_hash(teacher)})
    cached.store.check()
    rows, kl, worst = 0, 0.0, 0.0
    with torch.no_grad(), evaluating(teacher):
        for batch in batches:
            signal = teacher(batch).signal
            log_p = torch.log_softmax(logits_of(signal).float() / cached.temperature, -1)
            divergence, largest = _compare(log_p, cached(batch).signal, cached.temperature)
            rows, kl, worst = rows + batch.num_items, kl + float(divergence.sum()), max(worst, float(largest))
    return {"rows": rows, "mean_difference": kl / max(rows, 1), "largest_difference": worst}


def _compare(log_p: Tensor, stored: Target, temperature: float) -> tuple[Tensor, Tensor]:
    """Per row: KL(fresh ‖ stored) if all classes are stored, else the mean |difference| of the stored
    log-probabilities. A sampled class is known to lie below its weight, so only the excess above it counts."""
    if isinstance(stored, (Dense, Projected, Mixture)):
        log_q = torch.log_softmax(logits_of(stored).float() / temperature, -1)
        return (log_p.exp() * (log_p - log_q)).sum(-1), (log_p.exp() - log_q.exp()).abs().max()
    fresh = log_p.gather(-1, stored.ids).clamp(min=-24.0)
    if isinstance(stored, Sampled):
        log_w, here = stored.weights.log(), stored.weights > 0
        drawn = (fresh - log_w).clamp(min=0)
        kept = (log_w - stored.log_probs).abs() < 1e-4
        difference = torch.where(kept, (fresh - stored.log_probs).abs(), drawn).where(here, 0.0)
        return difference.sum(-1) / here.sum(-1), difference.max()
    difference = (fresh - stored.log_probs).abs()
    return difference.mean(-1), difference.max()


def _keep_head(signal: Any, support: Support, folder: Path) -> None:
    if support.kind != "hidden" or _heads(folder) or not isinstance(signal, Projected):
        return
    tensors = {"weight": signal.weight} | ({"bias": signal.bias} if signal.bias is not None else {})
    facts = {"scale": str(signal.scale), "softcap": str(signal.softcap or 0)}
    temporary = folder / f"head-{uuid.uuid4().hex}.tmp"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(temporary), metadata=facts)
            os.replace(temporary, folder / f"head-{digest(temporary)}.safetensors")
        finally:
            temporary.unlink(missing_ok=True)


def _heads(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("head*.safetensors") if HEAD.fullmatch(p.name))


def _load_head(folder: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    found = _heads(folder)
    if len(found) != 1:
        raise InputError(
            f"Cache {folder} keeps hidden states and has {len(found)} heads of them (head-….safetensors): capture again."
        )
    named = HEAD.fullmatch(found[0].name)
    try:
        if named is not None and named[1] not in (None, digest(found[0])):
            raise ValueError("its SHA-256 is not the one in its name")
        with safe_open(str(found[0]), "pt") as opened:
            facts = opened.metadata()
        tensors = load_file(str(found[0]))
        return {
            "weight": tensors["weight"],
            "bias": tensors.get("bias"),
            "scale": float(facts["scale"]),
            "softcap": float(facts["softcap"]) or None,
        }
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{found[0]} cannot be read ({error}): put it back, or capture again.") from error


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 40 else repr(value)
