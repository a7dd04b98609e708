"""From records to token rows with labels, with counts of truncation; and a display of one batch with its mask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from understudy.data.batch import IGNORE, Batch
from understudy.data.chat import conversation_tokens
from understudy.data.ends import Ends, token_ids
from understudy.data.pictures import picture_inputs
from understudy.data.records import Record, place
from understudy.errors import InputError


@dataclass
class Counts:
    """Counts of what the encoding changed."""

    records: int = 0
    rows: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    dropped: int = 0
    endless: int = 0
    """Number of conversations without a trained special token."""
    longest: int = 0
    """Number of tokens of the longest row."""

    def warnings(self, split: str, max_length: int) -> list[str]:
        """Warnings to resolve before a run: many truncated records, or answers without an end token."""
        found = []
        if self.truncated > 0.05 * self.records:
            found.append(
                f"{split}: {self.truncated} of {self.records} records ({self.truncated / self.records:.0%}) are longer than "
                f"data.max_length ({max_length} tokens) and were truncated: raise it, or shorten them."
            )
        if self.endless:
            found.append(
                f"{split}: in {self.endless} of {self.records} records the chat template ends no answer with a special token, "
                "so the student may not learn to stop: choose a template with one (data.tokenizer)."
            )
        return found

    def __str__(self) -> str:
        return (
            f"{self.records} records became {self.rows} rows of {self.tokens} tokens, {self.trained} of them trained on; "
            f"{self.truncated} records were truncated, {self.dropped} dropped for having no token to train on."
        )


class TextSet(Dataset[dict[str, Any]]):
    """Encoded rows: `input_ids`, `labels` (unshifted, −100 ignored), `id` and `bytes` of the counted text."""

    reward: Any = None
    """What an evaluation of preferences reports as rewards (`understudy.training.reference.Reward`)."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.records[index]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `<s>`, `</s>` and `<pad>`; deterministic, and any text round-trips."""
    if vocab_size < 260:
        raise InputError(f"data.vocab_size is {vocab_size}; byte-level BPE needs at least 260 (256 bytes, 3 specials).")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", add_bos_token=True
    )


def check_length(max_length: Any) -> None:
    """Raise an error for an invalid `data.max_length`."""
    if not isinstance(max_length, int) or max_length < 2:
        raise InputError(f"data.max_length is {max_length!r} and must be a whole number of at least 2.")


def encode(
    records: list[Record], tokenizer: PreTrainedTokenizerBase, *, max_length: int, pack: bool, truncation: str = "end"
) -> tuple[TextSet, Counts]:
    """Encode records.

    `text` is packed into rows of `max_length` (documents end with EOS) or kept one per row. `prompt` + `completion` and
    `messages` are one per row; only completion and assistant tokens are trained on, and a completion ends with one EOS.
    A text begins with the tokens that the tokenizer itself adds.

    Args:
        truncation: the end at which a row that is too long is truncated: `end`, `start`, or `error`.
    """
    check_length(max_length)
    if truncation not in ("end", "start", "error"):
        raise InputError(f"data.truncation is {truncation!r}; known: end, start, error.")
    counts = Counts(records=len(records))
    if "text" in records[0] and pack:
        rows = _packed_apart(records, tokenizer, max_length)
    else:
        ends = Ends.of(tokenizer)
        found = (_single(x, tokenizer, ends, max_length, truncation, counts) for x in records)
        rows = [row for row in found if row is not None]
    if not rows:
        raise InputError(
            "Every record has zero tokens to train on after truncation: the prompts fill data.max_length "
            f"({max_length}), or the completions are empty. Raise data.max_length or set data.truncation=start."
        )
    counts.rows, counts.tokens = len(rows), sum(len(r["input_ids"]) for r in rows)
    counts.trained = sum(int((r["labels"][1:] != IGNORE).sum()) for r in rows)
    counts.longest = max(counts.longest, *(len(r["input_ids"]) for r in rows))
    return TextSet(rows), counts


