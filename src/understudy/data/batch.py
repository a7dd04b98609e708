"""Batches: inputs, labels, stable ids, and which rows count. The causal shift happens here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache, cached_property
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORE = -100
UNLABELLED = -1
"""The label of a row that counts but has no label, for methods that only learn from the teacher."""
COUNT = "count/"
"""Prefix of an input, `[examples]`, that says how many rows of the input named behind it belong to each example, such as
the patches of its images."""
SOURCES = ("data", "fresh", "replayed")
"""The origin of a text: the data, or a sample of the student, generated for this update or an earlier one."""


@dataclass
class Batch:
    """Examples with their labels.

    Args:
        inputs: of the model: `pixel_values [examples, channels, height, width]` in [0, 1], or `input_ids` and
            `attention_mask [examples, length]`, and what a processor of transformers makes of the images beside the
            text. An input without a row for each example has its numbers of rows beside it (`COUNT`).
        labels: `[examples]`, or `[examples, length]` *not* shifted; −100 is ignored.
        ids: `[examples]`, stable example ids.
        bytes: `[examples]`, number of UTF-8 bytes of the counted tokens of each text; `None` for images.
        domains: `[examples]`, index of each example's domain, if the data have domains.
        source, sampled: `[examples]`, index into `SOURCES`, and the optimizer step whose weights generated the
            completion (−1: from the data); `None` without on-policy samples. Generated tokens are not labels: their
            rows have `UNLABELLED`.
        teacher_prompt: `[examples, length]`, what the teacher reads in the place of each prompt, −1 after its end; `None`
            where it reads the same.

    A *row* is a label that counts. Rows are in flattened order, and for text row `(b, t)` predicts token `t + 1`.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    ids: Tensor
    bytes: Tensor | None = None
    domains: Tensor | None = None
    source: Tensor | None = None
    sampled: Tensor | None = None
    teacher_prompt: Tensor | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Batch:
        """From a collator's result: tensors named after fields of this class, and inputs of the model.

        Fields of a subclass select that subclass.
        """
        for kind in cls.__subclasses__():
            if _names(kind)[1] <= values.keys():  # type: ignore[arg-type]  # a class is hashable, its instances are not
                return kind.from_dict(values)
        own, _ = _names(cls)  # type: ignore[arg-type]
        inputs = {k: v for k, v in values.items() if k not in own}
        return cls(inputs, **{k: v for k, v in values.items() if k in own})

    @property
    def kind(self) -> str:
        """`text`: rows are tokens; `classification`: rows are examples with a class."""
        return "text" if self.labels.dim() == 2 else "classification"

    @property
    def contents(self) -> list[tuple[Tensor, ...]]:
        """What each example consists of, without padding: equal where a model would be asked the same again."""
        if self.kind != "text":
            return [tuple(v[i] for v in self.inputs.values()) for i in range(len(self.labels))]
        shown = self.for_teacher()
        kept = shown.inputs["attention_mask"].bool()
        texts = zip(shown.inputs["input_ids"], shown.labels, kept, strict=True)
        return [(i[m], y[m], *(part[n] for part in self._pieces.values())) for n, (i, y, m) in enumerate(texts)]

    def for_teacher(self) -> Batch:
        """The batch as the teacher reads it: the same completions after `teacher_prompt`. Its rows are the same."""
        if self.teacher_prompt is None:
            return self
        parts = []
        rows = zip(
            self.inputs["input_ids"], self.labels, self.inputs["attention_mask"], self.teacher_prompt, strict=True
        )
        for ids, labels, mask, told in rows:
            start, length, asked = int((labels != IGNORE).int().argmax()), int(mask.sum()), told[told >= 0]
            learned = labels[start:length].clone()
            learned[: start == 0] = IGNORE  # the first token of a text is no row, and must not become one
            parts.append((torch.cat([asked, ids[start:length]]), torch.cat([torch.full_like(asked, IGNORE), learned])))
        ids, labels, mask = (
            pad_sequence([part(*row) for row in parts], batch_first=True, padding_value=value)
            for part, value in ((lambda i, y: i, 0), (lambda i, y: y, IGNORE), (lambda i, y: torch.ones_like(i), 0))
        )
        inputs = {**self.inputs, "input_ids": ids, "attention_mask": mask}
        return replace(self, inputs=inputs, labels=labels, teacher_prompt=None)

    @cached_property
    def _pieces(self) -> dict[str, tuple[Tensor, ...]]:
        """The part of each example of the inputs that have their numbers of rows beside them, by name."""
        named = {k.removeprefix(COUNT): v.tolist() for k, v in self.inputs.items() if k.startswith(COUNT)}
        return {k: self.inputs[k].split(numbers) for k, numbers in named.items()}

    @cached_property
    def mask(self) -> Tensor:
        """Which rows count: `[examples]`, or `[examples, length − 1]` after the shift."""
        labels = self.labels[:, 1:] if self.kind == "text" else self.labels
        return labels != IGNORE

    @cached_property
    def num_items(self) -> int:
        return int(self.mask.sum())

    @cached_property
    def row_labels(self) -> Tensor:
        """`[rows]`."""
        return self._kept(self.labels[:, 1:] if self.kind == "text" else self.labels)

    @cached_property
    def sequence(self) -> Tensor:
        """`[rows]`, the index of the example each row comes from."""
        index = torch.arange(len(self.labels), device=self.labels.device)
        return self._kept(index[:, None].expand(self.mask.shape) if self.kind == "text" else index)

    @cached_property
    def places(self) -> Tensor:
        """`[rows]`, the place of each row among those of its example."""
        counts = torch.bincount(self.sequence, minlength=len(self.ids))
        return torch.arange(len(self.sequence), device=counts.device) - (counts.cumsum(0) - counts)[self.sequence]

    def select(self, values: Tensor) -> Tensor:
        """The rows of `[examples, width]` or `[examples, length, width]` that count. The rest get no gradient."""
        return self._kept(values[:, :-1] if self.kind == "text" else values)

    def _kept(self, values: Tensor) -> Tensor:
        """The rows that count of `[*mask.shape, ...]`; where all do, none is looked for."""
        if self.num_items == self.mask.numel():
            return values.flatten(0, self.mask.dim() - 1)
        return values[self.mask]

    def with_labels(self, signal: Any) -> tuple[Any, Tensor]:
        """The rows of a signal that have a label, and these labels: all rows, except on graphs and for generated text."""
        if self._labelled is None:
            return signal, self.row_labels
        return signal.select(self._labelled), self.row_labels[self._labelled]

    def weighted(self, values: Tensor) -> Tensor:
        """The values of a term, times the weights of the examples where the data have them."""
        return values

    def among_rows(self, values: Tensor) -> Tensor:
        """`[rows]` from the values of rows with a label, with 0 for the others, which the divisor counts too."""
        if self._labelled is None:
            return values
        return values.new_zeros(self.num_items).masked_scatter(self._labelled, values)

    @cached_property
    def _labelled(self) -> Tensor | None:
        """`[rows]`, whether each has a label; `None` if all do."""
        if self.source is None or not bool(self.source.any()):
            return None
        return self.row_labels != UNLABELLED

    def take(self, index: Tensor) -> Self:
        """The examples at `index`, in this order."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        taken = {k: v[index] for k, v in found.items() if isinstance(v, Tensor)}
        inputs = {k: v[index] for k, v in self.inputs.items() if k not in self._pieces}
        chosen = torch.arange(len(self.ids), device=self.ids.device)[index].tolist()
        inputs |= {k: torch.cat([self.inputs[k][:0], *(part[n] for n in chosen)]) for k, part in self._pieces.items()}
        return replace(self, inputs=inputs, **taken)

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) for k, v in found.items() if isinstance(v, Tensor)}
        return replace(self, inputs={k: v.to(device) for k, v in self.inputs.items()}, **moved)


class WholeExamples:
    """For kinds of batches whose rows are their examples, with or without a label."""

    ids: Tensor

    @cached_property
    def mask(self) -> Tensor:
        """`[examples]`, all True."""
        return torch.ones_like(self.ids, dtype=torch.bool)

    @cached_property
    def num_items(self) -> int:
        """The number of examples."""
        return len(self.ids)

    @cached_property
    def sequence(self) -> Tensor:
        """`[examples]`: each row is its own example."""
        return torch.arange(len(self.ids), device=self.ids.device)

    def select(self, values: Tensor) -> Tensor:
        """`values`: every example counts."""
        return values


@cache
def _names(kind: type[Batch]) -> tuple[frozenset[str], frozenset[str]]:
    """Names of a kind's fields, and of those that a collator must give."""
    named = {f.name: f.default is MISSING for f in fields(kind)}
    return frozenset(named), frozenset(n for n, required in named.items() if required and n != "inputs")
