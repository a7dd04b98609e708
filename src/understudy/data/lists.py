"""Lists of scored candidates as batches of sequences; pairs are lists of two, unpaired examples lists of one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from understudy.data.batch import IGNORE, Batch, WholeExamples
from understudy.data.ends import Ends
from understudy.data.pictures import shown
from understudy.data.records import Record, place
from understudy.data.tokenize import Counts, TextSet, check_length, collate_text, completion_tokens, is_endless
from understudy.data.trees import token_steps
from understudy.errors import InputError

STRAY = "stray/"


@dataclass(kw_only=True)
class ListBatch(WholeExamples, Batch):
    """A batch whose rows are lists. `tokens` is the batch of its token rows.

    Args:
        inputs, labels: of the sequences, `[sequences, length]`.
        slots: `[lists, candidates]`, index of the sequence of each candidate, −1 for none.
        scores: `[lists, candidates]`, higher is better.
        reference, taught: `[lists, candidates]`, log-probabilities of the reference model and of a teacher, nats, if
            they were computed before.
        weights: `[lists]`, what the loss of each is multiplied by; `None` if all are 1.
    """

    slots: Tensor
    scores: Tensor
    reference: Tensor | None = None
    taught: Tensor | None = None
    weights: Tensor | None = None

    @property
    def kind(self) -> str:
        return "preference"

    @cached_property
    def tokens(self) -> Batch:
        """The sequences as a batch of token rows."""
        inputs = {k: v for k, v in self.inputs.items() if not k.startswith(STRAY)}
        return Batch(inputs, self.labels, torch.arange(len(self.labels), device=self.labels.device))

    @cached_property
    def strays(self) -> ListBatch | None:
        """Each prompt with the completion of another example (`mismatched`), as lists of one; `None` without any."""
        values = {k.removeprefix(STRAY): v for k, v in self.inputs.items() if k.startswith(STRAY)}
        found = Batch.from_dict(values) if values else None
        assert found is None or isinstance(found, ListBatch)
        return found

    @cached_property
    def candidates(self) -> Tensor:
        """`[lists, candidates]`, True for valid candidates."""
        return self.slots >= 0

    @cached_property
    def groups(self) -> list[list[int]]:
        """The indices of the sequences of each list."""
        return [[s for s in row if s >= 0] for row in self.slots.tolist()]

    @cached_property
    def lengths(self) -> Tensor:
        """`[lists, candidates]`, number of completion tokens; 0 for no candidate."""
        return self.by_candidate(self.tokens.mask.sum(1))

    @cached_property
    def best(self) -> Tensor:
        """`[lists]`, index of the candidate with the highest score (the first of equals)."""
        return self.scores.masked_fill(~self.candidates, -torch.inf).argmax(-1)

    @cached_property
    def chosen(self) -> Tensor:
        """`[lists]`, whether the best candidate is one to imitate: of several always, a single answer if its label is 1."""
        return (self.candidates.sum(1) > 1) | (self.scores[:, 0] > 0.5)

    @cached_property
    def worst(self) -> Tensor:
        """`[lists]`, index of the candidate with the lowest score (the last of equals)."""
        flipped = self.scores.masked_fill(~self.candidates, torch.inf).flip(-1).argmin(-1)
        return self.slots.shape[1] - 1 - flipped

    def by_candidate(self, values: Tensor) -> Tensor:
        """From `[sequences, …]` to `[lists, candidates, …]`, 0 where there is no candidate."""
        there = self.candidates.view(*self.candidates.shape, *[1] * (values.dim() - 1))
        return values[self.slots.clamp(min=0)].masked_fill(~there, 0)

    def sum_tokens(self, values: Tensor) -> Tensor:
        """From `[tokens]`, the rows of `tokens`, to the sum over each candidate, `[lists, candidates]`."""
        sums = values.new_zeros(len(self.labels)).index_add(0, self.tokens.sequence, values)
        return self.by_candidate(sums)

    def mean_tokens(self, values: Tensor, counted: Tensor | None = None) -> Tensor:
        """From `[tokens]` to the mean over each candidate's tokens, `[lists, candidates]`; 0 where no token counts.

        Args:
            counted: `[tokens]`, which tokens count; all if not given.
        """
        if counted is None:
            return self.sum_tokens(values) / self.lengths.clamp(min=1)
        kept = self.sum_tokens(values.masked_fill(~counted, 0.0))
        return kept / self.sum_tokens(counted.to(values.dtype)).clamp(min=1)

    def tokens_of(self, candidate: Tensor) -> Tensor:
        """`[tokens]`, which belong to one candidate of each list, `[lists]`."""
        chosen = self.slots.gather(1, candidate[:, None])
        return torch.isin(self.tokens.sequence, chosen)

    @cached_property
    def token_lists(self) -> Tensor:
        """`[tokens]`, the list that each token is in."""
        lists, candidates = self.candidates.nonzero(as_tuple=True)
        owner = torch.empty_like(self.labels[:, 0])
        owner[self.slots[lists, candidates]] = lists
        return owner[self.tokens.sequence]

    @cached_property
    def token_places(self) -> Tensor:
        """`[tokens]`, how many tokens of its completion are before each."""
        return (self.tokens.mask.long().cumsum(1) - 1)[self.tokens.mask]

    def weighted(self, values: Tensor) -> Tensor:
        """Values of lists, or of tokens, times the weight of their list."""
        if self.weights is None:
            return values
        weights = self.weights.to(values.dtype)
        return values * (weights if len(values) == len(weights) else weights[self.token_lists])

    @cached_property
    def shared(self) -> Tensor:
        """`[tokens]`, which belong to the beginning that all completions of a list have in common; none in a list of one."""
        said = self.tokens.row_labels.split(self.tokens.mask.sum(1).tolist())
        found = [torch.zeros_like(s, dtype=torch.bool) for s in said]
        for group in (g for g in self.groups if len(g) > 1):
            width = min(len(said[s]) for s in group)
            first = torch.stack([said[s][:width] for s in group])
            same = (first == first[0]).all(0).long().cumprod(0).bool()
            for s in group:
                found[s][:width] = same
        return torch.cat(found)

    @cached_property
    def row_labels(self) -> Tensor:
        return self.best


def encode_lists(
    records: list[Record], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[TextSet, Counts]:
    """Encode records of `load_preferences`: each candidate is prompt + completion, with the prompt masked.

    Prompts are truncated at the start so that the longest sequence of a list fits, by the same number of tokens for
    every candidate; a list whose longest completion leaves no room for a prompt token is dropped. Both are counted.
    """
    check_length(max_length)
    counts, rows, ends = Counts(records=len(records)), [], Ends.of(tokenizer)
    for record in records:
        asked, answers = record["prompt"], record["completions"]
        try:
            ended = record.get("ended") or [True] * len(answers)
            parts = zip(answers, ended, strict=True)
            encoded = [completion_tokens(asked, said, tokenizer, record.get("tools"), ends, e) for said, e in parts]
        except InputError as error:
            raise InputError(f"{place('Record ' + str(record['id']), record)}: {error}") from error
        counts.endless += any(is_endless(asked, s, e[1], tokenizer) for s, e in zip(answers, encoded, strict=True))
        starts = [next((i for i, t in enumerate(labels) if t != IGNORE), len(labels)) for _, labels in encoded]
        over = max(len(ids) for ids, _ in encoded) - max_length
        if over > 0:
            counts.truncated += 1
            if over >= min(starts):
                counts.dropped += 1
                continue
            encoded = [(ids[over:], labels[over:]) for ids, labels in encoded]
        if any(all(t == IGNORE for t in labels[1:]) for _, labels in encoded):
            counts.dropped += 1
            continue
        row = {"id": record["id"], "scores": record["scores"], "log_probs": record.get("log_probs")}
        row |= {k: record[k] for k in ("label_smoothing", "weight") if k in record}
        if "steps" in record:
            row["steps"] = [_steps(*e, texts, tokenizer) for e, texts in zip(encoded, record["steps"], strict=True)]
        rows.append(row | {"sequences": [(torch.tensor(i), torch.tensor(t)) for i, t in encoded]})
        counts.tokens += sum(len(i) for i, _ in encoded)
        counts.longest = max(counts.longest, *(len(i) for i, _ in encoded))
        counts.trained += sum(sum(t != IGNORE for t in labels[1:]) for _, labels in encoded)
    if not rows:
        raise InputError(
            f"No list is left: a completion fills data.max_length ({max_length}) or has no tokens. Raise data.max_length."
        )
    counts.rows = len(rows)
    return TextSet(rows), counts


def _steps(ids: list[int], labels: list[int], texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The step of each token that is trained on, `[tokens]`."""
    said = [i for i, label in zip(ids, labels, strict=True) if label != IGNORE]
    found = token_steps(said, texts, tokenizer)
    return found[1:] if labels[0] != IGNORE else found  # nothing predicts the first token