def _packed_apart(records: list[Record], tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, Any]]:
    """Packed rows that each hold one domain; the domains are mixed evenly, and rows are numbered in that order."""
    apart: dict[str | None, list[Record]] = {}
    for record in records:
        apart.setdefault(record.get("domain"), []).append(record)
    placed: list[tuple[float, dict[str, Any]]] = []
    for domain, part in apart.items():
        rows = _packed(part, tokenizer, length)
        named = {} if domain is None else {"domain": domain}
        placed += [(i / len(rows), {**row, **named}) for i, row in enumerate(rows)]
    placed.sort(key=lambda item: item[0])
    return [{**row, "id": number} for number, (_, row) in enumerate(placed)]


def _packed(records: list[Record], tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, Any]]:
    stream: list[int] = []
    ends = Ends.of(tokenizer)
    for record in records:
        stream += ends.behind(ends.before(token_ids(tokenizer, record["text"])))
    starts = range(0, max(1, len(stream) - 1), length)
    pieces = [stream[s : s + length] for s in starts]
    return [_row(p, p, i, tokenizer) for i, p in enumerate(p for p in pieces if len(p) > 1)]


def _row(ids: list[int], labels: list[int], number: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    special = set(tokenizer.all_special_ids)
    counted = [t for t in labels[1:] if t != IGNORE and t not in special]
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "id": number,
        "bytes": byte_length(counted, tokenizer),
    }


