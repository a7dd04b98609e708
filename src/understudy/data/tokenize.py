"""From records to token rows with labels, counting what was cut; and a look at one batch with its mask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from understudy.data.batch import IGNORE, Batch
from understudy.data.text import Record, shared_length
from understudy.errors import InputError


@dataclass
class Counts:
    """What encoding did."""

    records: int = 0
    rows: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        return (
            f"{self.records} records became {self.rows} rows of {self.tokens} tokens, {self.trained} of them trained on; "
            f"{self.truncated} records were truncated, {self.dropped} dropped for having no token to train on."
        )


class TextSet(Dataset[dict[str, Any]]):
    """Encoded rows: `input_ids`, `labels` (unshifted, −100 ignored), `id` and `bytes` of the counted text."""

    reward: Any = None
    """What an evaluation of preferences reports as rewards (`understudy.evaluation.preference.Reward`)."""

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
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def encode(
    records: list[Record], tokenizer: PreTrainedTokenizerBase, *, max_length: int, pack: bool, truncation: str = "end"
) -> tuple[TextSet, Counts]:
    """Encode records.

    `text` is packed into rows of `max_length` (documents end with EOS) or kept one a row. `prompt` + `completion` and
    `messages` are one a row; only completion and assistant tokens are trained on, and a completion ends with one EOS.

    Args:
        truncation: which end of a row that is too long goes: `end`, `start`, or `error`.
    """
    if not isinstance(max_length, int) or max_length < 2:
        raise InputError(f"data.max_length is {max_length!r} and must be a whole number of at least 2.")
    if truncation not in ("end", "start", "error"):
        raise InputError(f"data.truncation is {truncation!r}; known: end, start, error.")
    counts = Counts(records=len(records))
    if "text" in records[0] and pack:
        rows = _packed_apart(records, tokenizer, max_length)
    else:
        rows = [r for r in (_single(x, tokenizer, max_length, truncation, counts) for x in records) if r is not None]
    if not rows:
        raise InputError(
            "Every record has zero tokens to train on after truncation: the prompts fill data.max_length "
            f"({max_length}), or the completions are empty. Raise data.max_length or set data.truncation=start."
        )
    counts.rows, counts.tokens = len(rows), sum(len(r["input_ids"]) for r in rows)
    counts.trained = sum(int((r["labels"][1:] != IGNORE).sum()) for r in rows)
    return TextSet(rows), counts


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _packed_apart(records: list[Record], tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, Any]]:
    """Packed rows, none of them of two domains; the domains are mixed evenly, and rows numbered in that order."""
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
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for record in records:
        stream += (
            ([bos] if bos is not None else []) + _ids(tokenizer, record["text"]) + ([eos] if eos is not None else [])
        )
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
    pieces = tokenizer.convert_ids_to_tokens(ids)
    if "ByteLevel" in str(getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", "")):
        return sum(len(p) for p in pieces)
    return len(tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode())


def _single(
    record: Record, tokenizer: PreTrainedTokenizerBase, length: int, truncation: str, counts: Counts
) -> dict[str, Any] | None:
    ids, labels = _tokens(record, tokenizer)
    if len(ids) > length:
        if truncation == "error":
            raise InputError(
                f"Record {record['id']} has {len(ids)} tokens and data.max_length is {length}. Raise it, or allow "
                "data.truncation=end or start."
            )
        counts.truncated += 1
        part = slice(0, length) if truncation == "end" else slice(len(ids) - length, None)
        ids, labels = ids[part], labels[part]
    if all(label == IGNORE for label in labels[1:]):
        counts.dropped += 1
        return None
    named = {"domain": record["domain"]} if "domain" in record else {}
    return {**_row(ids, labels, record["id"], tokenizer), **named}


def _tokens(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if "text" in record:
        ids = bos + _ids(tokenizer, record["text"]) + eos
        return ids, list(ids)
    if "messages" in record:
        return _conversation(record["messages"], tokenizer)
    return completion_tokens(record["prompt"], record["completion"], tokenizer)


def completion_tokens(prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids and labels of a prompt with its completion, text or messages; the prompt is masked, one EOS ends it."""
    if isinstance(prompt, list) or isinstance(completion, list):
        asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        said = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        return _conversation(asked + said, tokenizer, len(asked))
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    first, second = bos + _ids(tokenizer, prompt), _after(tokenizer, prompt, completion)
    if not second:
        return first, [IGNORE] * len(first)
    second = second if eos and second[-1] == eos[0] else second + eos
    return first + second, [IGNORE] * len(first) + second