def collate_lists(items: list[dict[str, Any]], pad_id: int = 0) -> dict[str, Any]:
    """The tensors of a `ListBatch`."""
    flat = [(i, t, shown(item)) for item in items for i, t in item["sequences"]]
    padded = collate_text([{"input_ids": i, "labels": t, "id": 0, "bytes": 0, **more} for i, t, more in flat], pad_id)
    sizes = [len(item["sequences"]) for item in items]
    shape = (len(items), max(sizes))
    slots, scores = torch.full(shape, -1), torch.zeros(shape, dtype=torch.float64)
    known = [c for c in ("reference", "taught") if all(item.get(c) is not None for item in items)]
    weights = {}
    if any("weight" in item for item in items):
        weights["weights"] = torch.tensor([item.get("weight", 1.0) for item in items], dtype=torch.float64)
    columns = {c: torch.zeros(shape, dtype=torch.float64) for c in known}
    start = 0
    for row, (item, size) in enumerate(zip(items, sizes, strict=True)):
        slots[row, :size] = torch.arange(start, start + size)
        scores[row, :size] = torch.tensor(item["scores"], dtype=torch.float64)
        for column, values in columns.items():
            values[row, :size] = torch.tensor(item[column], dtype=torch.float64)
        start += size
    text = {k: v for k, v in padded.items() if k not in ("ids", "bytes")}
    ids = torch.tensor([item["id"] for item in items])
    strays = [item["stray"] for item in items if "stray" in item]
    others = collate_lists(strays, pad_id) if len(strays) == len(items) else {}
    return {
        **text,
        "ids": ids,
        "slots": slots,
        "scores": scores,
        **columns,
        **weights,
        **{STRAY + k: v for k, v in others.items()},
    }