def byte_length(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the counted tokens. A byte-level token is one character a byte, also inside a character."""
    return byte_starts(ids, tokenizer)[-1] if _is_byte_level(tokenizer) else _decoded_length(ids, tokenizer)


def byte_starts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """UTF-8 bytes before each token, and of all of them: `len(ids) + 1` numbers."""
    if _is_byte_level(tokenizer):
        return [0, *accumulate(len(piece) for piece in tokenizer.convert_ids_to_tokens(ids))]
    return [_decoded_length(ids[:n], tokenizer) for n in range(len(ids) + 1)]


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "ByteLevel" in str(getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", ""))


def _decoded_length(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode())


def _single(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    ends: Ends,
    length: int,
    truncation: str,
    counts: Counts,
) -> dict[str, Any] | None:
    what = place(f"Record {record['id']}", record)
    if "text" in record:
        ids = ends.behind(ends.before(token_ids(tokenizer, record["text"])))
        labels = list(ids)
    else:
        asked, said = record.get("prompt", []), record.get("completion", record.get("messages"))
        try:
            ids, labels = completion_tokens(asked, said, tokenizer, record.get("tools"), ends)
        except InputError as error:
            raise InputError(f"{what}: {error}") from error
        counts.endless += is_endless(asked, said, labels, tokenizer)
    if len(ids) > length:
        if truncation == "error":
            raise InputError(
                f"{what} has {len(ids)} tokens and data.max_length is {length}. Raise it, or allow "
                "data.truncation=end or start."
            )
        counts.truncated += 1
        part = slice(0, length) if truncation == "end" else slice(len(ids) - length, None)
        ids, labels = ids[part], labels[part]
    if all(label == IGNORE for label in labels[1:]):
        counts.dropped += 1
        return None
    named = {"domain": record["domain"]} if "domain" in record else {}
    if "teacher_prompt" in record:
        try:
            named["teacher_prompt"] = _teacher_prompt(record, ids, labels, tokenizer, ends)
        except InputError as error:
            raise InputError(f"{what}: {error}") from error
        counts.longest = max(counts.longest, len(named["teacher_prompt"]) + len(ids) - _begin(labels))
    return {**_row(ids, labels, record["id"], tokenizer), **named}


def _teacher_prompt(
    record: Record, ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase, ends: Ends
) -> Tensor:
    """Ids of what the teacher reads before the completion, in the place of the prompt of `ids`."""
    theirs, trained = completion_tokens(
        record["teacher_prompt"], record["completion"], tokenizer, record.get("tools"), ends
    )
    start, said = _begin(trained), ids[_begin(labels) :]
    if not start or theirs[start : start + len(said)] != said:
        raise InputError(
            "behind teacher_prompt the completion has other tokens than behind the prompt: let it not be empty, and raise "
            "data.max_length if the row was cut at its start."
        )
    return torch.tensor(theirs[:start])


def _begin(labels: Sequence[int]) -> int:
    """Where the completion begins."""
    return next(i for i, label in enumerate(labels) if label != IGNORE)


def completion_tokens(
    prompt: Any,
    completion: Any,
    tokenizer: PreTrainedTokenizerBase,
    tools: list[Any] | None = None,
    ends: Ends | None = None,
    ended: bool = True,
) -> tuple[list[int], list[int]]:
    """Ids and labels of a prompt with its completion, text or messages; the prompt is masked, one EOS ends it.

    Args:
        tools: for the chat template, if there are messages.
        ends: of the tokenizer, if they are known.
        ended: false for a text that goes on: no EOS is put behind it.
    """
    if isinstance(prompt, list) or isinstance(completion, list):
        asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        said = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        return conversation_tokens(asked + said, tokenizer, len(asked), tools)
    ends = Ends.of(tokenizer) if ends is None else ends
    first, second = ends.before(token_ids(tokenizer, prompt)), continuation(tokenizer, prompt, completion)
    second = ends.behind(second) if second and ended else second
    return first + second, [IGNORE] * len(first) + second


def is_endless(prompt: Any, completion: Any, labels: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a conversation has trained tokens without a special one among them, so that the end is never learned."""
    if not (isinstance(prompt, list) or isinstance(completion, list)):
        return False
    trained = {label for label in labels if label != IGNORE}
    added = tokenizer.added_tokens_decoder
    return bool(trained) and not any(i in added and added[i].special for i in trained)


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> list[int]:
    """The ids of a completion after its prompt's: alone, SentencePiece would begin them with a space. If a token would
    span the end of the prompt, another text is put before the completion instead, since a model that gets the prompt
    generates separate tokens."""
    for before in (prompt, "\n", ":", "."):
        asked, both = token_ids(tokenizer, before), token_ids(tokenizer, before + completion)
        if both[: len(asked)] == asked:
            return both[len(asked) :]
    return token_ids(tokenizer, completion)


def collate_text(
    items: list[dict[str, Any]], pad_id: int = 0, multiple: int = 8, domains: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Pad on the right to the longest row, rounded up to `multiple`; names of `domains` become indices."""
    length = -(-max(len(i["input_ids"]) for i in items) // multiple) * multiple
    shape = (len(items), length)
    ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, item in enumerate(items):
        n = len(item["input_ids"])
        ids[row, :n], labels[row, :n], mask[row, :n] = item["input_ids"], item["labels"], 1
    numbers = {"domains": torch.tensor([domains.index(i["domain"]) for i in items])} if domains else {}
    if any("teacher_prompt" in item for item in items):  # others have their own prompt
        told = [item.get("teacher_prompt", item["input_ids"][item["labels"] == IGNORE]) for item in items]
        numbers["teacher_prompt"] = pad_sequence(told, batch_first=True, padding_value=-1)
    return {
        **numbers,
        **picture_inputs(items, length),
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "ids": torch.tensor([i["id"] for i in items]),
        "bytes": torch.tensor([i["bytes"] for i in items]),
    }


def show_batch(batch: Batch, tokenizer: PreTrainedTokenizerBase, rows: int = 2) -> Text:
    """The first rows as text: trained tokens in bold green, the others dim."""
    out = Text()
    for ids, labels, mask in zip(
        batch.inputs["input_ids"][:rows].tolist(),
        batch.labels[:rows].tolist(),
        batch.inputs["attention_mask"][:rows].tolist(),
        strict=True,
    ):
        for i, (token, label, kept) in enumerate(zip(ids, labels, mask, strict=True)):
            if kept:
                out.append(tokenizer.decode([token]), style="bold green" if i and label != IGNORE else "dim")
        out.append("\n" + "─" * 40 + "\n", style="dim")
    return out