def _after(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> list[int]:
    """The completion's ids as they follow the prompt's: alone, SentencePiece would begin them with a space. Where a token
    reaches over the end of the prompt they follow another text, as a model that is given the prompt would write them."""
    for before in (prompt, "\n", ":", "."):
        asked, both = _ids(tokenizer, before), _ids(tokenizer, before + completion)
        if both[: len(asked)] == asked:
            return both[len(asked) :]
    return _ids(tokenizer, completion)


def _conversation(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, first: int = 0
) -> tuple[list[int], list[int]]:
    """Render through the chat template; trained on are the assistant's turns from message `first` on, each with what the
    template ends it with, and without the generation prompt."""
    if not tokenizer.chat_template:
        raise InputError(
            "The data holds messages and the tokenizer has no chat template. Use a tokenizer with one "
            "(data.tokenizer=...), or prompt + completion columns."
        )

    def render(part: list[dict[str, Any]], ask: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=ask))
        except TemplateError as error:
            if not part:  # many templates look at the first message
                return ""
            roles = ", ".join(str(m.get("role")) for m in part)
            raise InputError(
                f"The tokenizer's chat template refuses a conversation of {roles}: {str(error).splitlines()[0]} Mend the "
                "messages, or choose another template (data.tokenizer)."
            ) from error

    text = render(messages, False)
    trained = [
        _turn(text, render(messages[:i], True), render(messages[: i + 1], False), str(message.get("content") or ""), i)
        for i, message in enumerate(messages)
        if i >= first and message.get("role") == "assistant"
    ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    inside = [any(a <= s and e <= b and e > s for a, b in trained) for s, e in encoded["offset_mapping"]]
    return ids, [t if keep else IGNORE for t, keep in zip(ids, inside, strict=True)]


def _turn(text: str, before: str, after: str, content: str, number: int) -> tuple[int, int]:
    """Where an assistant's turn begins and ends in a rendered conversation.

    Args:
        before: the messages before it, with the generation prompt. after: those up to it. number: of the message.

    Some templates write the last turn otherwise than earlier ones (an empty thought, for example), so that `after` need
    not be a beginning of `text`; the turn is then found by its content, and ends as it does in `after`.
    """
    start = shared_length(text, before)
    if text.startswith(after):
        return start, len(after)
    content = content.strip()
    own, found = after.rfind(content), text.find(content, start)
    if not content or own < 0 or found < 0:
        raise InputError(
            f"The chat template changes message {number} ({content[:40]!r}) when others follow, so its tokens cannot be "
            "told from the rest. Use a template without such changes (data.tokenizer), or prompt + completion columns."
        )
    ending = after[own + len(content) :]
    end = found + len(content)
    return start, end + shared_length(text[end:], ending)


def collate_text(
    items: list[dict[str, Any]], pad_id: int = 0, multiple: int = 8, domains: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Pad on the right to the longest row, rounded up to `multiple`; names of `domains` become numbers."""
    length = -(-max(len(i["input_ids"]) for i in items) // multiple) * multiple
    shape = (len(items), length)
    ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, item in enumerate(items):
        n = len(item["input_ids"])
        ids[row, :n], labels[row, :n], mask[row, :n] = item["input_ids"], item["labels"], 1
    numbers = {"domains": torch.tensor([domains.index(i["domain"]) for i in items])} if domains else {}
    return {
        **numbers,
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "ids": torch.tensor([i["id"] for i in items]),
        "bytes": torch.tensor([i["bytes"] for i in items]),
    }


def show_batch(batch: Batch, tokenizer: PreTrainedTokenizerBase, rows: int = 2) -> Text:
    """The first rows as text: tokens that are trained on in bold green, the rest dim."""
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