def mismatched(examples: TextSet) -> TextSet:
    """The prompt of each example with the completion of an earlier example with another prompt, if there is one.

    Args:
        examples: lists of one candidate. The nearest earlier example is used, for the first ones the last.

    A prompt is truncated at the start if the new completion would make the longest sequence longer.
    """

    halves = []
    for row in examples.records:
        ids, labels = row["sequences"][0]
        start = int((labels != IGNORE).nonzero()[0, 0])
        halves.append((ids[:start], ids[start:], labels[start:]))
    keys, number = [prompt.numpy().tobytes() for prompt, *_ in halves], len(halves)
    partner = [i - 1 for i in range(number)]
    for i in [*range(number), *range(number)]:  # twice, since the first ones use the last
        if keys[i] == keys[i - 1]:
            partner[i] = partner[i - 1]
    longest = max((len(row["sequences"][0][0]) for row in examples.records), default=0)
    rows = []
    for i, (prompt, *_) in enumerate(halves):
        _, said, labels = halves[partner[i]]
        asked = prompt[max(0, len(prompt) + len(said) - longest) :]
        both = torch.cat([asked, said]), torch.cat([torch.full_like(asked, IGNORE), labels])
        row = examples.records[i]
        rows.append({"id": row["id"], "scores": [0.0], "sequences": [both], **shown(row)})
    return TextSet(rows)
